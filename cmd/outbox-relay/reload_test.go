package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// configMap is a folder that looks like a mounted ConfigMap: the file is a link into ..data, which is a link to the folder of a version.
type configMap struct {
	dir     string
	version int
}

func newConfigMap(t *testing.T, text string) *configMap {
	t.Helper()
	m := &configMap{dir: t.TempDir()}
	require.NoError(t, os.Symlink(filepath.Join("..data", "config.yaml"), m.file()))
	m.swap(t, text)
	return m
}

func (m *configMap) file() string { return filepath.Join(m.dir, "config.yaml") }

// swap does what the kubelet does.
func (m *configMap) swap(t *testing.T, text string) {
	t.Helper()
	before := fmt.Sprintf("..version_%d", m.version)
	m.version++
	name := fmt.Sprintf("..version_%d", m.version)
	require.NoError(t, os.Mkdir(filepath.Join(m.dir, name), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(m.dir, name, "config.yaml"), []byte(text), 0o600))
	require.NoError(t, os.Symlink(name, filepath.Join(m.dir, "..data_tmp")))
	require.NoError(t, os.Rename(filepath.Join(m.dir, "..data_tmp"), filepath.Join(m.dir, "..data")))
	require.NoError(t, os.RemoveAll(filepath.Join(m.dir, before)))
}

// reloading is a site with one endpoint whose relay's configuration changes.
type reloading struct {
	*site
	*relayProcess
	ctx  context.Context //nolint:containedctx // of the test
	base string          // what every version of the configuration begins with
}

func newReloading(t *testing.T, settings string) *reloading {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	t.Cleanup(cancel)
	r := &reloading{site: newSite(t, "", always(http.StatusOK), "acme"), ctx: ctx}
	r.base = fmt.Sprintf("database: {url: %q, slot: %s}\nserver: {listen: '127.0.0.1:0'}\n", r.dsn, r.slot)
	r.write(t, r.base+settings)
	return r
}

// begin starts the relay with a file.
func (r *reloading) begin(t *testing.T, file string) {
	t.Helper()
	r.relayProcess = startRelay(t, file)
	r.leading(r.ctx, t)
}

// write writes into the file that there is, as some editors do.
func (r *reloading) write(t *testing.T, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(r.config, []byte(text), 0o600))
}

// replace puts another file into its place, as others do.
func (r *reloading) replace(t *testing.T, text string) {
	t.Helper()
	require.NoError(t, os.WriteFile(r.config+".new", []byte(text), 0o600))
	require.NoError(t, os.Rename(r.config+".new", r.config))
}

func (r *reloading) hangUp(t *testing.T) {
	t.Helper()
	require.NoError(t, r.cmd.Process.Signal(syscall.SIGHUP))
}

// metric is the value of a metric without labels.
func (r *reloading) metric(t *testing.T, name string) float64 {
	t.Helper()
	_, text := r.page(r.ctx, t, r.site, "/metrics")
	found := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(text)
	require.NotNil(t, found, name)
	value, err := strconv.ParseFloat(found[1], 64)
	require.NoError(t, err)
	return value
}

// ready is the body of /readyz of a relay that leads.
func (r *reloading) ready(t *testing.T) string {
	t.Helper()
	status, text := r.page(r.ctx, t, r.site, "/readyz")
	require.Equal(t, http.StatusOK, status, "the configuration makes nothing unready")
	return text
}

func (r *reloading) awaitReload(t *testing.T, what string, line string) {
	t.Helper()
	r.receiver.await(r.ctx, t, what+": "+line, func() bool { return strings.Contains(r.ready(t), line) })
}

// awaitCalm waits until nothing is to be said of the configuration.
func (r *reloading) awaitCalm(t *testing.T, what string) {
	t.Helper()
	r.receiver.await(r.ctx, t, what, func() bool { return !strings.Contains(r.ready(t), "configuration") })
}

