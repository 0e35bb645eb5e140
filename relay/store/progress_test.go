package store_test

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func TestNew(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	// Whatever the role is set to, our sessions are as we need them.
	for _, setting := range []string{
		"search_path = public", "synchronous_commit = off", "statement_timeout = '30 s'", "idle_in_transaction_session_timeout = 1",
		"default_transaction_isolation = serializable", "default_transaction_read_only = on", "datestyle = german", "lock_timeout = 0",
	} {
		b.exec("ALTER ROLE relay_" + b.slot[len("store_"):] + " SET " + setting)
	}
	b.exec("CREATE TABLE a.settings (name text, value text)")
	b.exec(`CREATE FUNCTION a.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
		'BEGIN INSERT INTO a.settings SELECT name, setting FROM pg_settings; RETURN NULL; END'`)
	b.exec("CREATE TRIGGER note AFTER INSERT ON a.webhook_deliveries EXECUTE FUNCTION a.note()")
	_, err := b.open().Record(t.Context(), b.owner, nil, []store.Outcome{succeeded(deliver("a", b.endpoint("a")))})
	require.NoError(t, err)
	for name, want := range map[string]string{
		"application_name": "outbox-relay", "search_path": "", "synchronous_commit": "on", "statement_timeout": "0", "lock_timeout": "5000",
		"idle_in_transaction_session_timeout": "30000", "transaction_isolation": "read committed", "DateStyle": "ISO, DMY", "jit": "off",
	} {
		assert.Equal(t, want, get[string](b, "SELECT value FROM a.settings WHERE name = $1", name), name)
	}

	_, err = store.New(t.Context(), store.Config{URL: "postgres://u:pa55word@127.0.0.1:1/db?sslmode=bogus", Log: slog.New(slog.DiscardHandler)})
	require.ErrorContains(t, err, "parse database URL")
	assert.NotContains(t, err.Error(), "pa55word")
	_, err = store.New(t.Context(), store.Config{URL: "postgres://u:pa55word@127.0.0.1:1/db", ConnectTimeout: time.Second, Log: slog.New(slog.DiscardHandler)})
	require.ErrorContains(t, err, "connect to database")
	assert.NotContains(t, err.Error(), "pa55word")
}

func TestLead(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("DELETE FROM outbox_relay.progress") // the row of a slot that migrate did not make
	for _, test := range []struct {
		instance, system string
		epoch            int64
		kept             string
	}{
		{"", "", 1, "|"},
		{"prod", "", 2, "prod|"},
		{"prod", "77", 3, "prod|77"},
		{"staging", "77", 0, "prod|77"},
		{"", "77", 0, "prod|77"}, // a copy that nobody has given a name
		{"prod", "78", 0, "prod|77"},
		{"prod", "77", 4, "prod|77"},
	} {
		p, err := b.store.Lead(t.Context(), store.LeadOptions{InstanceID: test.instance, SystemID: test.system})
		if test.epoch == 0 {
			want := store.ErrInstance
			if test.instance == "prod" {
				want = store.ErrRestored
			}
			require.ErrorIs(t, err, want)
			require.ErrorContains(t, err, `"prod"`)
		} else {
			require.NoError(t, err)
		}
		assert.Equal(t, store.Progress{Epoch: test.epoch}, p)
		assert.Equal(t, test.kept, b.row("instance_id, system_identifier", "outbox_relay.progress WHERE slot = $1", b.slot))
	}
	b.exec("UPDATE outbox_relay.progress SET lsn = '1/2', high_lsn = 'A/FFFFFFFF'")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{InstanceID: "prod"})
	require.NoError(t, err)
	assert.Equal(t, store.Progress{Epoch: 5, LSN: 1<<32 + 2, High: pglogrepl.LSN(0xA_FFFF_FFFF)}, p)
}

// Whoever may lead may claim, and nobody else.
func TestAdmit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const system = "76"
	for _, test := range []struct {
		instance, system string // that the database knows
		ours             string
		admitted         bool
	}{
		{"", "", "", true},
		{"", "", "prod", true},
		{"prod", "", "prod", true},
		{"prod", system, "prod", true},
		{"", system, "", true},
		{"prod", system, "staging", false},
		{"prod", system, "", false}, // a copy that nobody has given a name
		{"", "77", "", false},
		{"", "77", "prod", false},
		{"prod", "77", "staging", false},
		{"prod", "77", "prod", true}, // restored into another cluster: healing mends it
	} {
		b.exec("UPDATE outbox_relay.progress SET instance_id = $1, system_identifier = $2", test.instance, test.system)
		us := store.LeadOptions{InstanceID: test.ours, SystemID: system}
		err := b.store.Admit(t.Context(), us)
		_, leading := b.store.Lead(t.Context(), us)
		if test.admitted {
			require.NoError(t, err, test)
			assert.NotErrorIs(t, leading, store.ErrInstance, test)
		} else {
			require.ErrorIs(t, err, store.ErrInstance, test)
			require.ErrorIs(t, leading, store.ErrInstance, test)
		}
	}
	b.exec("DELETE FROM outbox_relay.progress")
	require.ErrorIs(t, b.store.Admit(t.Context(), store.LeadOptions{}), store.ErrUnknown)
}

