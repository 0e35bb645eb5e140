package store_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) {
	os.Exit(pgtest.Main(leakTest{m}))
}

// leakTest fails the run when a goroutine outlives the tests. It looks before the shared server stops.
type leakTest struct{ m *testing.M }

func (l leakTest) Run() int {
	code := l.m.Run()
	if err := goleak.Find(goleak.IgnoreTopFunction("os/exec.(*Cmd).Wait"), goleak.IgnoreAnyFunction("os.(*Process).Wait")); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

// bundle is a database with tenants and a store that runs with the least privileges.
type bundle struct {
	t     testing.TB
	dsn   string // of the superuser
	url   string // of the relay
	slot  string
	admin *pgxpool.Pool
	store *store.Store
	owner outbox.UUID
}

func setup(t testing.TB, tenants ...string) *bundle {
	t.Helper()
	ctx := t.Context()
	dsn := pgtest.Database(t)
	cfg, err := pgxpool.ParseConfig(dsn)
	require.NoError(t, err)
	name := cfg.ConnConfig.Database
	b := &bundle{t: t, dsn: dsn, slot: "store_" + name, owner: outbox.NewUUID()}
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: b.slot}))
	b.admin, err = pgxpool.NewWithConfig(ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(b.admin.Close)
	b.exec("UPDATE outbox_relay.progress SET lsn = '0/0', high_lsn = '0/0'") // tests count from nothing

	role := "relay_" + name
	b.exec(fmt.Sprintf("CREATE ROLE %s LOGIN REPLICATION IN ROLE outbox_relay_runner", role))
	t.Cleanup(func() {
		_, err := b.admin.Exec(context.WithoutCancel(ctx), "DROP ROLE "+role)
		require.NoError(t, err)
	})
	b.url = strings.Replace(dsn, "postgres@", role+"@", 1)
	require.NotEqual(t, dsn, b.url)
	for _, schema := range tenants {
		b.addTenant(schema)
	}
	b.store = b.open()
	return b
}

func (b *bundle) open() *store.Store {
	b.t.Helper()
	s, err := store.New(b.t.Context(), store.Config{URL: b.url, Slot: b.slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(b.t, err)
	b.t.Cleanup(s.Close)
	return s
}

func (b *bundle) addTenant(schema string) {
	b.t.Helper()
	b.exec("CREATE SCHEMA " + pgx.Identifier{schema}.Sanitize())
	b.exec("SELECT outbox_relay.add_tenant($1)", schema)
}

func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	_, err := b.admin.Exec(b.t.Context(), sql, args...)
	require.NoError(b.t, err, sql)
}

// get reads one value.
func get[T any](b *bundle, sql string, args ...any) T {
	b.t.Helper()
	var v T
	require.NoError(b.t, b.admin.QueryRow(b.t.Context(), sql, args...).Scan(&v), sql)
	return v
}

// row reads the columns of one row as text, with bars between them and a dash for NULL.
func (b *bundle) row(columns, from string, args ...any) string {
	b.t.Helper()
	return get[string](b, "SELECT coalesce((SELECT array_to_string(ARRAY["+columns+"]::text[], '|', '-') FROM "+from+"), 'none')", args...)
}

func (b *bundle) count(from string, args ...any) int {
	b.t.Helper()
	return get[int](b, "SELECT count(*) FROM "+from, args...)
}

func (b *bundle) endpoint(tenant string) outbox.UUID {
	b.t.Helper()
	return get[outbox.UUID](b, "INSERT INTO "+pgx.Identifier{tenant}.Sanitize()+`.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
VALUES ('e', 'https://example.com/hook', 'secret', gen_random_uuid()) RETURNING id`)
}

// deliver makes a delivery of a new event.
func deliver(tenant string, endpoint outbox.UUID) *store.Delivery {
	event := outbox.NewUUID()
	return &store.Delivery{
		ID: outbox.NewUUID(), Tenant: tenant, EventID: event, EndpointID: endpoint, URL: "https://example.com/hook", Method: "POST",
		Message: &delivery.Message{
			ID: event, Body: []byte(`{"id":"` + event.String() + `","data":{"n":1}}`), ContentType: "application/json",
			Header: []delivery.HeaderField{{Name: "traceparent", Value: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}},
		},
	}
}

func succeeded(d *store.Delivery) store.Outcome {
	d.Attempts++
	return store.Outcome{
		Delivery: d, Status: store.Success, Attempted: true,
		Result: delivery.Result{
			Class: delivery.ClassSuccess, Status: 202, Started: time.Now().Add(-1500 * time.Millisecond), Duration: 250 * time.Millisecond,
			Signature: "sha256=abc",
		},
	}
}

func failed(d *store.Delivery, status store.Status) store.Outcome {
	d.Attempts++
	return store.Outcome{
		Delivery: d, Status: status, Attempted: true, Due: time.Hour,
		Result: delivery.Result{
			Class: delivery.Class5xx, Status: 503, Err: "answered 503", Started: time.Now().Add(-time.Second), Duration: 900 * time.Millisecond,
			Body: []byte("try\x00 later\xff"), Signature: "sha256=def",
		},
	}
}

func deferred(d *store.Delivery, due time.Duration) store.Outcome {
	return store.Outcome{Delivery: d, Status: store.Pending, Due: due, Reason: "window"}
}

// record records outcomes without trouble.
func (b *bundle) record(outcomes ...store.Outcome) {
	b.t.Helper()
	broken, err := b.store.Record(b.t.Context(), b.owner, nil, outcomes)
	require.NoError(b.t, err)
	require.Empty(b.t, broken)
}

// page reads a page of a backfill without trouble.
func (b *bundle) page(tenant string, n int) *store.Page {
	b.t.Helper()
	p, err := b.store.BackfillPage(b.t.Context(), tenant, n)
	require.NoError(b.t, err)
	return p
}