// TestReloadKeepsWhatThereIs: what cannot be used changes nothing, is seen in three places, and is over with the next good file.
func TestReloadKeepsWhatThereIs(t *testing.T) {
	t.Parallel()
	const settings = "network: {allow: [127.0.0.0/8]}\ndelivery: {endpoint_rate: 1000}\n"
	r := newReloading(t, settings)
	ep := r.endpoint(t, "acme", 3)
	r.subscribe(t, "acme", ep, "order.created", "{}")
	r.begin(t, r.config)
	require.InDelta(t, 1, r.metric(t, "outbox_relay_config_reload_success"), 0)
	began := r.metric(t, "outbox_relay_config_reload_timestamp_seconds")
	require.InDelta(t, float64(time.Now().Unix()), began, 60)
	sent := 0
	delivers := func(what string) {
		t.Helper()
		sent += 20
		r.insertMany(t, "acme", "order.created", 20)
		r.receiver.await(r.ctx, t, what, func() bool { return r.arrivedAt(ep) == sent })
	}
	delivers("the first")

	good := r.base + settings
	for i, c := range []struct {
		name  string
		spoil func()
		line  string
	}{
		{"broken YAML", func() { r.write(t, good+"delivery: [\n") }, "yaml: line"},
		{"a bad value", func() { r.replace(t, good+"retry: {backoff: 3}\nbreaker: {failures: 0}\n") }, "retry.backoff: 3: has no unit: write 3s for seconds, or use ms, m or h; breaker.failures: 0: must be at least 1"},
		{"an unknown key", func() { r.replace(t, good+"retry: {back_off: 3s}\n") }, "did you mean retry.backoff?"},
		{"a vanished file", func() { require.NoError(t, os.Remove(r.config)) }, "no such file or directory"},
		{"an empty file", func() { r.write(t, "") }, "is empty: somebody may be writing it"},
		{"half of a file", func() { r.write(t, good[:len(good)-len("point_rate: 1000}\n")]) }, "yaml: line"},
		{"half of a file, asked for", func() { r.write(t, good[:len(good)-len("point_rate: 1000}\n")]); r.hangUp(t) }, "yaml: line"},
		{"a password", func() { r.write(t, "postgres://relay:planted-secret@db/app") }, "cannot unmarshal"},
	} {
		before := r.metric(t, "outbox_relay_config_reload_timestamp_seconds")
		c.spoil()
		r.awaitReload(t, c.name, "configuration: not reloaded, what was read before stays in use: ")
		assert.Contains(t, r.ready(t), c.line, c.name)
		assert.InDelta(t, 0, r.metric(t, "outbox_relay_config_reload_success"), 0, c.name)
		assert.InDelta(t, before, r.metric(t, "outbox_relay_config_reload_timestamp_seconds"), 0, c.name)
		assert.Contains(t, r.said(t), "configuration not reloaded", c.name)
		assert.Equal(t, 2, strings.Count(r.ready(t), "\n"), "one line more: %s", r.ready(t))
		delivers("deliveries with " + c.name)
		if i%2 == 0 {
			r.replace(t, good)
		} else {
			r.write(t, good)
		}
		r.awaitCalm(t, "the end of "+c.name)
		assert.InDelta(t, 1, r.metric(t, "outbox_relay_config_reload_success"), 0, c.name)
		assert.Greater(t, r.metric(t, "outbox_relay_config_reload_timestamp_seconds"), before, c.name)
		delivers("deliveries after " + c.name)
	}
	log := r.said(t)
	assert.NotContains(t, log, "planted")
	_, exit := r.stop(t)
	require.NoError(t, exit)
	require.Empty(t, r.receiver.bad)
	require.Equal(t, sent, r.recorded(t, []string{"acme"}))
	require.Equal(t, sent, r.receiver.count(), "nothing twice")
}

