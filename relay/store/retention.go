package store

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Kept is a kind of rows that only record what has happened.
type Kept string

// The kinds.
const (
	KeptDeliveries  Kept = "deliveries"   // that have succeeded or were cancelled, or failed and their endpoint is gone
	KeptAttempts    Kept = "attempts"     // that failed
	KeptDeadLetters Kept = "dead letters" // that were replayed or discarded
	KeptStats       Kept = "statistics"
	KeptRecoveries  Kept = "recoveries" // that have ended
	KeptHealth      Kept = "health"     // of endpoints that are gone
)

// The ids of deliveries are version 7: their order is that of time, and so the primary key finds the old ones. $1 is the greatest id of the time
// before which rows go, $2 the age, $3 how many at most, $4 where to begin: rows that stay would be read over each time, and what has just gone as well.
//
// An older dispatcher's deliveries stay. They may be many, with ids of the same kind, and all of them before ours: nothing from before the tenant was
// added, $5, is looked at, but for an hour by which clocks may differ. So what is left of an earlier time as a tenant stays as well.
const (
	purgeDeliveries = `
DELETE FROM {tenant}.webhook_deliveries d WHERE d.id = ANY(ARRAY(
  SELECT o.id FROM {tenant}.webhook_deliveries o WHERE o.id < $1::uuid AND o.id >= coalesce($4::uuid, '00000000-0000-0000-0000-000000000000') AND o.relayed
    AND o.id >= (SELECT (lpad(to_hex((extract(epoch FROM t.since - interval '1 hour') * 1000)::int8), 12, '0') || repeat('0', 20))::uuid
      FROM outbox_relay.tenants t WHERE t.schema = $5::text)
    AND (o.delivery_status IN ('success', 'cancelled')
      OR o.delivery_status = 'failed' AND NOT EXISTS (SELECT FROM {tenant}.webhook_endpoints e WHERE e.id = o.webhook_endpoint_id))
    AND o.completed_at < now() - $2::int8 * interval '1 microsecond'
    AND NOT EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.delivery_id = o.id)
  ORDER BY o.id LIMIT $3::int4)) RETURNING d.id`
	purgeAttempts = `
DELETE FROM {tenant}.webhook_delivery_attempts a WHERE a.id = ANY(ARRAY(
  SELECT o.id FROM {tenant}.webhook_delivery_attempts o WHERE o.delivery_id < $1::uuid AND o.delivery_id >= coalesce($4::uuid, '00000000-0000-0000-0000-000000000000') AND o.attempted_at < now() - $2::int8 * interval '1 microsecond'
  ORDER BY o.delivery_id LIMIT $3::int4)) RETURNING a.delivery_id`
	purgeDeadLetters = `
DELETE FROM {tenant}.webhook_dead_letters l WHERE l.id = ANY(ARRAY(
  SELECT o.id FROM {tenant}.webhook_dead_letters o WHERE o.delivery_id < $1::uuid AND o.delivery_id >= coalesce($4::uuid, '00000000-0000-0000-0000-000000000000')
    AND coalesce(o.replayed_at, o.discarded_at) < now() - $2::int8 * interval '1 microsecond'
    AND NOT EXISTS (SELECT FROM outbox_relay.retry_queue q WHERE q.delivery_id = o.delivery_id)
  ORDER BY o.delivery_id LIMIT $3::int4)) RETURNING l.delivery_id`
	purgeStats = `
DELETE FROM {tenant}.webhook_delivery_stats s WHERE s.id = ANY(ARRAY(
  SELECT o.id FROM {tenant}.webhook_delivery_stats o WHERE $1::uuid IS NOT NULL AND o.date_recorded < ((now() - $2::int8 * interval '1 microsecond') AT TIME ZONE 'UTC')::date
  LIMIT $3::int4)) RETURNING coalesce($4::uuid, $1::uuid)`
)

// Rows of the relay's own tables are of a tenant, $5, or, where that is empty, of none that is registered any more. There are few: $1 and $4 are of no use.
const (
	purgeRecoveries = `
DELETE FROM outbox_relay.recoveries r WHERE r.id = ANY(ARRAY(
  SELECT o.id FROM outbox_relay.recoveries o WHERE o.done_at < now() - $2::int8 * interval '1 microsecond'
    AND (o.tenant = $5::text OR $5::text = '' AND NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = o.tenant))
  ORDER BY o.id LIMIT $3::int4)) RETURNING coalesce($4::uuid, $1::uuid)`
	purgeHealth = `
DELETE FROM outbox_relay.endpoint_health h WHERE h.tenant = $5::text AND h.endpoint_id = ANY(ARRAY(
  SELECT o.endpoint_id FROM outbox_relay.endpoint_health o WHERE o.tenant = $5::text AND o.updated_at < now() - $2::int8 * interval '1 microsecond'
    AND NOT EXISTS (SELECT FROM {tenant}.webhook_endpoints e WHERE e.id = o.endpoint_id)
  ORDER BY 1 LIMIT $3::int4)) RETURNING coalesce($4::uuid, $1::uuid)`
	// What a replica had seen before the tenant was removed, and saved afterwards.
	purgeStrayHealth = `
DELETE FROM outbox_relay.endpoint_health h WHERE (h.tenant, h.endpoint_id) IN (
  SELECT o.tenant, o.endpoint_id FROM outbox_relay.endpoint_health o WHERE $5::text = '' AND o.updated_at < now() - $2::int8 * interval '1 microsecond'
    AND NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = o.tenant)
  LIMIT $3::int4) RETURNING coalesce($4::uuid, $1::uuid)`
)

// Purge deletes up to limit rows of a kind that are older than age, and returns how many there were. They are looked for from a delivery on, which is the zero value
// at first, and moved past what has gone. No tenant: what recoveries and health there are of none that is registered. What is wrong with the tenant's own tables is a *TenantError.
func (s *Store) Purge(ctx context.Context, tenant string, kind Kept, age time.Duration, limit int, from *outbox.UUID) (n int, err error) {
	sql := map[Kept]string{
		KeptDeliveries: purgeDeliveries, KeptAttempts: purgeAttempts, KeptDeadLetters: purgeDeadLetters, KeptStats: purgeStats,
		KeptRecoveries: purgeRecoveries, KeptHealth: purgeHealth,
	}[kind]
	if kind == KeptHealth && tenant == "" {
		sql = purgeStrayHealth
	}
	args := []any{FirstID(time.Now().Add(-age)), age.Microseconds(), limit, *from}
	if kind == KeptDeliveries || kind == KeptRecoveries || kind == KeptHealth {
		args = append(args, tenant)
	}
	rows, err := s.pool.Query(ctx, forTenant(sql, tenant), args...)
	if err == nil {
		last := *from
		var id outbox.UUID
		_, err = pgx.ForEachRow(rows, []any{&id}, func() error {
			if n++; bytes.Compare(id[:], last[:]) > 0 {
				last = id
			}
			return nil
		})
		if err == nil {
			*from = last
		}
	}
	switch {
	case isTenants(err):
		return 0, &TenantError{Tenant: tenant, Err: err}
	case err != nil:
		return 0, fmt.Errorf("purge %s of tenant %q: %w", kind, tenant, err)
	}
	return n, nil
}
