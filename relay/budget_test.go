package relay

import (
	"bytes"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// The time that is left is taken from the rate of the last minute, towards the nearer of the server's limit and the budget.
func TestWALBudgetOutlook(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	start := time.Now()
	var b walBudget
	o := b.look(start, &store.Stats{WALStatus: "reserved", Written: 100 * mib, SafeBytes: -1, RetainedBytes: mib}, 0)
	assert.True(t, math.IsInf(o.left, 1), "no limit is known")
	assert.True(t, math.IsInf(o.seconds(), 1))

	o = b.look(start.Add(30*time.Second), &store.Stats{WALStatus: "reserved", Written: 130 * mib, SafeBytes: 600 * mib, RetainedBytes: 31 * mib}, 0)
	assert.InDelta(t, mib, o.rate, 1)
	assert.InDelta(t, 600, o.seconds(), .1)

	o = b.look(start.Add(50*time.Second), &store.Stats{WALStatus: "reserved", Written: 150 * mib, SafeBytes: 600 * mib, RetainedBytes: 31 * mib}, 61*mib)
	assert.InDelta(t, 30, o.seconds(), .1, "the budget is nearer than the server's limit")

	o = b.look(start.Add(90*time.Second), &store.Stats{WALStatus: "reserved", Written: 150 * mib, SafeBytes: 600 * mib}, 0)
	assert.InDelta(t, mib/3., o.rate, 1, "over the last minute, not over all time")

	o = b.look(start.Add(95*time.Second), &store.Stats{WALStatus: "reserved", Written: 10 * mib, SafeBytes: 0}, 0)
	assert.Zero(t, o.seconds(), "nothing is left, whatever the rate")
	assert.Zero(t, o.rate, "another server counts anew")
}

// A warning comes when the limit is near, again only after a while, and its end is told once.
func TestWALBudgetTells(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	log := slog.New(slog.NewTextHandler(&out, nil))
	var b walBudget
	now := time.Now()
	tell := func(after time.Duration, s store.Stats, o outlook) string {
		out.Reset()
		now = now.Add(after)
		b.tell(now, &s, o, log)
		return out.String()
	}
	far, near := outlook{rate: 1, left: 3600}, outlook{rate: 1, left: 60}
	assert.Empty(t, tell(0, store.Stats{WALStatus: "reserved"}, far))
	said := tell(time.Second, store.Stats{RetainedBytes: 100, LagBytes: 90, WALStatus: "extended"}, near)
	assert.Contains(t, said, "left_for=1m0s")
	assert.Contains(t, said, "outcomes cannot be recorded")
	assert.Empty(t, tell(time.Minute, store.Stats{WALStatus: "reserved"}, near), "it has been said")
	assert.Contains(t, tell(5*time.Minute, store.Stats{WALStatus: "reserved", RetainedBytes: 100, LagBytes: 1}, near), "pg_prepared_xacts", "nothing is unconfirmed: a transaction keeps the log")
	assert.NotEmpty(t, tell(time.Second, store.Stats{WALStatus: "unreserved"}, near), "it has become worse")
	assert.Contains(t, tell(time.Second, store.Stats{WALStatus: "reserved"}, far), "within its limit again")
	assert.Empty(t, strings.TrimSpace(tell(time.Second, store.Stats{WALStatus: "reserved"}, far)))
	assert.NotEmpty(t, tell(time.Second, store.Stats{WALStatus: "reserved"}, near))
	assert.Contains(t, tell(time.Second, store.Stats{WALStatus: "reserved"}, outlook{rate: 1}), "left_for=0s", "the budget is used up")

	assert.Empty(t, tell(time.Second, store.Stats{}, outlook{}), "without a slot nothing is kept")
	assert.InDelta(t, math.Inf(1), new(walBudget).look(time.Now(), &store.Stats{}, 0).left, 0)
}
