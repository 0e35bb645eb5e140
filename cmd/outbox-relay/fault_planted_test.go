package main

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// planted is a bug of the fault plan, the scenario that shows it, and what may tell of it.
type planted struct {
	bug      failpoint.Bug
	scenario string
	rules    []string
	quick    bool // caught soon enough for every test run
}

// plantedBugs are those of the fault plan. What our architecture makes of some of them:
//
//   - A position that is confirmed too early (ack before persist, flush=0) loses nothing by itself: at the next start the slot is ahead of the recorded
//     position, which is a reason to heal. It is told by the samples, or by a heal that nothing called for.
//   - Acking CommitLSN sends the last transaction again, but a new session looks up what may be recorded, and drops it. The bug includes doing without.
//   - Starting at a future LSN skips what the audit finds at the next checkpoint. It is told by the samples, or by what the audit finds.
//   - Recording without ON CONFLICT does no harm to a relay that is killed, for the same look-up. A heal, where tables and log bring the same events, meets it.
//   - A heal without the progress switch cannot lead: the slot is ahead of the old position, so that it heals over and over. One that switches, and forgets
//     to mark what was missed, is the harm that its opposite does.
func plantedBugs() []planted {
	return []planted{
		{bug: failpoint.AckBeforePersist, scenario: "table-locked", rules: []string{"I4", "heal"}},
		{bug: failpoint.AckCommitLSN, scenario: "killed-persisted", rules: []string{"I3"}}, // depends on what the last batch covers
		{bug: failpoint.FlushZero, scenario: "table-locked", rules: []string{"I4", "heal"}},
		{bug: failpoint.NoKeepaliveAck, scenario: "server-fast", rules: []string{"I6"}},
		{bug: failpoint.HealByID, scenario: "slot-dropped", rules: []string{"I1", "I4"}},
		{bug: failpoint.NoOnConflict, scenario: "slot-dropped", rules: []string{"suspended", "I1", "I3"}, quick: true},
		{bug: failpoint.HealWithoutSwitch, scenario: "slot-dropped", rules: []string{"heal", "I1", "I6"}},
		{bug: failpoint.HealWithoutMarks, scenario: "slot-dropped", rules: []string{"I1", "I4", "audit"}},
		{bug: failpoint.StartInFuture, scenario: "killed-sending", rules: []string{"I1", "I4", "audit"}},
	}
}

// TestPlantedBugs: a harness that misses a bug proves nothing. Each is caught within ten seeds, by a rule that has to do with it.
func TestPlantedBugs(t *testing.T) {
	t.Parallel()
	all := scenarios()
	for _, b := range plantedBugs() {
		if !b.quick && os.Getenv("OUTBOX_RELAY_TEST_FAULTS") == "" {
			continue
		}
		t.Run(string(b.bug), func(t *testing.T) {
			t.Parallel()
			i := slices.IndexFunc(all, func(sc *scenario) bool { return sc.name == b.scenario })
			require.GreaterOrEqual(t, i, 0, "no scenario %q", b.scenario)
			for seed := range uint64(10) {
				r := runFault(t, all[i], seed+1, b.bug, 20*time.Second)
				caught := slices.IndexFunc(r.violations, func(v violation) bool { return slices.Contains(b.rules, v.rule) })
				if caught >= 0 {
					t.Logf("caught by %s with seed %d: %s: %s", b.scenario, seed+1, r.violations[caught].rule, r.violations[caught].text)
					return
				}
				require.Empty(t, r.violations, "the harness itself is at fault: %s", r)
			}
			require.Fail(t, "not caught", "by %s, within ten seeds", b.scenario)
		})
	}
}
