package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/seal"
)

// How the configuration of a running relay changes.
//
//	SIGHUP ─────────────────────────────┐
//	files: others than were read,       ├──► read all of it ──► valid? ──► in use: log level, relays
//	       and the same at two looks ───┤                        └──► no: what there was stays, and is tried again
//	a few seconds after a fault ────────┘
//
// Looking at the files, and not being told of them, is the same for an editor that writes into one, one that puts another in its place, and Kubernetes, which
// swaps a link two folders up. A file that somebody is writing differs from look to look. Those of databases, certificates and the proxy are looked after by
// who uses them.

const (
	lookEvery = time.Second
	// readAgain is how long after a fault the configuration is read again, though its file may be the same: what it names, a key or a certificate, may have come.
	readAgain = 5 * time.Second
)

// reloader keeps the configuration up to date.
type reloader struct {
	file  string                 // empty: there is none
	load  func() (config, error) // reads everything afresh
	inUse config
	keys  *seal.Ring // of inUse, as its files were

	log                *slog.Logger
	use                func(*config) // has everything take it on
	success, timestamp prometheus.Gauge
	state              atomic.Pointer[string] // see Ready; nil: there is nothing to say

	seen, looked files     // when they were read, and at the last look
	restart      []string  // keys whose values of the last good reading need a restart
	fault        string    // of the last reading
	read         time.Time // when that was
}

// files are the configuration's and those of secrets.keys, by name; nil: one was not there.
type files map[string]fs.FileInfo

// first reads the configuration that the relay begins with.
func (r *reloader) first() (err error) {
	r.seen = r.look() // first: what is written while it is read is read once more
	if r.inUse, err = r.load(); err == nil {
		r.keys, _ = r.inUse.Secrets.Ring() // load has said what is wrong with one
		for name, info := range r.look() { // of the keys, which it has named
			if _, known := r.seen[name]; !known {
				r.seen[name] = info
			}
		}
	}
	return err
}

// begin takes what the configuration is for.
func (r *reloader) begin(registry prometheus.Registerer, log *slog.Logger, use func(*config)) {
	r.log, r.use = log, use
	r.success, r.timestamp = reloadMetrics(registry)
	r.success.Set(1)
	r.timestamp.SetToCurrentTime()
}

func reloadMetrics(registry prometheus.Registerer) (success, timestamp prometheus.Gauge) {
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help})
		registry.MustRegister(g)
		return g
	}
	return gauge("config_reload_success", "1 if the configuration was in order when it was read last, 0 if that of before is in use."),
		gauge("config_reload_timestamp_seconds", "When the configuration that is in use was read, in Unix time.")
}

// run reloads when it is asked to and when the file has changed, until ctx is done.
func (r *reloader) run(ctx context.Context, hangups <-chan os.Signal) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-hangups:
			r.reload(true)
		case <-tick.C:
			if r.due() {
				r.reload(false)
			}
		}
	}
}

// look notes what the files are that are read. Links are followed.
func (r *reloader) look() files {
	names := r.inUse.Secrets.KeyFiles()
	if r.file != "" {
		names = append(names, r.file)
	}
	found := make(files, len(names))
	for _, name := range names {
		found[name], _ = os.Stat(name)
	}
	return found
}

// due tells whether the files are others than were read, and the same as at the last look; or whether it is time to try once more.
func (r *reloader) due() bool {
	now := r.look()
	settled := maps.EqualFunc(r.looked, now, sameFile)
	r.looked = now
	return settled && (!maps.EqualFunc(r.seen, now, sameFile) || r.fault != "" && time.Since(r.read) >= readAgain)
}

