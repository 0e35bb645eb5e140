package wal

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(leakTest{m})) }

type leakTest struct{ m *testing.M }

func (l leakTest) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

const eventsTable = `CREATE TABLE %s.webhook_events (
	id uuid PRIMARY KEY DEFAULT gen_random_uuid(), event_type varchar(255) NOT NULL, event_name varchar(255), aggregate_id uuid NOT NULL,
	aggregate_type varchar(100) NOT NULL, aggregate_version int NOT NULL DEFAULT 1, event_data jsonb NOT NULL DEFAULT '{}',
	event_metadata jsonb NOT NULL DEFAULT '{}', correlation_id uuid, causation_id uuid, triggered_by_user_id uuid, context_id uuid,
	occurred_at timestamptz NOT NULL DEFAULT now(), processed_at timestamptz, created_at timestamptz NOT NULL DEFAULT now())`

// database is a fresh database with a slot and the publication "p" of all tables.
type database struct {
	t    testing.TB
	url  string
	slot string
	conn *pgx.Conn
}

func newDatabase(t testing.TB, ddl ...string) *database {
	t.Helper()
	return newDatabaseAt(t, pgtest.Database(t), ddl...)
}

func newDatabaseAt(t testing.TB, url string, ddl ...string) *database {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	d := &database{t: t, url: url, conn: conn}
	d.slot = "wal_" + d.text("SELECT current_database()")
	d.exec("SET synchronous_commit = on") // the log is read up to where it is flushed
	for _, sql := range ddl {
		d.exec(sql)
	}
	d.exec("CREATE PUBLICATION p FOR ALL TABLES WITH (publish_via_partition_root = true)")
	d.exec("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", d.slot)
	return d
}

func (d *database) exec(sql string, args ...any) {
	d.t.Helper()
	_, err := d.conn.Exec(d.t.Context(), sql, args...)
	require.NoError(d.t, err, sql)
}

func (d *database) text(sql string, args ...any) string {
	d.t.Helper()
	var s *string
	require.NoError(d.t, d.conn.QueryRow(d.t.Context(), sql, args...).Scan(&s), sql)
	if s == nil {
		return ""
	}
	return *s
}

func (d *database) lsn(sql string, args ...any) LSN {
	d.t.Helper()
	lsn := LSN(0)
	require.NoError(d.t, lsn.Scan(d.text(sql, args...)))
	return lsn
}

func (d *database) confirmed() LSN {
	return d.lsn("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1", d.slot)
}

func (d *database) flushed() LSN { return d.lsn("SELECT pg_current_wal_flush_lsn()::text") }

// messages returns what the slot has to send, in either format, and leaves it there.
func (d *database) messages(binary bool) [][]byte {
	d.t.Helper()
	rows, err := d.conn.Query(d.t.Context(), `SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
		'publication_names', 'p', 'binary', $2)`, d.slot, fmt.Sprint(binary))
	require.NoError(d.t, err)
	messages, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	require.NoError(d.t, err)
	return messages
}

// options are those of a stream from the slot.
func (d *database) options() Options {
	return Options{URL: d.url, Slot: d.slot, Publications: []string{"p"}}
}

// render writes a tuple as {column=value …}, by the getter that suits the type.
func render(t *Tuple) string {
	var b strings.Builder
	b.WriteByte('{')
	for i, c := range t.columns() {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(c.Name + "=" + renderValue(t, i))
	}
	b.WriteByte('}')
	return b.String()
}

func (t *Tuple) columns() []Column {
	if t.rel == nil {
		return nil
	}
	return t.rel.Columns
}

func renderValue(t *Tuple, i int) string {
	switch {
	case t.IsNull(i):
		return "NULL"
	case t.IsUnchanged(i):
		return "UNCHANGED"
	}
	var v any
	var err error
	switch t.rel.Columns[i].Type {
	case 16:
		v, err = t.Bool(i)
	case 20, 21, 23:
		v, err = t.Int(i)
	case 700, 701, 1700:
		v, err = t.Float(i)
	case 114, 3802:
		var b []byte
		b, err = t.JSON(i)
		v = string(b)
	case 1184:
		var at time.Time
		at, err = t.Time(i)
		v = at.Format(time.RFC3339Nano)
	case 2950:
		v, err = t.UUID(i)
	default:
		v, err = t.Text(i)
	}
	if err != nil {
		return "ERROR(" + err.Error() + ")"
	}
	return fmt.Sprint(v)
}
