-- +goose Up
-- Adding a tenant. Everything below may be repeated and takes a strong lock only where something is missing.

-- Raises unless the schema can be a tenant, with every fault in the detail.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.check_tenant(schema text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  nsp pg_namespace;
  faults text;
  owners text;
BEGIN
  IF schema IS NULL OR schema ~ '^pg_' OR schema IN ('information_schema', 'outbox_relay') THEN
    RAISE EXCEPTION 'schema "%" is reserved and cannot be a tenant', schema
      USING ERRCODE = 'OR003', HINT = 'Name the schema that holds, or shall hold, the tenant''s webhook tables.';
  END IF;
  SELECT * INTO nsp FROM pg_namespace n WHERE n.nspname = schema;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'schema "%" does not exist in database "%"', schema, current_database()
      USING ERRCODE = 'OR003', HINT = 'Create it first, and mind upper and lower case: the name is taken as it is.';
  END IF;

  SELECT string_agg(DISTINCT quote_ident(o.name), ', ') INTO owners
    FROM (SELECT nsp.nspowner AS oid
          UNION SELECT c.relowner FROM pg_class c JOIN outbox_relay.tenant_tables() t ON t.name = c.relname WHERE c.relnamespace = nsp.oid) r,
         LATERAL (SELECT pg_get_userbyid(r.oid) AS name) o
   WHERE NOT pg_has_role(r.oid, 'USAGE');
  IF owners IS NOT NULL THEN
    RAISE EXCEPTION 'role "%" does not own schema "%" and its webhook tables', current_user, schema
      USING ERRCODE = 'OR003',
            DETAIL = 'Only an owner can add tables to a publication, columns to a table and grant rights on it.',
            HINT = format('Run: GRANT %s TO %I; or install outbox_relay with a role that owns both.', owners, current_user);
  END IF;

  SELECT string_agg(f.fault, E'\n' ORDER BY f.tbl, f.fault) INTO faults FROM outbox_relay.tenant_faults(nsp.oid) f;
  IF faults IS NOT NULL THEN
    RAISE EXCEPTION 'schema "%" does not fit the relay', schema
      USING ERRCODE = 'OR003', DETAIL = faults,
            HINT = 'Change these tables as each line says; SELECT * FROM outbox_relay.tenant_tables() shows their shape. Then add the tenant again.';
  END IF;
END
$$;
-- +goose StatementEnd

-- What stands in the way of using the tables a schema has already, a line each.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_faults(nsp oid) RETURNS TABLE (tbl text, fault text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
  WITH required AS (
    SELECT r.tbl, split_part(w, ':', 1) AS col, nullif(split_part(w, ':', 2), '') AS typ
      FROM outbox_relay.tenant_requires() r, regexp_split_to_table(r.cols, ' ') w
    UNION ALL
    SELECT 'webhook_events', 'xid', 'xid8'
    UNION ALL
    SELECT 'webhook_deliveries', 'relayed', 'boolean'
  ), rel AS (
    SELECT c.* FROM pg_class c JOIN outbox_relay.tenant_requires() r ON r.tbl = c.relname WHERE c.relnamespace = nsp AND c.relkind <> 'i'
  ), att AS (
    SELECT rel.relname, a.* FROM rel JOIN pg_attribute a ON a.attrelid = rel.oid WHERE a.attnum > 0 AND NOT a.attisdropped
  )
  SELECT relname::text, format('%s is not an ordinary table', relname) FROM rel
   WHERE relkind NOT IN ('r', 'p') OR relpersistence <> 'p' OR relkind = 'p' AND relname = 'webhook_deliveries'
  UNION ALL
  SELECT relname, format('%s has no primary key that can identify its rows', relname) FROM rel
   WHERE NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = rel.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid)
  UNION ALL
  SELECT relname, format('%s has REPLICA IDENTITY NOTHING: its own updates would fail once published', relname) FROM rel
   WHERE relreplident = 'n' AND relname <> 'webhook_events'
  UNION ALL
  -- A row that is deleted, or whose id is changed, is known by what the log has of it before.
  SELECT relname, format('%s has a replica identity without id: its deleted rows could not be told apart', relname) FROM rel
   WHERE relreplident IN ('d', 'i') AND relname IN ('webhook_endpoints', 'webhook_event_types', 'webhook_subscriptions', 'webhook_event_subscriptions')
     AND NOT EXISTS (SELECT FROM pg_index i JOIN att a ON a.attrelid = i.indrelid AND a.attname = 'id'
                      WHERE i.indrelid = rel.oid AND CASE relreplident WHEN 'd' THEN i.indisprimary ELSE i.indisreplident END
                        AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]))
  UNION ALL
  -- A policy for everybody is about the application's users: it shows the relay nothing, which looks as if there were nothing.
  SELECT relname, format('%1$s has row-level security and no policy for the relay: CREATE POLICY outbox_relay ON %2$s.%1$I TO outbox_relay_runner USING (true)',
         relname, nsp::regnamespace) FROM rel
   WHERE relrowsecurity AND NOT EXISTS (SELECT FROM pg_policy p
     WHERE p.polrelid = rel.oid AND p.polpermissive AND to_regrole('outbox_relay_runner')::oid = ANY (p.polroles)
       AND (p.polcmd = '*' OR p.polcmd = 'r' AND EXISTS (SELECT FROM outbox_relay.tenant_grants() g WHERE g.tbl = relname AND g.privileges = 'SELECT')))
  UNION ALL
  SELECT relname, format('%1$s has the restrictive policy %2$I, which holds for the relay: ALTER POLICY %2$I ON %3$s.%1$I TO the roles that it is meant for,'
         ' or make it anew without AS RESTRICTIVE, beside CREATE POLICY outbox_relay ON %3$s.%1$I TO outbox_relay_runner USING (true)', relname, p.polname, nsp::regnamespace)
    FROM rel JOIN pg_policy p ON p.polrelid = rel.oid
   WHERE relrowsecurity AND NOT p.polpermissive AND p.polroles && ARRAY[0, to_regrole('outbox_relay_runner')::oid]
  UNION ALL
  SELECT r.tbl, format('%s lacks column %s', r.tbl, r.col) FROM required r JOIN rel ON rel.relname = r.tbl
   WHERE r.col NOT IN ('xid', 'relayed') AND NOT EXISTS (SELECT FROM att a WHERE a.attrelid = rel.oid AND a.attname = r.col)
  UNION ALL
  SELECT r.tbl, format('%s.%s is %s, not %s', r.tbl, r.col, format_type(a.atttypid, a.atttypmod), r.typ)
    FROM required r JOIN att a ON a.relname = r.tbl AND a.attname = r.col
   WHERE format_type(a.atttypid, NULL) <> r.typ
  UNION ALL
  SELECT a.relname, format('%s.%s is %s, not timestamp with time zone', a.relname, a.attname, format_type(a.atttypid, a.atttypmod)) FROM att a
   WHERE a.relname = 'webhook_events' AND a.attname IN ('occurred_at', 'created_at') AND a.atttypid <> 'timestamptz'::regtype
  UNION ALL
  -- A row the relay inserts names only the columns it knows.
  SELECT a.relname, format('%s.%s is not null without a default, and the relay does not know it', a.relname, a.attname) FROM att a
   WHERE a.relname IN ('webhook_deliveries', 'webhook_delivery_attempts', 'webhook_dead_letters', 'webhook_delivery_stats')
     AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
     AND NOT EXISTS (SELECT FROM required r WHERE r.tbl = a.relname AND r.col = a.attname)
