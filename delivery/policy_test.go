package delivery

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPolicyOfHosts(t *testing.T) {
	t.Parallel()
	const denied, unlisted = "the host is denied by network.deny_hosts", "the host is not listed in network.allow_hosts"
	cfg := Config{
		AllowHosts: []string{"Hooks.Example.com.", "*.partner.example", "b\u00fccher.example", "192.0.2.1", "2001:db8::1", "my_service"},
		DenyHosts:  []string{"*.internal.partner.example", "bad.partner.example"},
	}
	var f faults
	cfg.validateHosts(&f)
	require.Empty(t, f)
	p := cfg.Policy()
	for raw, want := range map[string]string{
		"https://hooks.example.com/":             "",
		"https://HOOKS.example.COM.:8443/":       "",
		"https://hooks.example.com..":            "",
		"https://a.hooks.example.com":            unlisted,
		"https://example.com":                    unlisted,
		"https://hooks.example.com.evil.example": unlisted,
		"https://evilhooks.example.com":          unlisted,
		"https://a.partner.example":              "",
		"https://a.b.partner.example":            "",
		"https://partner.example":                unlisted,
		"https://.partner.example":               unlisted,
		"https://evilpartner.example":            unlisted,
		"https://bad.partner.example":            denied,
		"https://BAD.partner.example.":           denied,
		"https://x.internal.partner.example":     denied,
		"https://x.y.internal.partner.example":   denied,
		"https://internal.partner.example":       "",
		"https://b\u00fccher.example":            "",
		"https://xn--bcher-kva.example":          "",
		"https://B\u00dcCHER.example":            "",
		"https://192.0.2.1":                      "",
		"https://[::ffff:192.0.2.1]":             "",
		"https://[::ffff:c000:201]:9":            "",
		"https://192.0.2.2":                      unlisted,
		"https://0xc0.0.2.1":                     unlisted, // not the name that was allowed, whatever it leads to
		"https://[2001:db8:0::1]":                "",
		"https://[2001:db8::1%25eth0]":           "",
		"https://my_service:8080":                "",
		"https://hooks.example.com@evil.example": unlisted,
		"https://evil.example/hooks.example.com": unlisted,
	} {
		u, err := url.Parse(raw)
		require.NoError(t, err, raw)
		require.True(t, hostToASCII(u), raw)
		assert.Equal(t, want, p.denied(u), raw)
	}
}

func TestPolicyOfPortsAndSchemes(t *testing.T) {
	t.Parallel()
	cfg := Config{Ports: []int{80, 443, 8443}}
	httpsOnly := Config{HTTPSOnly: true}
	for raw, want := range map[string][2]string{
		"https://h":        {"", ""},
		"https://h:443":    {"", ""},
		"https://h:":       {"", ""},
		"https://h:8443":   {"", ""},
		"https://[::1]":    {"", ""},
		"https://h:22":     {"port 22 is not listed in network.ports", ""},
		"https://h:0443":   {"", ""},
		"https://h:65979":  {"port 65979 is not listed in network.ports", ""}, // 443 and 65536
		"https://[::1]:25": {"port 25 is not listed in network.ports", ""},
		"http://h":         {"", "http:// is denied by network.https_only"},
		"http://h:8443":    {"", "http:// is denied by network.https_only"},
	} {
		u, err := url.Parse(raw)
		require.NoError(t, err, raw)
		assert.Equal(t, want, [2]string{cfg.Policy().denied(u), httpsOnly.Policy().denied(u)}, raw)
	}
}

// TestDeniedURLs: what the policy denies is not even looked up, and a redirect gains nothing.
func TestDeniedURLs(t *testing.T) {
	t.Parallel()
	other := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("somebody was asked who must not be") })
	var next string
	s := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", next)
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	_, otherPort, _ := strings.Cut(strings.TrimPrefix(other.URL, "http://"), ":")
	here, evil := "http://good.policy.test:"+port, "http://evil.policy.test:"+otherPort
	follow := func(r *EndpointRow) { r.FollowRedirects = true }
	for transport, change := range transports() {
		var names []string
		lookup := func(_ context.Context, host string) ([]string, error) {
			names = append(names, host)
			return []string{"127.0.0.1"}, nil
		}
		with := func(policy func(*Config)) *bundle { return setupLookup(t, lookup, change, policy) }
		for _, c := range []struct {
			policy         func(*Config)
			url, next, err string
		}{
			{func(c *Config) { c.DenyHosts = []string{"evil.policy.test"} }, evil, "", "the host is denied by network.deny_hosts"},
			{func(c *Config) { c.DenyHosts = []string{"evil.policy.test"} }, here, evil, "answered 307, not followed: the host is denied by network.deny_hosts"},
			{func(c *Config) { c.AllowHosts = []string{"good.policy.test"} }, evil, "", "the host is not listed in network.allow_hosts"},
			{func(c *Config) { c.AllowHosts = []string{"good.policy.test"} }, here, evil, "answered 307, not followed: the host is not listed in network.allow_hosts"},
			{func(c *Config) { c.Ports = []int{1} }, here, "", "port " + port + " is not listed in network.ports"},
			{func(c *Config) { c.HTTPSOnly = true }, here, "", "http:// is denied by network.https_only"},
		} {
			names = nil
			b := with(c.policy)
			next = c.next
			res := b.attempt(b.endpoint(c.url, follow))
			assert.Equal(t, c.err, res.Err)
			if c.next == "" {
				assert.Equal(t, ClassDenied, res.Class, "%s: %s", transport, c.url)
				assert.Empty(t, names)
			} else {
				assert.Equal(t, Class3xx, res.Class, "%s: %s: another day it may lead elsewhere", transport, c.next)
				assert.Equal(t, []string{"good.policy.test"}, names)
			}
		}
	}
}
