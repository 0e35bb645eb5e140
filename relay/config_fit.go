package relay

import "time"

// ceiling is a value that another one must not be above. What is below its ceiling changes nothing; what is above it does not do what it says.
type ceiling struct {
	key   string
	check func(f *faults)
	lower func()
}

// under is nothing to say while the limit is itself at fault.
func under[T int | time.Duration](key string, value *T, limitKey string, limit *T) ceiling {
	above := func() bool { return *limit > 0 && *value > *limit }
	return ceiling{key, func(f *faults) {
		if above() {
			f.add(key, *value, "must not be more than %s, which is %v: lower the one or raise the other", limitKey, *limit)
		}
	}, func() {
		if above() {
			*value = *limit
		}
	}}
}

// ceilings are in an order in which each can be lowered after what it depends on.
func (c *Config) ceilings() []ceiling {
	d := &c.Delivery
	return []ceiling{
		under("delivery.workers", &d.Workers, "window.deliveries", &c.Window.Deliveries),
		// An attempt that finds no connection fails, through no fault of the receiver.
		under("delivery.workers", &d.Workers, "delivery.max_connections", &d.MaxConnections),
		under("delivery.endpoint_concurrency", &d.EndpointConcurrency, "delivery.workers", &d.Workers),
		under("delivery.max_connections_per_host", &d.MaxConnectionsPerHost, "delivery.max_connections", &d.MaxConnections),
		under("delivery.max_idle_per_host", &d.MaxIdlePerHost, "delivery.max_connections_per_host", &d.MaxConnectionsPerHost),
		under("delivery.connect_timeout", &d.ConnectTimeout, "delivery.default_timeout", &d.DefaultTimeout),
		under("delivery.tls_handshake_timeout", &d.TLSHandshakeTimeout, "delivery.default_timeout", &d.DefaultTimeout),
		under("retry.backoff", &c.Retry.Backoff, "retry.max_backoff", &c.Retry.MaxBackoff),
		under("breaker.half_open", &c.Breaker.HalfOpen, "delivery.workers", &d.Workers),
		under("record.batch", &c.Record.Batch, "window.deliveries", &c.Window.Deliveries),
		under("health.warn_after", &c.Health.WarnAfter, "health.disable_after", &c.Health.DisableAfter), // 0: never
	}
}

// Fit lowers what nobody has given to what it must not be above: with delivery.workers at 7, one endpoint gets 7 as well, and not a fault for a
// default. Values that were given are left for Validate to judge.
func (c *Config) Fit(given func(key string) bool) {
	for _, l := range c.ceilings() {
		if !given(l.key) {
			l.lower()
		}
	}
}
