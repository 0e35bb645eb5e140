-- +goose Up
-- What the relay needs to verify endpoints: a place for what it knows of them, and the right to say so in their rows.

-- is_verified is about a URL, and the row of an endpoint does not say about which. Here is which, as a hash: URLs may hold secrets. An endpoint that nobody has
-- looked at has no row. Rows stay when their tenant goes: they count again when it comes back. There is no key to it, which would keep anybody from truncating
-- the table of tenants.
CREATE TABLE IF NOT EXISTS outbox_relay.endpoint_verification (
  tenant       text NOT NULL,
  endpoint_id  uuid NOT NULL,
  verified_for bytea,
  tried_for    bytea,
  tries        int NOT NULL DEFAULT 0,
  tried_at     timestamptz,
  next_at      timestamptz,
  error        text,
  PRIMARY KEY (tenant, endpoint_id)
);
COMMENT ON COLUMN outbox_relay.endpoint_verification.verified_for IS 'SHA-256 of the endpoint_url that is_verified is about; null: none has been noted';
COMMENT ON COLUMN outbox_relay.endpoint_verification.tried_for IS 'SHA-256 of the endpoint_url that what follows is about';
COMMENT ON COLUMN outbox_relay.endpoint_verification.tries IS 'that have failed';
COMMENT ON COLUMN outbox_relay.endpoint_verification.next_at IS 'when the leader tries again; null: it does not';
COMMENT ON COLUMN outbox_relay.endpoint_verification.error IS 'why the last try failed; null: it did not';
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay.endpoint_verification TO outbox_relay_runner;
GRANT EXECUTE ON FUNCTION outbox_relay.tenant_grants() TO outbox_relay_runner; -- for `check`

CREATE OR REPLACE FUNCTION outbox_relay.shape_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 3';

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
('webhook_endpoints', 'verified_at', 'timestamptz'),
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
('webhook_endpoints', 'SELECT, UPDATE (is_active, paused_at, disabled_reason, disabled_at, last_used_at, is_verified, verified_at)'),
('webhook_event_types', 'SELECT'),
('webhook_event_subscriptions', 'SELECT'),
('webhook_subscriptions', 'SELECT, UPDATE (last_triggered_at)'),
('webhook_deliveries', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_attempts', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_dead_letters', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_stats', 'SELECT, INSERT, UPDATE, DELETE')
$fn$;
-- +goose StatementEnd
