package store_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestPresent(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b", "locked")
	here, gone := b.endpoint("a"), outbox.NewUUID()
	b.exec("DROP TABLE b.webhook_endpoints CASCADE")
	b.exec("REVOKE ALL ON locked.webhook_endpoints FROM outbox_relay_runner")
	there, err := b.store.Present(t.Context(), map[string][]outbox.UUID{
		"a": {here, gone}, "b": {here}, "locked": {here}, "never": {here},
	})
	require.NoError(t, err)
	assert.Equal(t, map[store.Endpoint]struct{}{{Tenant: "a", ID: here}: {}, {Tenant: "locked", ID: here}: {}}, there)

	there, err = b.store.Present(t.Context(), map[string][]outbox.UUID{"a": {{}}, "b": {{}}, "never": {{}}})
	require.NoError(t, err)
	assert.Equal(t, map[store.Endpoint]struct{}{{Tenant: "a"}: {}, {Tenant: "b"}: {}}, there)

	p := b.store.Pool()
	assert.Equal(t, 4, p.Limit)
	assert.Positive(t, p.Opened)
	assert.Zero(t, p.Acquired)
}