// What the slots of others say counts as long as our own says nothing: they came with the copy.
func TestInstanceOfOtherSlots(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const ours, theirs, system = "staging", "production", "76"
	row := func(slot, instance, system string) string { return slot + "/" + instance + "/" + system }
	named, unnamed := "name it, with database.instance_id", " SET system_identifier = '76' WHERE slot = '"+b.slot+"'"
	take := "if this relay shall take over, run: UPDATE outbox_relay.progress SET instance_id = '" + ours + "' WHERE slot = '" + b.slot + "'"
	given := "set database.instance_id to a name, such as production, and run: UPDATE outbox_relay.progress SET instance_id = 'production' WHERE slot = '" + b.slot + "'"
	for name, test := range map[string]struct {
		own      string   // "": migrate has not run with this slot
		others   []string // the first of them is told of
		instance string
		system   string
		hint     string // "": we may lead
	}{
		"alone":                                {"//", nil, ours, system, ""},
		"named, before migrate":                {"", []string{row("app", theirs, system)}, ours, system, strings.Replace(take, "run: ", "run outbox-relay migrate, and then: ", 1)},
		"named":                                {"//", []string{row("app", theirs, system)}, ours, system, take},
		"named, on another cluster":            {"//", []string{row("app", theirs, "77")}, ours, system, take},
		"named, cluster unknown":               {"//", []string{row("app", theirs, "77")}, ours, "", take},
		"named, and we are not":                {"//", []string{row("app", theirs, system)}, "", system, named},
		"led without a name, by hand":          {row("", "", system), []string{row("app", theirs, system)}, ours, system, take},
		"led here without a name":              {row("", "", system) + "/5", []string{row("app", theirs, system)}, "", system, ""},
		"led here before we had a name":        {row("", "", system) + "/5", []string{row("app", theirs, system)}, ours, system, ""},
		"led here, cluster unknown":            {row("", "", system) + "/5", []string{row("app", theirs, system)}, ours, "", ""},
		"led elsewhere without a name":         {row("", "", "77") + "/5", []string{row("", "", "77"), row("app", theirs, "77")}, ours, system, take},
		"named, beside ours":                   {"//", []string{row("z", theirs, system), row("a", ours, system)}, ours, system, take},
		"named, beside one that is not":        {"//", []string{row("z", theirs, system), row("a", "", "77")}, ours, system, take},
		"ours already":                         {row("", ours, system), []string{row("app", theirs, system)}, ours, system, ""},
		"ours already, by a statement":         {row("", ours, ""), []string{row("app", theirs, "77")}, ours, system, ""},
		"a shard, before migrate":              {"", []string{row("app", ours, system)}, ours, system, ""},
		"a shard":                              {"//", []string{row("app", ours, system), row("app_1", ours, system)}, ours, system, ""},
		"a shard of a restored one":            {"//", []string{row("app", ours, "77")}, ours, system, ""},
		"a shard that was led before a name":   {"//", []string{row("app", ours, system), row("app_1", "", "77")}, ours, system, ""},
		"unnamed, led before we had one":       {"//", []string{row("app", "", system)}, ours, system, ""},
		"nobody named":                         {"//", []string{row("app", "", system)}, "", system, ""},
		"nobody named, never led":              {"//", []string{row("app", "", "")}, "", system, ""},
		"nobody named, another cluster":        {"//", []string{row("app", "", "77")}, "", system, unnamed},
		"nobody named, before migrate":         {"", []string{row("app", "", "77")}, "", system, "outbox-relay migrate, and then: UPDATE outbox_relay.progress" + unnamed},
		"nobody named, and we are":             {"//", []string{row("app", "", "77")}, ours, system, take},
		"nobody named, led here":               {row("", "", system), []string{row("app", "", "77")}, "", system, ""},
		"nobody named, cluster unknown":        {"//", []string{row("app", "", "77")}, "", "", ""},
		"nobody named, ours of another, too":   {row("", "", "77") + "/5", []string{row("", "", "77"), row("app_1", "", "77")}, "", system, given},
		"copied, named there":                  {row("", theirs, "77") + "/5", []string{row("", theirs, "77")}, "", system, "if this relay shall take over, set database.instance_id to \"production\""},
		"copied, named there and here":         {row("", theirs, "77") + "/5", []string{row("", theirs, "77")}, ours, system, take},
		"renamed":                              {row("", theirs, system) + "/5", []string{row("", theirs, system)}, ours, system, "run: UPDATE outbox_relay.progress SET instance_id = '' WHERE slot = '" + b.slot + "'"},
		"restored, which is for healing":       {row("", ours, "77"), []string{row("app", ours, "77")}, ours, system, ""},
		"restored, beside what is not of ours": {row("", ours, "77"), []string{row("app", theirs, "77")}, ours, system, ""},
	} {
		b.exec("DELETE FROM outbox_relay.progress")
		insert := func(slot, text string) {
			part := strings.Split(text+"/0", "/") // the last is the epoch
			b.exec("INSERT INTO outbox_relay.progress (slot, instance_id, system_identifier, epoch) VALUES ($1, $2, $3, $4::text::int) ON CONFLICT DO NOTHING",
				cmp.Or(slot, part[0], b.slot), part[1], part[2], part[3])
		}
		if test.own != "" {
			insert(b.slot, test.own)
		}
		for _, other := range test.others {
			insert("", other)
		}
		before := b.row("array_agg((slot, instance_id, system_identifier, epoch) ORDER BY slot)::text", "outbox_relay.progress")
		us := store.LeadOptions{InstanceID: test.instance, SystemID: test.system}
		admitted := b.store.Admit(t.Context(), us)
		_, led := b.store.Lead(t.Context(), us)
		if test.hint == "" {
			switch {
			case strings.HasSuffix(test.own, "/77"):
				require.ErrorIs(t, led, store.ErrRestored, name)
			default:
				require.NoError(t, led, name)
			}
			if test.own == "" {
				require.ErrorIs(t, admitted, store.ErrUnknown, name)
			} else {
				require.NoError(t, admitted, name)
			}
			continue
		}
		for _, err := range []error{admitted, led} {
			require.ErrorIs(t, err, store.ErrInstance, name)
			part := strings.Split(test.others[0], "/")
			require.ErrorContains(t, err, fmt.Sprintf("slot %q was served by instance %q on cluster %q, this is instance %q on cluster %q",
				cmp.Or(part[0], b.slot), part[1], part[2], test.instance, test.system), name)
			var hinted interface{ Hint() string }
			require.ErrorAs(t, err, &hinted, name)
			require.True(t, strings.HasSuffix(hinted.Hint(), test.hint), "%s: %s", name, hinted.Hint())
		}
		require.Equal(t, before, b.row("array_agg((slot, instance_id, system_identifier, epoch) ORDER BY slot)::text", "outbox_relay.progress"), name)

		_, statement, found := strings.Cut(led.(interface{ Hint() string }).Hint(), "UPDATE ")
		if !found {
			continue
		}
		if test.own == "" {
			insert(b.slot, "//") // by migrate
		}
		b.exec("UPDATE " + statement)
		if strings.Contains(test.hint, "set database.instance_id to a name") {
			us.InstanceID = "production"
		}
		require.NoError(t, b.store.Admit(t.Context(), us), "%s: after %s", name, statement)
		_, led = b.store.Lead(t.Context(), us)
		if strings.HasPrefix(test.own, "/") && strings.Contains(test.own, "/77") { // healing has to know that it was restored
			require.ErrorIs(t, led, store.ErrRestored, name)
			continue
		}
		require.NoError(t, led, "%s: after %s", name, statement)
	}
}

