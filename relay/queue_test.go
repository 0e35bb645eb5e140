package relay

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestClaimsOfAReplica are of tenants that it serves, and of endpoints whose breaker no other process has open: one batch while another is attempted, and no more
// bytes than fit.
func TestClaimsOfAReplica(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	shut, healed := s.endpoint("", ""), s.endpoint("", "")
	s.exec(`INSERT INTO outbox_relay.endpoint_health (tenant, endpoint_id, open_until) VALUES ('acme', $1, now() + interval '1 hour'), ('acme', $2, now() - interval '1 s')`,
		shut.endpoint, healed.endpoint)
	var due []store.Outcome
	for _, key := range []laneKey{shut, healed, healed, healed} {
		j := s.job()
		j.EndpointID = key.endpoint
		due = append(due, store.Outcome{Delivery: &j.Delivery, Status: store.Pending, Reason: store.DeferWindow})
	}
	broken, err := s.store.Record(ctx, s.owner, nil, due)
	require.NoError(t, err)
	require.Empty(t, broken)
	claimed := func() int {
		_, err := s.claimBatch(ctx)
		require.NoError(t, err)
		n, _ := s.dispatcher.claimRoom()
		return n
	}

	require.NoError(t, s.heedBreakers(ctx))
	require.Equal(t, map[store.Endpoint]int{{Tenant: "acme", ID: shut.endpoint}: 0}, s.dispatcher.caps())
	cfg := s.cfg()
	cfg.Tenants.Include = []string{"other*"}
	require.Zero(t, claimed())
	cfg.Tenants.Include, cfg.Database.Shards = nil, 2
	s.exec(`UPDATE outbox_relay.tenants SET shard = 1`)
	require.Zero(t, claimed(), "it is the other shard's")
	s.exec(`UPDATE outbox_relay.tenants SET shard = 0`)
	cfg.Queue.Batch = 1
	require.Equal(t, 1, claimed())
	require.Equal(t, 2, claimed())
	require.Equal(t, 2, claimed())
	cfg.Queue.Batch = 100
	window := s.dispatcher.cfg.Window.Bytes
	s.dispatcher.cfg.Window.Bytes = 0
	require.Equal(t, 2, claimed(), "there is no room")
	s.dispatcher.cfg.Window.Bytes = window
	require.Equal(t, 3, claimed(), "all but that behind the open breaker")
}