func sameFile(a, b fs.FileInfo) bool {
	if a == nil || b == nil {
		return a == nil && b == nil
	}
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

// reload reads the configuration and has it used, as far as it can be. asked: somebody waits for the answer, though it be the same as before.
func (r *reloader) reload(asked bool) {
	r.seen = r.look() // as in first
	r.looked, r.read = r.seen, time.Now()
	next, err := r.load()
	if info := r.seen[r.file]; info != nil && info.Size() == 0 { // which would be a file of defaults
		err = &configError{[]error{&relay.FieldError{Key: "--config", Value: r.file, Remedy: "is empty: somebody may be writing it"}}}
	}
	if err != nil {
		r.failed(err, asked)
		return
	}
	now := r.inUse.reloaded(&next)
	changed, restart := differences(&r.inUse, &now), differences(&now, &next)
	// What stays is in use, and has not to be in order any more: the file of a certificate may be elsewhere by now, as the configuration says.
	if err := (&configError{split(now.validateAll())}).of(changed); err != nil {
		r.failed(err, asked)
		return
	}
	keys, _ := now.Secrets.Ring()
	if !keys.Equal(r.keys) && !slices.Contains(changed, "secrets.keys") {
		changed = append(changed, "secrets.keys")
	}
	news := asked || r.fault != "" || len(changed)+len(restart)+len(r.restart) > 0
	r.use(&now)
	r.inUse, r.keys, r.restart, r.fault = now, keys, restart, ""
	r.success.Set(1)
	r.timestamp.SetToCurrentTime()
	r.tell()
	if news {
		r.log.Info("configuration reloaded", "changed", changed)
	}
	if len(restart) > 0 {
		r.log.Warn("what the configuration says of these keys needs a restart, until which they stay as they were", "keys", restart)
	}
}

func (r *reloader) failed(err error, asked bool) {
	fault := oneLine(err)
	if fault != r.fault || asked {
		r.log.Error("configuration not reloaded: what was read before stays in use", "error", fault)
	}
	r.fault = fault
	r.success.Set(0)
	r.tell()
}

// oneLine is every fault in one line.
func oneLine(err error) string {
	lines := []string{err.Error()}
	if faults, ok := errors.AsType[*configError](err); ok {
		lines = nil
		for _, fault := range faults.faults {
			lines = append(lines, strings.Join(strings.Fields(fault.Error()), " "))
		}
	}
	return strings.Join(lines, "; ")
}

// maxState is how many bytes of faults a line has.
const maxState = 500

// tell makes the lines of Ready.
func (r *reloader) tell() {
	var lines []string
	if r.fault != "" {
		fault := r.fault
		if len(fault) > maxState {
			fault = strings.ToValidUTF8(fault[:maxState], "") + " …"
		}
		lines = append(lines, "configuration: not reloaded, what was read before stays in use: "+fault)
	}
	if len(r.restart) > 0 {
		lines = append(lines, "configuration: a restart is needed for "+strings.Join(r.restart, ", "))
	}
	text := strings.Join(lines, "\n")
	r.state.Store(&text)
}

// health is what /readyz says: how the relays are, and what is to be said of the configuration. The latter makes nothing unready.
type health struct {
	relays   relays
	reloader *reloader
}

// Ready implements admin.Health.
func (h health) Ready() (ok bool, why string) {
	ok, why = h.relays.Ready()
	if p := h.reloader.state.Load(); p != nil && *p != "" {
		why += "\n" + *p
	}
	return ok, why
}

// reloaded is [relay.Config.Reloaded] for the whole configuration.
func (c *config) reloaded(next *config) config {
	now := *c
	now.Config = c.Reloaded(next.Config)
	now.Log.Level = next.Log.Level
	return now
}

// differences lists the keys that have other values in b than in a, in the order of the file.
func differences(a, b *config) []string {
	a, b = a.asGiven(), b.asGiven()
	keys := unequal(leavesOf(a), leavesOf(b))
	if len(a.Databases) != len(b.Databases) {
		return append(keys, databasesKey)
	}
	for i := range a.Databases {
		x, y := &a.Databases[i], &b.Databases[i]
		if x.Name != y.Name {
			return append(keys, databasesKey)
		}
		keys = append(keys, unequal(x.leaves(), y.leaves())...)
	}
	return keys
}

func unequal(a, b []leaf) []string {
	keys := []string{} // not null in a log
	for i := range a {
		x, y := a[i].value, b[i].value
		empty := x.Kind() == reflect.Slice && x.Len()+y.Len() == 0 // nil or not
		if !empty && !reflect.DeepEqual(x.Interface(), y.Interface()) {
			keys = append(keys, a[i].key)
		}
	}
	return keys
}
