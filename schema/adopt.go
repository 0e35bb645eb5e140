package schema

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// AddOptions of AddTenant. The zero value delivers what is committed from now on.
type AddOptions struct {
	// Unprocessed also queues, once, the events whose processed_at is null: for a tenant that comes from a polling dispatcher.
	Unprocessed bool
	// Since also queues, once, the events that occurred at or after it. Zero means none. Unprocessed and Since exclude each other.
	Since time.Time
	// Progress is told of each step as it begins, from the calling goroutine. nil means nobody is.
	Progress func(step string)
}

// AddTenant makes a schema a tenant: creates the tables it lacks, adopts those it has, then registers it. No step blocks writers for more
// than a second; where an open transaction is in the way it tries again until ctx ends. Repeating it, also after a failure, does no
// harm. A schema that does not fit is ErrUnfit, with every reason. A role that may only call outbox_relay.add_tenant can add schemas whose
// tables are new or small; others are ErrTooLarge.
func AddTenant(ctx context.Context, dsn, schema string, o AddOptions) error {
	if o.Unprocessed && !o.Since.IsZero() {
		return &Error{Op: fmt.Sprintf("add tenant %q", schema), Err: errors.New("both unprocessed and since are given"), Hint: "Choose one."}
	}
	return install(ctx, dsn, o.Progress, func(in *installer) error { return in.addTenant(ctx, schema, o) })
}

