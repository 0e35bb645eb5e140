-- +goose Up
-- What operators' commands do, for an application to do in its own transaction.
--
-- A tenant's tables are not the relay's: a view in the place of one, or a trigger on it, is code of somebody else, and code runs with the rights of the
-- function that meets it. So everything that touches a tenant's tables runs with the rights of the caller, who needs them on those tables. Rows of the
-- relay's own tables, which an application must not touch, are written by a few functions that run with the rights of their owner (SECURITY DEFINER):
-- they read and write nothing of a tenant's and ask check_control first.
--
-- Locks are taken in the order in which the recorder takes them: that of the endpoint's order (lock_order), rows of the queue, rows of the tenant.

-- Whoever changes a state.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.note_state() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$ BEGIN NEW.state_since := now(); RETURN NEW; END $$;
-- +goose StatementEnd
DROP TRIGGER IF EXISTS note_state ON outbox_relay.tenants;
CREATE TRIGGER note_state BEFORE UPDATE OF state ON outbox_relay.tenants FOR EACH ROW WHEN (OLD.state <> NEW.state) EXECUTE FUNCTION outbox_relay.note_state();

-- Raises unless the caller may control the tenant.
--
-- It judges who has logged in: inside a function that runs as its owner nothing else of the caller can be told. SET ROLE neither adds to that nor takes
-- from it: a login that may take on the roles of several tenants can write the queue rows of all of them, whichever role is in effect, and a login that
-- has its rights on the table by SET ROLE only (NOINHERIT) is refused. What keeps the roles of one login apart is what the functions below do as the caller: to
-- pause, resume, send again, skip, discard or recover they read and write the tenant's tables with the rights of the role that is in effect.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.check_control(schema text) RETURNS void
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = check_control.schema) THEN
    RAISE EXCEPTION 'schema "%" is not a tenant', schema USING ERRCODE = 'OR002', HINT = 'See outbox_relay.tenants, or: outbox-relay tenants list';
  END IF;
  IF NOT (pg_has_role(session_user, 'outbox_relay_runner', 'MEMBER')
          OR has_table_privilege(session_user, format('%I.webhook_endpoints', schema), 'UPDATE')) THEN
    RAISE EXCEPTION 'role "%" may not control the deliveries of "%"', session_user, schema
      USING ERRCODE = 'insufficient_privilege',
            HINT = format('Grant it UPDATE on %I.webhook_endpoints, or membership in outbox_relay_runner.', schema);
  END IF;
END
$$;
-- +goose StatementEnd

-- Locks the order of endpoints of a tenant, always in the same order.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.lock_order(schema text, endpoints uuid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM outbox_relay.check_control(schema);
  PERFORM pg_advisory_xact_lock(s.h)
     FROM (SELECT DISTINCT hashtextextended(outbox_relay.lane(schema, e)::text, 8245937120485516401) AS h FROM unnest(endpoints) e ORDER BY 1 OFFSET 0) s;
END
$$;
-- +goose StatementEnd

-- (IS TRUE, here and below, keeps the index on due_at from being used where the row is known: what the server believes to be due is what it saw an hour ago.)
-- Tells whether somebody has a delivery of the key under a lease that has not run out. One that is put in front of it meanwhile has to wait until it ends.
CREATE OR REPLACE FUNCTION outbox_relay.in_flight(lane uuid, key uuid) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
  SELECT EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.lane = in_flight.lane AND q.order_key = key
                    AND q.leased_by IS NOT NULL AND (q.due_at > now() AND q.due_at < 'infinity') IS TRUE)
$$;

-- The first place of events that are still being queued from the tables; null: there are none. Until they are queued, the first row of a key is not really the
-- first if its place is after theirs.
CREATE OR REPLACE FUNCTION outbox_relay.filling_place(schema text) RETURNS pg_lsn
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
  SELECT coalesce(CASE WHEN t.backfill_border IS NULL THEN t.backfill_place ELSE t.backfill_border_place END, '0/0') FROM outbox_relay.tenants t WHERE t.schema = filling_place.schema AND t.backfill IS NOT NULL AND t.backfill_done_at IS NULL
$$;

