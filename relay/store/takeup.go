package store

import "github.com/neo-commons/outbox-relay/outbox"

// takeUp queues deliveries of a backfill that have a row which waits, and no place in the queue: their tenant was removed, or its schema renamed, or taken to
// another database. They go on with the attempts that they have had. One whose id waits for another tenant is a copy, and stays as it is. Only for an order its endpoint has
// been locked, as everybody does before he changes one. $1 is the tenant.
const takeUp = `
WITH waiting AS MATERIALIZED (
  SELECT w.id, d.endpoint, d.key, d.lsn, d.n, CASE WHEN d.park THEN 'infinity' ELSE now() END AS due
  FROM unnest($2::uuid[], $3::uuid[], $4::uuid[], $5::text[]::pg_lsn[], $6::int4[], $7::bool[]) AS d (event, endpoint, key, lsn, n, park)
  JOIN {tenant}.webhook_deliveries w ON w.webhook_event_id = d.event AND w.webhook_endpoint_id = d.endpoint AND w.relayed
  WHERE w.delivery_status IN ('pending', 'retrying') AND NOT EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.delivery_id = w.id)
  ORDER BY d.event, d.endpoint),
unordered AS (
  INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
  SELECT l.id, $1::text, l.endpoint, l.due FROM waiting l WHERE l.key IS NULL ON CONFLICT (delivery_id) DO NOTHING RETURNING delivery_id AS id),
ordered AS MATERIALIZED (
  SELECT l.id FROM waiting l WHERE CASE WHEN l.key IS NOT NULL THEN outbox_relay.enqueue($1::text, l.id, l.endpoint, l.due, l.key, l.lsn, l.n) END)
UPDATE {tenant}.webhook_deliveries w SET next_retry_at = CASE WHEN w.delivery_status = 'retrying' THEN now() END
FROM (SELECT u.id FROM unordered u UNION ALL SELECT o.id FROM ordered o) t WHERE w.id = t.id`

// takeUps returns the statements that take up what first, the first outcomes of deliveries as far as the batch knows, has of a backfill. They come after those
// that insert the rest of it.
func (t *tenantBatch) takeUps(first []*Outcome) []statement {
	var (
		events, endpoints, keys []outbox.UUID
		lsns                    []string
		ns                      []int32
		parks                   []bool
	)
	for _, o := range first {
		if d := o.Delivery; o.Reason == DeferBackfill {
			events, endpoints, keys = append(events, d.EventID), append(endpoints, d.EndpointID), append(keys, d.Order.Key)
			lsns, ns, parks = append(lsns, d.Order.LSN.String()), append(ns, d.Order.N), append(parks, o.Park)
		}
	}
	if len(events) == 0 {
		return nil
	}
	return []statement{{sql: forTenant(takeUp, t.tenant), args: []any{t.tenant, given(events), endpoints, keys, lsns, ns, parks}}}
}
