package relay

import (
	"errors"
	"fmt"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
)

// FieldError is one fault of a configuration.
type FieldError struct {
	Key    string // dotted, as in the file
	Value  string // as given; empty when there is none to show
	Remedy string // what is wrong with it and what would do
}

func (e *FieldError) Error() string {
	if e.Value == "" {
		return e.Key + ": " + e.Remedy
	}
	return fmt.Sprintf("%s: %s: %s", e.Key, e.Value, e.Remedy)
}

// faults collects what Validate finds.
type faults []error

func (f *faults) add(key string, value any, format string, args ...any) {
	*f = append(*f, &FieldError{Key: key, Value: fmt.Sprint(value), Remedy: fmt.Sprintf(format, args...)})
}

// maxCount is more than any number of things may be: some are 32 bits wide where they are computed with, and are multiplied there.
const maxCount = 100_000_000

func count(f *faults, key string, value, least int) {
	if atLeast(f, key, value, least); value > maxCount {
		f.add(key, value, "must be at most %d", maxCount)
	}
}

func atLeast[T int | time.Duration | ByteSize](f *faults, key string, value, least T) {
	if value < least {
		f.add(key, value, "must be at least %v", least)
	}
}

// Validate returns every fault at once, each a *[FieldError], joined by [errors.Join].
func (c Config) Validate() error {
	var f faults
	c.Database.validate(&f)
	c.Tenants.validate(&f)
	c.Delivery.validate(&f)
	c.Network.validate(&f)
	c.Validation.validate(&f)
	c.Secrets.validate(&f)

	if c.Retry.Attempts < 0 || c.Retry.Attempts > 100 {
		f.add("retry.attempts", c.Retry.Attempts, "must be 0 to 100 retries after the first attempt")
	}
	atLeast(&f, "retry.backoff", c.Retry.Backoff, time.Millisecond)
	if m := c.Retry.Multiplier; !(m >= 1) || math.IsInf(m, 0) {
		f.add("retry.multiplier", m, "must be at least 1: 1 keeps the backoff constant, 2 doubles it")
	}
	atLeast(&f, "retry.max_backoff", c.Retry.MaxBackoff, time.Millisecond)

	for _, wait := range c.Retry.Schedule {
		atLeast(&f, "retry.schedule", wait, time.Millisecond)
	}

	count(&f, "breaker.failures", c.Breaker.Failures, 1)
	if r := c.Breaker.FailureRatio; !(r >= 0 && r <= 1) {
		f.add("breaker.failure_ratio", r, "must be 0 to 1: 0.9 opens the breaker when nine of ten attempts fail, 0 switches this off")
	}
	count(&f, "breaker.min_attempts", c.Breaker.MinAttempts, 1)
	atLeast(&f, "breaker.window", c.Breaker.Window, time.Second)
	atLeast(&f, "breaker.open_for", c.Breaker.OpenFor, time.Millisecond)
	count(&f, "breaker.half_open", c.Breaker.HalfOpen, 1)

	count(&f, "window.deliveries", c.Window.Deliveries, 1)
	atLeast(&f, "window.bytes", c.Window.Bytes, MiB)
	atLeast(&f, "window.hold", c.Window.Hold, time.Millisecond)

	count(&f, "record.batch", c.Record.Batch, 1)
	atLeast(&f, "record.interval", c.Record.Interval, time.Millisecond)
	atLeast(&f, "record.timeout", c.Record.Timeout, time.Second)

	atLeast(&f, "queue.poll", c.Queue.Poll, 10*time.Millisecond)
	count(&f, "queue.batch", c.Queue.Batch, 1)
	atLeast(&f, "queue.lease", c.Queue.Lease, time.Second)
	c.Health.validate(&f)
	c.Verification.validate(&f)
	c.Retention.validate(&f)
	c.Objective.validate(&f)
	c.Metrics.validate(&f)
	atLeast(&f, "shutdown.drain", c.Shutdown.Drain, 0)
	for _, l := range c.ceilings() {
		l.check(&f)
	}
	c.validateClient(&f)
	return errors.Join(f...)
}

