// Package schema owns every database object of the relay: its own schema outbox_relay, the two publications, the replication slot, the
// role of the running relay, and the shape of a tenant's tables. The shape is held by SQL functions, so that outbox_relay.add_tenant
// works inside an application's own transaction; the Go side adds what no transaction can do, such as concurrent index builds.
package schema

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/schema/guest"
)

// Names in the database. They are the same in every installation; only the slot, which belongs to the whole cluster, can be chosen.
const (
	Slot                = "outbox_relay"
	EventsPublication   = "outbox_relay_events"
	RegistryPublication = "outbox_relay_registry"
	RunnerRole          = "outbox_relay_runner"
)

//go:embed sql/*.sql
var files embed.FS

// SQLSTATEs that the functions of this package raise. OR002 is what cannot be done as it was asked for, or not now: the message says all there is.
const (
	codeUnfit    = "OR003" // a schema that cannot be a tenant, or tables or owners that do not fit
	codeNoSlot   = "OR004"
	codeTooLarge = "OR005" // add_tenant would block writers; AddTenant would not
)

// Causes that callers may want to tell apart; they come wrapped in an *Error.
var (
	ErrNotInstalled = errors.New("schema outbox_relay is not installed or not up to date")
	ErrNotTenant    = errors.New("the schema is not a tenant")
	ErrUnfit        = errors.New("the schema cannot be a tenant")
	ErrTooLarge     = errors.New("a table is too large to be changed in a transaction")
	ErrSlotMissing  = errors.New("the replication slot is missing")
	ErrEncoding     = errors.New("the encoding of the database is not UTF8")
	ErrPooler       = errors.New("a pooler lends sessions of the server by the transaction")
	ErrSlotUnusable = errors.New("the replication slot cannot be used")
	ErrStandby      = errors.New("the server is a standby")
)

const standbyHint = "This server is a standby: let the DSN lead to the primary (target_session_attrs=read-write picks it from several hosts)."

// Error is what a person has to act upon. Error() shows the operation, the cause and the hint.
type Error struct {
	Op   string
	Err  error
	Hint string
}

// Error implements error.
func (e *Error) Error() string {
	s := e.Op + ": " + e.Err.Error()
	if e.Hint != "" {
		s += " (hint: " + e.Hint + ")"
	}
	return s
}

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Querier is what reading needs; a pgx connection, pool or transaction.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

// opError wraps an error of the database once. Detail and hint of the server belong to the person who reads it.
func opError(op string, err error) error {
	if err == nil {
		return nil
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return fmt.Errorf("%s: %w", op, err)
	}
	if pg.Detail != "" {
		err = fmt.Errorf("%w\n%s", err, pg.Detail)
	}
	hint := pg.Hint
	switch pg.Code {
	case codeUnfit:
		err = fmt.Errorf("%w: %w", ErrUnfit, err)
	case codeTooLarge:
		err = fmt.Errorf("%w: %w", ErrTooLarge, err)
	case codeNoSlot:
		err = fmt.Errorf("%w: %w", ErrSlotMissing, err)
	case "3F000", "42883", "42P01": // schema, function or table unknown
		if hint == "" || pg.Code == "42883" {
			hint = "Run: outbox-relay migrate"
		}
		err = fmt.Errorf("%w: %w", ErrNotInstalled, err)
	case "25006": // it is not the session that cannot write
		hint = standbyHint
	case "42501":
		if hint == "" {
			hint = "Use a role that owns the objects named, not the relay's own; what it takes is at the head of: outbox-relay migrate --print, which an administrator may run as well"
		}
	}
	return &Error{Op: op, Err: err, Hint: hint}
}

// DDL depends on nothing that a role or database may set. It is set for each transaction anew, as the session may be a pooler's.
const (
	transactionMode = "ISOLATION LEVEL READ COMMITTED READ WRITE"
	settings        = `SELECT pg_catalog.set_config(w.name, w.value, true) FROM (VALUES ('search_path', ''), ('lock_timeout', '0'), ('statement_timeout', '0'),
		('idle_in_transaction_session_timeout', '0'), ('client_min_messages', 'warning'), ('jit', 'off'), ('standard_conforming_strings', 'on')) AS w (name, value)`
)

// connect opens the connection that DDL runs on.
func connect(ctx context.Context, dsn string) (*guest.Conn, error) {
	conn, err := dial(ctx, dsn)
	if err != nil {
		return nil, err
	}
	begin := "BEGIN " + transactionMode
	if conn.PgConn().ParameterStatus("in_hot_standby") == "on" {
		begin = "BEGIN" // what cannot be done there says so itself
	}
	return guest.New(conn, begin, settings), nil
}

func dial(ctx context.Context, dsn string) (*pgx.Conn, error) {
	cfg, err := parse(dsn)
	if err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	return conn, nil
}

// parse has nothing prepared either: that would stay in the session as well.
func parse(dsn string) (*pgx.ConnConfig, error) {
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("parse database URL: %w", err)
	}
	cfg.RuntimeParams["application_name"] = "outbox-relay migrate"
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	return cfg, nil
}

// closeConn says goodbye even when ctx is over, so that the server frees what the session holds at once.
func closeConn(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return conn.Close(ctx)
}
