package schema

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io/fs"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
)

const versionTable = "outbox_relay.schema_migrations"

// Options of Migrate. The zero value uses the slot named Slot and reports nothing.
type Options struct {
	// Slot is the replication slot to create; slots belong to the whole cluster, so two databases need two names. "" means Slot.
	Slot string
	// Shards is how many slots the tenants are spread over. 0 means 1.
	Shards int
	// Progress is told of each step as it begins, from the calling goroutine. nil means nobody is.
	Progress func(step string)
}

// Migrate brings a database up to date: the relay's own schema, its role, publications and slot, then every registered tenant. It may run
// any number of times and from several processes at once; they wait for each other. A tenant that cannot be brought up to date does
// not stop the others: all their errors come back joined. A slot that was in use and is gone is left to the relay, which makes it anew
// and heals: one made here would begin after the events in between.
func Migrate(ctx context.Context, dsn string, o Options) error {
	if err := o.complete(); err != nil {
		return err
	}
	return install(ctx, dsn, o.Progress, func(in *installer) error {
		if err := in.checkPrimary(ctx); err != nil {
			return err
		}
		if err := in.checkEncoding(ctx); err != nil {
			return err
		}
		in.progress("schema outbox_relay")
		if err := in.migrateOwn(ctx, dsn); err != nil {
			return err
		}
		if err := in.leaveShards(ctx, o); err != nil {
			return err
		}
		for shard := range o.Shards {
			slot := ShardSlot(o.Slot, shard)
			in.progress("replication slot " + slot)
			if err := in.ensureSlot(ctx, slot, shard); err != nil {
				return err
			}
		}
		others, err := OtherSlots(ctx, in.conn, o)
		if err != nil {
			return err
		}
		for _, u := range others {
			if u.Read {
				in.progress("replication slot " + u.Slot + ": another relay reads it: unless tenants.include divides the tenants between it and this one, events are sent twice")
				continue
			}
			in.progress("replication slot " + u.Slot + ": no relay reads it, it is none of those configured, and the server keeps its log; " + u.Remedy())
		}
		return in.migrateTenants(ctx)
	})
}

// checkPrimary refuses a standby: what is up to date there needs no writing, and the slots are the primary's.
func (in *installer) checkPrimary(ctx context.Context) error {
	const op = "check server"
	standby, err := collect[bool](ctx, in.conn, "SELECT pg_catalog.pg_is_in_recovery()")
	if err != nil {
		return opError(op, err)
	}
	if standby[0] {
		return &Error{Op: op, Err: ErrStandby, Hint: standbyHint}
	}
	return nil
}

// checkEncoding refuses a database that cannot keep what receivers answer, and one of SQL_ASCII: it may hold text that is no UTF-8, at which the stream would end.
func (in *installer) checkEncoding(ctx context.Context) error {
	const op = "check encoding"
	encoding, err := collect[string](ctx, in.conn, "SELECT pg_catalog.current_setting('server_encoding')")
	if err != nil {
		return opError(op, err)
	}
	if encoding[0] != "UTF8" {
		return &Error{
			Op: op, Err: fmt.Errorf("%w, but %s", ErrEncoding, encoding[0]),
			Hint: "Move the data into a database made with: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0",
		}
	}
	return nil
}

// migrateOwn lets goose run the embedded migrations, on a connection of its own.
func (in *installer) migrateOwn(ctx context.Context, dsn string) (err error) {
	// Where it exists, IF NOT EXISTS needs the right to create schemas all the same.
	missing, err := collect[bool](ctx, in.conn, "SELECT to_regnamespace('outbox_relay') IS NULL")
	if err == nil && missing[0] {
		_, err = in.conn.Exec(ctx, "CREATE SCHEMA IF NOT EXISTS outbox_relay")
	}
	if err != nil {
		return opError("create schema outbox_relay", err)
	}
	dir, err := fs.Sub(files, "sql")
	if err != nil {
		return fmt.Errorf("open migrations: %w", err)
	}
	cfg, err := parse(dsn)
	if err != nil {
		return err
	}
	db := sql.OpenDB(connector{stdlib.GetConnector(*cfg)})
	defer func() { err = errors.Join(err, db.Close()) }()
	provider, err := goose.NewProvider(goose.DialectPostgres, db, dir, goose.WithTableName(versionTable), goose.WithDisableGlobalRegistry(true))
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	// A migration is a transaction, and those before it are done: what follows waits for the relays' own tables, and relays would wait behind it.
	if err := in.patiently(ctx, "migrate schema outbox_relay", func() error {
		_, err := provider.Up(ctx)
		return err
	}); err != nil {
		return err
	}
	return in.checkPublications(ctx)
}

// connector makes connections whose transactions have our settings. Beside them goose only reads its table.
type connector struct{ driver.Connector }

// Connect implements driver.Connector.
func (c connector) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := c.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	own, ok := conn.(*stdlib.Conn)
	if !ok {
		return nil, fmt.Errorf("a connection is a %T", conn)
	}
	return migrating{own}, nil
}

type migrating struct{ *stdlib.Conn }

// BeginTx implements driver.ConnBeginTx.
func (c migrating) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	tx, err := c.Conn.BeginTx(ctx, o)
	if err != nil {
		return nil, err
	}
	_, err = c.Conn.Conn().Exec(ctx, fmt.Sprintf("SET TRANSACTION %s; %s; SET LOCAL lock_timeout = %d", transactionMode, settings, lockTimeout.Milliseconds()))
	if err != nil {
		return nil, errors.Join(opError("set up transaction", err), tx.Rollback())
	}
	return tx, nil
}

// checkPublications makes sure that nobody dropped one: changes made while it was missing are not in the log, and before
// PostgreSQL 18 the slot cannot even be read past them.
func (in *installer) checkPublications(ctx context.Context) error {
	missing, err := collect[string](ctx, in.conn, `SELECT w FROM unnest($1::text[]) w WHERE NOT EXISTS (SELECT FROM pg_publication p WHERE p.pubname = w)`,
		[]string{EventsPublication, RegistryPublication})
	if err != nil {
		return opError("check publications", err)
	}
	if len(missing) > 0 {
		return &Error{
			Op:  "check publications",
			Err: fmt.Errorf("publication %q is gone", missing[0]),
			Hint: "Somebody dropped it, and events may be missing from the log since. Stop the relay, drop its slot and its row in outbox_relay.progress, " +
				"run the publication part of outbox-relay migrate --print, then outbox-relay migrate, and outbox-relay tenants add --since for each tenant.",
		}
	}
	return nil
}

// migrateTenants brings tenants whose shape is behind up to date. A schema that was dropped is no tenant to be changed.
func (in *installer) migrateTenants(ctx context.Context) error {
	behind, err := collect[string](ctx, in.conn, `SELECT schema FROM outbox_relay.tenants WHERE version < outbox_relay.shape_version()
		AND EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = schema) ORDER BY schema`)
	if err != nil {
		return opError("list tenants", err)
	}
	var errs []error
	for _, schema := range behind {
		errs = append(errs, in.addTenant(ctx, schema, AddOptions{}))
	}
	return errors.Join(errs...)
}

// collect gathers a single-column result.
func collect[T any](ctx context.Context, q Querier, query string, args ...any) ([]T, error) {
	rows, err := q.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[T])
}
