package store

import (
	"context"
	"slices"

	"github.com/jackc/pgx/v5"
)

// existing lists the tenants that are still there. A table that is missing from one may be back in a moment: that is no reason to give anything up.
const existing = `
SELECT t.schema FROM outbox_relay.tenants t JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema WHERE t.schema = ANY($1::text[])`

// suspend stops a tenant. What it misses from now on is queued when it is resumed: everything after the later of the last checkpoint
// and its admission. A pause is kept beside it, with its reason. A backfill that is under way keeps its mode and starts over then. The checkpoint is that of the tenant's own shard: another one may be
// the writer, of a delivery that it claimed before the tenant was moved.
const suspend = `
UPDATE outbox_relay.tenants t
SET state = 'suspended', reason = $2::text, pause = CASE t.state WHEN 'paused' THEN coalesce(t.reason, '') END,
  backfill_upto = NULL, backfill_place = NULL, ` + markMissed + `
FROM (SELECT (SELECT g.snapshot FROM outbox_relay.progress g WHERE g.slot = $3::text OR g.shard = o.shard
    ORDER BY g.shard <> o.shard, g.slot <> $3::text LIMIT 1) AS snapshot FROM outbox_relay.tenants o WHERE o.schema = $1::text) p
WHERE t.schema = $1::text AND t.state <> 'suspended'`

// writeApart is the way once a tenant has an error: each tenant behind a savepoint of its own, so that only those in trouble are left
// out. It takes a few round trips for each tenant.
func (w *writer) writeApart(ctx context.Context, conn *pgx.Conn) ([]TenantError, error) {
	broken, err := w.eachApart(ctx, conn)
	if err != nil {
		return nil, inTransaction(ctx, conn, err)
	}
	if slices.ContainsFunc(broken, func(te TenantError) bool { return te.Suspended }) {
		w.last = nil // which says that all of it is written
	}
	p := beginPipeline(ctx, conn)
	w.commit(p)
	return broken, inTransaction(ctx, conn, p.run())
}

func (w *writer) eachApart(ctx context.Context, conn *pgx.Conn) ([]TenantError, error) {
	schemas := make([]string, len(w.batches))
	for i := range w.batches {
		schemas[i] = w.batches[i].tenant
	}
	p := beginPipeline(ctx, conn)
	w.begin(p)
	p.add("SET LOCAL lock_timeout = '1s'") // for each tenant whose table is locked, all others wait once more
	p.add("SET CONSTRAINTS ALL IMMEDIATE") // a deferred constraint of one tenant's would fail the COMMIT of all
	// If our own table is what cannot be written to, no tenant is to blame.
	p.add("LOCK TABLE outbox_relay.retry_queue IN ROW EXCLUSIVE MODE")
	if err := p.run(); err != nil {
		return nil, err
	}
	rows, _ := conn.Query(ctx, existing, schemas)
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}

	var broken []TenantError
	for i := range w.batches {
		t := &w.batches[i]
		if !slices.Contains(found, t.tenant) {
			broken = append(broken, TenantError{Tenant: t.tenant, Err: ErrGone, Discarded: len(t.outcomes)})
			continue
		}
		te, err := w.writeTenant(ctx, conn, t)
		if err != nil {
			return nil, err
		}
		if te != nil {
			broken = append(broken, *te)
		}
	}
	return broken, nil
}

// writeTenant writes one tenant's part, or suspends the tenant. The error is one that concerns everybody.
func (w *writer) writeTenant(ctx context.Context, conn *pgx.Conn, t *tenantBatch) (*TenantError, error) {
	err := w.tryTenant(ctx, conn, t)
	switch {
	case err == nil:
		return nil, nil //nolint:nilnil // neither kind of error
	case !isTenants(err):
		return nil, err
	}
	p := beginPipeline(ctx, conn)
	p.add("ROLLBACK TO SAVEPOINT tenant")
	p.add(suspend, t.tenant, text(err.Error()), w.slot)
	return &TenantError{Tenant: t.tenant, Err: err, Suspended: true, Lost: len(t.outcomes)}, p.run()
}

// tryTenant writes one tenant's part behind a savepoint.
func (w *writer) tryTenant(ctx context.Context, conn *pgx.Conn, t *tenantBatch) error {
	// On its own: a statement that cannot even be parsed must not come before it.
	if _, err := conn.Exec(ctx, "SAVEPOINT tenant"); err != nil {
		return err
	}
	p := beginPipeline(ctx, conn)
	if tenants, endpoints := ordered(*t); len(endpoints) > 0 {
		p.add(lockOrder, tenants, endpoints) // an application may hold one in a transaction of its own for as long as it likes
	}
	p.addAll(t.statements(w.owner, true))
	p.add("RELEASE SAVEPOINT tenant")
	return p.run()
}
