package main

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay"
)

// TestProfiles: a profile supplies defaults, here and for whom requests may go to; whatever is given counts.
func TestProfiles(t *testing.T) {
	t.Parallel()
	load := func(text string) config {
		c, err := loadText(t, text, "--database-url="+dsn)
		require.NoError(t, err, text)
		return c
	}
	want := defaultConfig()
	want.Database.URL = dsn
	assert.Equal(t, want, load("validation: {profile: staging}"))

	development := load("validation: {profile: development}")
	for _, address := range []string{"127.0.0.1", "::1", "10.1.2.3", "192.168.1.1", "172.31.0.1", "fd00::1"} {
		assert.True(t, allows(&development, address), address)
	}
	for _, address := range []string{"169.254.169.254", "100.64.0.1", "0.0.0.0", "172.32.0.1", "fe80::1"} {
		assert.False(t, allows(&development, address), address)
	}
	assert.False(t, development.Network.HTTPSOnly)
	development.Network.Allow, development.Validation.Profile = nil, relay.ProfileStaging
	assert.Equal(t, want, development, "and nothing else")

	c := load("validation: {profile: development}\nnetwork: {allow: [10.1.0.0/16], https_only: true}")
	assert.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}, c.Network.Allow)
	assert.True(t, c.Network.HTTPSOnly)
	assert.Empty(t, load("validation: {profile: development}\nnetwork: {allow: []}").Network.Allow)
	c = load("validation: {profile: development}\nnetwork: {deny: [10.0.0.0/7, 192.168.1.0/24]}")
	assert.False(t, allows(&c, "10.1.2.3"), "no fault either: nobody has given the range that is denied")
	assert.True(t, allows(&c, "192.168.2.1"))

	production := load("validation: {profile: production}")
	assert.Empty(t, production.Network.Allow)
	assert.True(t, production.Network.HTTPSOnly)
	assert.Equal(t, relay.EventTypesDotted, production.Validation.EventTypes)
	assert.Equal(t, 256*relay.KiB, production.Validation.MaxPayload)
	c = load("validation: {profile: production, max_payload: 0B, max_timeout: 4s, max_headers: 0, event_types: any}\nnetwork: {https_only: false}")
	assert.False(t, c.Network.HTTPSOnly)
	assert.Zero(t, c.Validation.MaxPayload)
	assert.Zero(t, c.Validation.MaxHeaders)
	assert.Equal(t, c.Validation.MaxTimeout, c.Validation.MinTimeout, "the default is lowered to what was given")
	assert.Equal(t, relay.EventTypesAny, c.Validation.EventTypes)
	assert.Equal(t, relay.SchemaOff, load("validation: {payload_schema: off}").Validation.PayloadSchema)
	assert.Equal(t, relay.SchemaOff, load("validation: {payload_schema: false}").Validation.PayloadSchema)
}

func allows(c *config, address string) bool {
	for _, p := range c.Network.Allow {
		if p.Contains(netip.MustParseAddr(address)) {
			return true
		}
	}
	return false
}
