package relay

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// TestARunThatStandsGoesOn: what is looked at again is found as it was claimed, until somebody changes it.
func TestARunThatStandsGoesOn(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	first, second := s.job(), s.job()
	second.EndpointID = first.EndpointID
	s.exec(`INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, created_by_user_id, delivery_order)
		VALUES ($1, 'slow', 'http://127.0.0.1:9', 'a secret of the test', gen_random_uuid(), 'strict')`, first.EndpointID)
	var rows []store.Outcome
	for i, j := range []*job{first, second} {
		j.Order = store.Place{Key: j.EndpointID, LSN: s.start + 100, N: int32(i)}
		rows = append(rows, store.Outcome{Delivery: &j.Delivery, Status: store.Pending})
	}
	broken, err := s.store.Record(ctx, s.owner, nil, rows)
	require.NoError(t, err)
	require.Empty(t, broken)
	_, err = s.claimBatch(ctx)
	require.NoError(t, err)
	require.Equal(t, first.ID, s.dispatcher.nextJob().ID)

	look := func() {
		runs := s.dispatcher.longRuns(-time.Minute)
		require.Len(t, runs["acme"], 1)
		require.NoError(t, s.recall(ctx, "acme", runs["acme"]))
	}
	look()
	require.Zero(t, s.recorder.pending())
	s.exec(`UPDATE acme.webhook_endpoints SET paused_at = now()`)
	look()
	require.Equal(t, 1, s.recorder.pending(), "the second goes back")
}
