package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// A scenario is a row of the fault plan, or one way to it. What it does and when is drawn from the seed.
type scenario struct {
	name, row string
	quick     bool              // short enough for every test run
	heals     bool              // slot or publication come to harm, so that healing is called for
	promotes  bool              // a standby becomes the primary
	phantoms  bool              // and events that were sent may be lost with the old one
	audits    bool              // the log may not carry what was committed: the audit finds it, late and out of order
	suspends  bool              // tenants are suspended, and resumed
	moves     bool              // tenants change their shard
	server    map[string]string // settings of a server of its own; nil: it needs none
	disk      int               // MiB that server has for its data, which can be filled; zero: as much as there is. The harness must be able to mount one
	settings  string            // of the relays
	window    int               // theirs, if it is not as usual
	least     int               // version of PostgreSQL that has what it is about
	wal       int64             // that may be kept, if it is not walLimit
	prepare   func(r *faultRun)
	writer    func(r *faultRun, w *faultWriter)
	run       func(r *faultRun)
}

func scenarios() []*scenario {
	return slices.Concat(kills(), serverFaults(), slotFaults(), networkFaults(), replicaFaults(), receiverFaults(), writerFaults(), diskFaults(), moveFaults(), failovers())
}

// replay is the command that plays a run again.
func replay(sc *scenario, seed uint64) string {
	return fmt.Sprintf("make faults SCENARIO='^%s$' SEED=%d", sc.name, seed)
}

// chosen reads which scenarios and seeds are asked for. Without a word, as in every test run, there is one seed of the quick ones.
func chosen(t *testing.T) (list []*scenario, seeds []uint64) {
	t.Helper()
	number := func(name string, otherwise uint64) uint64 {
		text := os.Getenv(name)
		if text == "" {
			return otherwise
		}
		n, err := strconv.ParseUint(text, 10, 64)
		require.NoError(t, err, name)
		return n
	}
	only, err := regexp.Compile(os.Getenv("OUTBOX_RELAY_TEST_FAULTS"))
	require.NoError(t, err)
	server := pgtest.Shared(t)
	for _, sc := range scenarios() {
		if sc.least > server.Version() {
			if only.String() != "" {
				t.Logf("%s is not applicable to PostgreSQL %d, but to %d and newer", sc.name, server.Version(), sc.least)
			}
			continue
		}
		if only.MatchString(sc.name) && (sc.quick || only.String() != "") {
			list = append(list, sc)
		}
	}
	require.NotEmpty(t, list, "no scenario is called like that")
	if seed := number("OUTBOX_RELAY_TEST_FAULT_SEED", 0); seed > 0 {
		return list, []uint64{seed}
	}
	for seed := range number("OUTBOX_RELAY_TEST_FAULT_SEEDS", 1) {
		seeds = append(seeds, seed+1)
	}
	return list, seeds
}

// TestFaults holds the invariants of the fault plan against everything that may happen to a relay. `make faults` plays all of it.
func TestFaults(t *testing.T) {
	t.Parallel()
	list, seeds := chosen(t)
	var report faultReport
	t.Cleanup(func() { report.print(os.Stdout) })
	for _, seed := range seeds {
		for _, sc := range list {
			t.Run(fmt.Sprintf("%s/%d", sc.name, seed), func(t *testing.T) {
				t.Parallel()
				r := runFault(t, sc, seed, "", 90*time.Second)
				report.add(sc, r)
				assert.Empty(t, r.violations, "%s\nreplay it: %s", r, replay(sc, seed))
				t.Log(r)
			})
		}
	}
}

// TestFailpointsAreInNoUsualBuild: neither the variables nor the bugs are in a binary without the build tag, and with it a slip in a name is told.
func TestFailpointsAreInNoUsualBuild(t *testing.T) {
	t.Parallel()
	usual, err := os.ReadFile(binary(t))
	require.NoError(t, err)
	faulty, err := os.ReadFile(faultyBinary(t))
	require.NoError(t, err)
	for _, name := range []string{
		"OUTBOX_RELAY_FAILPOINT", "OUTBOX_RELAY_PLANTED", "max(d.webhook_event_id::text)", string(failpoint.AckBeforePersist), string(failpoint.FlushZero),
		string(failpoint.StartInFuture), string(failpoint.HealMarked),
	} {
		assert.NotContains(t, string(usual), name)
		assert.Contains(t, string(faulty), name)
	}
}

// bound is a limit of a time. A run among all other tests, with the race detector, is not what it is measured by.
func bound(limit time.Duration) time.Duration {
	if os.Getenv("OUTBOX_RELAY_TEST_FAULTS") == "" {
		return 4 * limit
	}
	return limit
}
