// Package desk is what operators ask about the deliveries of a tenant and do about them: lists, details, explanations, and calls of the functions
// that control the relay from inside the database.
package desk

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/guest"
)

// CountLimit is how far waiting, parked and dead deliveries are counted: a number that has reached it stands for more.
const CountLimit = 10_000

// ErrChooseTenant says that no tenant was named and that there are several.
var ErrChooseTenant = errors.New("which tenant is meant is open")

// Error is what a person has to act upon.
type Error struct {
	Op   string // what was asked for
	Err  error
	hint string
}

// Error says what was asked for and what is wrong.
func (e *Error) Error() string {
	if e.Op == "" {
		return e.Err.Error()
	}
	return e.Op + ": " + e.Err.Error()
}

// Unwrap returns Err.
func (e *Error) Unwrap() error { return e.Err }

// Hint says what to do, if there is something.
func (e *Error) Hint() string { return e.hint }

// Desk answers for one tenant, over a connection of its own. It must be used by one goroutine at a time.
type Desk struct {
	conn   *guest.Conn
	tenant string
	state  string // of the tenant
	reason string // why it is paused or suspended
	slot   string
	now    time.Time

	standby  bool          // the server is one
	patience time.Duration // of Survey
}

const onStandby = "this server is a standby: ask the primary (target_session_attrs=read-write in the DSN picks it from several hosts)"

// What holds for the statements. Not for the session: it may be a pooler's, and an application's next.
const (
	settings   = `SELECT set_config(w.name, w.value, true) FROM (VALUES ('search_path', ''), ('TimeZone', 'UTC'), ('DateStyle', 'ISO'), ('jit', 'off'), `
	sessionSQL = settings + `('lock_timeout', '5s')) AS w (name, value)`
)

// Open sits down for a tenant, or with schema empty for the only one there is: ErrChooseTenant if there are several. slot is the relay's. The
// connection stays the caller's, and its session as it is.
func Open(ctx context.Context, conn *pgx.Conn, schema, slot string) (*Desk, error) {
	d := newDesk(conn, slot, sessionSQL)
	rows, err := d.conn.Query(ctx, `SELECT t.schema, t.state, coalesce(t.reason, ''), now(), pg_is_in_recovery() FROM outbox_relay.tenants t
WHERE $1::text = '' OR t.schema = $1::text ORDER BY 1 LIMIT 11`, schema)
	if err != nil {
		return nil, d.fault("look up tenant", err)
	}
	var names []string
	_, err = pgx.ForEachRow(rows, []any{&d.tenant, &d.state, &d.reason, &d.now, &d.standby}, func() error {
		names = append(names, d.tenant)
		return nil
	})
	const remedy = "see: outbox-relay tenants list"
	switch {
	case err != nil:
		return nil, d.fault("look up tenant", err)
	case len(names) == 1:
		return d, nil
	case schema != "":
		return nil, &Error{Err: fmt.Errorf("schema %q is not a tenant", schema), hint: remedy + "; names are taken as they are, upper and lower case differ"}
	case len(names) == 0:
		return nil, &Error{Err: errors.New("there is no tenant yet"), hint: "run: outbox-relay tenants add SCHEMA"}
	case len(names) > 10:
		return nil, &Error{Err: ErrChooseTenant, hint: "name one of them with --tenant; " + remedy}
	default:
		return nil, &Error{Err: ErrChooseTenant, hint: "name one of them with --tenant: " + strings.Join(names, ", ")}
	}
}

func newDesk(conn *pgx.Conn, slot, settings string, args ...any) *Desk {
	conn.TypeMap().RegisterDefaultPgType(outbox.UUID{}, "uuid")
	conn.TypeMap().RegisterDefaultPgType([]outbox.UUID{}, "_uuid")
	return &Desk{conn: guest.New(conn, "BEGIN", settings, args...), slot: slot}
}

// Tenant returns the tenant's schema.
func (d *Desk) Tenant() string { return d.tenant }

// Now is what the database's clock said at Open.
func (d *Desk) Now() time.Time { return d.now }

// sql puts the tenant's schema into a statement, where it stands as {tenant}.
func (d *Desk) sql(text string) string {
	return strings.ReplaceAll(text, "{tenant}", pgx.Identifier{d.tenant}.Sanitize())
}

// Fault wraps an error of the database that has come up elsewhere, with what to do about it.
func (d *Desk) Fault(op string, err error) error { return d.fault(op, err) }