$$;
-- +goose StatementEnd

-- Creates one table of the tenant, or adds what it lacks. It takes no lock when nothing is missing.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.shape_table(schema text, tbl text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  rel regclass := to_regclass(format('%I.%I', schema, tbl));
  fresh boolean := rel IS NULL;
  owner name;
  cmds text;
  fks text;
  keys text; -- the tables that they refer to
BEGIN
  IF fresh THEN
    EXECUTE (SELECT format(t.ddl, schema) FROM outbox_relay.tenant_tables() t WHERE t.name = tbl);
    rel := to_regclass(format('%I.%I', schema, tbl));
    -- The tables belong to whom the schema belongs, not to the relay's owner.
    SELECT CASE r.rolname WHEN 'pg_database_owner' THEN (SELECT pg_get_userbyid(d.datdba) FROM pg_database d WHERE d.datname = current_database())
                          ELSE r.rolname END
      INTO owner FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = schema;
    IF owner <> current_user THEN
      EXECUTE format('ALTER TABLE %s OWNER TO %I', rel, owner);
    END IF;
  END IF;

  SELECT string_agg(format('ADD COLUMN %I ', c.col) || format(c.definition, CASE WHEN fresh THEN 'standard' ELSE 'neo' END), ', ') INTO cmds
    FROM outbox_relay.tenant_columns() c
   WHERE c.tbl = shape_table.tbl
     AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = c.col AND NOT a.attisdropped);
  IF tbl = 'webhook_deliveries' THEN
    SELECT string_agg(format('DROP CONSTRAINT %I', c.conname), ', '), string_agg(DISTINCT c.confrelid::regclass::text, ', ' ORDER BY c.confrelid::regclass::text DESC)
      INTO fks, keys FROM pg_constraint c
     WHERE c.contype = 'f' AND c.conrelid = rel AND c.conparentid = 0
       AND c.conkey <@ ARRAY(SELECT a.attnum FROM pg_attribute a WHERE a.attrelid = rel AND a.attname IN ('webhook_event_id', 'webhook_endpoint_id'))
       AND c.confrelid IN (to_regclass(format('%I.webhook_events', schema)), to_regclass(format('%I.webhook_endpoints', schema)));
    IF fks IS NOT NULL THEN
      -- Writers come to events and endpoints first, be it for the key check alone: the other way round we and they would wait for each other.
      EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', keys);
      cmds := concat_ws(', ', cmds, fks);
    END IF;
  END IF;
  IF cmds IS NOT NULL THEN
    EXECUTE format('ALTER TABLE %s %s', rel, cmds);
  END IF;

  -- The default comes after the column: a volatile default in ADD COLUMN would rewrite the table.
  IF tbl = 'webhook_events' AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = rel AND a.attname = 'xid' AND a.atthasdef) THEN
    EXECUTE format('ALTER TABLE %s ALTER COLUMN xid SET DEFAULT pg_current_xact_id()', rel);
  END IF;
