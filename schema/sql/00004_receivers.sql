-- +goose Up
-- What the relay needs to live with receivers that misbehave: order in the retry queue, the health of endpoints, replays, recoveries.

-- Names the endpoint of a tenant by one value. A tenant chooses the ids of its rows, and one that was made as a copy of another has the same: neither is to wait
-- for the other, in its order or for what its receiver can take. One value, since the planner thinks little of two conditions and takes any index then.
CREATE OR REPLACE FUNCTION outbox_relay.lane(schema text, endpoint uuid) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
  SELECT pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(pg_catalog.replace(schema OPERATOR(pg_catalog.||) endpoint::text, E'\\', E'\\\\')::bytea), 1, 16), 'hex')::uuid
$$;
REVOKE ALL ON FUNCTION outbox_relay.lane(text, uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_relay.lane(text, uuid) TO outbox_relay_runner;
ALTER TABLE outbox_relay.retry_queue ADD COLUMN IF NOT EXISTS lane uuid NOT NULL
  GENERATED ALWAYS AS (encode(substr(sha256(replace(tenant || endpoint_id::text, E'\\', E'\\\\')::bytea), 1, 16), 'hex')::uuid) STORED; -- the same. A server in FIPS mode has no md5
COMMENT ON COLUMN outbox_relay.retry_queue.lane IS 'outbox_relay.lane(tenant, endpoint_id)';

-- Rows of an endpoint that promises an order carry a key and the place of their event in the log. Of each (lane, order_key) only the
-- first row by (order_lsn, order_n, delivery_id) may be attempted; those behind it are parked (due_at = infinity) until it has ended.
ALTER TABLE outbox_relay.retry_queue ADD COLUMN IF NOT EXISTS order_key uuid;
ALTER TABLE outbox_relay.retry_queue ADD COLUMN IF NOT EXISTS order_lsn pg_lsn;
ALTER TABLE outbox_relay.retry_queue ADD COLUMN IF NOT EXISTS order_n int;
CREATE INDEX IF NOT EXISTS retry_queue_order_idx ON outbox_relay.retry_queue (lane, order_key, order_lsn, order_n, delivery_id)
 WHERE order_key IS NOT NULL;
-- What waits until its endpoint is resumed, and everything else about one endpoint. An expression, so that it is no way to a key of a lane: a server that
-- has counted few rows of each lane takes that for as good as the index above, and would go through a million rows of one for each key.
CREATE INDEX IF NOT EXISTS retry_queue_lane_idx ON outbox_relay.retry_queue (uuid_send(lane), due_at);
COMMENT ON COLUMN outbox_relay.retry_queue.due_at IS 'infinity: parked, until what it waits for is over';
COMMENT ON COLUMN outbox_relay.retry_queue.order_key IS 'the endpoint (strict) or the aggregate whose order holds; null: none';
COMMENT ON COLUMN outbox_relay.retry_queue.order_lsn IS 'commit of the event; 0/0 for one that did not come from the log';

-- What replicas tell each other, and a restarted relay, about endpoints in trouble. A healthy endpoint has no row.
CREATE TABLE IF NOT EXISTS outbox_relay.endpoint_health (
  tenant        text NOT NULL,
  endpoint_id   uuid NOT NULL,
  failing_since timestamptz,
  failed_at     timestamptz,
  warned_at     timestamptz,
  open_until    timestamptz,
  last_error    text,
  updated_at    timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant, endpoint_id)
);
COMMENT ON COLUMN outbox_relay.endpoint_health.failing_since IS 'first failure since the last success';
COMMENT ON COLUMN outbox_relay.endpoint_health.failed_at IS 'last failure known';
COMMENT ON COLUMN outbox_relay.endpoint_health.open_until IS 'the breaker is open until then';

