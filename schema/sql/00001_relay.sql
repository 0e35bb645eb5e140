-- +goose Up
-- The relay's own tables and the role it runs as. Everything here may be run again: `migrate --print` hands the same text to a DBA.

-- Roles belong to the cluster, not to the database: another database may have created this one, or may be doing so right now.
-- +goose StatementBegin
DO $$
BEGIN
  IF to_regrole('outbox_relay_runner') IS NULL THEN
    CREATE ROLE outbox_relay_runner NOLOGIN;
  END IF;
EXCEPTION
  WHEN duplicate_object OR unique_violation THEN NULL;
  WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'role "%" may not create role outbox_relay_runner', current_user
      USING ERRCODE = 'insufficient_privilege',
            HINT = 'Have an administrator run: CREATE ROLE outbox_relay_runner NOLOGIN; then run this again.';
END
$$;
-- +goose StatementEnd

-- The history that the log of this server belongs to: another one after a standby became the primary, and positions of the old one mean nothing in it.
CREATE OR REPLACE FUNCTION outbox_relay.timeline() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$ SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) $$;

-- OIDs of the two publications; 0: it is missing.
CREATE OR REPLACE FUNCTION outbox_relay.publications() RETURNS oid[]
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
  SELECT ARRAY(SELECT coalesce(b.oid, 0) FROM unnest('{outbox_relay_events,outbox_relay_registry}'::name[]) WITH ORDINALITY w (name, n)
    LEFT JOIN pg_publication b ON b.pubname = w.name ORDER BY w.n)
$$;
REVOKE ALL ON FUNCTION outbox_relay.timeline(), outbox_relay.publications() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_relay.timeline(), outbox_relay.publications() TO outbox_relay_runner;

-- One row per slot, rewritten many times a second: the free space keeps those updates on one page.
CREATE TABLE IF NOT EXISTS outbox_relay.progress (
  slot              text PRIMARY KEY,
  system_identifier text NOT NULL DEFAULT '',
  instance_id       text NOT NULL DEFAULT '',
  epoch             bigint NOT NULL DEFAULT 0,
  lsn               pg_lsn NOT NULL DEFAULT '0/0',
  high_lsn          pg_lsn NOT NULL DEFAULT '0/0',
  snapshot          pg_snapshot,
  updated_at        timestamptz NOT NULL DEFAULT now(),
  shard             int NOT NULL DEFAULT 0,
  timeline          text,
  publications      oid[] DEFAULT outbox_relay.publications()
) WITH (fillfactor = 10);
COMMENT ON COLUMN outbox_relay.progress.lsn IS 'every commit that ends here or before has its outcomes recorded';
COMMENT ON COLUMN outbox_relay.progress.high_lsn IS 'greatest commit record with a recorded outcome; from lsn to here a restart looks before it sends';
COMMENT ON COLUMN outbox_relay.progress.snapshot IS 'every transaction visible here is handled: where healing a lost slot starts from';
COMMENT ON COLUMN outbox_relay.progress.shard IS 'whose tenants the reader of this slot serves';
COMMENT ON COLUMN outbox_relay.progress.timeline IS 'history of the log that the epoch belongs to';
COMMENT ON COLUMN outbox_relay.progress.publications IS 'through which the slot is read: a publication made anew leaves out what was being written meanwhile';

CREATE TABLE IF NOT EXISTS outbox_relay.tenants (
  schema                text PRIMARY KEY,
  state                 text NOT NULL DEFAULT 'active' CHECK (state IN ('active', 'paused', 'suspended')),
  reason                text,
  version               int NOT NULL,
  since                 timestamptz NOT NULL DEFAULT now(),
  added_snapshot        pg_snapshot NOT NULL DEFAULT pg_current_snapshot(),
  backfill              text CHECK (backfill IN ('unprocessed', 'since', 'missed')),
  backfill_since        timestamptz,
  backfill_from         pg_snapshot,
  backfill_upto         pg_snapshot,
  backfill_border       pg_snapshot,
  backfill_cursor       uuid,
  backfill_done_at      timestamptz,
  shard                 int NOT NULL DEFAULT 0,
  moved_from            text,
  moved_lsn             pg_lsn,
  backfill_place        pg_lsn,
  backfill_border_place pg_lsn,
  pause                 text,
  tables                text,
  digest                bigint,
  state_since           timestamptz NOT NULL DEFAULT now(),
  restored_at           timestamptz
);
COMMENT ON COLUMN outbox_relay.tenants.version IS 'the shape version this schema was last brought to';
COMMENT ON COLUMN outbox_relay.tenants.backfill IS 'which earlier events to queue: those visible in backfill_upto and not in backfill_from';
COMMENT ON COLUMN outbox_relay.tenants.moved_from IS 'slot that brought its events before moved_lsn; null: it has always been on this shard';
COMMENT ON COLUMN outbox_relay.tenants.moved_lsn IS 'its events of commits from here on are for the slot of its shard to bring';
COMMENT ON COLUMN outbox_relay.tenants.backfill_border IS 'events not visible here were the log''s to bring: they are queued whatever backfill says';
COMMENT ON COLUMN outbox_relay.tenants.backfill_place IS 'order_lsn of what the backfill queues: after what the log had brought, before what it brings since; null: before everything';
COMMENT ON COLUMN outbox_relay.tenants.backfill_border_place IS 'the same for what is visible in backfill_border';
COMMENT ON COLUMN outbox_relay.tenants.pause IS 'while it is suspended: why an operator has paused it, empty where nobody said; null: it is not paused';
COMMENT ON COLUMN outbox_relay.tenants.tables IS 'OIDs of its tables of endpoints, event types, older subscriptions and subscriptions when it was last added: others are loaded anew';
COMMENT ON COLUMN outbox_relay.tenants.digest IS 'of the rows of these tables, as the leader knew them at progress.snapshot or before';
COMMENT ON COLUMN outbox_relay.tenants.restored_at IS 'when it came with rows that have transaction ids of another cluster; null: never';