func TestSaveSnapshot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	snap, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	require.NoError(t, b.store.SaveSnapshot(t.Context(), p.Epoch, snap))
	assert.Equal(t, snap.String(), b.row("snapshot", "outbox_relay.progress"))

	later, _, err := b.store.Snapshot(t.Context())
	require.NoError(t, err)
	require.NotEqual(t, snap.String(), later.String())
	b.exec("UPDATE outbox_relay.progress SET timeline = 'FFFFFFFF'") // a standby has become the primary since
	require.ErrorIs(t, b.store.SaveSnapshot(t.Context(), p.Epoch, later), store.ErrFenced)
	assert.Equal(t, snap.String(), b.row("snapshot", "outbox_relay.progress"))
	b.exec("UPDATE outbox_relay.progress SET timeline = NULL") // of a leader that did not know of histories
	require.NoError(t, b.store.SaveSnapshot(t.Context(), p.Epoch, later))
	assert.Equal(t, later.String(), b.row("snapshot", "outbox_relay.progress"))
	b.exec("UPDATE outbox_relay.progress SET timeline = 'FFFFFFFF'")
	p, err = b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	require.NoError(t, b.store.SaveSnapshot(t.Context(), p.Epoch, later), "who leads on the new primary is not fenced by what was led on the old one")
}

