package relay

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestHealthThatCouldNotBeSaved is saved the next time, from the first failure on.
func TestHealthThatCouldNotBeSaved(t *testing.T) {
	t.Parallel()
	s, endpoint := newSite(t), outbox.NewUUID()
	fails := func(ago time.Duration) {
		s.keeper.note([]store.Outcome{{
			Delivery: &store.Delivery{Tenant: "acme", EndpointID: endpoint}, Status: store.Retrying, Attempted: true,
			Result: delivery.Result{Class: delivery.Class5xx, Err: "answered 503", Started: time.Now().Add(-ago)},
		}})
	}
	fails(time.Hour)
	s.exec(`ALTER TABLE outbox_relay.endpoint_health RENAME TO away`)
	require.Error(t, s.keeper.saveHealth(t.Context()))
	s.exec(`ALTER TABLE outbox_relay.away RENAME TO endpoint_health`)
	fails(time.Minute)
	require.NoError(t, s.keeper.saveHealth(t.Context()))
	require.Equal(t, 1, s.count(`outbox_relay.endpoint_health WHERE failing_since <= now() - interval '1 hour' AND last_error = 'answered 503'`))
}

// TestADisablingIsToldOnce: attempts in flight, and those of what was read from the log before the disabling, get the same answer.
func TestADisablingIsToldOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		k := newKeeper(nil, slog.New(slog.DiscardHandler))
		gone := func(started time.Time) {
			k.note([]store.Outcome{{
				Delivery: &store.Delivery{Tenant: "t", EndpointID: outbox.UUID{1}}, Attempted: true, Status: store.Retrying, Disable: true,
				Result: delivery.Result{Class: delivery.ClassGone, Started: started, Duration: time.Since(started)},
			}})
		}
		began := time.Now()
		gone(began)
		k.takeHealth()
		for range 20 {
			time.Sleep(healthEvery)
			gone(time.Now())
			gone(began)
			k.takeHealth()
		}
		assert.Len(t, k.news, 1)
		time.Sleep(2 * disabling)
		gone(began)
		time.Sleep(2 * disabling)
		gone(time.Now()) // it was active again
		assert.Len(t, k.news, 2)
		time.Sleep(time.Hour)
		k.takeHealth()
		assert.Empty(t, k.disabled)
	})
}
