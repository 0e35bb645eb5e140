package store_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// BenchmarkRecord writes batches of 1,000 outcomes. What it has to beat is a bare insert from arrays, in batches of as many.
func BenchmarkRecord(b *testing.B) {
	plain := func(d *store.Delivery) store.Outcome {
		d.Message.Header = nil
		return succeeded(d)
	}
	for _, tenants := range []int{1, 100} {
		b.Run(fmt.Sprintf("delivered/tenants=%d", tenants), func(b *testing.B) { benchmarkRecord(b, tenants, 1, plain) })
	}
	b.Run("traced/tenants=1", func(b *testing.B) {
		benchmarkRecord(b, 1, 1, func(d *store.Delivery) store.Outcome {
			d.Message.Header[0].Value = "00-" + strings.ReplaceAll(d.EventID.String(), "-", "") + "-b7ad6b7169203331-01"
			return succeeded(d)
		})
	})
	for _, endpoints := range []int{1, 1000} {
		b.Run(fmt.Sprintf("deferred/endpoints=%d", endpoints), func(b *testing.B) {
			benchmarkRecord(b, 1, endpoints, func(d *store.Delivery) store.Outcome {
				d.Message.Header = nil
				return deferred(d, 0)
			})
		})
	}
	b.Run("delivered/endpoints=1000", func(b *testing.B) { benchmarkRecord(b, 1, 1000, plain) })
}

func benchmarkRecord(b *testing.B, tenants, endpointsEach int, outcome func(*store.Delivery) store.Outcome) {
	const batch = 1000
	s := setup(b)
	names := make([]string, tenants)
	endpoints := make([]outbox.UUID, tenants*endpointsEach)
	for i := range names {
		names[i] = fmt.Sprintf("tenant_%d", i)
		s.addTenant(names[i])
	}
	for i := range endpoints {
		endpoints[i] = s.endpoint(names[i%tenants])
	}
	p, err := s.store.Lead(b.Context(), store.LeadOptions{})
	require.NoError(b, err)
	rows := 0
	for b.Loop() {
		b.StopTimer()
		outcomes := make([]store.Outcome, batch)
		for i := range outcomes {
			outcomes[i] = outcome(deliver(names[i%tenants], endpoints[i%len(endpoints)]))
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

// BenchmarkClaim claims ten deliveries of an endpoint, where more and more others are due of one that can take no more.
func BenchmarkClaim(b *testing.B) {
	for _, backlog := range []int{0, 10_000, 1_000_000} {
		b.Run(fmt.Sprintf("backlog=%d", backlog), func(b *testing.B) {
			s := setup(b, "a")
			full, free := s.endpoint("a"), s.endpoint("a")
			s.exec(`INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
				SELECT gen_random_uuid(), 'a', $1, now() - i * interval '1 ms' - interval '1 hour' FROM generate_series(1, $2) i`, full, backlog)
			s.exec("ANALYZE outbox_relay.retry_queue")
			const n = 10
			for b.Loop() {
				b.StopTimer()
				outcomes := make([]store.Outcome, n)
				for i := range outcomes {
					outcomes[i] = deferred(deliver("a", free), 0)
				}
				s.record(outcomes...)
				b.StartTimer()
				claimed, _, err := s.store.Claim(b.Context(), s.owner, store.ClaimOptions{N: 500, Lease: time.Hour, Run: 1, Caps: map[store.Endpoint]int{{Tenant: "a", ID: full}: 0}})
				require.NoError(b, err)
				require.Len(b, claimed, n)
			}
		})
	}
}