-- Makes the first row of each key due, if it is parked and nothing of the key is in flight: the one before it has gone. The caller holds the lock of the
-- endpoints.
CREATE OR REPLACE FUNCTION outbox_relay.wake_next(schema text, endpoints uuid[], keys uuid[]) RETURNS bigint
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
  WITH head AS (
    SELECT n.delivery_id FROM (SELECT DISTINCT outbox_relay.lane(wake_next.schema, u.e) AS lane, u.k FROM unnest(endpoints, keys) u (e, k)) p
     CROSS JOIN LATERAL (SELECT q.delivery_id, q.due_at, q.order_lsn FROM outbox_relay.retry_queue q
                          WHERE q.lane = p.lane AND q.order_key = p.k
                          ORDER BY q.order_lsn, q.order_n, q.delivery_id LIMIT 1) n
     WHERE CASE WHEN n.due_at = 'infinity' -- which few are asked
       THEN NOT outbox_relay.in_flight(p.lane, p.k) AND (n.order_lsn <= outbox_relay.filling_place(wake_next.schema)) IS NOT FALSE END
  ), woken AS (
    UPDATE outbox_relay.retry_queue q SET due_at = now() FROM head h WHERE q.delivery_id = h.delivery_id RETURNING 1
  )
  SELECT count(*) FROM woken
$$;

-- What is parked for an endpoint and waits for no other row: rows without an order, and the first of each key of which nothing is in flight. The first rows
-- are found by going from key to key: whatever the planner knows of the queue, nobody compares rows with all others of their key.
CREATE OR REPLACE FUNCTION outbox_relay.parked_heads(schema text, endpoint uuid) RETURNS SETOF uuid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
  WITH RECURSIVE head AS (
    (SELECT q.order_key, q.delivery_id, q.due_at, q.order_lsn FROM outbox_relay.retry_queue q
      WHERE q.lane = outbox_relay.lane(schema, endpoint) AND q.order_key IS NOT NULL
      ORDER BY q.order_key, q.order_lsn, q.order_n, q.delivery_id LIMIT 1)
    UNION ALL
    SELECT n.* FROM head h CROSS JOIN LATERAL (
      SELECT q.order_key, q.delivery_id, q.due_at, q.order_lsn FROM outbox_relay.retry_queue q
       WHERE q.lane = outbox_relay.lane(schema, endpoint) AND q.order_key > h.order_key
       ORDER BY q.order_key, q.order_lsn, q.order_n, q.delivery_id LIMIT 1) n
  )
  SELECT h.delivery_id FROM head h WHERE CASE WHEN h.due_at = 'infinity'
    THEN NOT outbox_relay.in_flight(outbox_relay.lane(schema, endpoint), h.order_key) AND (h.order_lsn <= outbox_relay.filling_place(schema)) IS NOT FALSE END
  UNION ALL
  SELECT q.delivery_id FROM outbox_relay.retry_queue q
   WHERE uuid_send(q.lane) = uuid_send(outbox_relay.lane(schema, endpoint))
     AND (uuid_send(q.lane), q.due_at) >= (uuid_send(outbox_relay.lane(schema, endpoint)), 'infinity') AND q.order_key IS NULL
$$;

-- Makes due what is parked for an endpoint and waits for no other row, 20,000 rows at most: whoever records deliveries of the endpoint waits until this commits.
-- The leader calls it again for the rest. (A function in the list of SELECT is left as soon as there is enough of it.)
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.wake(schema text, endpoint uuid, within interval DEFAULT '0') RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  n bigint;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  PERFORM outbox_relay.lock_order(schema, ARRAY[endpoint]);
  UPDATE outbox_relay.retry_queue q SET due_at = now() + random() * wake.within
   WHERE q.delivery_id = ANY(ARRAY(SELECT outbox_relay.parked_heads(schema, endpoint) LIMIT 20000)) AND (q.due_at = 'infinity') IS TRUE;
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n;
END
$$;
-- +goose StatementEnd