// TestSaveDigests: a leader whose epoch is over saves none, and nobody is waited for.
func TestSaveDigests(t *testing.T) {
	t.Parallel()
	b := setup(t, "a", "b")
	p, err := b.store.Lead(t.Context(), store.LeadOptions{})
	require.NoError(t, err)
	tx, err := b.admin.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), "SELECT FROM outbox_relay.tenants WHERE schema = 'b' FOR UPDATE")
	require.NoError(t, err)
	soon, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	saved, err := b.store.SaveDigests(soon, p.Epoch, map[string]int64{"a": 1, "b": 2, "gone": 3})
	require.NoError(t, tx.Rollback(t.Context()))
	require.NoError(t, err)
	assert.Equal(t, []string{"a"}, saved)
	saved, err = b.store.SaveDigests(t.Context(), p.Epoch-1, map[string]int64{"a": 4, "b": 5})
	require.NoError(t, err)
	assert.Empty(t, saved)
	assert.Equal(t, "1|-", b.row("(SELECT digest FROM outbox_relay.tenants WHERE schema = 'a'), (SELECT digest FROM outbox_relay.tenants WHERE schema = 'b')", "(SELECT) one"))
}

func TestRecorded(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	e := b.endpoint("a")
	one, two, none, old := deliver("a", e), deliver("a", e), deliver("a", e), deliver("a", e)
	b.record(succeeded(one), deferred(two, time.Hour))
	b.exec("INSERT INTO a.webhook_deliveries (webhook_event_id, webhook_endpoint_id, request_url, request_method) VALUES ($1, $2, 'u', 'POST')", old.EventID, e)
	found, err := b.store.Recorded(t.Context(), "a", []outbox.UUID{one.EventID, two.EventID, none.EventID, old.EventID})
	require.NoError(t, err)
	assert.Equal(t, map[store.Pair]struct{}{{Event: one.EventID, Endpoint: e}: {}, {Event: two.EventID, Endpoint: e}: {}}, found)

	found, err = b.store.Recorded(t.Context(), "nobody", []outbox.UUID{one.EventID})
	require.NoError(t, err)
	assert.Empty(t, found)
	b.exec("REVOKE ALL ON a.webhook_deliveries FROM outbox_relay_runner")
	_, err = b.store.Recorded(t.Context(), "a", []outbox.UUID{one.EventID})
	var te *store.TenantError
	require.ErrorAs(t, err, &te)
	assert.Equal(t, "a", te.Tenant)
	requireCode(t, "42501", err)
}

func TestStats(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	s, err := b.store.SlotStats(t.Context())
	require.NoError(t, err)
	assert.Equal(t, []int64{0, 0, 0}, queueOf(b.stats()))
	assert.True(t, s.SlotExists)
	assert.False(t, s.SlotActive)
	assert.Equal(t, "reserved", s.WALStatus)
	assert.Equal(t, int64(-1), s.SafeBytes)

	e := b.endpoint("a")
	b.exec("SELECT pg_logical_emit_message(true, 'x', repeat('x', 100000))")
	b.record(deferred(deliver("a", e), -time.Minute), deferred(deliver("a", e), 0), deferred(deliver("a", e), time.Hour))
	q := b.stats()
	assert.Equal(t, int64(3), q.Queued)
	assert.Equal(t, int64(2), q.Due)
	assert.InDelta(t, time.Minute, q.OldestDue, float64(20*time.Second))
	s, err = b.store.SlotStats(t.Context())
	require.NoError(t, err)
	assert.Greater(t, s.LagBytes, int64(100000))
	assert.GreaterOrEqual(t, s.RetainedBytes, s.LagBytes)

	other, err := store.New(t.Context(), store.Config{URL: b.url, Slot: "nosuch", Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	defer other.Close()
	s, err = other.SlotStats(t.Context())
	require.NoError(t, err)
	assert.False(t, s.SlotExists)
}

// A caller that gives up gets its error, and the store goes on.
func TestCancelledContext(t *testing.T) {
	t.Parallel()
	b := setup(t, "a")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	e := b.endpoint("a")
	_, err := b.store.Record(ctx, b.owner, nil, []store.Outcome{succeeded(deliver("a", e))})
	require.ErrorIs(t, err, context.Canceled)
	_, _, err = b.store.Claim(ctx, b.owner, store.ClaimOptions{N: 1, Lease: time.Hour})
	require.ErrorIs(t, err, context.Canceled)
	_, err = b.store.LoadShard(ctx, nil, 0, nil)
	require.ErrorIs(t, err, context.Canceled)
	b.record(succeeded(deliver("a", e)))
}
