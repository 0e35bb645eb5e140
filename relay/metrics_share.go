package relay

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Metrics says which series there are beside those of the relay as a whole.
type Metrics struct {
	// PerTenant is how many tenants have series of their own, PerEndpoint how many endpoints. All others share one set of series. Zero: there are none.
	PerTenant   int `mapstructure:"per_tenant"`
	PerEndpoint int `mapstructure:"per_endpoint"`
}

// maxShares bounds what one relay has to keep and a server to scrape: each has some forty series.
const maxShares = 10_000

func (m Metrics) validate(f *faults) {
	check := func(key string, n int) {
		if n < 0 || n > maxShares {
			f.add(key, n, "must be 0 to %d: each of them has some forty series; 0 switches them off", maxShares)
		}
	}
	check("metrics.per_tenant", m.PerTenant)
	check("metrics.per_endpoint", m.PerEndpoint)
}

// shareOther is what tenants and endpoints are called that have no series of their own.
const shareOther = "other"

// A share is the series of one tenant, or of one endpoint.
type share struct {
	objective
	deliveries map[store.Status]prometheus.Counter
	attempts   map[delivery.Class]prometheus.Counter
	latency    prometheus.Observer
}

// shares hands out the series of tenants, or of endpoints: to those that come first, as many as there may be. Those that are gone make room. It is safe for
// concurrent use.
type shares struct {
	limit                  int
	endpoints              bool // of tenants otherwise
	deliveries, attempts   *prometheus.CounterVec
	latency                *prometheus.HistogramVec
	total, met, unanswered *prometheus.CounterVec
	other                  *share
	mu                     sync.Mutex
	known                  map[laneKey]*share
}

func newShares(reg prometheus.Registerer, of string, limit int, labels ...string) *shares {
	counter := func(name, help string, more ...string) *prometheus.CounterVec {
		v := prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "outbox_relay", Subsystem: of, Name: name, Help: help}, append(slices.Clone(labels), more...))
		reg.MustRegister(v)
		return v
	}
	latency := histogramOpts("commit_to_answer_seconds", "Time from the COMMIT of an event to the answer to the first attempt of one "+of+".", []float64{.01, .1, 1, 5, 30})
	latency.Subsystem = of
	s := &shares{
		limit: limit, endpoints: of == "endpoint", known: make(map[laneKey]*share),
		deliveries: counter("deliveries_total", "Deliveries of one "+of+" recorded, by the status they were given.", "status"),
		attempts:   counter("attempts_total", "Finished attempts of one "+of+" by class of outcome.", "class"),
		latency:    prometheus.NewHistogramVec(latency, labels),
		total:      counter("objective_deliveries_total", "Deliveries of one "+of+" that the objective is a share of."),
		met:        counter("objective_met_total", "Deliveries of one "+of+" that met the objective."),
		unanswered: counter("objective_unanswered_total", "Deliveries of one "+of+" that began in time for the objective and that the receiver did not answer in time."),
	}
	reg.MustRegister(s.latency)
	other := make([]string, len(labels))
	for i := range other {
		other[i] = shareOther
	}
	s.other = s.make(other)
	return s
}

// labels are those of a tenant's, or an endpoint's, series.
func (s *shares) labels(key laneKey) []string {
	if s.endpoints {
		return []string{key.tenant, key.endpoint.String()}
	}
	return []string{key.tenant}
}

// make makes all series at once, so that the first of each kind is an increase.
func (s *shares) make(labels []string) *share {
	sh := &share{
		objective:  objective{s.total.WithLabelValues(labels...), s.met.WithLabelValues(labels...), s.unanswered.WithLabelValues(labels...)},
		deliveries: make(map[store.Status]prometheus.Counter), attempts: make(map[delivery.Class]prometheus.Counter), latency: s.latency.WithLabelValues(labels...),
	}
	for _, status := range statuses() {
		sh.deliveries[status] = s.deliveries.WithLabelValues(append(slices.Clone(labels), status.String())...)
	}
	for _, class := range delivery.Classes() {
		sh.attempts[class] = s.attempts.WithLabelValues(append(slices.Clone(labels), string(class))...)
	}
	return sh
}

// of finds the series of a tenant, or of an endpoint of it.
func (s *shares) of(tenant string, endpoint outbox.UUID) *share {
	key := laneKey{tenant: tenant}
	if s.endpoints {
		key.endpoint = endpoint
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sh := s.known[key]
	if sh == nil {
		if len(s.known) >= s.limit || tenant == shareOther { // a schema may be called so: it is one of the others
			return s.other
		}
		sh = s.make(s.labels(key))
		s.known[key] = sh
	}
	return sh
}

// owners lists who has series.
func (s *shares) owners() []laneKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.known))
}

// drop removes the series of those that are gone.
func (s *shares) drop(gone []laneKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range gone {
		delete(s.known, key)
		labels := make(prometheus.Labels)
		for i, name := range []string{"tenant", "endpoint"}[:len(s.labels(key))] {
			labels[name] = s.labels(key)[i]
		}
		for _, v := range []interface{ DeletePartialMatch(prometheus.Labels) int }{s.deliveries, s.attempts, s.latency, s.total, s.met, s.unanswered} {
			v.DeletePartialMatch(labels)
		}
	}
}

// pruneEvery is how often those are looked for that are gone.
const pruneEvery = time.Minute

// prune drops the series of tenants and endpoints that are gone. It asks the database, since relays that stand by have series as well, and hear of nothing.
func (m *metrics) prune(ctx context.Context, st *store.Store) error {
	for _, s := range m.shares {
		of := make(map[string][]outbox.UUID)
		owners := s.owners()
		for _, key := range owners {
			of[key.tenant] = append(of[key.tenant], key.endpoint)
		}
		there, err := st.Present(ctx, of)
		if err != nil {
			return err
		}
		s.drop(slices.DeleteFunc(owners, func(key laneKey) bool {
			_, is := there[store.Endpoint{Tenant: key.tenant, ID: key.endpoint}]
			return is
		}))
	}
	return nil
}