-- Gives a delivery its place in the queue; the order of its endpoint decides whether it is due: not while another is before it, or one from behind it is in
-- flight. What was first and is not any more is parked: due rows that may not be claimed would stand in the way of those that may. False: the delivery
-- has a place.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.enqueue(schema text, delivery uuid, endpoint uuid, due timestamptz, key uuid, lsn pg_lsn, n int) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  own uuid := outbox_relay.lane(schema, endpoint);
BEGIN
  PERFORM outbox_relay.check_control(schema);
  PERFORM outbox_relay.lock_order(schema, ARRAY[endpoint]);
  IF key IS NULL THEN
    lsn := NULL;
    n := NULL;
  ELSE
    -- Whoever claims a key locks its first row. He has done so before us, and the lease is seen below, or comes after us, and sees who is first now.
    PERFORM FROM outbox_relay.retry_queue q WHERE q.lane = own AND q.order_key = key
      ORDER BY q.order_lsn, q.order_n, q.delivery_id LIMIT 1 FOR UPDATE;
    IF outbox_relay.in_flight(own, key) OR EXISTS (SELECT FROM outbox_relay.retry_queue h WHERE h.lane = own AND h.order_key = key
         AND (h.order_lsn, h.order_n, h.delivery_id) < (lsn, n, delivery)) THEN
      due := 'infinity';
    END IF;
  END IF;
  INSERT INTO outbox_relay.retry_queue AS q (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
  VALUES (delivery, schema, endpoint, due, key, lsn, n) ON CONFLICT (delivery_id) DO NOTHING;
  IF NOT FOUND THEN
    IF EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.delivery_id = delivery AND q.tenant <> schema) THEN
      RAISE EXCEPTION 'delivery % of "%" has the id of one that waits for another tenant', delivery, schema
        USING ERRCODE = 'OR002', HINT = 'One is a copy of the other. Once that one has ended, this one can be sent again.';
    END IF;
    RETURN false;
  END IF;
  UPDATE outbox_relay.retry_queue q SET due_at = 'infinity', leased_by = NULL
   WHERE q.delivery_id = (SELECT b.delivery_id FROM outbox_relay.retry_queue b WHERE b.lane = own AND b.order_key = key
                             AND (b.order_lsn, b.order_n, b.delivery_id) > (lsn, n, delivery) ORDER BY b.order_lsn, b.order_n, b.delivery_id LIMIT 1)
     AND (q.due_at < 'infinity') IS TRUE AND (q.leased_by IS NULL OR q.due_at <= now()); -- what is behind that one is parked already
  RETURN true;
END
$$;
-- +goose StatementEnd

-- Takes a delivery out of the queue and returns the row that it had there, all null if it had none; what waits behind it goes on. Its caller says what
-- becomes of the delivery.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.unqueue(schema text, delivery uuid) RETURNS outbox_relay.retry_queue
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  q outbox_relay.retry_queue;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  SELECT * INTO q FROM outbox_relay.retry_queue r WHERE r.delivery_id = delivery AND r.tenant = schema;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  PERFORM outbox_relay.lock_order(schema, ARRAY[q.endpoint_id]);
  SELECT * INTO q FROM outbox_relay.retry_queue r WHERE r.delivery_id = delivery AND r.tenant = schema FOR UPDATE;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  IF q.leased_by IS NOT NULL AND q.due_at > now() THEN
    RAISE EXCEPTION 'delivery % is in flight', delivery USING ERRCODE = 'OR002', HINT = 'Wait until its attempt has ended, then try again; or pause its endpoint first.';
  END IF;
  DELETE FROM outbox_relay.retry_queue r WHERE r.delivery_id = delivery;
  IF q.order_key IS NOT NULL THEN
    PERFORM outbox_relay.wake_next(schema, ARRAY[q.endpoint_id], ARRAY[q.order_key]);
  END IF;
  RETURN q;
END
$$;
-- +goose StatementEnd

