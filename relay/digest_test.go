package relay

import (
	"context"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// TestDigest: a routing table that came to its rows one by one has the digest of one that was loaded with them.
func TestDigest(t *testing.T) {
	t.Parallel()
	rows := store.TenantRows{
		Endpoints:     []delivery.EndpointRow{{ID: outbox.NewUUID(), URL: "http://a"}, {ID: outbox.NewUUID(), URL: "http://b", Verified: true}},
		EventTypes:    []route.EventTypeRow{{ID: outbox.NewUUID(), EventType: "order.paid", Enabled: true}},
		Subscriptions: []route.SubscriptionRow{{ID: outbox.NewUUID(), EventType: "order.*"}, {ID: outbox.NewUUID(), Source: route.Older}},
	}
	attestLoaded(rows.Endpoints)
	want := digestOf(&rows)

	of := &tenant{table: route.NewTenant("acme", endpointDefaults())}
	seen := map[digest]bool{of.version().digest: true}
	step := func() {
		assert.False(t, seen[of.version().digest])
		seen[of.version().digest] = true
	}
	endpoint := func(before *delivery.EndpointRow, r delivery.EndpointRow) {
		attest(before, &r)
		of.differs(before.ID == r.ID, *before, r)
		_ = of.table.SetEndpoint(r)
	}
	for _, r := range rows.Subscriptions {
		of.differs(false, nil, r)
		_ = of.table.SetSubscription(r)
		step()
	}
	of.differs(false, nil, rows.EventTypes[0])
	_ = of.table.SetEventType(rows.EventTypes[0])
	step()
	for _, r := range rows.Endpoints {
		endpoint(&delivery.EndpointRow{}, r)
		step()
	}
	assert.Equal(t, want, of.version().digest)
	assert.Equal(t, uint64(5), of.version().changes)

	// One is another for a while, and each table has one more.
	other := rows.Endpoints[0]
	other.Active = true
	endpoint(&rows.Endpoints[0], other)
	step()
	id := outbox.NewUUID()
	endpoint(&delivery.EndpointRow{}, delivery.EndpointRow{ID: id})
	step()
	of.differs(false, nil, route.EventTypeRow{ID: id})
	_ = of.table.SetEventType(route.EventTypeRow{ID: id})
	step()
	kinds := map[route.Source]tableKind{route.Current: tableSubscriptions, route.Older: tableOlderSubscriptions}
	for source := range kinds {
		r := route.SubscriptionRow{ID: id, Source: source}
		of.differs(false, nil, r)
		_ = of.table.SetSubscription(r)
		step()
	}
	endpoint(&other, rows.Endpoints[0])
	for _, kind := range []tableKind{tableEndpoints, tableEventTypes, tableSubscriptions, tableOlderSubscriptions} {
		step()
		of.forget(kind, id)
		of.forget(kind, id) // it is gone
	}
	assert.Equal(t, want, of.version().digest)

	odd := delivery.EndpointRow{RatePerSecond: math.NaN()}
	first, second := hashRow(odd), hashRow(odd)
	assert.NotEqual(t, first, second, "what cannot be told is never the same")
}

// TestDigestIsSavedOnce: a tenant that leaves and joins has another row, and nothing is known of it.
func TestDigestIsSavedOnce(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	var c checkpoint
	var row string
	save := func() (again bool) {
		c.next = s.routes()
		require.NoError(t, c.saveDigests(ctx, s.session))
		require.Equal(t, 1, s.count("outbox_relay.tenants WHERE digest IS NOT NULL"))
		before := row
		require.NoError(t, s.pool.QueryRow(ctx, "SELECT xmin::text FROM outbox_relay.tenants").Scan(&row))
		return row != before
	}
	require.True(t, save())
	require.False(t, save())
	require.NoError(t, s.loadTenants(ctx))
	require.False(t, save(), "another session finds it")
	s.exec("SELECT outbox_relay.remove_tenant('acme')")
	s.exec("SELECT outbox_relay.add_tenant('acme')")
	s.leave("acme")
	require.NoError(t, s.loadTenants(ctx))
	require.True(t, save())
}

// TestDigestOfARowWithAnotherID: a row that is given another id is the row that a restart would load.
func TestDigestOfARowWithAnotherID(t *testing.T) {
	t.Parallel()
	ctx, s := t.Context(), newSite(t)
	s.relations = make(map[uint32]*relation)
	s.exec("INSERT INTO acme.webhook_event_types (event_type, category, display_name) VALUES ('order.paid', 'order', 'Paid')")
	s.exec("UPDATE acme.webhook_event_types SET id = gen_random_uuid()")
	s.exec("UPDATE acme.webhook_event_types SET display_name = 'the last one'")
	require.ErrorIs(t, s.stream.Run(ctx, &untilChanges{session: s.session, left: 3}, func() wal.LSN { return 0 }), errAllRows)
	followed := s.tenants["acme"].version().digest
	require.NoError(t, s.loadTenants(ctx))
	require.Equal(t, s.tenants["acme"].version().digest, followed)
}

// untilChanges ends the stream after some rows.
type untilChanges struct {
	*session
	left int
}

func (u *untilChanges) Change(ctx context.Context, c *wal.Change) error {
	err := u.session.Change(ctx, c)
	if u.left--; err == nil && u.left == 0 {
		return errAllRows
	}
	return err
}

func endpointDefaults() delivery.Defaults {
	cfg := DefaultConfig()
	return cfg.EndpointDefaults()
}
