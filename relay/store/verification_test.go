package store_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// state is what is known of an endpoint, and what its row says.
func (b *bundle) verification(e store.Endpoint) (known store.Verification, is string) {
	b.t.Helper()
	list, err := b.store.Verifications(b.t.Context(), []string{e.Tenant, "other"})
	require.NoError(b.t, err)
	for _, v := range list {
		if v.Endpoint == e {
			known = v
		}
	}
	return known, b.row("is_verified, verified_at > now() - interval '1 minute'", e.Tenant+".webhook_endpoints WHERE id = $1", e.ID)
}

func TestVerification(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	ctx := t.Context()
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	url := get[string](b, "SELECT endpoint_url FROM a.webhook_endpoints WHERE id = $1", e.ID)
	hash := delivery.HashURL(url)
	rowOf := func() delivery.EndpointRow {
		registry, err := b.store.LoadShard(ctx, nil, 0, nil)
		require.NoError(t, err)
		return registry.Tenants[0].Endpoints[0]
	}

	require.NoError(t, b.store.NotVerified(ctx, e, url, 1, time.Minute, "answered 404"))
	require.NoError(t, b.store.NoteTry(ctx, e, "answered 405"))
	known, is := b.verification(e)
	assert.Equal(t, "false|-", is)
	assert.InDelta(t, time.Minute, known.Next, float64(10*time.Second))
	known.Next = 0
	assert.Equal(t, store.Verification{Endpoint: e, TriedFor: hash, Tries: 1, Again: true}, known)
	assert.Equal(t, "answered 405", get[string](b, "SELECT error FROM outbox_relay.endpoint_verification"))
	require.NoError(t, b.store.NotVerified(ctx, e, url, 2, -1, "answered 404"))
	known, _ = b.verification(e)
	assert.Equal(t, store.Verification{Endpoint: e, TriedFor: hash, Tries: 2}, known, "given up")

	done, err := b.store.Verified(ctx, e, url+"/before")
	require.NoError(t, err)
	assert.False(t, done, "it has another URL by now")
	_, is = b.verification(e)
	assert.Equal(t, "false|-", is)
	done, err = b.store.Verified(ctx, e, url)
	require.NoError(t, err)
	assert.True(t, done)
	known, is = b.verification(e)
	assert.Equal(t, "true|true", is)
	assert.Equal(t, store.Verification{Endpoint: e, TriedFor: hash, VerifiedFor: hash}, known)
	assert.Equal(t, hash, rowOf().VerifiedFor)

	require.NoError(t, b.store.Unverify(ctx, e, url))
	_, is = b.verification(e)
	assert.Equal(t, "true|true", is, "it is verified with this one")
	b.exec("UPDATE a.webhook_endpoints SET endpoint_url = 'https://example.org/ä'")
	require.NoError(t, b.store.Unverify(ctx, e, "https://example.org/ä"))
	known, is = b.verification(e)
	assert.Equal(t, "false|true", is)
	assert.Equal(t, store.Verification{}, known, "everything begins anew")

	b.exec("UPDATE a.webhook_endpoints SET is_verified = true")
	require.NoError(t, b.store.NoteVerified(ctx, "a", []outbox.UUID{e.ID, e.ID}[:1], [][]byte{delivery.HashURL("https://example.org/ä")}))
	assert.Equal(t, delivery.HashURL(rowOf().URL), rowOf().VerifiedFor)
	require.NoError(t, b.store.ForgetVerifications(ctx, "a", []outbox.UUID{e.ID}))
	assert.Nil(t, rowOf().VerifiedFor)
}

// TestVerificationOfBrokenTenants: what is wrong with a tenant's tables is that tenant's trouble, and soon over.
func TestVerificationOfBrokenTenants(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	ctx := t.Context()
	e := store.Endpoint{Tenant: "a", ID: b.endpoint("a")}
	url := get[string](b, "SELECT endpoint_url FROM a.webhook_endpoints WHERE id = $1", e.ID)
	tx, err := b.admin.Begin(ctx)
	require.NoError(t, err)
	_, err = tx.Exec(ctx, "LOCK TABLE a.webhook_endpoints")
	require.NoError(t, err)
	began := time.Now()
	_, err = b.store.Verified(ctx, e, url)
	var broken *store.TenantError
	require.ErrorAs(t, err, &broken)
	assert.Less(t, time.Since(began), 4*time.Second)
	require.NoError(t, tx.Rollback(ctx))

	b.exec("REVOKE UPDATE (is_verified) ON a.webhook_endpoints FROM outbox_relay_runner")
	_, err = b.store.Verified(ctx, e, url)
	require.ErrorAs(t, err, &broken)
	b.exec("SELECT outbox_relay.add_tenant('a')")
	_, err = b.store.Verified(ctx, e, url)
	require.NoError(t, err)

	before, _ := b.verification(e)
	require.NotEqual(t, store.Verification{}, before)
	b.exec("SELECT outbox_relay.remove_tenant('a')")
	known, _ := b.verification(e)
	assert.Equal(t, before, known, "it counts again once the tenant is back")
}

// TestClaimTellsWhatIsForVerifiedEndpointsOnly, by the type of the event.
func TestClaimTellsWhatIsForVerifiedEndpointsOnly(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	b.exec(`INSERT INTO a.webhook_event_types (event_type, category, display_name, requires_verification) VALUES ('card.issued', 'card', '', true), ('order.created', 'order', '', false)`)
	b.exec(`INSERT INTO a.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('card.issued', $1, 'x'), ('order.created', $1, 'x'), ('no.such', $1, 'x')`, e)
	b.exec(`INSERT INTO a.webhook_deliveries (webhook_endpoint_id, webhook_event_id, request_url, request_method, request_body, relayed)
		SELECT $1, v.id, '', 'POST', v.event_type, true FROM a.webhook_events v`, e)
	b.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at) SELECT d.id, 'a', $1, now() FROM a.webhook_deliveries d`, e)
	claim := func() map[string]bool {
		claimed, _, err := b.store.Claim(t.Context(), b.owner, store.ClaimOptions{N: 10, Lease: time.Hour})
		require.NoError(t, err)
		only := make(map[string]bool)
		for _, c := range claimed {
			only[string(c.Message.Body)] = c.VerifiedOnly
		}
		b.exec(`UPDATE outbox_relay.retry_queue SET due_at = now(), leased_by = NULL`)
		return only
	}
	assert.Equal(t, map[string]bool{"card.issued": true, "order.created": false, "no.such": false}, claim())
	b.exec(`UPDATE a.webhook_event_types SET requires_verification = false`)
	assert.Equal(t, map[string]bool{"card.issued": false, "order.created": false, "no.such": false}, claim())
}