-- Requests to queue again what an endpoint missed. The leader works them off.
CREATE TABLE IF NOT EXISTS outbox_relay.recoveries (
  id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant       text NOT NULL,
  endpoint_id  uuid NOT NULL,
  since        timestamptz NOT NULL,
  rate         numeric CHECK (rate BETWEEN 0.001 AND 1000000),
  upto         pg_snapshot NOT NULL DEFAULT pg_current_snapshot(),
  upto_lsn     pg_lsn,
  cursor       uuid,
  paced_until  timestamptz,
  scanned      bigint NOT NULL DEFAULT 0,
  queued       bigint NOT NULL DEFAULT 0,
  error        text,
  requested_at timestamptz NOT NULL DEFAULT now(),
  done_at      timestamptz
);
COMMENT ON COLUMN outbox_relay.recoveries.rate IS 'deliveries a second that become due; null: all at once';
COMMENT ON COLUMN outbox_relay.recoveries.paced_until IS 'when the last delivery queued so far is due, if there is a rate';
COMMENT ON COLUMN outbox_relay.recoveries.upto IS 'events that this snapshot does not show come by the log';
COMMENT ON COLUMN outbox_relay.recoveries.upto_lsn IS 'set by the leader: once everything up to here is recorded, what has no delivery was missed';

CREATE OR REPLACE FUNCTION outbox_relay.shape_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2';

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_columns() RETURNS TABLE (tbl text, col text, definition text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_events', 'xid', 'xid8'),
('webhook_endpoints', 'payload_format', $$varchar(32) NOT NULL DEFAULT %1$L
  CONSTRAINT webhook_endpoints_payload_format_check CHECK (payload_format IN ('standard', 'neo', 'cloudevents', 'cloudevents-binary', 'raw'))$$),
('webhook_endpoints', 'delivery_order', $$varchar(16) NOT NULL DEFAULT 'none'
  CONSTRAINT webhook_endpoints_delivery_order_check CHECK (delivery_order IN ('none', 'aggregate', 'strict'))$$),
('webhook_endpoints', 'max_concurrency', 'int CONSTRAINT webhook_endpoints_max_concurrency_check CHECK (max_concurrency > 0)'),
('webhook_endpoints', 'rate_limit_per_second', 'numeric CONSTRAINT webhook_endpoints_rate_limit_check CHECK (rate_limit_per_second > 0)'),
('webhook_endpoints', 'disabled_reason', 'text'),
('webhook_endpoints', 'disabled_at', 'timestamptz'),
('webhook_endpoints', 'paused_at', 'timestamptz'),
('webhook_endpoints', 'secondary_secret_token', 'varchar(512)'),
('webhook_endpoints', 'secondary_secret_expires_at', 'timestamptz'),
('webhook_deliveries', 'relayed', 'boolean NOT NULL DEFAULT false'),
('webhook_deliveries', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_delivery_attempts', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_dead_letters', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_dead_letters', 'discarded_at', 'timestamptz'),
('webhook_dead_letters', 'order_key', 'uuid'),
('webhook_dead_letters', 'order_lsn', 'pg_lsn'),
('webhook_dead_letters', 'order_n', 'int')
$fn$;
-- +goose StatementEnd

-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_grants() RETURNS TABLE (tbl text, privileges text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_events', 'SELECT, INSERT'), -- INSERT: the relay's own news
('webhook_endpoints', 'SELECT, UPDATE (is_active, paused_at, disabled_reason, disabled_at, last_used_at)'),
('webhook_event_types', 'SELECT'),
('webhook_event_subscriptions', 'SELECT'),
('webhook_subscriptions', 'SELECT, UPDATE (last_triggered_at)'),
('webhook_deliveries', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_attempts', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_dead_letters', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_stats', 'SELECT, INSERT, UPDATE, DELETE')
$fn$;
-- +goose StatementEnd

GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay.endpoint_health TO outbox_relay_runner;
GRANT SELECT, UPDATE, DELETE ON outbox_relay.recoveries TO outbox_relay_runner;
