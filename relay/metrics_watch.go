package relay

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// RegisterMetrics registers all metrics of a relay that is told to do nothing, for who wants to know what there are.
func RegisterMetrics(reg prometheus.Registerer, cfg Config) {
	delivery.NewMetrics(reg)
	m := newMetrics(reg, &cfg)
	d := newDispatcher(&cfg, m)
	m.watch(d, newRecorder(&cfg, nil, outbox.UUID{}, d, m, slog.New(slog.DiscardHandler)), func() store.Pool { return store.Pool{} })
}

// watch exports what dispatcher, recorder and pool hold, and how much they may.
func (m *metrics) watch(d *dispatcher, r *recorder, pool func() store.Pool) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "outbox_relay", Name: name, Help: help}, value))
	}
	counter := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "outbox_relay", Name: name, Help: help}, value))
	}
	connections := func(state string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "outbox_relay", Name: "database_connections", Help: "Connections of the pool, by state; that of the stream is not among them.",
			ConstLabels: prometheus.Labels{"state": state},
		}, value))
	}
	limit, workers := d.cfg.Window, d.cfg.Delivery.Workers // they stay as they are, see Config.Reloaded
	gauge("window_bytes", "Memory that deliveries of the stream occupy, bodies included.", func() float64 { _, n, _, _ := d.load(); return float64(n) })
	gauge("window_limit_deliveries", "Deliveries of the stream that may be in the window: window.deliveries. A burst may hold five times as many.", func() float64 { return float64(limit.Deliveries) })
	gauge("window_limit_bytes", "Memory that deliveries of the stream may occupy: window.bytes.", func() float64 { return float64(limit.Bytes) })
	gauge("claimed_deliveries", "Deliveries of the retry queue in memory.", func() float64 { _, _, n, _ := d.load(); return float64(n) })
	gauge("claimed_limit_deliveries", "Deliveries of the retry queue that may be in memory: one queue.batch is attempted while the next is claimed.", func() float64 {
		d.mu.Lock()
		defer d.mu.Unlock()
		return float64(2 * d.cfg.Queue.Batch)
	})
	gauge("in_flight", "Deliveries being attempted, of the stream and of the retry queue.", func() float64 { _, _, _, n := d.load(); return float64(n) })
	gauge("in_flight_limit", "Deliveries that may be attempted at the same time: delivery.workers.", func() float64 { return float64(workers) })
	gauge("record_pending", "Outcomes that wait to be recorded.", func() float64 { return float64(r.pending()) })
	gauge("restart_lag_seconds", "Age of the oldest commit that is not recorded whole, from which on a restart would look again; 0 when there is none.",
		func() float64 { return r.restartLag(time.Now()).Seconds() })
	connections("acquired", func() float64 { return float64(pool().Acquired) })
	connections("idle", func() float64 { return float64(pool().Idle) })
	connections("opening", func() float64 { return float64(pool().Opening) })
	gauge("database_connections_limit", "Connections that the pool may have: database.max_connections.", func() float64 { return float64(pool().Limit) })
	counter("database_connections_opened_total", "Connections that the pool has opened.", func() float64 { return float64(pool().Opened) })
	counter("database_waits_total", "Times that a connection of the pool had to be waited for, as none was idle.", func() float64 { return float64(pool().Waits) })
	counter("database_wait_seconds_total", "Time spent waiting for a connection of the pool.", func() float64 { return pool().Waited.Seconds() })
	gauge("window_deliveries", "Deliveries of the stream in memory.", func() float64 { n, _, _, _ := d.load(); return float64(n) })
}

// The states of an endpoint.
const (
	endpointActive   = "active"
	endpointPaused   = "paused"
	endpointInactive = "inactive"
	endpointInvalid  = "invalid"
)

// census counts what a leader serves.
type census struct {
	tenants   map[string]int
	endpoints route.Count
}

// countServed shows it.
func (s *session) countServed() {
	c := census{tenants: make(map[string]int)}
	for _, t := range s.served() {
		t.mu.Lock()
		c.tenants[t.state]++
		n := t.table.Count()
		t.mu.Unlock()
		c.endpoints.Active += n.Active
		c.endpoints.Paused += n.Paused
		c.endpoints.Inactive += n.Inactive
		c.endpoints.Invalid += n.Invalid
	}
	s.metrics.served(c)
}

func (m *metrics) served(c census) {
	for state, g := range m.tenants {
		g.Set(float64(c.tenants[state]))
	}
	for state, n := range map[string]int{
		endpointActive: c.endpoints.Active, endpointPaused: c.endpoints.Paused, endpointInactive: c.endpoints.Inactive, endpointInvalid: c.endpoints.Invalid,
	} {
		m.endpoints[state].Set(float64(n))
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

// queue shows what waits in the retry queue.
func (m *metrics) queue(s *store.Stats) {
	m.queueDepth.Set(float64(s.Queued))
	m.queueDue.Set(float64(s.Due))
	m.queueAge.Set(s.OldestDue.Seconds())
}

// observe asks the database now and then what the gauges should show, until ctx is done.
func (e *engine) observe(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	var budget walBudget
	var commits commitWatch
	pruned := time.Now()
	complained := false
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		commits.look(ctx, e)
		// The slot comes first, and whatever the queue says: somebody who has locked that for long is what fills the log.
		s, err := e.store.SlotStats(ctx)
		if err != nil {
			continue // the recorder and the claimer tell that the database is away
		}
		now := time.Now()
		o := budget.look(now, &s, int64(e.cfg().Database.WALBudget))
		e.metrics.slot(&s, o)
		budget.tell(now, &s, o, e.log)
		if e.shard == 0 { // it is one queue: the sum over all shards has to be right
			q, err := e.store.QueueStats(ctx)
			switch {
			case err == nil:
				e.metrics.queue(&q)
			case !complained && ctx.Err() == nil:
				e.log.Warn("the metrics of the retry queue stay as they are: it cannot be read", "error", err)
			}
			complained = err != nil
		}
		if now.Sub(pruned) >= pruneEvery {
			pruned = now
			_ = e.metrics.prune(ctx, e.store) // what is gone may as well go a minute later
		}
	}
}
