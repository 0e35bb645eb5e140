package relay

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sony/gobreaker/v2"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// latencyBuckets reach from the fast path, under a millisecond, to a delivery that waited for minutes. In seconds.
var latencyBuckets = []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300} //nolint:gochecknoglobals // a table

// metrics counts the road of an event. Labels are closed sets; tenants and endpoints are none of them.
type metrics struct {
	registry prometheus.Registerer

	eventsMatched, eventsUnmatched prometheus.Counter
	outcomes                       map[store.Status]prometheus.Counter
	deferrals                      map[string]prometheus.Counter
	latency                        prometheus.Histogram
	flushes                        prometheus.Histogram
	flushRows                      prometheus.Histogram
	recordErrors, repeated, claims prometheus.Counter
	invalidRows                    prometheus.Counter
	heals, auditFindings           prometheus.Counter
	leader, epoch, slotLag         prometheus.Gauge
	slotDelay                      prometheus.Gauge
	slotRetained, slotSafe         prometheus.Gauge
	slotTimeLeft                   prometheus.Gauge
	slotStatus                     map[string]prometheus.Gauge
	queueDepth, queueDue           prometheus.Gauge
	queueAge                       prometheus.Gauge
	breakersOpen                   prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{registry: reg}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Namespace: "outbox_relay", Name: name, Help: help})
		reg.MustRegister(c)
		return c
	}
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help})
		reg.MustRegister(g)
		return g
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "outbox_relay", Name: name, Help: help, Buckets: buckets})
		reg.MustRegister(h)
		return h
	}
	vector := func(name, help, label string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "outbox_relay", Name: name, Help: help}, []string{label})
		reg.MustRegister(v)
		return v
	}

	events := vector("events_total", "Events read from the log, by whether a subscription matched.", "matched")
	m.eventsMatched, m.eventsUnmatched = events.WithLabelValues("true"), events.WithLabelValues("false")
	outcomes := vector("deliveries_total", "Deliveries recorded, by the status they were given.", "status")
	m.outcomes = make(map[store.Status]prometheus.Counter)
	for _, s := range []store.Status{store.Success, store.Retrying, store.Pending, store.Leased, store.Failed, store.Cancelled} {
		m.outcomes[s] = outcomes.WithLabelValues(s.String())
	}
	deferrals := vector("deferred_total", "Deliveries deferred to the retry queue without an attempt, by reason.", "reason")
	m.deferrals = make(map[string]prometheus.Counter)
	for _, r := range []string{
		deferWindow, deferShare, deferBreaker, deferThrottled, deferRate, deferOrder, deferPaused, deferInactive, deferInvalid, deferHold, deferDrain, deferLocal,
		deferBackfill, deferRecovery, deferAudit,
	} {
		m.deferrals[r] = deferrals.WithLabelValues(r)
	}
	m.latency = histogram("commit_to_answer_seconds", "Time from the COMMIT of an event to the answer to the first attempt.", latencyBuckets)
	m.flushes = histogram("record_flush_seconds", "Time to make one batch of outcomes durable.", latencyBuckets)
	m.flushRows = histogram("record_flush_outcomes", "Outcomes in one batch.", []float64{0, 1, 10, 50, 100, 250, 500, 1000, 2500, 5000})
	m.recordErrors = counter("record_errors_total", "Batches that could not be made durable at once; they are tried again.")
	m.repeated = counter("repeated_total", "Deliveries that the log repeated after a restart and that had been recorded: not sent again.")
	m.invalidRows = counter("invalid_rows_total", "Rows of endpoints and subscriptions read that cannot be used.")
	m.claims = counter("claimed_total", "Deliveries claimed from the retry queue.")
	m.heals = counter("heals_total", "Times that a slot was made anew and what it had missed was queued from the tables.")
	m.auditFindings = counter("audit_findings_total", "Deliveries that committed events should have had and had not. They were queued.")
	m.leader = gauge("leader", "1 while this replica leads its slot.")
	m.epoch = gauge("epoch", "Epoch of the latest leadership of this replica.")
	m.slotLag = gauge("slot_lag_bytes", "WAL between the position that is recorded and what the server has written.")
	m.slotDelay = gauge("slot_lag_seconds", "Age of the latest commit read from the log; 0 when everything has been read.")
	m.slotRetained = gauge("slot_retained_bytes", "WAL that the server keeps for the slot.")
	m.slotSafe = gauge("slot_safe_bytes", "WAL that may still be written before the slot is lost, or database.wal_budget is used up; +Inf where neither limit is set.")
	m.slotTimeLeft = gauge("slot_time_left_seconds", "Time until then, at the rate of the last minute.")
	status := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Namespace: "outbox_relay", Name: "slot_wal_status", Help: "1 for what pg_replication_slots says of the slot's WAL; missing: there is no slot.",
	}, []string{"status"})
	reg.MustRegister(status)
	m.slotStatus = make(map[string]prometheus.Gauge)
	for _, s := range []string{"reserved", "extended", "unreserved", "lost", "missing"} {
		m.slotStatus[s] = status.WithLabelValues(s)
	}
	m.queueDepth = gauge("queue_deliveries", "Deliveries that wait in the retry queue, counted up to 100,000; beyond that the server's estimate.")
	m.queueDue = gauge("queue_due_deliveries", "Deliveries in the retry queue that are due; 100,000 stands for that many or more.")
	m.queueAge = gauge("queue_oldest_due_seconds", "How long the longest due delivery of the retry queue has been due.")
	m.breakersOpen = gauge("breakers_open", "Endpoints whose breaker is open.")
	return m
}

