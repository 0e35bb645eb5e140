package desk_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(leakTest{m})) }

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

// bundle is a fresh database with the tenant acme, and a desk for it.
type bundle struct {
	t    *testing.T
	ctx  context.Context //nolint:containedctx // the test's own
	dsn  string
	slot string
	conn *pgx.Conn // superuser, for what the relay and applications write
	desk *desk.Desk
}

func connect(t *testing.T, dsn string) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec // as the commands do
	conn, err := pgx.ConnectConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, conn.Close(context.WithoutCancel(t.Context()))) })
	conn.TypeMap().RegisterDefaultPgType(outbox.UUID{}, "uuid")
	return conn
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{t: t, ctx: t.Context(), dsn: pgtest.Database(t)}
	b.conn = connect(t, b.dsn)
	b.slot = "s_" + b.conn.Config().Database
	require.NoError(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}))
	b.exec("CREATE SCHEMA acme")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{}))
	b.desk = b.open(b.dsn, "acme")
	return b
}

func (b *bundle) open(dsn, tenant string) *desk.Desk {
	b.t.Helper()
	d, err := desk.Open(b.ctx, connect(b.t, dsn), tenant, b.slot)
	require.NoError(b.t, err)
	return d
}

// again sits down anew, for the clock.
func (b *bundle) again() *desk.Desk {
	b.t.Helper()
	return b.open(b.dsn, "acme")
}

func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	_, err := b.conn.Exec(b.ctx, sql, args...)
	require.NoError(b.t, err, sql)
}

func get[T any](b *bundle, sql string, args ...any) (v T) {
	b.t.Helper()
	require.NoError(b.t, b.conn.QueryRow(b.ctx, sql, args...).Scan(&v), sql)
	return v
}

// registry reads the routing rows the way the desk does.
func (b *bundle) registry() *store.TenantRows {
	b.t.Helper()
	reg, err := store.ReadRegistry(b.ctx, b.conn, []string{"acme"}, false)
	require.NoError(b.t, err)
	require.Len(b.t, reg.Tenants, 1)
	require.NoError(b.t, reg.Tenants[0].Err)
	return &reg.Tenants[0]
}

func (b *bundle) endpoint(name, order string) outbox.UUID {
	b.t.Helper()
	id := outbox.NewUUID()
	b.exec(`INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, delivery_order, created_by_user_id)
		VALUES ($1::uuid, $2::text, 'https://user:pw@receiver.example/hooks?key=s3cret', 's3cret-of-the-endpoint', $3::text, $1::uuid)`, id, name, order)
	return id
}

func (b *bundle) subscribe(endpoint outbox.UUID, eventType, filter string) outbox.UUID {
	b.t.Helper()
	id := outbox.NewUUID()
	b.exec(`INSERT INTO acme.webhook_event_types (event_type, category, display_name) VALUES ($1::text, 'c', 'd') ON CONFLICT DO NOTHING`, eventType)
	b.exec(`INSERT INTO acme.webhook_subscriptions (id, endpoint_id, event_type_id, event_type, event_filters)
		SELECT $1::uuid, $2::uuid, t.id, t.event_type, $4::jsonb FROM acme.webhook_event_types t WHERE t.event_type = $3::text`, id, endpoint, eventType, filter)
	return id
}

func (b *bundle) event(eventType, data string) outbox.UUID {
	b.t.Helper()
	id, err := outbox.Insert(b.ctx, b.conn, "acme", outbox.Event{
		Type: eventType, AggregateID: outbox.UUID{1}, AggregateType: "order", Data: []byte(data),
	})
	require.NoError(b.t, err)
	return id
}

// deliver inserts a delivery as the relay does. columns are set on top.
func (b *bundle) deliver(event, endpoint outbox.UUID, status string, columns string) outbox.UUID {
	b.t.Helper()
	id := outbox.NewUUID()
	b.exec(`INSERT INTO acme.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, delivery_status, request_url, request_method, request_headers, request_body, relayed)
		VALUES ($1::uuid, $2::uuid, $3::uuid, $4::text, 'https://receiver.example/hooks', 'POST', '{"content-type":"application/json"}', '{"a":1}', true)`,
		id, event, endpoint, status)
	if columns != "" {
		b.exec(`UPDATE acme.webhook_deliveries SET `+columns+` WHERE id = $1::uuid`, id)
	}
	return id
}

