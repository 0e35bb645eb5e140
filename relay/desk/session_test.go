package desk_test

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

// session is all that a session can be told and keep.
func session(b *bundle, conn *pgx.Conn) (s []string) {
	b.t.Helper()
	require.Equal(b.t, "I", string(conn.PgConn().TxStatus()), "a transaction is left")
	require.NoError(b.t, conn.QueryRow(b.ctx, `SELECT ARRAY(SELECT name || '=' || setting FROM pg_settings WHERE source = 'session'
		UNION ALL SELECT 'prepared ' || statement FROM pg_prepared_statements
		UNION ALL SELECT 'lock ' || locktype FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory' ORDER BY 1)`).Scan(&s))
	return s
}

// TestSessionStaysAsItWas: a pooler in transaction mode gives it to an application next.
func TestSessionStaysAsItWas(t *testing.T) {
	t.Parallel()
	b := setup(t)
	endpoint := b.endpoint("e", "none")
	conn := connect(t, b.dsn)
	_, err := conn.Exec(b.ctx, "SET DateStyle = 'German'; SET search_path = 'acme'; SET statement_timeout = '7s'; SET TimeZone = 'Asia/Kathmandu'")
	require.NoError(t, err)
	before := session(b, conn)
	require.Len(t, before, 4)
	_, err = desk.Open(b.ctx, conn, "nobody", b.slot)
	require.ErrorContains(t, err, "is not a tenant")
	assert.Equal(t, before, session(b, conn), "no tenant")
	d, err := desk.Open(b.ctx, conn, "acme", b.slot)
	require.NoError(t, err)
	_, err = desk.Tenants(b.ctx, conn)
	require.NoError(t, err)
	rows, err := d.Rows(b.ctx)
	require.NoError(t, err)
	x, err := d.Endpoint(b.ctx, rows, rows.Routing(defaults()), endpoint)
	require.NoError(t, err)
	assert.WithinDuration(t, time.Now(), x.Settings.CreatedAt.Time, time.Hour)
	paused, err := d.Pause(b.ctx, endpoint, "holiday")
	require.NoError(t, err)
	assert.True(t, paused)
	_, err = d.RotateSecret(b.ctx, outbox.NewUUID(), &desk.Rotation{Secret: "whsec_bmV3"})
	require.ErrorContains(t, err, "has no endpoint")
	_, err = d.RotateSecret(b.ctx, endpoint, &desk.Rotation{Secret: "whsec_bmV3", Keep: time.Hour})
	require.NoError(t, err)
	_, err = d.Delivery(b.ctx, outbox.NewUUID())
	require.ErrorContains(t, err, "has no delivery")
	assert.Equal(t, before, session(b, conn), "a desk")
	o, err := desk.Survey(b.ctx, conn, []string{b.slot}, []string{"acme", "gone"}, desk.OverviewPatience)
	require.NoError(t, err)
	assert.Contains(t, o.Gap(desk.PartEndpoints), `relation "gone.webhook_endpoints" does not exist`)
	assert.WithinDuration(t, time.Now(), o.At.Time, time.Hour)
	assert.Equal(t, before, session(b, conn), "a survey")
}