// watch exports what the dispatcher and the recorder hold, and how much they may.
func (m *metrics) watch(d *dispatcher, r *recorder) {
	export := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help}, value))
	}
	export("window_deliveries", "Deliveries of the stream in memory.", func() float64 { n, _, _, _ := d.load(); return float64(n) })
	export("window_bytes", "Memory that these occupy, in bytes.", func() float64 { _, n, _, _ := d.load(); return float64(n) })
	export("window_limit_deliveries", "How many deliveries of the stream are attempted from memory.", func() float64 { return float64(d.cfg.Window.Deliveries) })
	export("window_limit_bytes", "And how much memory they may occupy, in bytes.", func() float64 { return float64(d.cfg.Window.Bytes) })
	export("claimed_deliveries", "Deliveries of the retry queue in memory.", func() float64 { _, _, n, _ := d.load(); return float64(n) })
	export("in_flight", "Deliveries being attempted.", func() float64 { _, _, _, n := d.load(); return float64(n) })
	export("record_pending", "Outcomes that wait to be recorded.", func() float64 { return float64(r.pending()) })
}

func (m *metrics) event(targets int) {
	if targets > 0 {
		m.eventsMatched.Inc()
	} else {
		m.eventsUnmatched.Inc()
	}
}

// read notes how old the commit is that the stream has come to; caughtUp, that there is nothing more to read.
func (m *metrics) read(committed time.Time) {
	m.slotDelay.Set(max(time.Since(committed).Seconds(), 0))
}

func (m *metrics) caughtUp() { m.slotDelay.Set(0) }

func (m *metrics) outcome(o *store.Outcome) { m.outcomes[o.Status].Inc() }

func (m *metrics) deferred(reason string) { m.deferrals[reason].Inc() }

func (m *metrics) claimed(n int) { m.claims.Add(float64(n)) }

// answered counts from the commit by the server's clock: with clocks apart the latency is off by that much.
func (m *metrics) answered(committed, answered time.Time) {
	m.latency.Observe(max(answered.Sub(committed).Seconds(), 0))
}

func (m *metrics) flushed(outcomes int, took time.Duration) {
	m.flushes.Observe(took.Seconds())
	m.flushRows.Observe(float64(outcomes))
}

func (m *metrics) leading(is bool, epoch int64) {
	m.epoch.Set(float64(epoch))
	if is {
		m.leader.Set(1)
		return
	}
	m.leader.Set(0)
	m.slotDelay.Set(0)
}

func (m *metrics) breakerChanged(from, to gobreaker.State) {
	if to == gobreaker.StateOpen {
		m.breakersOpen.Inc()
	} else if from == gobreaker.StateOpen {
		m.breakersOpen.Dec()
	}
}

// slot shows what is known of the slot's log.
func (m *metrics) slot(s *store.Stats, o outlook) {
	m.slotLag.Set(float64(s.LagBytes))
	m.slotRetained.Set(float64(s.RetainedBytes))
	m.slotSafe.Set(o.left)
	m.slotTimeLeft.Set(o.seconds())
	is := s.WALStatus
	if !s.SlotExists {
		is = "missing"
	}
	for name, g := range m.slotStatus {
		if name == is {
			g.Set(1)
		} else {
			g.Set(0)
		}
	}
}

// observe asks the database now and then what the gauges should show, until ctx is done.
func (e *engine) observe(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	var budget walBudget
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		s, err := e.store.Stats(ctx)
		if err != nil {
			continue // the recorder and the claimer tell that the database is away
		}
		if e.shard == 0 { // it is one queue: the sum over all shards has to be right
			e.metrics.queueDepth.Set(float64(s.Queued))
			e.metrics.queueDue.Set(float64(s.Due))
			e.metrics.queueAge.Set(s.OldestDue.Seconds())
		}
		now := time.Now()
		o := budget.look(now, &s, int64(e.cfg.Database.WALBudget))
		e.metrics.slot(&s, o)
		budget.tell(now, &s, o, e.log)
	}
}
