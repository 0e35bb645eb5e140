package relay

import (
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
	invalidEvents                  map[string]prometheus.Counter
	verified, unverified           prometheus.Counter
	heals, auditFindings           prometheus.Counter
	dispatches, replays, takeovers prometheus.Counter
	leader, epoch, slotLag         prometheus.Gauge
	slotDelay                      prometheus.Gauge
	slotRetained, slotSafe         prometheus.Gauge
	slotTimeLeft                   prometheus.Gauge
	slotStatus                     map[string]prometheus.Gauge
	queueDepth, queueDue           prometheus.Gauge
	queueAge                       prometheus.Gauge
	breakersOpen, breakersHalfOpen prometheus.Gauge
	tenants, endpoints             map[string]prometheus.Gauge // by state, of those that the leader serves

	toRead, toAttempt, toRecord prometheus.Histogram
	within                      time.Duration // Config.Objective.Latency
	objective                   objective
	shares                      []*shares // of tenants and endpoints, as far as there are to be series of these
}

// histogramOpts are those of a latency: classic buckets for everybody, and a native histogram for a server that takes it. That has buckets 10 % apart, and at
// most so many that a receiver which answers after anything from a millisecond to a day costs no more memory than another; beyond that they grow wider.
func histogramOpts(name, help string, buckets []float64) prometheus.HistogramOpts {
	return prometheus.HistogramOpts{
		Namespace: "outbox_relay", Name: name, Help: help, Buckets: buckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour,
	}
}

func newMetrics(reg prometheus.Registerer, cfg *Config) *metrics {
	m := &metrics{registry: reg, within: cfg.Objective.Latency}
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
		h := prometheus.NewHistogram(histogramOpts(name, help, buckets))
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
	for _, s := range statuses() {
		m.outcomes[s] = outcomes.WithLabelValues(s.String())
	}
	deferrals := vector("deferred_total", "Deliveries deferred to the retry queue without an attempt, by reason.", "reason")
	m.deferrals = make(map[string]prometheus.Counter)
	for _, r := range store.Deferrals() {
		m.deferrals[r] = deferrals.WithLabelValues(r)
	}
	m.dispatches = counter("dispatched_total", "Deliveries of events from the log that were given to their endpoints' lanes. What a lane does not take is deferred.")
	m.toRead = histogram("commit_to_read_seconds", "Time from the COMMIT of an event until it was read from the log.", latencyBuckets)
	m.toAttempt = histogram("commit_to_attempt_seconds", "Time from the COMMIT of an event to the beginning of the first attempt.", latencyBuckets)
	m.latency = histogram("commit_to_answer_seconds", "Time from the COMMIT of an event to the answer to the first attempt.", latencyBuckets)
	m.toRecord = histogram("commit_to_record_seconds", "Time from the COMMIT of an event until what came of a delivery, or its deferral, was durable.", latencyBuckets)
	m.flushes = histogram("record_flush_seconds", "Time to make one batch of outcomes durable.", latencyBuckets)
	m.flushRows = prometheus.NewHistogram(prometheus.HistogramOpts{
		Namespace: "outbox_relay", Name: "record_flush_outcomes", Help: "Outcomes in one batch.", Buckets: []float64{0, 1, 10, 50, 100, 250, 500, 1000, 2500, 5000},
	})
	reg.MustRegister(m.flushRows)
	m.recordErrors = counter("record_errors_total", "Batches that could not be made durable at once; they are tried again.")
	m.repeated = counter("repeated_total", "Deliveries that the log repeated after a restart and that had been recorded: not sent again.")
	m.invalidRows = counter("invalid_rows_total", "Rows of endpoints, subscriptions and event types read that cannot be used.")
	invalid := vector("invalid_events_total", "Matched events that break a bound of validation, or do not match their payload_schema, by error code.", "code")
	m.invalidEvents = make(map[string]prometheus.Counter)
	for _, code := range []string{codeEvent, codeSchema} {
		m.invalidEvents[code] = invalid.WithLabelValues(code)
	}
	verifications := vector("verifications_total", "Endpoints whose receiver was asked whether it wants what is sent there, by whether it was verified.", "verified")
	m.verified, m.unverified = verifications.WithLabelValues("true"), verifications.WithLabelValues("false")
	m.claims = counter("claimed_total", "Deliveries claimed from the retry queue.")
	m.replays = counter("replays_total", "Deliveries that somebody had sent again, when they were attempted.")
	m.takeovers = counter("takeovers_total", "Times that this replica began to lead its slot.")
	m.heals = counter("heals_total", "Times that a slot was made anew and what it had missed was queued from the tables.")
	m.auditFindings = counter("audit_findings_total", "Deliveries that committed events should have had and had not. They were queued.")
	m.leader = gauge("leader", "1 while this replica leads its slot.")
	m.epoch = gauge("epoch", "Epoch of the latest leadership of this replica.")
	m.slotLag = gauge("slot_lag_bytes", "WAL between the position that is recorded and what the server has written.")
	m.slotDelay = gauge("slot_lag_seconds", "Age of the latest commit read from the log; 0 when everything has been read.")
	m.slotRetained = gauge("slot_retained_bytes", "WAL that the server keeps for the slot.")
	m.slotSafe = gauge("slot_safe_bytes", "WAL that may still be written before the slot is lost, or database.wal_budget is used up; +Inf where neither limit is set.")
	m.slotTimeLeft = gauge("slot_time_left_seconds", "Time until slot_safe_bytes is used up, at the rate of the last minute; +Inf where it is not used.")
	gauges := func(name, help, label string, values ...string) map[string]prometheus.Gauge {
		v := prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help}, []string{label})
		reg.MustRegister(v)
		each := make(map[string]prometheus.Gauge)
		for _, value := range values {
			each[value] = v.WithLabelValues(value)
		}
		return each
	}
	m.slotStatus = gauges("slot_wal_status", "1 for what pg_replication_slots says of the slot's WAL; missing: there is no slot.", "status",
		"reserved", "extended", "unreserved", "lost", "missing")
	m.queueDepth = gauge("queue_deliveries", "Deliveries that wait in the retry queue, counted up to 100,000; beyond that the server's estimate.")
	m.queueDue = gauge("queue_due_deliveries", "Deliveries in the retry queue that are due, without those of endpoints whose breaker is open; 100,000 stands for that many or more.")
	m.queueAge = gauge("queue_oldest_due_seconds", "How long the longest due delivery of the retry queue has been due. Those of an endpoint whose breaker is open do not count.")
	m.breakersOpen = gauge("breakers_open", "Endpoints whose breaker is open.")
	m.breakersHalfOpen = gauge("breakers_half_open", "Endpoints whose breaker lets a probe through.")
	m.tenants = gauges("tenants", "Tenants that this replica leads, by state.", "state", store.StateActive, store.StatePaused, store.StateSuspended)
	m.endpoints = gauges("endpoints", "Endpoints of the tenants that this replica leads, by state. Inactive ones are disabled, by the relay or by a person; of invalid ones the row cannot be used.", "state",
		endpointActive, endpointPaused, endpointInactive, endpointInvalid)
	gauge("objective_latency_seconds", "Time after the COMMIT of an event within which the first attempt is to be answered: objective.latency.").Set(m.within.Seconds())
	m.objective = objective{
		total:      counter("objective_deliveries_total", "Deliveries of events from the log, once each has been attempted or deferred: what the objective is a share of."),
		met:        counter("objective_met_total", "Deliveries whose first attempt was answered, whatever the answer, within objective.latency of the COMMIT."),
		unanswered: counter("objective_unanswered_total", "Deliveries whose first attempt began within objective.latency of the COMMIT and was not answered within it: the receiver's part in what was missed."),
	}
	if n := cfg.Metrics.PerTenant; n > 0 {
		m.shares = append(m.shares, newShares(reg, "tenant", n, "tenant"))
	}
	if n := cfg.Metrics.PerEndpoint; n > 0 {
		m.shares = append(m.shares, newShares(reg, "endpoint", n, "tenant", "endpoint"))
	}
	return m
}