END
$$;
-- +goose StatementEnd

-- The indexes a tenant lacks, with the size of the table each would be built on.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.missing_indexes(schema text) RETURNS TABLE (tbl text, name text, uniq boolean, spec text, bytes bigint)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $$
  SELECT x.tbl, x.name, x.uniq, x.spec,
         -- A table without partitions has no partition tree, not even of itself.
         pg_relation_size(c.oid) + (SELECT coalesce(sum(pg_relation_size(p.relid)), 0)::bigint FROM pg_partition_tree(c.oid) p WHERE p.isleaf)
    FROM outbox_relay.tenant_indexes() x
    JOIN pg_class c ON c.relname = x.tbl AND c.relkind IN ('r', 'p')
    JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = schema
   WHERE NOT EXISTS (SELECT FROM pg_index i JOIN pg_class ic ON ic.oid = i.indexrelid
                      WHERE i.indrelid = c.oid AND ic.relname = x.name AND i.indisvalid)
$$;
-- +goose StatementEnd

-- Rights of the running relay, and membership in the publications where it is missing.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.publish_tenant(schema text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  g record;
  p record;
BEGIN
  EXECUTE format('GRANT USAGE ON SCHEMA %I TO outbox_relay_runner', schema);
  FOR g IN SELECT * FROM outbox_relay.tenant_grants() LOOP
    EXECUTE format('GRANT %s ON %I.%I TO outbox_relay_runner', g.privileges, schema, g.tbl);
  END LOOP;
  FOR p IN
    SELECT v.pub, v.tbl FROM (VALUES
        ('outbox_relay_events', 'webhook_events'), ('outbox_relay_registry', 'webhook_endpoints'), ('outbox_relay_registry', 'webhook_event_types'),
        ('outbox_relay_registry', 'webhook_event_subscriptions'), ('outbox_relay_registry', 'webhook_subscriptions')) v (pub, tbl)
     WHERE NOT EXISTS (SELECT FROM pg_publication_rel pr JOIN pg_publication pub ON pub.oid = pr.prpubid
                        WHERE pub.pubname = v.pub AND pr.prrelid = to_regclass(format('%I.%I', schema, v.tbl)))
  LOOP
    EXECUTE format('ALTER PUBLICATION %I ADD TABLE %I.%I', p.pub, schema, p.tbl);
  END LOOP;
END
$$;
-- +goose StatementEnd

-- Makes a schema a tenant, in the caller's transaction. An event committed after it is never missed; the caller's own events count
-- from this call on. backfill queues earlier events once: 'unprocessed' (processed_at is null) or 'since' (occurred_at >= since).
--
-- It runs with the rights of its owner: grant EXECUTE only to roles that may publish any schema that owner owns.
-- On tables that exist it waits at most 400 ms for a lock (55P03: try again), since writers queue up behind it meanwhile.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.add_tenant(schema text, backfill text DEFAULT NULL, since timestamptz DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  callers_timeout text := current_setting('lock_timeout');
  deadline timestamptz;
  big record;
  t record;
  tbl text;
  handled pg_snapshot; -- what the relay knows of; null: it has missed nothing
BEGIN
  backfill := coalesce(backfill, CASE WHEN since IS NOT NULL THEN 'since' END);
  IF backfill NOT IN ('unprocessed', 'since') OR (backfill = 'since') <> (since IS NOT NULL) THEN
    RAISE EXCEPTION 'backfill "%" with since % is not possible', backfill, coalesce(since::text, 'null')
      USING ERRCODE = 'OR002', HINT = 'Use backfill => ''unprocessed'', or since => a time, or neither.';
  END IF;
  IF since = 'infinity' THEN
    RAISE EXCEPTION 'since % is never', since USING ERRCODE = 'OR002', HINT = 'Use a time, or -infinity for everything.';
  END IF;
  IF since = '-infinity' THEN
    since := '0001-01-01 00:00:00+00'; -- which who reads it has a value for
  END IF;
  IF backfill IS NOT NULL AND current_setting('transaction_isolation') <> 'read committed' THEN
    -- An older snapshot would not see what was committed between it and the lock below.
    RAISE EXCEPTION 'a backfill needs a READ COMMITTED transaction' USING ERRCODE = 'OR002';
  END IF;
  -- ALTER PUBLICATION locks the publication to the end of the transaction: queue up here, before any table is locked.
  PERFORM pg_advisory_xact_lock(8245937120485516401);
  PERFORM outbox_relay.check_tenant(schema);
  IF NOT EXISTS (SELECT FROM outbox_relay.progress g JOIN pg_replication_slots s ON s.slot_name = g.slot AND s.database = current_database()) THEN
    RAISE EXCEPTION 'no replication slot of the relay exists in database "%"', current_database()
      USING ERRCODE = 'OR004', HINT = 'Run: outbox-relay migrate, with a role that has REPLICATION; one that was there and is gone, a running relay makes anew.';
  END IF;
  SELECT * INTO big FROM outbox_relay.missing_indexes(schema) m WHERE m.bytes >= 16 * 1024 * 1024 LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'table "%"."%" is too large (%) to build index % while writers wait', schema, big.tbl, pg_size_pretty(big.bytes), big.name
      USING ERRCODE = 'OR005', HINT = format('Run: outbox-relay tenants add %s, which builds it concurrently.', quote_literal(schema));
  END IF;

  IF backfill IS NOT NULL AND EXISTS (SELECT FROM outbox_relay.tenants n WHERE n.schema = add_tenant.schema AND n.backfill IS NOT NULL AND n.backfill_done_at IS NULL) THEN
    RAISE EXCEPTION 'a backfill of tenant "%" is not done yet', schema
      USING ERRCODE = 'OR002', HINT = 'Wait until outbox-relay tenants list shows it as queued: another one in its place would forget what is still to be queued.';
  END IF;

  IF to_regclass(format('%I.webhook_deliveries', schema)) IS NULL AND to_regclass(format('%I.webhook_endpoints', schema)) IS NULL THEN
    -- A schema that was dropped and made again is another tenant: the relay has to forget the old one's endpoints.
    DELETE FROM outbox_relay.tenants n WHERE n.schema = add_tenant.schema;
    DELETE FROM outbox_relay.retry_queue q WHERE q.tenant = add_tenant.schema;
    DELETE FROM outbox_relay.endpoint_health h WHERE h.tenant = add_tenant.schema;
  END IF;
  -- One budget for all locks, or the first would be held while the others are waited for. A row that an open transaction has written into a table
  -- which is published meanwhile is not in the log, nor is it visible when the relay loads the table.
  deadline := clock_timestamp() + interval '400 ms';
  FOREACH tbl IN ARRAY ARRAY['webhook_events', 'webhook_endpoints', 'webhook_event_types', 'webhook_event_subscriptions', 'webhook_subscriptions'] LOOP
    IF to_regclass(format('%I.%I', schema, tbl)) IS NOT NULL AND (tbl = 'webhook_events' OR NOT EXISTS (
         SELECT FROM pg_publication_rel pr JOIN pg_publication p ON p.oid = pr.prpubid AND p.pubname = 'outbox_relay_registry'
          WHERE pr.prrelid = to_regclass(format('%I.%I', schema, tbl)))) THEN
      PERFORM set_config('lock_timeout', greatest(1, ceil(extract(epoch FROM deadline - clock_timestamp()) * 1000))::int::text, true);
      EXECUTE format('LOCK TABLE %I.%I IN SHARE ROW EXCLUSIVE MODE', schema, tbl);
    END IF;
  END LOOP;
  FOR t IN SELECT * FROM outbox_relay.tenant_tables() ORDER BY ord LOOP
    PERFORM set_config('lock_timeout', greatest(1, ceil(extract(epoch FROM deadline - clock_timestamp()) * 1000))::int::text, true);
    PERFORM outbox_relay.shape_table(schema, t.name);
  END LOOP;
  FOR t IN SELECT * FROM outbox_relay.missing_indexes(schema) LOOP
    -- What is left of a concurrent build that failed has the name.
    EXECUTE format('DROP INDEX IF EXISTS %I.%I', schema, t.name);
    EXECUTE format('CREATE %s INDEX %I ON %I.%I %s', CASE WHEN t.uniq THEN 'UNIQUE' ELSE '' END, t.name, schema, t.tbl, t.spec);
  END LOOP;
  -- What was written to a table that has taken the place of the published one is not in the log. A tenant that is suspended has a mark already.
  SELECT CASE WHEN (pg_snapshot_xmax(p.snapshot), pg_snapshot_xmin(p.snapshot)) > (pg_snapshot_xmax(n.added_snapshot), pg_snapshot_xmin(n.added_snapshot))
              THEN p.snapshot ELSE n.added_snapshot END INTO handled
    FROM outbox_relay.tenants n LEFT JOIN LATERAL (
           SELECT g.snapshot FROM outbox_relay.progress g
            WHERE g.shard = n.shard -- not of a slot that a new name has left behind
              AND g.updated_at > (SELECT max(m.updated_at) - interval '1 day' FROM outbox_relay.progress m WHERE m.shard = n.shard AND m.snapshot IS NOT NULL)
            ORDER BY pg_snapshot_xmin(g.snapshot) LIMIT 1) p ON true
   WHERE n.schema = add_tenant.schema AND n.state <> 'suspended'
     AND NOT EXISTS (SELECT FROM pg_publication_rel pr JOIN pg_publication b ON b.oid = pr.prpubid AND b.pubname = 'outbox_relay_events'
                      WHERE pr.prrelid = to_regclass(format('%I.webhook_events', add_tenant.schema)));
  IF handled IS NOT NULL AND current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'adding tenant "%" again with another webhook_events needs a READ COMMITTED transaction', schema USING ERRCODE = 'OR002';
  END IF;
  PERFORM outbox_relay.publish_tenant(schema);
  PERFORM set_config('lock_timeout', callers_timeout, true);

  -- Whoever wrote before the lock is visible in this snapshot; whoever writes after it is in the log, which does not tell of rows that go with their table.
  INSERT INTO outbox_relay.tenants AS old (schema, version, tables, backfill, backfill_since, backfill_upto, shard)
  VALUES (add_tenant.schema, outbox_relay.shape_version(),
          (SELECT string_agg(coalesce(to_regclass(format('%I.%I', add_tenant.schema, r.name))::oid, 0)::text, ' ' ORDER BY r.ord)
             FROM unnest(ARRAY['webhook_endpoints', 'webhook_event_types', 'webhook_event_subscriptions', 'webhook_subscriptions']) WITH ORDINALITY r (name, ord)),
          add_tenant.backfill, add_tenant.since,
          CASE WHEN add_tenant.backfill IS NOT NULL THEN pg_current_snapshot() END,
          coalesce((SELECT g.shard FROM outbox_relay.progress g GROUP BY 1
            ORDER BY (SELECT count(*) FROM outbox_relay.tenants n WHERE n.shard = g.shard AND n.schema <> add_tenant.schema), 1 LIMIT 1), 0))
  ON CONFLICT ON CONSTRAINT tenants_pkey DO UPDATE SET version = excluded.version, tables = excluded.tables;
  IF backfill IS NOT NULL THEN
    UPDATE outbox_relay.tenants n
       SET backfill = add_tenant.backfill, backfill_since = add_tenant.since, backfill_from = NULL,
           backfill_upto = pg_current_snapshot(), backfill_border = handled, backfill_place = CASE WHEN handled IS NOT NULL THEN pg_current_wal_insert_lsn() - 1 END,
           backfill_border_place = NULL, backfill_cursor = NULL, backfill_done_at = NULL
     WHERE n.schema = add_tenant.schema;
  ELSIF handled IS NOT NULL THEN
    -- As a suspension that is over. A backfill that is not done keeps its mode, and starts over with the wider border; what it was to queue keeps its place.
    UPDATE outbox_relay.tenants n
       SET backfill = CASE WHEN n.backfill_done_at IS NULL THEN coalesce(n.backfill, 'missed') ELSE 'missed' END,
           backfill_from = CASE WHEN n.backfill_done_at IS NULL AND n.backfill IS NOT NULL THEN n.backfill_from ELSE handled END,
           backfill_border = CASE WHEN n.backfill_done_at IS NULL THEN coalesce(n.backfill_border, n.backfill_upto) END,
           backfill_border_place = CASE WHEN n.backfill_done_at IS NULL THEN CASE WHEN n.backfill_border IS NULL THEN n.backfill_place ELSE n.backfill_border_place END END,
           backfill_upto = pg_current_snapshot(), backfill_place = pg_current_wal_insert_lsn() - 1, backfill_cursor = NULL, backfill_done_at = NULL
     WHERE n.schema = add_tenant.schema;
  END IF;
END
$$;
-- +goose StatementEnd

-- Ends deliveries of a tenant; its tables and rows stay. The schema may be gone already. False: it was not a tenant.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.remove_tenant(schema text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  p record;
  known boolean;
BEGIN
  PERFORM pg_advisory_xact_lock(8245937120485516401);
  DELETE FROM outbox_relay.tenants n WHERE n.schema = remove_tenant.schema;
  known := FOUND;
  DELETE FROM outbox_relay.retry_queue q WHERE q.tenant = remove_tenant.schema;
  DELETE FROM outbox_relay.endpoint_health h WHERE h.tenant = remove_tenant.schema;
  FOR p IN SELECT pub.pubname, c.relname
             FROM pg_publication_rel pr
             JOIN pg_publication pub ON pub.oid = pr.prpubid AND pub.pubname IN ('outbox_relay_events', 'outbox_relay_registry')
             JOIN pg_class c ON c.oid = pr.prrelid
             JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = remove_tenant.schema AND n.nspname <> 'outbox_relay'
  LOOP
    EXECUTE format('ALTER PUBLICATION %I DROP TABLE %I.%I', p.pubname, schema, p.relname);
  END LOOP;
  RETURN known;
END
$$;
-- +goose StatementEnd

-- Holds a tenant's deliveries back without losing one. False: it was not a tenant.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.pause_tenant(schema text, reason text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
BEGIN
  -- A suspended tenant stays suspended: its mark says which events are still to be fetched. It is paused once that is over.
  UPDATE outbox_relay.tenants n
     SET state = CASE n.state WHEN 'suspended' THEN n.state ELSE 'paused' END,
         reason = CASE n.state WHEN 'suspended' THEN n.reason ELSE coalesce(pause_tenant.reason, n.reason) END,
         pause = CASE n.state WHEN 'suspended' THEN coalesce(pause_tenant.reason, n.pause, '') END
   WHERE n.schema = pause_tenant.schema;
  RETURN FOUND;
END
$$;
-- +goose StatementEnd

-- Ends the suspension of a tenant: one that an operator has paused is paused then. What it missed is queued while it is active: everything from its mark to
-- this moment, the lock being the border between what the snapshot shows and what the log will bring. It returns the state; null: it was not suspended.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.unsuspend_tenant(schema text) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '400ms' AS $$
DECLARE
  was outbox_relay.tenants;
BEGIN
  PERFORM pg_advisory_xact_lock(8245937120485516401); -- as add_tenant does, before any row or table
  SELECT n.* INTO was FROM outbox_relay.tenants n WHERE n.schema = unsuspend_tenant.schema FOR UPDATE;
  IF was.state IS DISTINCT FROM 'suspended' THEN
    RETURN NULL;
  END IF;
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE EXCEPTION 'resuming a suspended tenant needs a READ COMMITTED transaction' USING ERRCODE = 'OR002';
  END IF;
  PERFORM outbox_relay.add_tenant(schema); -- takes the lock, and makes good what has been changed about its tables
  -- A backfill that was still under way starts over with the wider border and then covers what was missed, too.
  UPDATE outbox_relay.tenants n
     SET state = CASE WHEN was.pause IS NULL THEN 'active' ELSE 'paused' END, reason = nullif(was.pause, ''), pause = NULL,
         backfill = CASE WHEN n.backfill_done_at IS NULL THEN coalesce(n.backfill, 'missed') ELSE 'missed' END,
         backfill_from = CASE WHEN n.backfill_done_at IS NULL AND n.backfill IN ('unprocessed', 'since') THEN NULL ELSE n.backfill_from END,
         backfill_place = pg_current_wal_insert_lsn() - 1, -- what it had still to queue when it was suspended keeps its own
         backfill_upto = pg_current_snapshot(), backfill_cursor = NULL, backfill_done_at = NULL
   WHERE n.schema = unsuspend_tenant.schema
  RETURNING n.state INTO was.state;
  RETURN was.state;
END
$$;
-- +goose StatementEnd

-- Lets a paused or suspended tenant go on, for an operator: nothing else ends a pause. False: it was not a tenant.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.resume_tenant(schema text) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '400ms' AS $$
BEGIN
  PERFORM outbox_relay.unsuspend_tenant(schema); -- and the row is locked, whatever its state
  UPDATE outbox_relay.tenants n SET state = 'active', reason = NULL WHERE n.schema = resume_tenant.schema;
  RETURN FOUND;
END
$$;
-- +goose StatementEnd

-- Moves a tenant to another shard, whose slot brings its events from here on. Both slots carry this change of its row at the same place of the log: one
-- leader leaves the tenant there, the other one joins it. What the old one has not recorded by then, and only that, is queued by the new one once the
-- old slot's progress has come to moved_lsn. False: it was not a tenant.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.move_tenant(schema text, shard int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '400ms' AS $$
DECLARE
  t outbox_relay.tenants;
  old outbox_relay.progress;
BEGIN
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    -- An older snapshot would not show what was committed before the lock below.
    RAISE EXCEPTION 'moving a tenant needs a READ COMMITTED transaction' USING ERRCODE = 'OR002';
  END IF;
  PERFORM pg_advisory_xact_lock(8245937120485516401); -- as add_tenant does, before any row or table
  SELECT n.* INTO t FROM outbox_relay.tenants n WHERE n.schema = move_tenant.schema FOR UPDATE;
  IF t.schema IS NULL THEN
    RETURN false;
  END IF;
  IF t.shard = move_tenant.shard THEN
    RETURN true;
  END IF;
  IF t.state = 'suspended' THEN
    RAISE EXCEPTION 'tenant "%" is suspended: %', schema, t.reason
      USING ERRCODE = 'OR002', HINT = 'Mend what suspended it and resume it first: its events are still to be fetched.';
  END IF;
  IF t.backfill IS NOT NULL AND t.backfill_done_at IS NULL THEN
    RAISE EXCEPTION 'earlier events of tenant "%" are still being queued', schema
      USING ERRCODE = 'OR002', HINT = 'Wait until outbox-relay tenants list shows it as queued: after a move that takes running relays for both shards.';
  END IF;
  -- Of two slots for one shard nobody can tell which is read. One of them belongs to a relay that is not used any more.
  IF (SELECT count(*) FROM outbox_relay.progress g WHERE g.shard = move_tenant.shard) <> 1 THEN
    RAISE EXCEPTION 'there is no shard %, or more than one slot for it', move_tenant.shard
      USING ERRCODE = 'OR002', HINT = 'Set database.shards and run outbox-relay migrate. See outbox_relay.progress.';
  END IF;
  BEGIN
    SELECT g.* INTO STRICT old FROM outbox_relay.progress g WHERE g.shard = t.shard;
  EXCEPTION WHEN no_data_found OR too_many_rows THEN
    RAISE EXCEPTION 'there is no slot for shard %, where tenant "%" is, or more than one', t.shard, schema
      USING ERRCODE = 'OR002', HINT = 'See outbox_relay.progress.';
  END;
  IF to_regclass(format('%I.webhook_events', schema)) IS NULL THEN
    RAISE EXCEPTION 'tenant "%" has no table of events', schema USING ERRCODE = 'OR002', HINT = 'If its schema is gone: outbox-relay tenants remove.';
  END IF;
  -- Whoever has written an event holds a lock on its table until his commit is in the log and visible: nobody has one open now.
  EXECUTE format('LOCK TABLE %I.webhook_events IN SHARE ROW EXCLUSIVE MODE', schema);
  UPDATE outbox_relay.tenants n
     SET shard = move_tenant.shard, moved_from = old.slot, moved_lsn = pg_current_wal_insert_lsn(), backfill_place = pg_current_wal_insert_lsn() - 1, backfill_border_place = NULL,
         backfill = 'missed', backfill_since = NULL, backfill_upto = pg_current_snapshot(), backfill_border = NULL, backfill_cursor = NULL, backfill_done_at = NULL,
         -- the last checkpoint, or its admission if that came after it
         backfill_from = CASE WHEN (pg_snapshot_xmax(old.snapshot), pg_snapshot_xmin(old.snapshot)) > (pg_snapshot_xmax(n.added_snapshot), pg_snapshot_xmin(n.added_snapshot))
                              THEN old.snapshot ELSE n.added_snapshot END
   WHERE n.schema = move_tenant.schema;
  RETURN true;
END
$$;
-- +goose StatementEnd

-- Makes publications that somebody dropped, with the tables of every tenant: the relay calls it before it makes a new slot.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.restore_publications() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
  t record;
BEGIN
  PERFORM pg_advisory_xact_lock(8245937120485516401);
  PERFORM outbox_relay.create_publications();
  FOR t IN SELECT n.schema FROM outbox_relay.tenants n WHERE to_regnamespace(quote_ident(n.schema)) IS NOT NULL ORDER BY 1 LOOP
    BEGIN
      PERFORM outbox_relay.publish_tenant(t.schema);
    EXCEPTION WHEN OTHERS THEN -- the relay suspends a tenant whose tables are not published
      RAISE WARNING 'tables of "%" are not published: %', t.schema, SQLERRM;
    END;
  END LOOP;
END
$$;
-- +goose StatementEnd

-- Functions are executable by everybody unless told otherwise.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA outbox_relay FROM PUBLIC;
GRANT EXECUTE ON FUNCTION outbox_relay.tenant_faults(oid), outbox_relay.tenant_requires() TO outbox_relay_runner; -- for `check`
GRANT EXECUTE ON FUNCTION outbox_relay.restore_publications(), outbox_relay.shape_version(), outbox_relay.pause_tenant(text, text), outbox_relay.resume_tenant(text),
  outbox_relay.unsuspend_tenant(text), outbox_relay.move_tenant(text, int) TO outbox_relay_runner;
