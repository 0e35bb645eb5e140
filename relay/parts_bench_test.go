package relay

import (
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// BenchmarkLedger opens a commit with one delivery and records one that is 5,000 commits older, in order or in swapped pairs.
func BenchmarkLedger(b *testing.B) {
	for _, swap := range []int{0, 1} {
		b.Run(fmt.Sprintf("swap=%d", swap), func(b *testing.B) {
			const behind = 5000
			l := newLedger(0, 0)
			lsn := pglogrepl.LSN(0)
			open := func() int {
				lsn += 100
				n := l.begin(lsn, time.Time{})
				l.add(n)
				l.end(n, lsn+50)
				return n
			}
			for range behind {
				open()
			}
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				l.record(open() - behind + swap*(1-2*(i%2)))
				l.written(1)
				l.position()
			}
		})
	}
}

// BenchmarkLanes takes deliveries through the dispatcher, from their admission to the end of their record, in batches of 256 with a window of 10,000.
func BenchmarkLanes(b *testing.B) {
	for _, lanes := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint(lanes), func(b *testing.B) {
			cfg := DefaultConfig()
			d := newDispatcher(&cfg, newMetrics(prometheus.NewRegistry(), &cfg))
			d.ended = func(*job, store.Outcome) {}
			ledger, endpoint := newLedger(0, 0), &delivery.Endpoint{Concurrency: 64, Host: "h:80"}
			keys := make([]laneKey, lanes)
			for i := range keys {
				keys[i] = laneKey{fmt.Sprint("tenant", i%1000), outbox.NewUUID()}
			}
			const batch = 256
			jobs := make([]*job, batch)
			now, next := time.Now(), 0
			b.ReportAllocs()
			for b.Loop() {
				for i := range jobs {
					key := keys[next%lanes]
					next++
					jobs[i] = &job{Delivery: store.Delivery{Tenant: key.tenant, EndpointID: key.endpoint}, endpoint: endpoint, ledger: ledger, commit: noCommit, bytes: 1000, committed: now}
					d.admit(b.Context(), jobs[i])
				}
				for range batch {
					d.finish(d.take(), verdict{attempted: true}, store.Outcome{Status: store.Success})
				}
				d.release(jobs)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/batch, "ns/delivery")
		})
	}
}

// BenchmarkPace asks a rate limit whether an attempt may start, and starts it.
func BenchmarkPace(b *testing.B) {
	p := pace{rate: 1e9}
	now := time.Now()
	clock := func() time.Time { return now }
	for b.Loop() {
		if p.wait(clock) == 0 {
			p.started(clock)
		}
		now = now.Add(time.Nanosecond)
	}
}
