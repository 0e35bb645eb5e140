package store

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Endpoint names an endpoint.
type Endpoint struct {
	Tenant string
	ID     outbox.UUID
}

// Health is what a replica has seen of an endpoint since it was saved last.
type Health struct {
	Endpoint
	// All by this process's clock, and zero if there is nothing to say: the first failure since the last success, or since the last save; how long the
	// breaker stays open; the last success.
	Failing, OpenUntil, Succeeded time.Time
	LastError                     string
}

// Trouble is an endpoint that every replica has seen failing.
type Trouble struct {
	Endpoint
	Failing   time.Duration // from the first failure to the last one known; zero while failures have not come steadily
	Warned    bool
	OpenFor   time.Duration // what is left of the breaker's time; zero or less: nothing
	LastError string
}

// An endpoint that nothing is sent to does not fail. Two failures with five days of silence between them are not five days of failing: no pause may be
// longer than a third of the time, and after one of three days, a weekend and a night, the time begins anew.
const (
	steadily = `h.pause <= (h.failed_at - h.failing_since) / 3`
	goesOn   = `h.failing_since IS NOT NULL AND excluded.failing_since - h.failed_at <= interval '3 days'`

	// lockHealth comes first: of two replicas, one may have seen fail what the other has seen recover, and each would hold what the other waits for.
	lockHealth = `
SELECT FROM outbox_relay.endpoint_health h WHERE (h.tenant, h.endpoint_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[])) ORDER BY h.tenant, h.endpoint_id FOR UPDATE`

	saveFailing = `
INSERT INTO outbox_relay.endpoint_health AS h (tenant, endpoint_id, failing_since, failed_at, open_until, last_error)
SELECT n.tenant, n.id, CASE WHEN n.failing > 0 THEN now() - n.failing * interval '1 microsecond' END, CASE WHEN n.failing > 0 THEN now() END,
  CASE WHEN n.open > 0 THEN now() + n.open * interval '1 microsecond' END, nullif(n.error, '')
FROM unnest($1::text[], $2::uuid[], $3::int8[], $4::int8[], $5::text[]) AS n (tenant, id, failing, open, error) ORDER BY 1, 2
ON CONFLICT (tenant, endpoint_id) DO UPDATE SET
  failing_since = CASE WHEN excluded.failing_since IS NULL OR ` + goesOn + ` THEN h.failing_since ELSE excluded.failing_since END,
  pause = CASE WHEN excluded.failing_since IS NULL THEN h.pause WHEN ` + goesOn + ` THEN greatest(h.pause, excluded.failing_since - h.failed_at) ELSE '0' END,
  failed_at = coalesce(excluded.failed_at, h.failed_at),
  open_until = coalesce(excluded.open_until, h.open_until), last_error = coalesce(excluded.last_error, h.last_error), updated_at = now()`

	saveRecovered = `
DELETE FROM outbox_relay.endpoint_health h USING (
  SELECT g.tenant, g.endpoint_id FROM outbox_relay.endpoint_health g
  JOIN unnest($1::text[], $2::uuid[], $3::int8[]) AS n (tenant, id, succeeded) ON g.tenant = n.tenant AND g.endpoint_id = n.id
  WHERE coalesce(g.failing_since, g.updated_at) < now() - n.succeeded * interval '1 microsecond' ORDER BY 1, 2 FOR UPDATE OF g) gone
WHERE h.tenant = gone.tenant AND h.endpoint_id = gone.endpoint_id
RETURNING h.tenant, h.endpoint_id, h.warned_at IS NOT NULL`
)

