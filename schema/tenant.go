package schema

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"github.com/jackc/pgx/v5"
)

// Tenant is a row of outbox_relay.tenants.
type Tenant struct {
	Schema  string
	State   string    // active, paused or suspended
	Reason  string    // why it is not active; "" when nobody said
	Version int       // the shape its tables have
	Since   time.Time // of State
	Added   time.Time
	// Backfill says which earlier events are being queued or were: unprocessed, since, missed, or "".
	Backfill       string
	BackfillSince  time.Time // zero unless Backfill is since
	BackfillDoneAt time.Time // zero while it is under way
	Shard          int
	// Paused says that an operator has paused it. A suspended one is paused once that is over, and PauseReason says why; "" when nobody said.
	Paused      bool
	PauseReason string
}

// Tenants lists the registered tenants by name.
func Tenants(ctx context.Context, conn Querier) ([]Tenant, error) {
	rows, err := conn.Query(ctx, `SELECT schema, state, coalesce(reason, ''), state = 'paused' OR pause IS NOT NULL, coalesce(pause, ''),
		version, state_since, since, coalesce(backfill, ''), backfill_since, backfill_done_at, shard
		FROM outbox_relay.tenants ORDER BY schema`)
	if err != nil {
		return nil, opError("list tenants", err)
	}
	tenants, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Tenant, err error) {
		var since, done *time.Time
		err = row.Scan(&t.Schema, &t.State, &t.Reason, &t.Paused, &t.PauseReason, &t.Version, &t.Since, &t.Added, &t.Backfill, &since, &done, &t.Shard)
		if since != nil {
			t.BackfillSince = *since
		}
		if done != nil {
			t.BackfillDoneAt = *done
		}
		return t, err
	})
	return tenants, opError("list tenants", err)
}

// Candidates lists the schemas that hold a webhook_events table, are not registered and match one of the patterns, which are those of
// path.Match (tenant_*). A malformed pattern is an error.
func Candidates(ctx context.Context, conn Querier, patterns []string) ([]string, error) {
	schemas, err := collect[string](ctx, conn, `
		SELECT n.nspname::text FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid
		 WHERE c.relname = 'webhook_events' AND c.relkind IN ('r', 'p') AND n.nspname !~ '^pg_' AND n.nspname NOT IN ('information_schema', 'outbox_relay')
		   AND NOT EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.schema = n.nspname) ORDER BY 1`)
	if err != nil {
		return nil, opError("look for new tenants", err)
	}
	var found []string
	for _, schema := range schemas {
		for _, pattern := range patterns {
			ok, err := path.Match(pattern, schema)
			if err != nil {
				return nil, fmt.Errorf("tenant pattern %q: %w", pattern, err)
			}
			if ok {
				found = append(found, schema)
				break
			}
		}
	}
	return found, nil
}

// RemoveTenant ends deliveries for a schema and forgets what it has queued; its tables and rows stay. The schema may be gone already.
// A schema that is no tenant is ErrNotTenant. progress is told when it has to wait; nil means nobody is. So it is with the functions below.
func RemoveTenant(ctx context.Context, dsn, schema string, progress func(step string)) error {
	return change(ctx, dsn, fmt.Sprintf("remove tenant %q", schema), progress, "SELECT outbox_relay.remove_tenant($1)", schema)
}

// PauseTenant holds a tenant's deliveries back until ResumeTenant; nothing is lost. A suspended one stays suspended, and is paused when that is over. A
// schema that is no tenant is ErrNotTenant.
func PauseTenant(ctx context.Context, dsn, schema, reason string, progress func(step string)) (suspended bool, err error) {
	op := fmt.Sprintf("pause tenant %q", schema)
	err = transact(ctx, dsn, op, progress, func(tx pgx.Tx) error {
		if err := known(ctx, tx, op, "SELECT outbox_relay.pause_tenant($1, nullif($2, ''))", schema, reason); err != nil {
			return err
		}
		return tx.QueryRow(ctx, "SELECT t.state = 'suspended' FROM outbox_relay.tenants t WHERE t.schema = $1", schema).Scan(&suspended)
	})
	return suspended, err
}

// ResumeTenant lets a paused or suspended tenant go on; what a suspended one missed is queued. A schema that is no tenant is ErrNotTenant.
func ResumeTenant(ctx context.Context, dsn, schema string, progress func(step string)) error {
	return change(ctx, dsn, fmt.Sprintf("resume tenant %q", schema), progress, "SELECT outbox_relay.resume_tenant($1)", schema)
}

// change calls a function that says whether the tenant was known.
func change(ctx context.Context, dsn, op string, progress func(step string), call string, args ...any) error {
	return transact(ctx, dsn, op, progress, func(tx pgx.Tx) error { return known(ctx, tx, op, call, args...) })
}

// known calls such a function within a transaction.
func known(ctx context.Context, tx pgx.Tx, op, call string, args ...any) error {
	var known bool
	if err := tx.QueryRow(ctx, call, args...).Scan(&known); err != nil {
		return err
	}
	if !known {
		return &Error{Op: op, Err: ErrNotTenant, Hint: "See: outbox-relay tenants list"}
	}
	return nil
}

func transact(ctx context.Context, dsn, op string, progress func(step string), f func(pgx.Tx) error) (err error) {
	conn, err := connect(ctx, dsn)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	defer func() { err = errors.Join(err, closeConn(ctx, conn.Conn())) }()
	if progress == nil {
		progress = func(string) {}
	}
	in := &installer{conn: conn, progress: progress}
	return in.short(ctx, op, f)
}
