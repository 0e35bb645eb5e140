package store

// The statements that record outcomes of one tenant. Every one takes its rows as arrays, in the order of the batch, which is that of
// (event, endpoint): two transactions that write the same rows meet in the same order and cannot deadlock. Every one can be repeated, insertDelivered
// with unlessThere.

// attemptRows is what is known of a delivery whose only attempt, or last one, succeeded. In this place the server takes the arrays apart row by row; as a
// function of FROM each would be made into a table of its own first.
const attemptRows = `(SELECT r.id, r.event, ` + alike + `, r.signature, r.age, r.ended, r.took
  FROM (SELECT unnest($1::uuid[]) AS id, unnest($2::uuid[]) AS event, unnest($3::uuid[]) AS endpoint, unnest($4::int4[]) AS attempt,
    unnest($5::text[]) AS url, unnest($6::text[]) AS method, unnest($7::jsonb[]) AS headers, unnest($8::int4[]) AS status,
    unnest($9::text[]) AS signature, unnest($10::interval[]) AS age, unnest($11::interval[]) AS ended, unnest($12::int4[]) AS took) AS r) AS d`

// outcomeRows adds what any other outcome needs. class is empty where no attempt was made.
const outcomeRows = `(SELECT r.id, r.event, ` + alike + `, r.signature, r.age, r.ended, r.took,
    r.state, r.body, r.class, r.code, r.error, r.answer, r.due, r.leased, r.replay, r.key, r.lsn, r.n, r.park
  FROM unnest($1::uuid[], $2::uuid[], $3::uuid[], $4::int4[], $5::text[], $6::text[], $7::jsonb[], $8::int4[], $9::text[], $10::interval[], $11::interval[], $12::int4[],
    $13::text[], $14::text[], $15::text[], $16::text[], $17::text[], $18::text[], $19::interval[], $20::bool[],
    $21::int4[], $22::uuid[], $23::text[]::pg_lsn[], $24::int4[], $25::bool[])
  AS r (id, event, endpoint, attempt, url, method, headers, status, signature, age, ended, took, state, body, class, code, error, answer, due, leased,
    replay, key, lsn, n, park)) AS d`

// alike are the columns that may be the same in all rows, as most are: then only the first row has a value, and it is sent and read once, JSON above all.
const alike = `coalesce(r.endpoint, ($3::uuid[])[1]) AS endpoint, coalesce(r.attempt, ($4::int4[])[1]) AS attempt, coalesce(r.url, ($5::text[])[1]) AS url,
    coalesce(r.method, ($6::text[])[1]) AS method, coalesce(r.headers, ($7::jsonb[])[1]) AS headers, coalesce(r.status, ($8::int4[])[1]) AS status`

const (
	started  = `now() - d.age`
	finished = `now() - d.ended`
	dueAt    = `now() + d.due`
	queuedAt = `CASE WHEN d.park THEN 'infinity' ELSE ` + dueAt + ` END`
	nextTry  = `CASE WHEN d.due IS NOT NULL AND NOT d.park THEN ` + dueAt + ` END`
)

// insertDelivered is the fast path: a delivery that succeeded before it had a row. One that has a row all the same is a unique violation, after which the
// batch is written once more with unlessThere. To look for the row first and to insert speculatively, which takes one more record in the log, would be an eighth
// of what the server does for a row, and a fifth of what it decodes of the relay's own log; what it is for comes only of a batch whose commit was
// unclear, or of a relay that was killed. On each connection the first batch of a tenant has unlessThere as well: it is refused where the unique index is gone.
const insertDelivered = `
INSERT INTO {tenant}.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, attempt_number, delivery_status, request_url, request_method,
  request_headers, request_signature, response_status_code, response_time_ms, attempted_at, completed_at, relayed)
SELECT d.id, d.event, d.endpoint, d.attempt, 'success', d.url, d.method,
  d.headers, nullif(d.signature, ''), nullif(d.status, 0), d.took, ` + started + `, ` + finished + `, true
FROM ` + attemptRows

// unlessThere leaves deliveries alone that have a row.
const unlessThere = `
ON CONFLICT (webhook_event_id, webhook_endpoint_id) WHERE relayed DO NOTHING`

