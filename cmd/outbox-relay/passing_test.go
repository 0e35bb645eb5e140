package main

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestTroubleThatPasses holds locks that a migration, or an application's transaction that was left open, would hold. The other tenant's events go on
// meanwhile, and what the tenant in trouble missed is sent without anybody's help once the lock is gone.
func TestTroubleThatPasses(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", func(outbox.UUID, string) int { return http.StatusOK }, "sound", "sick")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s.asRunner(t)
	sound, sick := s.endpoint(t, "sound", 3), s.endpoint(t, "sick", 3)
	s.subscribe(t, "sound", sound, "order.created", "{}")
	s.subscribe(t, "sick", sick, "order.created", "{}")
	startRelay(t, s.config)
	s.leading(ctx, t)

	arrived, missed := 0, 0
	for _, lock := range []string{
		"LOCK TABLE sick.webhook_deliveries", "LOCK TABLE sick.webhook_endpoints", "SELECT outbox_relay.wake('sick', '" + sick.String() + "')",
	} {
		s.exec(t, "UPDATE sick.webhook_endpoints SET delivery_order = 'strict', paused_at = CASE WHEN $1 THEN now() END", lock[0] == 'S')
		tx, err := s.pool.Begin(ctx)
		require.NoError(t, err)
		_, err = tx.Exec(ctx, lock)
		require.NoError(t, err)
		s.insertMany(t, "sick", "order.created", 10)
		missed += 10
		for range 5 {
			s.insertMany(t, "sound", "order.created", 1)
			arrived++
			s.receiver.await(ctx, t, "the other tenant's event after "+lock, func() bool { return s.arrivedAt(sound) == arrived })
		}
		require.NoError(t, tx.Rollback(ctx))
		s.exec(t, "SELECT outbox_relay.resume_endpoint('sick', $1)", sick)
		s.receiver.await(ctx, t, "what was missed after "+lock, func() bool { return s.arrivedAt(sick) == missed })
		s.receiver.await(ctx, t, "the end of what was missed", func() bool {
			var state string
			require.NoError(t, s.pool.QueryRow(ctx, `SELECT state FROM outbox_relay.tenants WHERE schema = 'sick'`).Scan(&state))
			return state == "active"
		})
	}
}

// TestTenantsMadeAnew drops a tenant's schema and makes it again under its name: the new customer's events must not reach the old one's receivers.
// Then the table of tenants itself is emptied and filled again.
func TestTenantsMadeAnew(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", func(outbox.UUID, string) int { return http.StatusOK }, "acme", "other")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	before := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", before, "order.created", "{}")
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the first customer's event", func() bool { return s.arrivedAt(before) == 1 })

	s.cascade(t, "DROP SCHEMA acme CASCADE")
	s.exec(t, "CREATE SCHEMA acme")
	s.command(t, "tenants", "add", "acme")
	s.insertMany(t, "acme", "order.created", 5) // which the first customer would have liked
	after := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", after, "order.paid", "{}")
	s.insertMany(t, "acme", "order.paid", 1)
	s.receiver.await(ctx, t, "the second customer's event", func() bool { return s.arrivedAt(after) == 1 })
	require.Equal(t, 1, s.arrivedAt(before))

	s.exec(t, "TRUNCATE outbox_relay.tenants")
	s.insertMany(t, "acme", "order.paid", 1) // of no tenant
	s.command(t, "tenants", "add", "acme")
	s.insertMany(t, "acme", "order.paid", 1)
	s.receiver.await(ctx, t, "an event of the tenant added again", func() bool { return s.arrivedAt(after) == 2 })
}

