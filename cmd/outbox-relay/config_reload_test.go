package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
	"github.com/neo-commons/outbox-relay/relay"
)

// another changes a value into one that it is not.
func another(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Int, reflect.Int64:
		if v.Int() > 1 { // a value above its ceiling would be lowered again
			v.SetInt(v.Int() - 1)
		} else {
			v.SetInt(v.Int() + 1)
		}
	case reflect.Float64:
		v.SetFloat(v.Float() + 0.05)
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), v.Len()+1, v.Len()+1))
	default:
		require.Fail(t, "a kind of value that nobody changes", "%v", v.Type())
	}
}

// The example lists what needs a restart, by keys and whole sections, and nothing else.
func TestExampleListsWhatNeedsARestart(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(examplePath)
	require.NoError(t, err)
	_, list, found := strings.Cut(strings.ReplaceAll(string(text), "\n# ", " "), "until a restart: ")
	require.True(t, found)
	list, _, found = strings.Cut(list, ".\n")
	require.True(t, found)
	listed := strings.Split(list, ", ")
	used := map[string]bool{databasesKey: true} // no key of the section, see differences
	c := defaultConfig()
	for i, l := range leavesOf(&c) {
		next := defaultConfig()
		another(t, leavesOf(&next)[i].value)
		require.Equal(t, []string{l.key}, differences(&c, &next))
		now := c.reloaded(&next)
		needs := len(differences(&now, &next)) > 0
		require.Equal(t, !needs, len(differences(&c, &now)) > 0, l.key)
		says := slices.IndexFunc(listed, func(k string) bool { return k == l.key || strings.HasPrefix(l.key, k+".") })
		assert.Equal(t, needs, says >= 0, "%s: needs a restart: %v", l.key, needs)
		if says >= 0 {
			used[listed[says]] = true
		}
	}
	for _, name := range listed {
		assert.True(t, used[name], "%s is listed and is no key", name)
	}

	next := defaultConfig()
	next.Databases = []databaseEntry{{Name: "one"}, {Name: "two"}}
	assert.Equal(t, []string{"databases"}, differences(&c, &next))
	other := next
	other.Databases = slices.Clone(next.Databases)
	other.Databases[1].Slot = "other"
	assert.Equal(t, []string{"databases.two.slot"}, differences(&next, &other))
	now := next.reloaded(&other)
	assert.Equal(t, next, now)
}

// TestReloadPastWhatStays: what waits for a restart may have gone from where it was when the relay began, or have no effect beside what has changed since. It is in use
// as it was, and holds nothing else up; the fault of what changes does.
func TestReloadPastWhatStays(t *testing.T) {
	t.Parallel()
	const proxy = "http://proxy.internal:3128"
	ca := certtest.New(t, "receivers").PEM()
	for name, c := range map[string]struct{ was, is, keys, fault string }{
		"authorities": {was: "delivery: {tls: {ca_file: OLD}}", is: "delivery: {tls: {ca_file: NEW}}", keys: "delivery.tls.ca_file"},
		"profile": {
			was: "delivery: {tls: {profiles: [{tenant: acme, ca_file: OLD}]}}", is: "delivery: {tls: {profiles: [{tenant: acme, ca_file: NEW}]}}", keys: "delivery.tls.profiles",
		},
		"proxy":    {was: "network: {proxy_file: PROXY.OLD}", is: "network: {proxy_file: PROXY.NEW}", keys: "network.proxy_file"},
		"database": {was: "database: {url: 'postgres://r@h/d?sslrootcert=OLD'}", is: "database: {url: 'postgres://r@h/d?sslrootcert=NEW'}", keys: "database.url"},
		"one of the databases": {
			was: "databases: [{name: a, url: 'postgres://r@h/d?sslrootcert=OLD'}]", is: "databases: [{name: a, url: 'postgres://r@h/d?sslrootcert=NEW'}]", keys: "databases.a.url",
		},
		"network of a profile": {
			was: "validation: {profile: development}", is: "network: {deny: [10.0.0.0/8]}", keys: "network.allow validation.profile",
		},
		"part of a host": {
			was: "databases: [{name: a, url: 'postgres://r@h/a', slot: a}, {name: b, url: 'postgres://r@h/b', slot: b}]",
			is:  "databases: [{name: a, url: 'postgres://r@h/a', slot: a}]\ndelivery: {host_concurrency: 1}", fault: "delivery.host_concurrency: 1: is shared by 2 relays",
		},
	} {
		dir := t.TempDir()
		old, oldProxy := certtest.Write(t, dir, "old.pem", ca), certtest.Write(t, dir, "old-proxy", []byte(proxy))
		place := strings.NewReplacer("PROXY.OLD", oldProxy, "OLD", old, "PROXY.NEW", certtest.Write(t, dir, "proxy", []byte(proxy)), "NEW", certtest.Write(t, dir, "ca.pem", ca))
		file := filepath.Join(dir, "relay.yaml")
		write := func(text string) {
			if !strings.Contains(text, "database") {
				text += "\ndatabase: {url: 'postgres://r@h/d'}"
			}
			require.NoError(t, os.WriteFile(file, []byte(place.Replace(text)), 0o600))
		}
		var used []config
		r := &reloader{file: file, load: func() (config, error) { return loadConfig(file, pflag.NewFlagSet("", 0)) }}
		write(c.was)
		require.NoError(t, r.first(), name)
		r.begin(prometheus.NewRegistry(), slog.New(slog.DiscardHandler), func(c *config) { used = append(used, *c) })
		require.NoError(t, os.Remove(old))
		require.NoError(t, os.Remove(oldProxy))
		write(c.is + "\nretry: {attempts: 7}")
		r.reload(false)
		if c.fault != "" {
			assert.Contains(t, r.fault, c.fault, name)
			assert.Empty(t, used, name)
			continue
		}
		assert.Empty(t, r.fault, name)
		assert.Equal(t, c.keys, strings.Join(r.restart, " "), name)
		if assert.Len(t, used, 1, name) {
			assert.Equal(t, 7, used[0].Retry.Attempts, name)
		}
	}
}

// TestReloadKeepsTheProfileWhole: what a profile says of networks waits for the restart that the profile waits for.
func TestReloadKeepsTheProfileWhole(t *testing.T) {
	t.Parallel()
	read := func(profile, network string) *config {
		file := filepath.Join(t.TempDir(), "relay.yaml")
		text := "database: {url: 'postgres://relay@db/app'}\nvalidation: {profile: " + profile + "}\nnetwork: " + network + "\n"
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		c, err := loadConfig(file, pflag.NewFlagSet("", 0))
		require.NoError(t, err)
		return &c
	}
	profiles := []string{relay.ProfileDevelopment, relay.ProfileStaging, relay.ProfileProduction}
	for _, from := range profiles {
		for _, to := range profiles {
			was := read(from, "{}")
			now := was.reloaded(read(to, "{deny_hosts: [example.com]}"))
			assert.Equal(t, from, now.Validation.Profile)
			assert.Equal(t, was.Network.HTTPSOnly, now.Network.HTTPSOnly, "%s to %s", from, to)
			assert.Equal(t, was.Network.Allow, now.Network.Allow, "%s to %s", from, to)
			assert.NotEmpty(t, now.Network.DenyHosts, "what no profile speaks of")
		}
	}
}
