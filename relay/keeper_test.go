package relay

import (
	"testing"
	"time"

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