// SaveHealth tells all replicas what this one has seen. It returns the endpoints that have recovered after a warning.
func (s *Store) SaveHealth(ctx context.Context, seen []Health) (recovered []Endpoint, err error) {
	var tenants, wellTenants, errs []string
	var ids, wellIDs []outbox.UUID
	var failing, open, succeeded []int64
	now := time.Now()
	for i := range seen {
		h := &seen[i]
		if !h.Succeeded.IsZero() {
			wellTenants, wellIDs = append(wellTenants, h.Tenant), append(wellIDs, h.ID)
			succeeded = append(succeeded, now.Sub(h.Succeeded).Microseconds())
		}
		if !h.Failing.IsZero() || h.OpenUntil.After(now) {
			tenants, ids, errs = append(tenants, h.Tenant), append(ids, h.ID), append(errs, text(h.LastError))
			failing, open = append(failing, age(h.Failing, now)), append(open, age(now, h.OpenUntil))
		}
	}
	err = pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, lockHealth, slices.Concat(wellTenants, tenants), slices.Concat(wellIDs, ids)); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, saveRecovered, wellTenants, wellIDs, succeeded)
		var e Endpoint
		var warned bool
		if _, err := pgx.ForEachRow(rows, []any{&e.Tenant, &e.ID, &warned}, func() error {
			if warned {
				recovered = append(recovered, e)
			}
			return nil
		}); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, saveFailing, tenants, ids, failing, open, errs)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("save health of endpoints: %w", err)
	}
	return recovered, nil
}

// age is how long before now t is, in microseconds, and at least one; zero: t is zero or later.
func age(t, now time.Time) int64 {
	if t.IsZero() || t.After(now) {
		return 0
	}
	return max(now.Sub(t).Microseconds(), 1)
}

// Troubled lists the endpoints in trouble, those that have failed the longest first.
func (s *Store) Troubled(ctx context.Context) ([]Trouble, error) {
	rows, _ := s.pool.Query(ctx, `
SELECT h.tenant, h.endpoint_id, coalesce(extract(epoch FROM CASE WHEN `+steadily+` THEN h.failed_at - h.failing_since END) * 1e6, 0)::int8, h.warned_at IS NOT NULL,
  coalesce(extract(epoch FROM h.open_until - now()) * 1e6, 0)::int8, coalesce(h.last_error, '')
FROM outbox_relay.endpoint_health h ORDER BY h.failing_since NULLS LAST, 1, 2`)
	list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Trouble, err error) {
		var failing, open int64
		err = row.Scan(&t.Tenant, &t.ID, &failing, &t.Warned, &open, &t.LastError)
		t.Failing, t.OpenFor = time.Duration(failing)*time.Microsecond, time.Duration(open)*time.Microsecond
		return t, err
	})
	if err != nil {
		return nil, fmt.Errorf("read health of endpoints: %w", err)
	}
	return list, nil
}

// Warned notes that the warning about an endpoint has been given. False: it was given already, or the endpoint has recovered.
func (s *Store) Warned(ctx context.Context, e Endpoint) (bool, error) {
	tag, err := s.pool.Exec(ctx, `UPDATE outbox_relay.endpoint_health SET warned_at = now()
WHERE tenant = $1::text AND endpoint_id = $2::uuid AND failing_since IS NOT NULL AND warned_at IS NULL`, e.Tenant, e.ID)
	if err != nil {
		return false, fmt.Errorf("note a warning: %w", err)
	}
	return tag.RowsAffected() > 0, nil
}

const disableEndpoint = `
UPDATE {tenant}.webhook_endpoints e SET is_active = false, disabled_reason = $2::text, disabled_at = now() WHERE e.id = $1::uuid AND e.is_active`

// Disable makes an endpoint inactive and keeps the reason. False: it is not active, or is gone. On an error its health stays as it is.
func (s *Store) Disable(ctx context.Context, e Endpoint, reason string) (bool, error) {
	tag, err := s.pool.Exec(ctx, forTenant(disableEndpoint, e.Tenant), e.ID, text(reason))
	if err != nil && code(err) != codeUndefinedTable {
		return false, fmt.Errorf("disable endpoint %s of tenant %q: %w", e.ID, e.Tenant, err)
	}
	disabled := err == nil && tag.RowsAffected() > 0
	return disabled, s.ForgetHealth(ctx, e)
}

// ForgetHealth is for an endpoint that begins anew.
func (s *Store) ForgetHealth(ctx context.Context, e Endpoint) error {
	if _, err := s.pool.Exec(ctx, `DELETE FROM outbox_relay.endpoint_health WHERE tenant = $1::text AND endpoint_id = $2::uuid`, e.Tenant, e.ID); err != nil {
		return fmt.Errorf("forget the health of endpoint %s: %w", e.ID, err)
	}
	return nil
}