// TestReloadUnderLoad: a mounted ConfigMap changes an endpoint's rate down and up while events come, and not one delivery is lost or repeated.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	const ahead = 8 // what may arrive before its time: four in flight, and a few that are let through early
	r := newReloading(t, "")
	settings := func(rate int) string {
		return fmt.Sprintf("%snetwork: {allow: [127.0.0.0/8]}\nqueue: {poll: 100ms}\ndelivery: {endpoint_concurrency: 4, endpoint_rate: %d}\n", r.base, rate)
	}
	m := newConfigMap(t, settings(0))
	ep := r.endpoint(t, "acme", 3)
	r.subscribe(t, "acme", ep, "order.created", "{}")
	r.begin(t, m.file())

	ctx, stop := context.WithCancel(r.ctx)
	defer stop()
	inserted := make(chan int, 1)
	go func() { // some forty events a second
		n := 0
		defer func() { inserted <- n }()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			_, err := r.pool.Exec(r.ctx, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
				SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{}' FROM generate_series(1, 4)`)
			if !assert.NoError(t, err) {
				return
			}
			n += 4
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	}()
	burst, reloads := 0, 0
	swap := func(rate int) {
		t.Helper()
		m.swap(t, settings(rate))
		reloads++
		r.receiver.await(r.ctx, t, "the reload", func() bool { return strings.Count(r.said(t), "configuration reloaded") == reloads })
	}
	arrivals := func(n int, what string) {
		t.Helper()
		n += r.receiver.count()
		r.receiver.await(r.ctx, t, what, func() bool { return r.receiver.count() >= n })
	}
	// backlog sends more than any of the rates lets through within window.hold, and tells whether some of it was put off for that.
	backlog := func() bool {
		t.Helper()
		const n = 200
		before := r.scrape(r.ctx, t, r.site).value(t, `deferred_total{reason="rate"}`)
		r.insertMany(t, "acme", "order.created", n)
		burst += n
		arrivals(ahead, "some of a backlog")
		if r.scrape(r.ctx, t, r.site).value(t, `deferred_total{reason="rate"}`) > before {
			return true
		}
		arrivals(n-ahead, "the rest of it")
		return r.scrape(r.ctx, t, r.site).value(t, `deferred_total{reason="rate"}`) > before
	}
	// A lane hears of its rate a moment after the log does: either is looked for until it is there.
	unlimited := func() {
		t.Helper()
		r.receiver.await(r.ctx, t, "no limit", func() bool { return !backlog() })
	}
	// What a rate lets through in three seconds takes that long to arrive. It may take longer: a machine that stands still lets nothing through.
	limited := func(rate int) {
		t.Helper()
		r.receiver.await(r.ctx, t, "a limit", backlog)
		began := time.Now()
		arrivals(3*rate, "three seconds of the rate")
		assert.Greater(t, time.Since(began).Seconds(), float64(3*rate-ahead)/float64(rate), "%d a second", rate)
	}
	unlimited()
	swap(40)
	limited(40)
	swap(0)
	unlimited()
	swap(20)
	limited(20)
	swap(0)
	unlimited()
	swap(30)
	swap(0)
	stop()
	sent := burst + <-inserted
	r.receiver.await(r.ctx, t, "all of them", func() bool { return r.arrivedAt(ep) == sent })
	_, exit := r.stop(t)
	require.NoError(t, exit)
	require.Empty(t, r.receiver.bad)
	require.Equal(t, sent, r.recorded(t, []string{"acme"}))
	require.Equal(t, sent, r.receiver.count(), "nothing twice")
}

