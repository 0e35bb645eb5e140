package store_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// BenchmarkRecord writes batches of 1,000 outcomes. What it has to beat is the recording that DESIGN.md measured: 90,000 rows/s.
func BenchmarkRecord(b *testing.B) {
	for _, tenants := range []int{1, 100} {
		b.Run(fmt.Sprintf("delivered/tenants=%d", tenants), func(b *testing.B) { benchmarkRecord(b, tenants, succeeded) })
	}
	b.Run("deferred/tenants=1", func(b *testing.B) {
		benchmarkRecord(b, 1, func(d *store.Delivery) store.Outcome { return deferred(d, 0) })
	})
}

func benchmarkRecord(b *testing.B, tenants int, outcome func(*store.Delivery) store.Outcome) {
	const batch = 1000
	s := setup(b)
	names := make([]string, tenants)
	endpoints := make([]outbox.UUID, tenants)
	for i := range names {
		names[i] = fmt.Sprintf("tenant_%d", i)
		s.addTenant(names[i])
		endpoints[i] = s.endpoint(names[i])
	}
	p, err := s.store.Lead(b.Context(), store.LeadOptions{})
	require.NoError(b, err)
	rows := 0
	for b.Loop() {
		b.StopTimer()
		outcomes := make([]store.Outcome, batch)
		for i := range outcomes {
			outcomes[i] = outcome(deliver(names[i%tenants], endpoints[i%tenants]))
		}
		p.LSN++
		b.StartTimer()
		broken, err := s.store.Record(b.Context(), s.owner, &p, outcomes)
		require.NoError(b, err)
		require.Empty(b, broken)
		rows += batch
	}
	b.ReportMetric(float64(rows)/b.Elapsed().Seconds(), "rows/s")
}
