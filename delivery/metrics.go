package delivery

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
)

// Metrics counts what a Client does. It is safe for concurrent use, and several Clients may share one.
type Metrics struct {
	attempts         map[Class]prometheus.Counter
	duration         prometheus.Histogram
	inFlight         prometheus.Gauge
	resends          prometheus.Counter
	connOpened       prometheus.Counter
	connReused       prometheus.Counter
	connOpen         prometheus.Gauge
	connErrors       map[stage]prometheus.Counter
	dnsLookups       prometheus.Counter
	dnsHits          prometheus.Counter
	dnsLookupsFailed prometheus.Counter
}

// NewMetrics registers the metrics with reg, all series at zero. A nil reg keeps them to themselves. Like promauto it panics on names
// that reg already has.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	auto := promauto.With(reg)
	counter := func(name, help string) prometheus.Counter {
		return auto.NewCounter(prometheus.CounterOpts{Name: "outbox_relay_" + name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return auto.NewGauge(prometheus.GaugeOpts{Name: "outbox_relay_" + name, Help: help})
	}
	m := &Metrics{
		attempts: map[Class]prometheus.Counter{},
		duration: auto.NewHistogram(prometheus.HistogramOpts{
			Name: "outbox_relay_attempt_duration_seconds", Help: "Time of one attempt, from request to answer.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
			// And a native histogram, for a server that takes it: buckets 10 % apart, as long as they are no more than these.
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour,
		}),
		inFlight:         gauge("attempts_in_flight", "Attempts under way."),
		resends:          counter("attempt_resends_total", "Requests sent again within an attempt because a kept connection turned out dead, or was given up before its answer was read, or HTTP/2 refused them."),
		connOpened:       counter("connections_opened_total", "Connections opened to receivers."),
		connReused:       counter("connections_reused_total", "Requests sent on a kept connection."),
		connOpen:         gauge("connections_open", "Open connections to receivers, idle ones included."),
		connErrors:       map[stage]prometheus.Counter{},
		dnsLookups:       counter("dns_lookups_total", "Host names looked up."),
		dnsHits:          counter("dns_cache_hits_total", "Host names answered from the cache."),
		dnsLookupsFailed: counter("dns_lookup_errors_total", "Lookups that failed."),
	}
	attempts := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_relay_attempts_total", Help: "Finished attempts by class of outcome.",
	}, []string{"class"})
	for _, c := range Classes() {
		m.attempts[c] = attempts.WithLabelValues(string(c))
	}
	connErrors := auto.NewCounterVec(prometheus.CounterOpts{
		Name: "outbox_relay_connection_errors_total", Help: "Connections that could not be opened, by the stage that failed.",
	}, []string{"stage"})
	for _, s := range []stage{stageDNS, stageConnect, stageTLS, stageDenied, stageProxy} {
		m.connErrors[s] = connErrors.WithLabelValues(string(s))
	}
	return m
}