// TestReloadAppliesWhatItCan: what needs a restart waits for it and is named, all else counts at once: the level of the log, whom the relay may reach, how often
// it tries, and what it keeps of answers.
func TestReloadAppliesWhatItCan(t *testing.T) {
	t.Parallel()
	const settings = "retry: {schedule: [1h]}\n"
	r := newReloading(t, settings+"network: {allow: [127.0.0.0/8]}\n")
	var m moods
	r.receiver.answer = m.answer
	ep := r.endpoint(t, "acme", 4)
	r.subscribe(t, "acme", ep, "order.created", "{}")
	r.begin(t, r.config)
	letters := func(code string) (n int) {
		require.NoError(t, r.pool.QueryRow(r.ctx, `SELECT count(*) FROM acme.webhook_dead_letters WHERE last_error_code = $1`, code).Scan(&n))
		return n
	}
	r.insertMany(t, "acme", "order.created", 1)
	r.receiver.await(r.ctx, t, "a delivery", func() bool { return r.arrivedAt(ep) == 1 })
	require.NotContains(t, r.said(t), `"msg":"attempt"`)

	// The address is denied, over the connection that is there as well.
	r.replace(t, r.base+settings+"network: {allow: [127.0.0.0/8], deny: [127.0.0.1/32]}\nwindow: {deliveries: 20000}\nlog: {level: debug, format: text}\n")
	r.awaitReload(t, "keys that wait", "configuration: a restart is needed for window.deliveries, log.format\n")
	r.insertMany(t, "acme", "order.created", 1)
	r.receiver.await(r.ctx, t, "a dead letter", func() bool { return letters("denied") == 1 })
	r.receiver.await(r.ctx, t, "the line of an attempt", func() bool { return strings.Contains(r.said(t), `"msg":"attempt"`) })
	assert.InDelta(t, 10_000, r.metric(t, "outbox_relay_window_limit_deliveries"), 0)
	assert.InDelta(t, 1, r.metric(t, "outbox_relay_config_reload_success"), 0)
	require.Contains(t, r.said(t), `"msg":"configuration reloaded","changed":["network.deny","log.level"]`)
	require.Contains(t, r.said(t), `"keys":["window.deliveries","log.format"]`)

	// A fault beside it: both are said.
	r.replace(t, r.base+"window: {deliveries: 0}\n")
	r.awaitReload(t, "a fault", "configuration: not reloaded")
	assert.Contains(t, r.ready(t), "\nconfiguration: a restart is needed for window.deliveries, log.format\n")

	// As it was, and with retries that come at once.
	r.replace(t, r.base+"retry: {schedule: [10ms]}\nqueue: {poll: 50ms}\nnetwork: {allow: [127.0.0.0/8]}\n")
	r.awaitCalm(t, "nothing that waits")
	m.set(ep, http.StatusInternalServerError)
	before := r.receiver.count()
	r.insertMany(t, "acme", "order.created", 1)
	r.receiver.await(r.ctx, t, "five attempts", func() bool { return letters("http_5xx") == 1 })
	assert.Equal(t, before+5, r.receiver.count())

	// Asked for, it answers though nothing has changed.
	n := strings.Count(r.said(t), `"changed":[]`)
	r.hangUp(t)
	r.receiver.await(r.ctx, t, "an answer", func() bool { return strings.Count(r.said(t), `"changed":[]`) > n })
	_, exit := r.stop(t)
	require.NoError(t, exit)
	require.Empty(t, r.receiver.bad)
}