// TestTablesMadeAnew makes tables of a tenant anew by the application's own statements, within the transaction that adds it: the log does not say that
// their rows are gone, nor does it bring those that were written before the tenant was added.
func TestTablesMadeAnew(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s.subscribe(t, "acme", s.endpoint(t, "acme", 3), "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)

	want := 0
	for _, drop := range []string{"DROP SCHEMA acme CASCADE; CREATE SCHEMA acme", "DROP TABLE acme.webhook_endpoints CASCADE", "DROP TABLE acme.webhook_subscriptions"} {
		s.insertMany(t, "acme", "order.created", 1)
		want++
		s.receiver.await(ctx, t, "an event before "+drop, func() bool { return s.receiver.count() == want })

		endpoint := s.remake(t, drop)
		s.insertMany(t, "acme", "order.created", 5) // which the endpoint, or the subscription, that is gone would have liked
		s.insertMany(t, "acme", "order.paid", 1)
		want++
		s.receiver.await(ctx, t, "an event after "+drop, func() bool { return s.arrivedAt(endpoint) == 1 })
		s.subscribe(t, "acme", endpoint, "order.created", "{}")
	}
	_, err := p.stop(t)
	require.NoError(t, err)
	require.Equal(t, want, s.receiver.count())
}

// remake drops tables and makes them again, with an endpoint for order.paid. It goes again after a deadlock, as cascade does.
func (s *site) remake(t *testing.T, drop string) (endpoint outbox.UUID) {
	t.Helper()
	for {
		err := pgx.BeginFunc(t.Context(), s.pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), drop); err != nil {
				return err
			}
			_, err := tx.Exec(t.Context(), `DO $$ DECLARE ddl text; BEGIN
				FOR ddl IN SELECT format(t.ddl, 'acme') FROM outbox_relay.tenant_tables() t WHERE to_regclass('acme.' || t.name) IS NULL ORDER BY t.ord LOOP EXECUTE ddl; END LOOP;
				END $$`)
			require.NoError(t, err)
			endpoint = s.endpointBy(t, tx, "acme", 3)
			s.subscribeBy(t, tx, "acme", endpoint, "order.paid", "{}")
			_, err = tx.Exec(t.Context(), "SELECT outbox_relay.add_tenant('acme')")
			return err
		})
		if broken, ok := errors.AsType[*pgconn.PgError](err); ok && broken.Code == "40P01" {
			continue
		}
		require.NoError(t, err)
		return endpoint
	}
}

// TestResendToAPausedEndpoint sends a delivery again whose row does not keep the body, since it succeeded, while its endpoint takes none.
func TestResendToAPausedEndpoint(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 100ms\n", func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	endpoint := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", endpoint, "order.created", "{}")
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "the event", func() bool { return s.recorded(t, []string{"acme"}) == 1 })
	s.exec(t, "SELECT outbox_relay.pause_endpoint('acme', $1)", endpoint)
	s.exec(t, "SELECT outbox_relay.resend('acme', id) FROM acme.webhook_deliveries")
	s.receiver.await(ctx, t, "the delivery to be parked", func() (parked bool) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT due_at = 'infinity' AND leased_by IS NULL FROM outbox_relay.retry_queue`).Scan(&parked))
		return parked
	})
	s.exec(t, "SELECT outbox_relay.resume_endpoint('acme', $1)", endpoint)
	s.receiver.await(ctx, t, "the event again", func() bool { return s.receiver.count() == 2 })
}

// TestSchemaRenamed gives a tenant's schema another name while deliveries of it wait: what waits goes on under that name, and what had been delivered
// is not sent again.
func TestSchemaRenamed(t *testing.T) {
	t.Parallel()
	var up atomic.Bool
	var failing atomic.Pointer[outbox.UUID]
	s := newSite(t, "queue:\n  poll: 100ms\n", func(endpoint outbox.UUID, _ string) int {
		if endpoint == *failing.Load() && !up.Load() {
			return http.StatusServiceUnavailable
		}
		return http.StatusOK
	}, "acme", "other")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	well, down := s.endpoint(t, "acme", 3), s.endpoint(t, "acme", 10)
	failing.Store(&down)
	s.subscribe(t, "acme", well, "order.created", "{}")
	s.subscribe(t, "acme", down, "order.created", "{}")
	s.exec(t, "UPDATE acme.webhook_endpoints SET retry_backoff_seconds = 3600 WHERE id = $1", down)
	startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 20)
	s.receiver.await(ctx, t, "every delivery to have a row", func() (all bool) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) = 40 FROM acme.webhook_deliveries`).Scan(&all))
		return all
	})

	before := s.receiver.delivered()
	s.exec(t, "ALTER SCHEMA acme RENAME TO apex")
	s.insertMany(t, "apex", "order.created", 5) // of no tenant yet
	s.command(t, "tenants", "remove", "acme", "--yes")
	up.Store(true) // before anything is sent under the new name: what fails there waits for up to an hour
	s.command(t, "tenants", "add", "apex", "--since", time.Now().Add(-time.Hour).Format(time.RFC3339))
	s.insertMany(t, "apex", "order.created", 5)
	s.receiver.await(ctx, t, "every event at both endpoints", func() bool { return s.arrivedAt(well) == 30 && s.arrivedAt(down) == 30 })
	for p, n := range s.receiver.delivered() { // what came between the two names may be sent under both
		if _, early := before[pair{well, p.event}]; early {
			require.Equal(t, 1, n, "%v", p)
		}
	}
}