-- Forgets how an endpoint has fared: it begins anew.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.forget_health(schema text, endpoint uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM outbox_relay.check_control(schema);
  DELETE FROM outbox_relay.endpoint_health h WHERE h.tenant = schema AND h.endpoint_id = endpoint;
END
$$;
-- +goose StatementEnd

-- Notes a request to recover an endpoint.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.request_recovery(schema text, endpoint uuid, since timestamptz, rate numeric) RETURNS bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  id bigint;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  IF since = 'infinity' THEN
    RAISE EXCEPTION 'since % is never', since USING ERRCODE = 'OR002', HINT = 'Use a time, or -infinity for everything.';
  END IF;
  IF NOT rate BETWEEN 0.001 AND 1000000 THEN
    RAISE EXCEPTION 'rate % is not between 0.001 and 1000000', rate
      USING ERRCODE = 'OR002', HINT = 'It is how many deliveries become due each second; null is all at once.';
  END IF;
  INSERT INTO outbox_relay.recoveries AS r (tenant, endpoint_id, since, rate)
  VALUES (schema, endpoint, CASE request_recovery.since WHEN '-infinity' THEN '0001-01-01 00:00:00+00' ELSE request_recovery.since END, request_recovery.rate) RETURNING r.id INTO id;
  RETURN id;
END
$$;
-- +goose StatementEnd

-- Which of the deliveries are parked and wait for no other row: those without an order, and the first of a key of which nothing is in flight.
CREATE OR REPLACE FUNCTION outbox_relay.parked_for_nothing(deliveries uuid[]) RETURNS SETOF uuid
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
  SELECT q.delivery_id FROM outbox_relay.retry_queue q
   WHERE q.delivery_id = ANY(deliveries) AND (q.due_at = 'infinity') IS TRUE
     AND CASE WHEN q.order_key IS NULL THEN true
       WHEN q.delivery_id = (SELECT h.delivery_id FROM outbox_relay.retry_queue h WHERE h.lane = q.lane AND h.order_key = q.order_key
                              ORDER BY h.order_lsn, h.order_n, h.delivery_id LIMIT 1) -- few are, and the others are not asked the rest
       THEN NOT outbox_relay.in_flight(q.lane, q.order_key) AND (q.order_lsn <= outbox_relay.filling_place(q.tenant)) IS NOT FALSE END
$$;

-- Makes due what is parked and waits for nothing: somebody may have changed tables by hand. Each call looks at 5,000 rows, from place on, and returns the place
-- of the next call, null after the last row: a million may be parked for good reason, for days, and to look at all of them takes seconds. Where no more
-- than that are parked, it looks at these alone, however many others the queue has.
--
-- It waits for nobody long, and holds nothing meanwhile that somebody may wait for: what a tenant's table says is read before any order is locked, and what is
-- locked is left for the next time. (The settings keep a server that saw a small queue, when the plan was made, from going through all of a large one.)
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.wake_parked_heads(INOUT place uuid DEFAULT NULL, OUT woken bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms' SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
  most CONSTANT int := 5000;
  look outbox_relay.retry_queue[] := ARRAY(SELECT q FROM outbox_relay.retry_queue q WHERE q.due_at = 'infinity' LIMIT most + 1);
  g record;
  ready uuid[];
  idle uuid[] := '{}';
  held uuid[] := '{}';
  locks int := 0;
BEGIN
  IF cardinality(look) <= most THEN
    look := ARRAY(SELECT q FROM unnest(look) q WHERE place IS NULL OR q.delivery_id >= place);
    place := NULL;
  ELSE
    look := ARRAY(SELECT q FROM outbox_relay.retry_queue q WHERE q.delivery_id >= coalesce(place, '00000000-0000-0000-0000-000000000000')
      ORDER BY q.delivery_id LIMIT most + 1);
    place := (look[most + 1]).delivery_id;
  END IF;
  FOR g IN SELECT q.tenant, array_agg(q.delivery_id) AS deliveries, array_agg(q.endpoint_id) AS endpoints FROM unnest(look) q
            WHERE q.due_at = 'infinity' GROUP BY 1 HAVING (SELECT t.state FROM outbox_relay.tenants t WHERE t.schema = q.tenant) = 'active' LOOP
    BEGIN
      EXECUTE format('SELECT array_agg(x.id) FROM (SELECT DISTINCT id FROM unnest($1) id) x LEFT JOIN %I.webhook_endpoints e ON e.id = x.id
        WHERE e.id IS NULL OR e.is_active AND e.paused_at IS NULL', g.tenant) INTO ready USING g.endpoints;
    EXCEPTION
      WHEN undefined_table OR undefined_column OR invalid_schema_name THEN
        ready := g.endpoints; -- one that is gone is found out when its delivery is claimed
      WHEN OTHERS THEN
        ready := NULL; -- it is locked, or in trouble of its own, which is no reason for the others to wait
    END;
    idle := idle || ARRAY(SELECT u.d FROM unnest(g.deliveries, g.endpoints) u (d, e) WHERE u.e IN (SELECT r FROM unnest(ready) r));
  END LOOP;
  idle := ARRAY(SELECT outbox_relay.parked_for_nothing(idle));
  FOR g IN SELECT q.lane, array_agg(q.delivery_id) AS deliveries, (array_agg(q.delivery_id ORDER BY q.delivery_id))[1] AS first
             FROM outbox_relay.retry_queue q WHERE q.delivery_id = ANY(idle) GROUP BY 1 ORDER BY 3 LOOP
    IF locks = 500 THEN -- each is kept to the end, and there is room for so many only
      place := g.first;
      EXIT;
    END IF;
    IF pg_try_advisory_xact_lock(hashtextextended(g.lane::text, 8245937120485516401)) THEN -- as lock_order does
      locks := locks + 1;
      held := held || g.deliveries;
    END IF;
  END LOOP;
  UPDATE outbox_relay.retry_queue q SET due_at = now() + random() * interval '1 s' WHERE q.delivery_id = ANY(ARRAY(
    SELECT l.delivery_id FROM outbox_relay.retry_queue l
     WHERE l.delivery_id = ANY(ARRAY(SELECT outbox_relay.parked_for_nothing(held))) AND (l.due_at = 'infinity') IS TRUE FOR UPDATE SKIP LOCKED));
  GET DIAGNOSTICS woken = ROW_COUNT;
END
$$;
-- +goose StatementEnd

-- Holds an endpoint's deliveries back without losing one. False: it was paused already. One that is not active gets no deliveries that could wait, and
-- disabled_reason says why it is not.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.pause_endpoint(schema text, endpoint uuid, reason text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  was boolean;
  active boolean;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  EXECUTE format('SELECT e.paused_at IS NOT NULL, e.is_active FROM %I.webhook_endpoints e WHERE e.id = $1 FOR NO KEY UPDATE', schema)
    INTO was, active USING endpoint;
  IF was IS NULL THEN
    RAISE EXCEPTION 'endpoint % does not exist in "%"', endpoint, schema USING ERRCODE = 'OR002', HINT = 'See: outbox-relay endpoints list';
  ELSIF NOT active THEN
    RAISE EXCEPTION 'endpoint % is not active: its events get no delivery that could wait', endpoint
      USING ERRCODE = 'OR002', HINT = 'Resume it first, then pause it: what comes from then on waits. outbox-relay endpoints recover queues what it has missed.';
  END IF;
  IF NOT was THEN
    EXECUTE format('UPDATE %I.webhook_endpoints e SET paused_at = now(), disabled_reason = coalesce($2, e.disabled_reason) WHERE e.id = $1', schema)
      USING endpoint, reason;
  END IF;
  RETURN NOT was;
END
$$;
-- +goose StatementEnd

-- Lets an endpoint go on that was paused, disabled or deactivated; what has waited meanwhile becomes due. False: it took deliveries already.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.resume_endpoint(schema text, endpoint uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  took boolean;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  PERFORM outbox_relay.lock_order(schema, ARRAY[endpoint]); -- the recorder has it when it disables an endpoint
  EXECUTE format('SELECT e.paused_at IS NULL AND e.is_active FROM %I.webhook_endpoints e WHERE e.id = $1 FOR NO KEY UPDATE', schema) INTO took USING endpoint;
  IF took IS NULL THEN
    RAISE EXCEPTION 'endpoint % does not exist in "%"', endpoint, schema USING ERRCODE = 'OR002', HINT = 'See: outbox-relay endpoints list';
  END IF;
  IF NOT took THEN
    EXECUTE format('UPDATE %I.webhook_endpoints e SET paused_at = NULL, is_active = true, disabled_reason = NULL, disabled_at = NULL WHERE e.id = $1', schema)
      USING endpoint;
  END IF;
  PERFORM outbox_relay.forget_health(schema, endpoint);
  PERFORM outbox_relay.wake(schema, endpoint, '1 s');
  RETURN NOT took;
END
$$;
-- +goose StatementEnd

-- Queues a delivery again, from a dead letter or from its own row. The caller holds the endpoint's lock. It returns false if the delivery is queued
-- already or its endpoint is gone.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.requeue(schema text, delivery uuid, due timestamptz) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  dead record;
  own record;
  event record;
  ends record;
  key uuid;
  n bigint;
BEGIN
  EXECUTE format('SELECT * FROM %I.webhook_dead_letters l WHERE l.delivery_id = $1', schema) INTO dead USING delivery;
  EXECUTE format('SELECT d.webhook_endpoint_id, d.webhook_event_id, d.delivery_status FROM %I.webhook_deliveries d WHERE d.id = $1', schema) INTO own USING delivery;
  EXECUTE format('SELECT e.id, e.delivery_order FROM %I.webhook_endpoints e WHERE e.id = $1', schema)
    INTO ends USING coalesce(own.webhook_endpoint_id, dead.webhook_endpoint_id);
  IF ends.id IS NULL THEN
    RETURN false;
  END IF;
  EXECUTE format('SELECT v.aggregate_id FROM %I.webhook_events v WHERE v.id = $1', schema)
    INTO event USING coalesce(own.webhook_event_id, dead.webhook_event_id);
  key := CASE ends.delivery_order WHEN 'strict' THEN ends.id -- the nil UUID is no aggregate
    WHEN 'aggregate' THEN nullif(coalesce(event.aggregate_id, dead.order_key), '00000000-0000-0000-0000-000000000000') END;
  IF NOT outbox_relay.enqueue(schema, delivery, ends.id, due, key, coalesce(dead.order_lsn, '0/0'), coalesce(dead.order_n, 0)) THEN
    RETURN false;
  END IF;

  -- attempted_at tells an attempt of an earlier round, whose success may be recorded late, from one of this.
  EXECUTE format('UPDATE %I.webhook_deliveries d SET delivery_status = ''pending'', attempt_number = 1, replay = d.replay + 1, next_retry_at = $2,
      request_body = coalesce($3, d.request_body), attempted_at = clock_timestamp(), completed_at = NULL, max_attempts_reached = false,
      error_message = ''replay'', error_code = ''deferred'', response_status_code = NULL, response_body = NULL, response_time_ms = NULL WHERE d.id = $1', schema)
    USING delivery, due, dead.request_body;
  GET DIAGNOSTICS n = ROW_COUNT;
  IF n = 0 AND dead.id IS NULL THEN
    RAISE EXCEPTION 'delivery % does not exist in "%"', delivery, schema USING ERRCODE = 'OR002', HINT = 'Retention has just removed it, or a policy keeps this role from changing it.';
  ELSIF n = 0 THEN -- retention has taken the row, the dead letter has all that was in it
    EXECUTE format('INSERT INTO %I.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method,
        request_headers, request_body, next_retry_at, attempted_at, relayed, replay, error_code, error_message)
        VALUES ($1, $2, $3, ''pending'', $4, $5, $6, $7, $8, clock_timestamp(), true, $9, ''deferred'', ''replay'')', schema)
      USING delivery, dead.webhook_event_id, dead.webhook_endpoint_id, dead.request_url, dead.request_method, dead.request_headers, dead.request_body, due,
            dead.replay + 1;
  END IF;
  EXECUTE format('UPDATE %I.webhook_dead_letters l SET replayed_at = now() WHERE l.delivery_id = $1 AND l.replayed_at IS NULL', schema) USING delivery;
  GET DIAGNOSTICS n = ROW_COUNT;
  -- A letter that stays open is sent again by whoever sees it. The relay's role sees all there are: one that was discarded may be gone.
  IF n = 0 AND coalesce(own.delivery_status, 'failed') = 'failed' AND dead.replayed_at IS NULL AND row_security_active(format('%I.webhook_dead_letters', schema))
     AND NOT pg_has_role('outbox_relay_runner', 'USAGE') THEN
    RAISE EXCEPTION 'role "%" cannot mark the dead letter of delivery % in "%"', current_user, delivery, schema
      USING ERRCODE = 'OR002', HINT = 'A policy hides it from this role, or keeps it from changing it; or it is gone. Call this with a role that may see and change the row.';
  END IF;
  RETURN true;
END
$$;
-- +goose StatementEnd

-- Sends a delivery again that has ended, whichever way. False: it is queued already.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.resend(schema text, delivery uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  d record;
  gone boolean;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  EXECUTE format('SELECT d.webhook_endpoint_id AS endpoint, d.relayed, d.webhook_event_id AS event, d.request_body IS NOT NULL AS kept FROM %1$I.webhook_deliveries d WHERE d.id = $1
    UNION ALL SELECT l.webhook_endpoint_id, true, l.webhook_event_id, l.request_body IS NOT NULL FROM %1$I.webhook_dead_letters l WHERE l.delivery_id = $1
    ORDER BY kept DESC LIMIT 1', schema) INTO d USING delivery;
  IF d.endpoint IS NULL THEN
    RAISE EXCEPTION 'delivery % does not exist in "%"', delivery, schema USING ERRCODE = 'OR002', HINT = 'See: outbox-relay deliveries list';
  ELSIF NOT d.relayed THEN
    RAISE EXCEPTION 'delivery % was made by another dispatcher', delivery
      USING ERRCODE = 'OR002', HINT = 'Insert its event again, or queue older events with: outbox-relay endpoints recover --since';
  END IF;
  EXECUTE format('SELECT NOT EXISTS (SELECT FROM %I.webhook_endpoints e WHERE e.id = $1)', schema) INTO gone USING d.endpoint;
  IF gone THEN
    RAISE EXCEPTION 'the endpoint of delivery % does not exist any more', delivery USING ERRCODE = 'OR002', HINT = 'Insert its event again for the endpoint that has taken its place.';
  END IF;
  EXECUTE format('SELECT NOT EXISTS (SELECT FROM %I.webhook_events v WHERE v.id = $1)', schema) INTO gone USING d.event;
  IF gone AND NOT d.kept THEN
    RAISE EXCEPTION 'neither the event nor the body of delivery % is kept', delivery USING ERRCODE = 'OR002', HINT = 'An event that is inserted again is a new one, also under its id: it is sent to every endpoint that subscribes to it now.';
  END IF;
  PERFORM outbox_relay.lock_order(schema, ARRAY[d.endpoint]);
  RETURN outbox_relay.requeue(schema, delivery, now());
END
$$;
-- +goose StatementEnd

-- Queues dead letters again, the oldest first, and marks them: repeated calls work them off, and none is queued twice. It returns how many; zero: none is
-- left but what somebody has locked.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.replay(schema text, endpoint uuid DEFAULT NULL, event uuid DEFAULT NULL, event_type text DEFAULT NULL,
  since timestamptz DEFAULT NULL, until timestamptz DEFAULT NULL, max int DEFAULT 500, within interval DEFAULT '0') RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  endpoints uuid[];
  found_ids uuid[];
  ids uuid[];
  seen uuid[] := '{}';
  n bigint := 0;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  -- The order is locked before any letter is, so somebody else may have taken all that were found, or they are queued: then the next ones are looked for.
  LOOP
    EXECUTE format('SELECT array_agg(s.delivery_id), array_agg(DISTINCT s.webhook_endpoint_id) FROM (
        SELECT l.delivery_id, l.webhook_endpoint_id FROM %1$I.webhook_dead_letters l
         WHERE l.replayed_at IS NULL AND l.discarded_at IS NULL AND EXISTS (SELECT FROM %1$I.webhook_endpoints e WHERE e.id = l.webhook_endpoint_id)
           AND ($1 IS NULL OR l.webhook_endpoint_id = $1) AND ($2 IS NULL OR l.webhook_event_id = $2)
           AND ($3 IS NULL OR EXISTS (SELECT FROM %1$I.webhook_events v WHERE v.id = l.webhook_event_id AND v.event_type = $3))
           AND ($4 IS NULL OR l.dead_at >= $4) AND ($5 IS NULL OR l.dead_at < $5) AND l.delivery_id <> ALL($7)
         ORDER BY l.order_lsn, l.order_n, l.dead_at, l.delivery_id LIMIT $6) s', schema)
      INTO found_ids, endpoints USING endpoint, event, event_type, since, until, max, seen;
    IF found_ids IS NULL THEN
      RETURN 0;
    END IF;
    PERFORM outbox_relay.lock_order(schema, endpoints);
    EXECUTE format('SELECT array_agg(s.delivery_id ORDER BY s.order_lsn, s.order_n, s.dead_at, s.delivery_id) FROM (
        SELECT l.* FROM %I.webhook_dead_letters l WHERE l.delivery_id = ANY($1) AND l.replayed_at IS NULL AND l.discarded_at IS NULL FOR UPDATE SKIP LOCKED) s',
        schema) INTO ids USING found_ids;
    seen := seen || found_ids;
    FOR i IN 1 .. coalesce(cardinality(ids), 0) LOOP
      IF outbox_relay.requeue(schema, ids[i], now() + within * (i - random()) / cardinality(ids)) THEN
        n := n + 1;
      ELSE -- it is queued: not to be found again; unless its endpoint has gone meanwhile, and nobody will send it
        EXECUTE format('UPDATE %1$I.webhook_dead_letters l SET replayed_at = now() WHERE l.delivery_id = $1
          AND EXISTS (SELECT FROM %1$I.webhook_endpoints e WHERE e.id = l.webhook_endpoint_id)', schema) USING ids[i];
      END IF;
    END LOOP;
    EXIT WHEN n > 0;
  END LOOP;
  RETURN n;
END
$$;
-- +goose StatementEnd

-- Gives a waiting delivery up: it becomes a dead letter, and what waits behind it goes on. False: it does not wait.
--
-- One that had been delivered and has not been attempted since it was sent again keeps no body, and only the relay can make one. Its letter can be replayed
-- for as long as the event is there, and says so.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.skip(schema text, delivery uuid, reason text DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  q outbox_relay.retry_queue;
  n bigint;
BEGIN
  q := outbox_relay.unqueue(schema, delivery);
  IF q.delivery_id IS NULL THEN
    RETURN false;
  END IF;
  EXECUTE format('INSERT INTO %1$I.webhook_dead_letters AS l (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers,
        request_body, attempts, last_error, last_error_code, last_status_code, last_response_body, replay, order_key, order_lsn, order_n)
      SELECT d.id, d.webhook_event_id, d.webhook_endpoint_id, d.request_url, d.request_method, d.request_headers, d.request_body,
        CASE d.delivery_status WHEN ''retrying'' THEN d.attempt_number ELSE 0 END,
        coalesce($2, ''skipped by an operator'') || CASE WHEN d.request_body IS NULL THEN '' (no body is kept: it can be sent again while its event is there)''
          ELSE '''' END, ''skipped'', d.response_status_code, d.response_body, d.replay, $3, $4, $5
      FROM %1$I.webhook_deliveries d WHERE d.id = $1
      ON CONFLICT (delivery_id) DO UPDATE SET attempts = excluded.attempts, last_error = excluded.last_error, last_error_code = excluded.last_error_code,
        last_status_code = excluded.last_status_code, last_response_body = excluded.last_response_body, request_url = excluded.request_url,
        request_method = excluded.request_method, request_headers = excluded.request_headers, request_body = coalesce(excluded.request_body, l.request_body),
        replay = excluded.replay, dead_at = now(), replayed_at = NULL, discarded_at = NULL', schema)
    USING delivery, reason, q.order_key, q.order_lsn, q.order_n;
  EXECUTE format('UPDATE %I.webhook_deliveries d SET delivery_status = ''failed'', error_code = ''skipped'', error_message = coalesce($2, ''skipped by an operator''),
        next_retry_at = NULL, completed_at = now() WHERE d.id = $1', schema) USING delivery, reason;
  GET DIAGNOSTICS n = ROW_COUNT;
  -- The queue's row is gone with the rights of the owner: one of a delivery that only the caller does not see would be missed by nobody.
  IF n = 0 AND row_security_active(format('%I.webhook_deliveries', schema)) THEN
    RAISE EXCEPTION 'role "%" cannot change delivery % of "%"', current_user, delivery, schema
      USING ERRCODE = 'OR002', HINT = 'A policy hides it from this role, or keeps it from changing it; or it is gone. Call this with a role that may see and change the row.';
  END IF;
  RETURN true;
END
$$;
-- +goose StatementEnd

-- Says that nobody wants a dead letter any more. False: there is no such dead letter, or it is not open.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.discard(schema text, delivery uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  n bigint;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  EXECUTE format('UPDATE %I.webhook_dead_letters l SET discarded_at = now()
    WHERE l.delivery_id = $1 AND l.discarded_at IS NULL AND l.replayed_at IS NULL', schema) USING delivery;
  GET DIAGNOSTICS n = ROW_COUNT;
  RETURN n > 0;
END
$$;
-- +goose StatementEnd

-- Asks the relay to queue what an endpoint missed since a time, or since an event. It returns the number of the request in outbox_relay.recoveries.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.recover_endpoint(schema text, endpoint uuid, since timestamptz DEFAULT NULL, event uuid DEFAULT NULL,
  rate numeric DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  known boolean;
  active boolean;
BEGIN
  PERFORM outbox_relay.check_control(schema);
  IF (since IS NULL) = (event IS NULL) THEN
    RAISE EXCEPTION 'name either a time or an event to recover from' USING ERRCODE = 'OR002';
  END IF;
  EXECUTE format('SELECT true, e.is_active FROM %I.webhook_endpoints e WHERE e.id = $1', schema) INTO known, active USING endpoint;
  IF known IS NULL THEN
    RAISE EXCEPTION 'endpoint % does not exist in "%"', endpoint, schema USING ERRCODE = 'OR002', HINT = 'See: outbox-relay endpoints list';
  ELSIF NOT active THEN
    RAISE EXCEPTION 'endpoint % is not active: nothing would be queued for it', endpoint
      USING ERRCODE = 'OR002', HINT = 'Resume it first, in the same transaction if you like: outbox-relay endpoints resume, or outbox_relay.resume_endpoint.';
  END IF;
  IF event IS NOT NULL THEN
    EXECUTE format('SELECT v.occurred_at FROM %I.webhook_events v WHERE v.id = $1', schema) INTO since USING event;
    IF since IS NULL THEN
      RAISE EXCEPTION 'event % does not exist in "%"', event, schema USING ERRCODE = 'OR002', HINT = 'Name a time instead.';
    END IF;
  END IF;
  RETURN outbox_relay.request_recovery(schema, endpoint, since, rate);
END
$$;
-- +goose StatementEnd

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA outbox_relay FROM PUBLIC;
-- An application needs all of these but filling_place, wake_next, in_flight, parked_heads, parked_for_nothing and wake_parked_heads: the functions that it calls call the others with its rights.
GRANT EXECUTE ON FUNCTION outbox_relay.check_control(text), outbox_relay.lock_order(text, uuid[]), outbox_relay.wake_next(text, uuid[], uuid[]),
  outbox_relay.filling_place(text), outbox_relay.in_flight(uuid, uuid), outbox_relay.parked_heads(text, uuid), outbox_relay.wake(text, uuid, interval),
  outbox_relay.enqueue(text, uuid, uuid, timestamptz, uuid, pg_lsn, int), outbox_relay.unqueue(text, uuid),
  outbox_relay.forget_health(text, uuid), outbox_relay.request_recovery(text, uuid, timestamptz, numeric), outbox_relay.wake_parked_heads(uuid), outbox_relay.parked_for_nothing(uuid[]),
  outbox_relay.pause_endpoint(text, uuid, text), outbox_relay.resume_endpoint(text, uuid), outbox_relay.requeue(text, uuid, timestamptz),
  outbox_relay.resend(text, uuid), outbox_relay.replay(text, uuid, uuid, text, timestamptz, timestamptz, int, interval), outbox_relay.skip(text, uuid, text),
  outbox_relay.discard(text, uuid), outbox_relay.recover_endpoint(text, uuid, timestamptz, uuid, numeric) TO outbox_relay_runner;
