-- +goose Up
-- What the relay needs to verify endpoints: a place for what it knows of them.

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