// statuses are those that a delivery may be given.
func statuses() []store.Status {
	return []store.Status{store.Success, store.Retrying, store.Pending, store.Leased, store.Failed, store.Cancelled}
}

// event counts an event that the log has brought. Its COMMIT is by the server's clock: with clocks apart all that is measured from it is off by as much.
func (m *metrics) event(committed time.Time, targets int) {
	age := max(time.Since(committed).Seconds(), 0)
	m.toRead.Observe(age)
	m.slotDelay.Set(age) // a stream that waits for room in the middle of a transaction has not read everything
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

func (m *metrics) outcome(o *store.Outcome) {
	m.outcomes[o.Status].Inc()
	for _, s := range m.shares {
		s.of(o.Delivery.Tenant, o.Delivery.EndpointID).deliveries[o.Status].Inc()
	}
}

// recorded notes that a delivery of the stream is durable, as all of its batch are since now.
func (m *metrics) recorded(j *job, now time.Time) {
	if j.ledger != nil && !j.committed.IsZero() {
		m.toRecord.Observe(max(now.Sub(j.committed).Seconds(), 0))
	}
}

func (m *metrics) deferred(reason string) { m.deferrals[reason].Inc() }

func (m *metrics) claimed(n int) { m.claims.Add(float64(n)) }

func (m *metrics) flushed(outcomes int, took time.Duration) {
	m.flushes.Observe(took.Seconds())
	m.flushRows.Observe(float64(outcomes))
}

func (m *metrics) leading(is bool, epoch int64) {
	m.epoch.Set(float64(epoch))
	if is {
		m.leader.Set(1)
		m.takeovers.Inc()
		return
	}
	m.leader.Set(0)
	m.slotDelay.Set(0)
	m.served(census{})
}

func (m *metrics) breakerChanged(from, to gobreaker.State) {
	of := map[gobreaker.State]prometheus.Gauge{gobreaker.StateOpen: m.breakersOpen, gobreaker.StateHalfOpen: m.breakersHalfOpen}
	if g := of[from]; g != nil {
		g.Dec()
	}
	if g := of[to]; g != nil {
		g.Inc()
	}
}
