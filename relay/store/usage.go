package store

import (
	"context"
	"encoding/json"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Usage is what became of the attempts to an endpoint on one day (UTC). Every attempt counts once: as a success, a failure or a timeout.
type Usage struct {
	Endpoint
	Day                           time.Time
	Successes, Failures, Timeouts int64
	Total, Min, Max               time.Duration // of the answer times
	Errors                        map[string]int64
	LastUsed                      time.Time // by this process's clock
}

// Attempts is how many there were.
func (u *Usage) Attempts() int64 { return u.Successes + u.Failures + u.Timeouts }

// commonError is the class that failed most.
func (u *Usage) commonError() string {
	var best string
	for class, n := range u.Errors {
		if m := u.Errors[best]; n > m || n == m && class < best {
			best = class
		}
	}
	return best
}

// Trigger is the last time a subscription led to a delivery.
type Trigger struct {
	Subscription outbox.UUID
	Last         time.Time // by this process's clock
}

// totalBefore is what the attempts took that a row of statistics s has. One that another dispatcher wrote knows only their average.
const totalBefore = `coalesce(s.total_response_ms, coalesce(s.avg_response_time_ms, 0)::int8 * s.total_attempts)`

// errorCounts are the attempts by class of error that a row of statistics s and what is added to it have, a row for each.
const errorCounts = `(SELECT c.key, sum(c.value::int8)::int8 AS n
    FROM (SELECT * FROM jsonb_each_text(coalesce(s.error_counts, '{}')) UNION ALL SELECT * FROM jsonb_each_text(excluded.error_counts)) c GROUP BY c.key) c`

const (
	// An adopted table's default for the id may find nothing in our search path, which is empty.
	saveStats = `
INSERT INTO {tenant}.webhook_delivery_stats AS s (id, webhook_endpoint_id, date_recorded, total_attempts, successful_deliveries, failed_deliveries,
  timeout_deliveries, total_response_ms, avg_response_time_ms, min_response_time_ms, max_response_time_ms, error_counts, most_common_error_code, error_rate)
SELECT gen_random_uuid(), u.id, u.day::date, u.ok + u.failed + u.late, u.ok, u.failed, u.late, u.total, u.total / (u.ok + u.failed + u.late), u.least, u.most,
  u.errors, nullif(u.error, ''),
  round(100.0 * (u.failed + u.late) / (u.ok + u.failed + u.late), 2)
FROM unnest($1::uuid[], $2::text[], $3::int4[], $4::int4[], $5::int4[], $6::int8[], $7::int4[], $8::int4[], $9::text[], $10::text[]::jsonb[])
  AS u (id, day, ok, failed, late, total, least, most, error, errors)
JOIN {tenant}.webhook_endpoints e ON e.id = u.id ORDER BY 2, 3
ON CONFLICT (webhook_endpoint_id, date_recorded) DO UPDATE SET
  total_attempts = s.total_attempts + excluded.total_attempts,
  successful_deliveries = s.successful_deliveries + excluded.successful_deliveries,
  failed_deliveries = s.failed_deliveries + excluded.failed_deliveries,
  timeout_deliveries = s.timeout_deliveries + excluded.timeout_deliveries,
  total_response_ms = ` + totalBefore + ` + excluded.total_response_ms,
  avg_response_time_ms = (` + totalBefore + ` + excluded.total_response_ms) / (s.total_attempts + excluded.total_attempts),
  min_response_time_ms = least(s.min_response_time_ms, excluded.min_response_time_ms),
  max_response_time_ms = greatest(s.max_response_time_ms, excluded.max_response_time_ms),
  error_counts = (SELECT coalesce(jsonb_object_agg(c.key, c.n), '{}') FROM ` + errorCounts + `),
  most_common_error_code = coalesce((SELECT c.key FROM ` + errorCounts + ` ORDER BY c.n DESC, c.key LIMIT 1), s.most_common_error_code),
  error_rate = round(100.0 * (s.failed_deliveries + s.timeout_deliveries + excluded.failed_deliveries + excluded.timeout_deliveries)
    / (s.total_attempts + excluded.total_attempts), 2), updated_at = now()`

	// Once a minute is enough, and spares the row versions. Who has the row locked will see it next time.
	touchEndpoints = `
UPDATE {tenant}.webhook_endpoints e SET last_used_at = now() - u.age * interval '1 microsecond'
FROM (SELECT e.id, u.age FROM {tenant}.webhook_endpoints e JOIN unnest($1::uuid[], $2::int8[]) AS u (id, age) USING (id)
  WHERE e.last_used_at IS NULL OR e.last_used_at < now() - interval '1 minute' ORDER BY e.id FOR NO KEY UPDATE OF e SKIP LOCKED) u WHERE e.id = u.id`

	touchSubscriptions = `
UPDATE {tenant}.webhook_subscriptions s SET last_triggered_at = now() - u.age * interval '1 microsecond'
FROM (SELECT s.id, u.age FROM {tenant}.webhook_subscriptions s JOIN unnest($1::uuid[], $2::int8[]) AS u (id, age) USING (id)
  WHERE s.last_triggered_at IS NULL OR s.last_triggered_at < now() - interval '1 minute' ORDER BY s.id FOR NO KEY UPDATE OF s SKIP LOCKED) u WHERE s.id = u.id`
)

// SaveUsage adds to the statistics of one tenant and notes when its endpoints and subscriptions were used last, in one transaction that a crash
// of the server may lose. What is wrong with the tenant's own tables is a *TenantError.
func (s *Store) SaveUsage(ctx context.Context, tenant string, usage []*Usage, triggers []Trigger) error {
	var (
		ids              []outbox.UUID
		days, errs       []string
		counts           []string // of errors, as JSON
		ok, failed, late []int32
		total, ages      []int64
		least, most      []int32
		subscriptions    []outbox.UUID
		subscriptionAges []int64
		millis           = func(d time.Duration) int32 { return int32(min(d.Milliseconds(), 1<<31-1)) } //nolint:gosec // bounded
		count            = func(n int64) int32 { return int32(min(n, 1<<31-1)) }                        //nolint:gosec // bounded
	)
	for _, u := range usage {
		counted, err := json.Marshal(u.Errors)
		if u.Errors == nil || err != nil { // which a map of numbers never is
			counted = []byte("{}")
		}
		counts = append(counts, string(counted))
		ids, days, errs = append(ids, u.ID), append(days, u.Day.Format(time.DateOnly)), append(errs, short(u.commonError(), maxCode))
		ok, failed, late = append(ok, count(u.Successes)), append(failed, count(u.Failures)), append(late, count(u.Timeouts))
		total, ages = append(total, u.Total.Milliseconds()), append(ages, time.Since(u.LastUsed).Microseconds())
		least, most = append(least, millis(u.Min)), append(most, millis(u.Max))
	}
	for _, t := range triggers {
		subscriptions, subscriptionAges = append(subscriptions, t.Subscription), append(subscriptionAges, time.Since(t.Last).Microseconds())
	}
	conn, err := s.pool.Acquire(ctx)
	if err == nil {
		defer conn.Release()
		p := beginPipeline(ctx, conn.Conn())
		p.add("BEGIN")
		p.add("SET LOCAL synchronous_commit = off") // a thousand tenants would wait for the disk a thousand times
		p.add(forTenant(saveStats, tenant), ids, days, ok, failed, late, total, least, most, errs, counts)
		p.add(forTenant(touchEndpoints, tenant), ids, ages)
		p.add(forTenant(touchSubscriptions, tenant), subscriptions, subscriptionAges)
		p.add("COMMIT")
		err = inTransaction(ctx, conn.Conn(), p.run())
	}
	return tenantFault(err, tenant, "save usage of tenant %q", tenant)
}