// insertOutcomes writes the first outcome of deliveries that did not succeed at once. Queue, dead letters and attempts get rows for
// those deliveries only that are really new. $26 is the owner of leases, $27 the tenant.
//
// Nor is one written that what its tenant has missed comes before: see overtakes.
const insertOutcomes = `
WITH d AS MATERIALIZED (SELECT * FROM ` + outcomeRows + `),
fresh AS (
  INSERT INTO {tenant}.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, attempt_number, delivery_status, request_url, request_method,
    request_headers, request_body, request_signature, response_status_code, response_body, response_time_ms, error_message, error_code,
    next_retry_at, max_attempts_reached, attempted_at, completed_at, relayed)
  SELECT d.id, d.event, d.endpoint, d.attempt, d.state, d.url, d.method,
    d.headers, d.body, nullif(d.signature, ''), nullif(d.status, 0), nullif(d.answer, ''), CASE WHEN d.class <> '' THEN d.took END,
    nullif(d.error, ''), nullif(d.code, ''), ` + nextTry + `, d.state = 'failed',
    ` + started + `, CASE WHEN d.due IS NULL THEN ` + finished + ` END, true
  FROM d WHERE NOT (` + overtakes + `)` + unlessThere + `
  RETURNING id),
queued AS (
  INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, leased_by, order_key, order_lsn, order_n)
  SELECT d.id, $27::text, d.endpoint, ` + queuedAt + `, CASE WHEN d.leased THEN $26::uuid END,
    d.key, CASE WHEN d.key IS NOT NULL THEN d.lsn END, CASE WHEN d.key IS NOT NULL THEN d.n END
  FROM d JOIN fresh USING (id) WHERE d.due IS NOT NULL
  ON CONFLICT (delivery_id) DO NOTHING),
dead AS (` + insertDead + ` FROM d JOIN fresh USING (id) WHERE d.state = 'failed'` + deadAgain + `)
` + insertAttempts + ` FROM d JOIN fresh USING (id) WHERE d.class <> ''`

// overtakes tells of a delivery d of the stream, ordered and to be attempted later, that an earlier one of its key may have been lost: its tenant has been
// suspended since, or is having queued what it missed then, up to a later place. It is among that, and comes at its place in the order. Of one that has been
// moved, the slot before still brings some. Only the stream's have a number within their transaction. $27 is the tenant.
const overtakes = `d.key IS NOT NULL AND d.due IS NOT NULL AND NOT d.leased AND d.n > 0
    AND (SELECT t.state = 'suspended' OR t.moved_from IS NULL AND ` + open + ` AND d.lsn < t.backfill_place FROM outbox_relay.tenants t WHERE t.schema = $27::text) IS TRUE`

// updateDelivered records the success of deliveries that have a row. It is a fact whoever holds the lease by now, and also if the delivery has been
// given up meanwhile: then nobody has to send its dead letter again. Only a delivery that was sent again after the attempt began stays as it is: the batch
// is repeated after an unclear commit, and what somebody has asked for since is not to be undone. $13 is the tenant.
const updateDelivered = `
WITH d AS MATERIALIZED (SELECT * FROM ` + attemptRows + `),
held AS MATERIALIZED (
  SELECT q.delivery_id FROM outbox_relay.retry_queue q WHERE q.delivery_id = ANY($1::uuid[]) AND q.tenant = $13::text ORDER BY q.delivery_id FOR UPDATE),
stale AS MATERIALIZED (SELECT w.id FROM d JOIN {tenant}.webhook_deliveries w USING (id) WHERE w.id = ANY($1::uuid[]) AND ` + sentAgain + `),
done AS (DELETE FROM outbox_relay.retry_queue q USING held WHERE q.delivery_id = held.delivery_id AND NOT EXISTS (SELECT FROM stale s WHERE s.id = q.delivery_id)),
closed AS (
  UPDATE {tenant}.webhook_dead_letters l SET replayed_at = now()
  WHERE l.delivery_id = ANY($1::uuid[]) AND l.replayed_at IS NULL AND l.discarded_at IS NULL)
UPDATE {tenant}.webhook_deliveries w
SET delivery_status = 'success', attempt_number = d.attempt, request_url = d.url, request_method = d.method, request_body = NULL,
  request_signature = nullif(d.signature, ''), response_status_code = nullif(d.status, 0), response_body = NULL, response_time_ms = d.took,
  error_message = NULL, error_code = NULL, next_retry_at = NULL, max_attempts_reached = false, attempted_at = ` + started + `, completed_at = ` + finished + `
FROM d WHERE w.id = d.id AND w.delivery_status <> 'success' AND NOT (` + sentAgain + `)`

// sentAgain tells of a delivery w that the attempt d is one of an earlier round: requeue notes when the new one began.
const sentAgain = `w.replay > 0 AND w.attempted_at > ` + started