// queue gives a delivery its place. place is order_key, order_lsn, order_n as SQL.
func (b *bundle) queue(delivery, endpoint outbox.UUID, due, place string) {
	b.t.Helper()
	if place == "" {
		place = "NULL, NULL, NULL"
	}
	b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at, order_key, order_lsn, order_n)
		VALUES ($1::uuid, 'acme', $2::uuid, `+due+`, `+place+`)`, delivery, endpoint)
}

// bury makes a dead letter of a delivery.
func (b *bundle) bury(delivery outbox.UUID, deadAt string) {
	b.t.Helper()
	b.exec(`UPDATE acme.webhook_deliveries SET delivery_status = 'failed', error_code = 'http_5xx', error_message = 'answered 500', response_status_code = 500,
		response_time_ms = 3, attempt_number = 4, completed_at = now(), max_attempts_reached = true WHERE id = $1::uuid`, delivery)
	b.exec(`INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, request_body,
		attempts, last_error, last_error_code, last_status_code, last_response_body, dead_at)
		SELECT d.id, d.webhook_event_id, d.webhook_endpoint_id, d.request_url, d.request_method, d.request_headers, d.request_body, d.attempt_number, d.error_message,
		d.error_code, d.response_status_code, 'internal error', `+deadAt+` FROM acme.webhook_deliveries d WHERE d.id = $1::uuid`, delivery)
}

func hint(err error) string {
	if h, ok := err.(interface{ Hint() string }); ok {
		return h.Hint()
	}
	return ""
}

func TestOpenChoosesTheTenant(t *testing.T) {
	t.Parallel()
	b := setup(t)
	assert.Equal(t, "acme", b.open(b.dsn, "").Tenant())
	assert.WithinDuration(t, time.Now(), b.desk.Now(), time.Minute)

	_, err := desk.Open(b.ctx, b.conn, "Acme", b.slot)
	require.EqualError(t, err, `schema "Acme" is not a tenant`)
	assert.Contains(t, hint(err), "outbox-relay tenants list")
	b.exec(`CREATE SCHEMA "Big-Corp"`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "Big-Corp", schema.AddOptions{}))
	_, err = desk.Open(b.ctx, b.conn, "", b.slot)
	require.ErrorIs(t, err, desk.ErrChooseTenant)
	assert.Equal(t, "name one of them with --tenant: Big-Corp, acme", hint(err))
	big := b.open(b.dsn, "Big-Corp")
	list, err := big.Deliveries(b.ctx, desk.DeliveryFilter{Limit: 10})
	require.NoError(t, err)
	assert.Empty(t, list)
	b.exec(`DELETE FROM outbox_relay.tenants`)
	_, err = desk.Open(b.ctx, b.conn, "", b.slot)
	assert.Contains(t, hint(err), "outbox-relay tenants add")
}

func TestOpenSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	_, err := desk.Open(b.ctx, connect(t, pgtest.Database(t)), "", b.slot)
	require.ErrorContains(t, err, "look up tenant: ")
	assert.Equal(t, "run: outbox-relay migrate", hint(err))

	b.exec(`DROP FUNCTION outbox_relay.resend(text, uuid)`)
	_, err = b.desk.Resend(b.ctx, outbox.UUID{1})
	assert.Contains(t, hint(err), "run: outbox-relay migrate")

	role := "r_" + b.conn.Config().Database
	b.exec("CREATE ROLE " + role + " LOGIN")
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.WithoutCancel(t.Context()), b.dsn)
		require.NoError(t, err)
		_, err = conn.Exec(context.WithoutCancel(t.Context()), "DROP OWNED BY "+role+"; DROP ROLE "+role)
		assert.NoError(t, err)
		assert.NoError(t, conn.Close(context.WithoutCancel(t.Context())))
	})
	cfg := b.conn.Config()
	dsn := fmt.Sprintf("postgres://%s@%s:%d/%s?sslmode=disable", role, cfg.Host, cfg.Port, cfg.Database)
	_, err = desk.Open(b.ctx, connect(t, dsn), "acme", b.slot)
	assert.Equal(t, fmt.Sprintf(`GRANT outbox_relay_runner TO "%s", or use a role that owns the tenant's tables`, role), hint(err))
	b.exec("GRANT outbox_relay_runner TO " + role)
	d := b.open(dsn, "acme")
	e := b.endpoint("Shop", "none")
	paused, err := d.Pause(b.ctx, e, "")
	require.NoError(t, err, "the group role may do all that an operator does")
	assert.True(t, paused)
	_, err = d.Endpoint(b.ctx, b.registry(), b.registry().Routing(defaults()), e)
	require.NoError(t, err)
}
