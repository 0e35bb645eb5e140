package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// rename gives the slot another name in the configuration.
func (s *site) rename(t *testing.T, slot string) {
	t.Helper()
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(yaml), "slot: "+s.slot, "slot: "+slot, 1)), 0o600))
	s.slot = slot
}

// readmeSQL is the first block of SQL after the words.
func readmeSQL(t *testing.T, after string) string {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, text, found := strings.Cut(string(readme), after)
	require.True(t, found)
	_, text, found = strings.Cut(text, "```sql\n")
	require.True(t, found)
	text, _, _ = strings.Cut(text, "```")
	return text
}

// TestRenamedSlot: migrate and check tell of the slot that is left behind, which keeps the log, and with what the README says nothing is left, nor missed.
func TestRenamedSlot(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	ep := s.route(t)
	sent := 0
	send := func(n int) {
		s.insertMany(t, "acme", "order.created", n)
		sent += n
	}
	relays := func() {
		p := startRelay(t, s.config)
		s.leading(ctx, t)
		send(3)
		s.receiver.await(ctx, t, "events", func() bool { return s.arrivedAt(ep) == sent })
		o := invoke(t, nil, "check", "--config", s.config)
		assert.Equal(t, exitOK, o.code, o.out)
		o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_SLOT=another"}, "check", "--config", s.config)
		assert.Contains(t, o.out, "warn  slot "+s.slot+": another relay reads it and serves this database as well → "+store.OtherReaderRemedy+"\n")
		o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_SLOT=another", "OUTBOX_RELAY_TENANTS_INCLUDE=globex"}, "check", "--config", s.config)
		assert.NotContains(t, o.out, "  slot "+s.slot+": ", "which may be for the other tenants")
		_, exit := p.stop(t)
		require.NoError(t, exit)
		assert.NotContains(t, p.said(t), "another relay serves", "a slot that is left behind is read by none")
	}
	relays()
	old := s.slot
	told := func() string {
		return strings.Join([]string{invoke(t, nil, "migrate", "--config", s.config).out, invoke(t, nil, "check", "--config", s.config).out}, "\n")
	}
	assert.NotContains(t, told(), "no relay reads it, ")

	s.insertMany(t, "acme", "order.created", 2) // which no slot brings
	s.rename(t, old+"_new")
	statements := []string{"SELECT pg_drop_replication_slot('" + old + "')", "DELETE FROM outbox_relay.progress WHERE slot = '" + old + "'"}
	remedy := "if no relay is to use it any more, run: " + strings.Join(statements, "; ") + "; then outbox-relay audit --repair queues what it had not brought"
	said := told()
	assert.Contains(t, said, "… replication slot "+old+": no relay reads it, it is none of those configured, and the server keeps its log; "+remedy+"\n")
	assert.Regexp(t, `(?m)^warn  slot `+old+`: no relay reads it, and it is none of those configured: \S+B of the log kept → if no relay`, said)
	assert.Contains(t, said, "→ "+remedy+"\n")
	relays()
	for _, statement := range statements {
		s.exec(t, statement)
	}
	assert.NotContains(t, told(), old+":")
	p := startRelay(t, s.config)
	sent += 2
	s.receiver.await(ctx, t, "what was left out", func() bool {
		invoke(t, nil, "audit", "--repair", "--config", s.config) // which it refuses until something is known to be handled
		return s.arrivedAt(ep) == sent
	})
	_, exit := p.stop(t)
	require.NoError(t, exit)

	send(2)
	old = s.slot
	s.rename(t, old+"er")
	for statement := range strings.Lines(strings.NewReplacer("'outbox_relay'", "'"+old+"'", "'relay_orders'", "'"+s.slot+"'").Replace(readmeSQL(t, "**Another name for the slot.**"))) {
		s.exec(t, statement)
	}
	s.command(t, "migrate")
	relays()
	assert.NotContains(t, told(), old+":")
}

// TestAnotherRelayOnTheDatabase: one whose slot has another name sends the same events. It says so, unless the tenants may be divided between them.
func TestAnotherRelayOnTheDatabase(t *testing.T) {
	t.Parallel()
	const warning = `"msg":"another relay serves this database"`
	for name, test := range map[string]struct {
		settings string
		warned   bool
	}{"all tenants": {"", true}, "some tenants": {"tenants:\n  include: [globex]\n", false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			s := newSite(t, test.settings, always(http.StatusOK), "acme")
			s.shard(t, 2)
			first := startRelay(t, s.config)
			leading := func(p *relayProcess) {
				s.receiver.await(ctx, t, "both leaders", func() bool { return strings.Count(p.said(t), `"msg":"leading"`) == 2 })
			}
			leading(first)
			other := *s
			yaml, err := os.ReadFile(s.config)
			require.NoError(t, err)
			other.config = filepath.Join(t.TempDir(), "other.yaml")
			require.NoError(t, os.WriteFile(other.config, yaml, 0o600))
			other.rename(t, s.slot+"_too")
			o := invoke(t, nil, "migrate", "--config", other.config)
			require.Equal(t, exitOK, o.code, o.err)
			assert.Contains(t, o.out+o.err, "… replication slot "+s.slot+": another relay reads it: unless ")
			second := startRelay(t, other.config)
			leading(second)
			said := 0
			if test.warned {
				said = 2
				for shard, slot := range []string{s.slot, s.slot + "_1"} {
					assert.Contains(t, second.said(t), fmt.Sprintf(`%s,"shard":"%d","slot":%q`, warning, shard, slot))
				}
			}
			assert.Equal(t, said, strings.Count(second.said(t), warning))
			assert.NotContains(t, first.said(t), warning)
			for _, p := range []*relayProcess{first, second} {
				_, exit := p.stop(t)
				require.NoError(t, exit)
			}
		})
	}
}

// TestUninstall: with what the README says nothing of the relay is left but the tables of tenants, which work on, and it can be had again.
func TestUninstall(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	server := secondServer(t)
	s := newSiteOn(t, server.URL("postgres"), "", always(http.StatusOK), "acme")
	ep := s.route(t)
	s.shard(t, 2)
	s.exec(t, "CREATE ROLE relay LOGIN REPLICATION IN ROLE outbox_relay_runner")
	s.exec(t, "ALTER TABLE acme.webhook_endpoints ENABLE ROW LEVEL SECURITY")
	const policy = "CREATE POLICY outbox_relay ON acme.webhook_endpoints TO outbox_relay_runner USING (true)"
	s.exec(t, policy)
	works := func(n int) {
		p := startRelay(t, s.config)
		s.leading(ctx, t)
		s.insertMany(t, "acme", "order.created", 3)
		s.receiver.await(ctx, t, "events", func() bool { return s.arrivedAt(ep) == n })
		_, exit := p.stop(t)
		require.NoError(t, exit)
	}
	works(3)
	for statement := range strings.Lines(readmeSQL(t, "**To be rid of it**")) {
		s.exec(t, statement)
	}
	s.exec(t, "DROP ROLE relay")
	var left int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM pg_replication_slots) + (SELECT count(*) FROM pg_publication)
		+ (SELECT count(*) FROM pg_namespace WHERE nspname ~ 'relay') + (SELECT count(*) FROM pg_roles WHERE rolname ~ 'relay')`).Scan(&left))
	assert.Zero(t, left)
	s.insertMany(t, "acme", "order.created", 3)

	s.command(t, "migrate")
	s.exec(t, policy)
	s.command(t, "tenants", "add", "acme")
	works(6)
}