// updateOutcomes records any other outcome of deliveries that have a row, as long as the lease is still ours: whoever else holds it
// is attempting the delivery and will say what became of it. So is a lease of another replay, which a batch that is repeated may meet. A row that kept no body, since it had been delivered once, gets what was sent now: its
// event may be archived before the next attempt. $26 is the owner of leases, $27 the tenant.
const updateOutcomes = `
WITH d AS MATERIALIZED (SELECT * FROM ` + outcomeRows + `),
held AS MATERIALIZED (
  SELECT q.delivery_id AS id FROM outbox_relay.retry_queue q
  WHERE q.delivery_id = ANY($1::uuid[]) AND q.leased_by = $26::uuid AND q.tenant = $27::text
    AND NOT EXISTS (SELECT FROM d JOIN {tenant}.webhook_deliveries w USING (id) WHERE d.id = q.delivery_id AND w.replay <> d.replay)
  ORDER BY q.delivery_id FOR UPDATE OF q),
back AS (
  UPDATE outbox_relay.retry_queue q SET due_at = ` + queuedAt + `, leased_by = NULL
  FROM d JOIN held USING (id) WHERE q.delivery_id = d.id AND d.due IS NOT NULL),
done AS (DELETE FROM outbox_relay.retry_queue q USING d JOIN held USING (id) WHERE q.delivery_id = d.id AND d.due IS NULL),
dead AS (` + insertDead + ` FROM d JOIN held USING (id) WHERE d.state = 'failed'` + deadAgain + `),
tried AS (` + insertAttempts + ` FROM d JOIN held USING (id) WHERE d.class <> '')
UPDATE {tenant}.webhook_deliveries w
SET delivery_status = d.state, attempt_number = d.attempt, error_message = nullif(d.error, ''), error_code = nullif(d.code, ''),
  next_retry_at = ` + nextTry + `, max_attempts_reached = d.state = 'failed',
  completed_at = CASE WHEN d.due IS NULL THEN ` + finished + ` END,
  request_url = CASE WHEN d.class <> '' THEN d.url ELSE w.request_url END,
  request_method = CASE WHEN d.class <> '' THEN d.method ELSE w.request_method END,
  request_headers = CASE WHEN w.request_body IS NULL AND d.body IS NOT NULL THEN d.headers ELSE w.request_headers END,
  request_body = coalesce(w.request_body, d.body),
  request_signature = CASE WHEN d.class <> '' THEN nullif(d.signature, '') ELSE w.request_signature END,
  response_status_code = CASE WHEN d.class <> '' THEN nullif(d.status, 0) ELSE w.response_status_code END,
  response_body = CASE WHEN d.class <> '' THEN nullif(d.answer, '') ELSE w.response_body END,
  response_time_ms = CASE WHEN d.class <> '' THEN d.took ELSE w.response_time_ms END,
  attempted_at = CASE WHEN d.class <> '' THEN ` + started + ` ELSE w.attempted_at END
FROM d JOIN held USING (id) WHERE w.id = d.id`

const insertDead = `
  INSERT INTO {tenant}.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers,
    request_body, attempts, last_error, last_error_code, last_status_code, last_response_body, replay, order_key, order_lsn, order_n)
  SELECT d.id, d.event, d.endpoint, d.url, d.method, d.headers,
    d.body, d.attempt, nullif(d.error, ''), nullif(d.code, ''), nullif(d.status, 0), nullif(d.answer, ''), d.replay, d.key, d.lsn, d.n`

// deadAgain is for a delivery that has been replayed in vain. One that was skipped before may have kept no body.
const deadAgain = `
  ON CONFLICT (delivery_id) DO UPDATE SET attempts = excluded.attempts, last_error = excluded.last_error, last_error_code = excluded.last_error_code,
    last_status_code = excluded.last_status_code, last_response_body = excluded.last_response_body, request_url = excluded.request_url,
    request_method = excluded.request_method, request_headers = excluded.request_headers, request_body = excluded.request_body, replay = excluded.replay, dead_at = now(), replayed_at = NULL, discarded_at = NULL`

const insertAttempts = `
  INSERT INTO {tenant}.webhook_delivery_attempts (delivery_id, webhook_endpoint_id, attempt_number, error_class, response_status_code,
    error_message, response_body, response_time_ms, attempted_at, replay)
  SELECT d.id, d.endpoint, d.attempt, d.class, nullif(d.status, 0),
    nullif(d.error, ''), nullif(d.answer, ''), d.took, ` + started + `, d.replay`

// disableEndpoints writes nothing but what says that they are disabled.
const disableEndpoints = `
UPDATE {tenant}.webhook_endpoints e SET is_active = false, disabled_reason = d.reason, disabled_at = now()
FROM unnest($1::uuid[], $2::text[]) AS d (id, reason) WHERE e.id = d.id AND e.is_active`