func (d Database) validate(f *faults) {
	if d.URL == "" {
		f.add("database.url", "", "is required: give --database-url, OUTBOX_RELAY_DATABASE_URL or database.url in the file, "+
			"for example postgres://outbox_relay@db.internal:5432/app")
	}
	if fault := DSNFault(d.URL); fault != "" {
		f.add(d.urlKey(), d.URLFile, "%s", fault)
	}
	if fault := DSNFault(d.ReplicationURL); fault != "" {
		f.add(d.streamKey(), d.ReplicationURLFile, "%s", fault)
	}
	if !regexp.MustCompile(`^[a-z0-9_]{1,63}$`).MatchString(d.Slot) {
		f.add("database.slot", strconv.Quote(d.Slot), "must be 1 to 63 of a-z, 0-9 and _, as PostgreSQL demands of a slot's name")
	}
	switch {
	case d.Shards < 1 || d.Shards > maxShards:
		f.add("database.shards", d.Shards, "must be 1 to %d: each is one more slot that decodes the whole log", maxShards)
	case len(d.Slot) <= maxName && len(d.ShardSlot(d.Shards-1)) > maxName:
		f.add("database.slot", strconv.Quote(d.Slot), "must be shorter: the slot of the last shard is %s, and a slot's name has at most %d characters", d.ShardSlot(d.Shards-1), maxName)
	}
	count(f, "database.max_connections", d.MaxConnections, 3) // one records, and one is held by a heal that needs another
	atLeast(f, "database.connect_timeout", d.ConnectTimeout, time.Millisecond)
	atLeast(f, "database.wal_budget", d.WALBudget, 0)
}

func (t Tenants) validate(f *faults) {
	check := func(key string, patterns []string) {
		for i, p := range patterns {
			if fault := patternFault(p); fault != "" {
				f.add(key, strconv.Quote(p), "%s", fault)
			} else if slices.Contains(patterns[:i], p) {
				f.add(key, strconv.Quote(p), "is in the list twice: drop one of the two, or let it be the name that was meant")
			}
		}
	}
	check("tenants.include", t.Include)
	check("tenants.auto_adopt", t.AutoAdopt)
}

// patternFault says why a pattern can match no tenant; empty: it can.
func patternFault(p string) string {
	if _, err := path.Match(p, ""); err != nil || p == "" {
		return "is not a name or a pattern: * stands for any characters, ? for one, [a-z] for one of a set"
	}
	if strings.HasPrefix(p, "pg_") || p == "information_schema" || p == ownSchema {
		return "can match no tenant, as the server keeps pg_… and information_schema for itself, and the relay " + ownSchema + ": name the schemas with the tables of webhooks"
	}
	if len(p) > maxName && !strings.ContainsAny(p, `*?[\`) {
		return fmt.Sprintf(`can match no tenant, as it is longer than the %d bytes that PostgreSQL keeps of a name: write what \dn shows in psql`, maxName)
	}
	return ""
}

func (d Delivery) validate(f *faults) {
	count(f, "delivery.workers", d.Workers, 1)
	count(f, "delivery.endpoint_concurrency", d.EndpointConcurrency, 1)
	if r := d.EndpointRate; !(r >= 0) || math.IsInf(r, 0) {
		f.add("delivery.endpoint_rate", r, "must be a number of attempts a second, or 0 for no limit")
	}
	count(f, "delivery.host_concurrency", d.HostConcurrency, 1)
	atLeast(f, "delivery.default_timeout", d.DefaultTimeout, time.Millisecond)
	if d.DefaultTimeout > delivery.MaxTimeout {
		f.add("delivery.default_timeout", d.DefaultTimeout, "must not be more than %v", delivery.MaxTimeout)
	}
}

func (h Health) validate(f *faults) {
	atLeast(f, "health.warn_after", h.WarnAfter, 0)
	atLeast(f, "health.disable_after", h.DisableAfter, 0)
}

func (r Retention) validate(f *faults) {
	least := func(key string, d time.Duration) {
		if d != 0 && d < time.Hour {
			f.add(key, d, "must be at least 1h, or 0s to keep everything")
		}
	}
	least("retention.deliveries", r.Deliveries)
	least("retention.attempts", r.Attempts)
	least("retention.dead_letters", r.DeadLetters)
	least("retention.stats", r.Stats)
}

func (n Network) validate(f *faults) {
	for _, allow := range n.Allow {
		for _, deny := range n.Deny {
			if deny.Bits() <= allow.Bits() && deny.Contains(allow.Addr()) {
				f.add("network.allow", allow, "has no effect, as network.deny has %v: drop one of them", deny)
			}
		}
	}
}

// validateClient takes over what the client finds wrong with its part. Of a key that has a fault already, a pair that does not fit, it has nothing to add.
func (c *Config) validateClient(f *faults) {
	client := c.ClientConfig("dev")
	joined, ok := client.Validate().(interface{ Unwrap() []error })
	if !ok {
		return
	}
	said := make(map[string]bool)
	for _, err := range *f {
		if fault, ok := errors.AsType[*FieldError](err); ok {
			said[fault.Key] = true
		}
	}
	for _, err := range joined.Unwrap() {
		if fault, ok := errors.AsType[*delivery.FieldError](err); ok && !said[fault.Field] {
			f.add(fault.Field, fault.Value, "%s", fault.Remedy)
		}
	}
}