func (in *installer) addTenant(ctx context.Context, schema string, o AddOptions) error {
	op := fmt.Sprintf("add tenant %q", schema)
	var exists, owner bool
	err := in.conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_catalog.pg_tables WHERE schemaname = $1 AND tablename = 'webhook_events'),
		has_function_privilege('outbox_relay.shape_table(text, text)', 'EXECUTE')`, schema).Scan(&exists, &owner)
	if err != nil {
		return opError(op, err)
	}
	// A schema without the tables gets them all or none, in one transaction; so does one that this role cannot change by itself.
	if exists && owner {
		if err := in.adopt(ctx, op, schema); err != nil {
			return err
		}
	}
	in.progress(op + ": publish and register")
	var backfill *string
	var since *time.Time
	switch {
	case o.Unprocessed:
		backfill = new("unprocessed")
	case !o.Since.IsZero():
		backfill, since = new("since"), &o.Since
	}
	return in.short(ctx, op, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, "SELECT outbox_relay.add_tenant($1, $2, $3)", schema, backfill, since)
		return err
	})
}

// adopt changes the tables of a schema one by one, each in a transaction of its own, so that add_tenant then finds nothing left that needs
// a strong lock.
func (in *installer) adopt(ctx context.Context, op, schema string) error {
	if _, err := in.conn.Exec(ctx, "SELECT outbox_relay.check_tenant($1)", schema); err != nil {
		return opError(op, err)
	}
	tables, err := collect[string](ctx, in.conn, "SELECT name FROM outbox_relay.tenant_tables() ORDER BY ord")
	if err != nil {
		return opError(op, err)
	}
	for _, table := range tables {
		step := op + ": table " + table
		in.progress(step)
		err := in.short(ctx, step, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, "SELECT outbox_relay.shape_table($1, $2)", schema, table)
			return err
		})
		if err != nil {
			return err
		}
	}
	rows, err := in.conn.Query(ctx, "SELECT tbl, name, uniq, spec FROM outbox_relay.missing_indexes($1)", schema)
	if err != nil {
		return opError(op, err)
	}
	indexes, err := pgx.CollectRows(rows, pgx.RowToStructByPos[index])
	if err != nil {
		return opError(op, err)
	}
	for _, x := range indexes {
		if err := in.buildIndex(ctx, op, schema, x); err != nil {
			return err
		}
	}
	return nil
}

// index is one that a tenant's table lacks. Spec is the part of CREATE INDEX after the table.
type index struct {
	Table, Name string
	Unique      bool
	Spec        string
}

// buildIndex builds an index while writers go on. A partitioned table cannot be indexed concurrently: its partitions are, one by one, and the
// index of the whole then takes theirs over without building anything. Without partitions yet, it is all there is to build.
func (in *installer) buildIndex(ctx context.Context, op, schema string, x index) error {
	table := pgx.Identifier{schema, x.Table}.Sanitize()
	var partitioned bool
	err := in.conn.QueryRow(ctx, "SELECT relkind = 'p' FROM pg_catalog.pg_class WHERE oid = $1::pg_catalog.regclass", table).Scan(&partitioned)
	if err != nil {
		return opError(op, err)
	}
	if !partitioned {
		return in.buildConcurrently(ctx, op, schema, x)
	}
	rows, err := in.conn.Query(ctx, `SELECT n.nspname::text, c.relname::text, c.oid
		FROM pg_catalog.pg_partition_tree($1::pg_catalog.regclass) p JOIN pg_catalog.pg_class c ON c.oid = p.relid
		JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE p.isleaf AND p.level > 0`, table)
	if err != nil {
		return opError(op, err)
	}
	type leaf struct {
		Schema, Table string
		OID           uint32
	}
	leaves, err := pgx.CollectRows(rows, pgx.RowToStructByPos[leaf])
	if err != nil {
		return opError(op, err)
	}
	for _, l := range leaves {
		part := index{Table: l.Table, Name: fmt.Sprintf("%s_%d", x.Name, l.OID), Unique: x.Unique, Spec: x.Spec}
		if err := in.buildConcurrently(ctx, op, l.Schema, part); err != nil {
			return err
		}
	}
	return in.short(ctx, op+": index "+x.Name, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, fmt.Sprintf("CREATE INDEX %s ON %s %s", pgx.Identifier{x.Name}.Sanitize(), table, x.Spec))
		return err
	})
}

// buildConcurrently has no lock timeout: what it waits for does not make writers wait. A failed build leaves an invalid index behind, which
// goes first.
func (in *installer) buildConcurrently(ctx context.Context, op, schema string, x index) error {
	op += ": index " + x.Name
	unique := ""
	if x.Unique {
		unique = "UNIQUE "
	}
	create := fmt.Sprintf("CREATE %sINDEX CONCURRENTLY IF NOT EXISTS %s ON %s %s", unique,
		pgx.Identifier{x.Name}.Sanitize(), pgx.Identifier{schema, x.Table}.Sanitize(), x.Spec)
	name := pgx.Identifier{schema, x.Name}.Sanitize()
	for pause := lockTimeout; ; pause = min(2*pause, 5*time.Second) {
		in.progress(op)
		err := in.dropInvalid(ctx, name)
		if err == nil {
			err = in.bare(ctx, create)
		}
		if err == nil || !lockConflict(err) {
			return opError(op, err)
		}
		if wait := sleep(ctx, pause); wait != nil {
			return errors.Join(opError(op, err), wait)
		}
	}
}

func (in *installer) dropInvalid(ctx context.Context, name string) error {
	invalid, err := collect[bool](ctx, in.conn, "SELECT true FROM pg_catalog.pg_index WHERE indexrelid = pg_catalog.to_regclass($1) AND NOT indisvalid", name)
	if err != nil || len(invalid) == 0 {
		return err
	}
	return in.bare(ctx, "DROP INDEX CONCURRENTLY "+name)
}

// unfit are the settings of the session that do not do for what cannot be in a transaction, as statements that change them and others that undo it.
const unfit = `SELECT coalesce(string_agg('SET ' || s.name || ' = ' || quote_literal(w.value), '; '), ''), coalesce(string_agg('RESET ' || s.name, '; '), ''),
	coalesce(string_agg(s.name || ' = ' || s.setting, ', '), '')
	FROM pg_catalog.pg_settings s JOIN (VALUES ('lock_timeout', '0'), ('statement_timeout', '0'), ('transaction_timeout', '0'), ('default_transaction_read_only', 'off'),
	('default_transaction_isolation', 'read committed'), ('search_path', '')) AS w (name, value) ON s.name = w.name
	WHERE CASE s.name WHEN 'search_path' THEN s.setting ~ 'pg_catalog' ELSE s.setting <> w.value END`

// bare runs what cannot be in a transaction. It takes the session as it is, if that does, which is so unless a role or a database has settings of its own: these
// can be changed only where the session is ours for as long as we are connected.
func (in *installer) bare(ctx context.Context, statement string) (err error) {
	conn := in.conn.Conn()
	var set, reset, what string
	if err := conn.QueryRow(ctx, unfit).Scan(&set, &reset, &what); err != nil {
		return err
	}
	if set == "" {
		_, err = conn.Exec(ctx, statement)
		return err
	}
	lends, err := lendsSessions(ctx, conn)
	if err != nil {
		return err
	}
	if lends {
		return &Error{
			Op: "set up session", Err: fmt.Errorf("%w, and this needs other settings than %s", ErrPooler, what),
			Hint: "Connect to the server itself, or through a pool in session mode: --database-url or OUTBOX_RELAY_DATABASE_URL.",
		}
	}
	if _, err := conn.Exec(ctx, set); err != nil {
		return err
	}
	_, err = conn.Exec(ctx, statement)
	if _, end := conn.Exec(context.WithoutCancel(ctx), reset); !conn.IsClosed() {
		err = errors.Join(err, end)
	}
	return err
}