-- Ids and times only: payloads stay in the tenant's schema and go with it.
CREATE TABLE IF NOT EXISTS outbox_relay.retry_queue (
  delivery_id uuid PRIMARY KEY,
  tenant      text NOT NULL,
  endpoint_id uuid NOT NULL,
  due_at      timestamptz NOT NULL,
  leased_by   uuid,
  lane        uuid NOT NULL -- outbox_relay.lane(tenant, endpoint_id). A server in FIPS mode has no md5
    GENERATED ALWAYS AS (encode(substr(sha256(replace(tenant || endpoint_id::text, E'\\', E'\\\\')::bytea), 1, 16), 'hex')::uuid) STORED,
  order_key   uuid,
  order_lsn   pg_lsn,
  order_n     int
);
COMMENT ON COLUMN outbox_relay.retry_queue.lane IS 'outbox_relay.lane(tenant, endpoint_id)';
COMMENT ON COLUMN outbox_relay.retry_queue.due_at IS 'infinity: parked, until what it waits for is over';
COMMENT ON COLUMN outbox_relay.retry_queue.order_key IS 'the endpoint (strict) or the aggregate whose order holds; null: none';
COMMENT ON COLUMN outbox_relay.retry_queue.order_lsn IS 'commit of the event; 0/0 for one that did not come from the log';
CREATE INDEX IF NOT EXISTS retry_queue_due_at_idx ON outbox_relay.retry_queue (due_at);
-- Rows of an endpoint that promises an order carry a key and the place of their event in the log. Of each (lane, order_key) only the
-- first row by (order_lsn, order_n, delivery_id) may be attempted; those behind it are parked (due_at = infinity) until it has ended.
CREATE INDEX IF NOT EXISTS retry_queue_order_idx ON outbox_relay.retry_queue (lane, order_key, order_lsn, order_n, delivery_id)
 WHERE order_key IS NOT NULL;
-- What waits until its endpoint is resumed, and everything else about one endpoint. An expression, so that it is no way to a key of a lane: a server that
-- has counted few rows of each lane takes that for as good as the index above, and would go through a million rows of one for each key.
CREATE INDEX IF NOT EXISTS retry_queue_lane_idx ON outbox_relay.retry_queue (uuid_send(lane), due_at);
-- Finds what of a key is in flight. Only ordered rows under a lease are in it.
CREATE INDEX IF NOT EXISTS retry_queue_leased_idx ON outbox_relay.retry_queue (lane, order_key) WHERE order_key IS NOT NULL AND leased_by IS NOT NULL;

-- Moves the progress of a slot inside the transaction that records the outcomes it covers. A leader whose epoch is over gets OR001
-- and its outcomes roll back with it. Positions never go back: a batch that is repeated after an unclear commit does no harm.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.advance(slot text, epoch bigint, lsn pg_lsn, high pg_lsn) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  UPDATE outbox_relay.progress p
     SET lsn = greatest(p.lsn, advance.lsn), high_lsn = greatest(p.high_lsn, advance.high), updated_at = now()
   WHERE p.slot = advance.slot AND p.epoch = advance.epoch AND (p.timeline IS NULL OR p.timeline = outbox_relay.timeline());
  IF NOT FOUND THEN
    RAISE EXCEPTION 'fenced: slot "%" has another leader than epoch %, or the log another history', slot, epoch USING ERRCODE = 'OR001';
  END IF;
END
$$;
-- +goose StatementEnd

REVOKE ALL ON FUNCTION outbox_relay.advance(text, bigint, pg_lsn, pg_lsn) FROM PUBLIC;
GRANT USAGE ON SCHEMA outbox_relay TO outbox_relay_runner;
GRANT EXECUTE ON FUNCTION outbox_relay.advance(text, bigint, pg_lsn, pg_lsn) TO outbox_relay_runner;
GRANT SELECT, INSERT, UPDATE ON outbox_relay.progress TO outbox_relay_runner;
GRANT SELECT, INSERT, UPDATE, DELETE ON outbox_relay.retry_queue TO outbox_relay_runner;
GRANT SELECT, UPDATE (state, reason, added_snapshot, backfill, backfill_since, backfill_from, backfill_upto, backfill_border, backfill_cursor,
   backfill_done_at, moved_lsn, backfill_place, backfill_border_place, pause, digest, restored_at)
   ON outbox_relay.tenants TO outbox_relay_runner;
GRANT SELECT ON outbox_relay.schema_migrations TO outbox_relay_runner;

-- Publications come before the slot: a slot that starts without them fails for good (15, 17) or skips events silently (18).
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.create_publications() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'outbox_relay_events') THEN
    CREATE PUBLICATION outbox_relay_events WITH (publish = 'insert', publish_via_partition_root = true);
  END IF;
  IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = 'outbox_relay_registry') THEN
    CREATE PUBLICATION outbox_relay_registry FOR TABLE outbox_relay.tenants WITH (publish_via_partition_root = true);
  END IF;
END
$$;
-- +goose StatementEnd
SELECT outbox_relay.create_publications();