// fault wraps an error of the database, with what to do about it. An *Error stays as it is.
func (d *Desk) fault(op string, err error) error {
	server, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		if _, done := errors.AsType[*Error](err); done {
			return err
		}
		return fmt.Errorf("%s: %w", op, err)
	}
	e := &Error{Op: op, Err: err, hint: server.Hint}
	switch server.Code {
	case "OR002": // the functions say it as it is to be read
		e.Err = errors.New(server.Message)
	case "42501":
		if e.hint == "" {
			e.hint = fmt.Sprintf("GRANT outbox_relay_runner TO %s, or use a role that owns the tenant's tables", pgx.Identifier{d.conn.Conn().Config().User}.Sanitize())
		}
	case "42P01", "3F000", "42883", "42703":
		e.hint = "run: outbox-relay migrate"
		if d.tenant != "" {
			e.hint += ", then outbox-relay check, which says what tenant " + d.tenant + " lacks"
		}
	case "25006", "55000": // a transaction that cannot write; a position of the log that is not there
		if d.standby {
			e.hint = onStandby
		}
	case "55P03":
		e.hint = "somebody holds a lock on the rows: try again in a moment"
	}
	return e
}

// collect reads all rows.
func collect[T any](ctx context.Context, d *Desk, op string, scan pgx.RowToFunc[T], sql string, args ...any) ([]T, error) {
	rows, err := d.conn.Query(ctx, d.sql(sql), args...)
	if err != nil {
		return nil, d.fault(op, err)
	}
	list, err := pgx.CollectRows(rows, scan)
	if err != nil {
		return nil, d.fault(op, err)
	}
	return list, nil
}

// call runs a function that returns one value.
func call[T any](ctx context.Context, d *Desk, op, sql string, args ...any) (value T, err error) {
	if err := d.conn.QueryRow(ctx, sql, args...).Scan(&value); err != nil {
		return value, d.fault(op, err)
	}
	return value, nil
}

// Time is a time that may be missing: then it is zero. NULL and infinity are missing.
type Time struct{ time.Time }

// ScanTimestamptz implements pgtype.TimestamptzScanner.
func (t *Time) ScanTimestamptz(v pgtype.Timestamptz) error {
	t.Time = time.Time{}
	if v.Valid && v.InfinityModifier == pgtype.Finite {
		t.Time = v.Time.UTC()
	}
	return nil
}

// conditions is a WHERE clause under construction.
type conditions struct {
	list []string
	args []any
}

// add adds a condition on an argument, which stands in it as $.
func (c *conditions) add(condition string, arg any) {
	c.args = append(c.args, arg)
	c.list = append(c.list, strings.ReplaceAll(condition, "$", fmt.Sprintf("$%d", len(c.args))))
}

// unless adds a condition unless its argument is empty.
func unless[T comparable](c *conditions, empty T, condition string, arg T) {
	if arg != empty {
		c.add(condition, arg)
	}
}

func (c *conditions) String() string {
	if len(c.list) == 0 {
		return "true"
	}
	return strings.Join(c.list, " AND ")
}

// notFound says that there is no such thing in the tenant, and what the id stands for if that is known: ids are easily mixed up.
func (d *Desk) notFound(ctx context.Context, what string, id outbox.UUID) error {
	const look = `SELECT CASE
  WHEN EXISTS (SELECT FROM {tenant}.webhook_deliveries d WHERE d.id = $1::uuid AND d.relayed) THEN 'deliveries show'
  WHEN EXISTS (SELECT FROM {tenant}.webhook_deliveries d WHERE d.id = $1::uuid) THEN 'foreign'
  WHEN EXISTS (SELECT FROM {tenant}.webhook_dead_letters l WHERE l.delivery_id = $1::uuid) THEN 'deadletters show'
  WHEN EXISTS (SELECT FROM {tenant}.webhook_events v WHERE v.id = $1::uuid) THEN 'events explain'
  WHEN EXISTS (SELECT FROM {tenant}.webhook_endpoints e WHERE e.id = $1::uuid) THEN 'endpoints show'
  ELSE '' END`
	command, err := call[string](ctx, d, "look up "+what, d.sql(look), id)
	if err != nil {
		return err
	}
	hint := "see: outbox-relay " + map[string]string{"delivery": "deliveries list", "dead letter": "deadletters list", "endpoint": "endpoints list"}[what] + " -t " + d.tenant
	switch {
	case command == "foreign":
		if what == "delivery" {
			return &Error{Err: fmt.Errorf("delivery %s of tenant %s was made by another dispatcher", id, d.tenant), hint: "all there is of it is its row in webhook_deliveries"}
		}
		hint = "the id is that of a delivery which another dispatcher made: all there is of it is its row in webhook_deliveries"
	case command != "":
		hint = fmt.Sprintf("the id is there as something else: outbox-relay %s -t %s %s", command, d.tenant, id)
	case what == "event":
		hint = "its transaction was rolled back or is still open, or the event was archived and no delivery of it is kept, or it is another tenant's"
	}
	return &Error{Err: fmt.Errorf("tenant %s has no %s %s", d.tenant, what, id), hint: hint}
}