// TestReloadOfSeveral: each database's relay takes its part of what is divided.
func TestReloadOfSeveral(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	one, two := newSite(t, "", always(http.StatusOK), "acme"), newSite(t, "", always(http.StatusOK), "acme")
	first, second := one.route(t), two.route(t)
	sites := map[string]*site{"one": one, "two": two}
	file := several(t, "", sites)
	p := startRelay(t, file)
	p.awaitReady(ctx, t, one, http.StatusOK, "one: leading", "two: leading")
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	changed := strings.Replace(string(text), "network: {allow: [127.0.0.0/8]}", "network: {allow: [127.0.0.0/8], https_only: true}\nretry: {attempts: 0}", 1)
	changed = strings.Replace(changed, two.slot, two.slot+"_other", 1)
	require.NoError(t, os.WriteFile(file, []byte(changed), 0o600))
	p.awaitReady(ctx, t, one, http.StatusOK, "one: leading", "two: leading", `configuration: a restart is needed for databases\.two\.slot$`)
	for _, s := range sites {
		s.insertMany(t, "acme", "order.created", 1)
		s.receiver.await(ctx, t, "a dead letter", func() bool {
			var n int
			return s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_dead_letters WHERE last_error_code = 'denied'`).Scan(&n) == nil && n == 1
		})
	}
	require.NoError(t, os.WriteFile(file, text, 0o600))
	one.receiver.await(ctx, t, "the next reload", func() bool { return strings.Count(p.said(t), "configuration reloaded") == 2 })
	p.awaitReady(ctx, t, one, http.StatusOK, "one: leading", "two: leading")
	for s, ep := range map[*site]outbox.UUID{one: first, two: second} {
		s.insertMany(t, "acme", "order.created", 1)
		s.receiver.await(ctx, t, "a delivery", func() bool { return s.arrivedAt(ep) == 1 })
	}
	_, exit := p.stop(t)
	require.NoError(t, exit)
}

// TestReloaderWaitsForWriters: a file that differs from look to look is being written. The files of keys count as well, once the configuration names them.
func TestReloaderWaitsForWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file, key := filepath.Join(dir, "config.yaml"), filepath.Join(dir, "key")
	write := func(path, text string) {
		t.Helper()
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	}
	base := "database: {url: " + dsn + "}\n"
	write(file, base)
	write(key, strings.Repeat("ab", 32))
	var used []config
	r := &reloader{file: file, load: func() (config, error) { return loadConfig(file, pflag.NewFlagSet("test", pflag.ContinueOnError)) }}
	require.NoError(t, r.first())
	var log bytes.Buffer
	r.begin(prometheus.NewRegistry(), slog.New(slog.NewTextHandler(&log, nil)), func(c *config) { used = append(used, *c) })
	told := func(want ...string) {
		t.Helper()
		var changed []string
		for _, found := range regexp.MustCompile(`msg="configuration reloaded" changed="?\[(.*)\]`).FindAllStringSubmatch(log.String(), -1) {
			changed = append(changed, found[1])
		}
		require.Equal(t, want, changed)
		log.Reset()
	}
	settled := func(want bool) {
		t.Helper()
		require.False(t, r.due())
		require.Equal(t, want, r.due())
	}
	settled(false)

	write(file, base+"retry: {attempts: 3}")
	require.False(t, r.due(), "it has just changed")
	write(file, base+"retry: {attempts: 3}\nsecrets: {keys: ['one=file:"+key+"']}\n")
	settled(true)
	r.reload(false)
	require.Len(t, used, 1)
	require.Equal(t, 3, used[0].Retry.Attempts)
	told("retry.attempts secrets.keys")
	settled(true) // the key is new to it, and may have changed while the configuration was read
	r.reload(false)
	told()
	settled(false)
	write(file, base+"retry: {attempts: 3}\nsecrets: {keys: ['one=file:"+key+"']} # as it was\n")
	settled(true)
	r.reload(false)
	told()
	r.reload(true)
	told("")
	write(key, strings.Repeat("ef", 32)+"\n")
	settled(true)
	r.reload(false)
	told("secrets.keys")

	write(key, strings.Repeat("cd", 31))
	settled(true)
	r.reload(false)
	require.Contains(t, r.fault, "secrets.keys: one=file:"+key)
	require.NotContains(t, r.fault, "cdcd")
	settled(false)
	r.read = r.read.Add(-readAgain)
	require.True(t, r.due(), "it tries again")
	write(key, strings.Repeat("cd", 32))
	settled(true)
	r.reload(false)
	require.Empty(t, r.fault)
	told("secrets.keys")
	require.Len(t, used, 6)

	// A mounted Secret has all its files anew when one entry changes. The keys are the same.
	require.NoError(t, os.Remove(key))
	write(key, strings.Repeat("CD", 32)+"\n")
	settled(true)
	r.reload(false)
	told()
	require.NoError(t, os.Remove(key))
	write(key, strings.Repeat("cd", 32))
	write(file, base+"retry: {attempts: 4}\nsecrets: {keys: ['one=file:"+key+"']}\n")
	settled(true)
	r.reload(false)
	told("retry.attempts")

	// Another key comes with a fault that is none of its own.
	write(key, strings.Repeat("ab", 32))
	write(file, base+"retry: {attempts: -5}\nsecrets: {keys: ['one=file:"+key+"']}\n")
	settled(true)
	r.reload(false)
	require.Contains(t, r.fault, "retry.attempts: -5")
	told()
	write(file, base+"retry: {attempts: 5}\nsecrets: {keys: ['one=file:"+key+"']}\n")
	settled(true)
	r.reload(false)
	require.Empty(t, r.fault)
	told("retry.attempts secrets.keys")
	write(file, base+"retry: {attempts: 10}\nsecrets: {keys: ['one=file:"+key+"']}\n")
	settled(true)
	r.reload(false)
	told("retry.attempts")

	// There need be no file.
	r = &reloader{load: func() (config, error) { return used[0], nil }}
	require.NoError(t, r.first())
	r.begin(prometheus.NewRegistry(), slog.New(slog.DiscardHandler), func(*config) {})
	r.inUse.Secrets.Keys = nil
	r.seen = nil
	settled(false)
	r.reload(true)
	require.Empty(t, r.fault)
}
