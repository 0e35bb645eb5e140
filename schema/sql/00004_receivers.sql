-- +goose Up
-- What the relay needs to live with receivers that misbehave: the name of a lane in the retry queue, the health of endpoints, recoveries.

-- Names the endpoint of a tenant by one value. A tenant chooses the ids of its rows, and one that was made as a copy of another has the same: neither is to wait
-- for the other, in its order or for what its receiver can take. One value, since the planner thinks little of two conditions and takes any index then.
CREATE OR REPLACE FUNCTION outbox_relay.lane(schema text, endpoint uuid) RETURNS uuid
LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
  SELECT pg_catalog.encode(pg_catalog.substr(pg_catalog.sha256(pg_catalog.replace(schema OPERATOR(pg_catalog.||) endpoint::text, E'\\', E'\\\\')::bytea), 1, 16), 'hex')::uuid
$$;
REVOKE ALL ON FUNCTION outbox_relay.lane(text, uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_relay.lane(text, uuid) TO outbox_relay_runner;

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
  pause         interval NOT NULL DEFAULT '0',
  PRIMARY KEY (tenant, endpoint_id)
);
COMMENT ON COLUMN outbox_relay.endpoint_health.failing_since IS 'first failure since the last success';
COMMENT ON COLUMN outbox_relay.endpoint_health.failed_at IS 'last failure known';
COMMENT ON COLUMN outbox_relay.endpoint_health.pause IS 'longest time without a failure since failing_since';
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

GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay.endpoint_health TO outbox_relay_runner;
GRANT SELECT, UPDATE, DELETE ON outbox_relay.recoveries TO outbox_relay_runner;
