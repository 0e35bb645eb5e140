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
		under("delivery.host_concurrency", &d.HostConcurrency, "delivery.max_connections_per_host", &d.MaxConnectionsPerHost), // as above
		under("delivery.connect_timeout", &d.ConnectTimeout, "delivery.default_timeout", &d.DefaultTimeout),
		under("delivery.tls_handshake_timeout", &d.TLSHandshakeTimeout, "delivery.default_timeout", &d.DefaultTimeout),
		under("retry.backoff", &c.Retry.Backoff, "retry.max_backoff", &c.Retry.MaxBackoff),
		under("breaker.half_open", &c.Breaker.HalfOpen, "delivery.workers", &d.Workers),
		under("record.batch", &c.Record.Batch, "window.deliveries", &c.Window.Deliveries),
		under("validation.min_timeout", &c.Validation.MinTimeout, "validation.max_timeout", &c.Validation.MaxTimeout),
		under("validation.min_backoff", &c.Validation.MinBackoff, "validation.max_backoff", &c.Validation.MaxBackoff),
		under("health.warn_after", &c.Health.WarnAfter, "health.disable_after", &c.Health.DisableAfter), // 0: never
	}
}

// Share returns the configuration of one of n relays in one process: what bounds the process is divided between them, so that they hold no more
// together than one would. Connections to receivers need no division: they are the client's, and the relays share it.
func (c Config) Share(n int) Config {
	if n > 1 {
		c.Window.Deliveries /= n
		c.Window.Bytes /= ByteSize(n)
		c.Delivery.Workers /= n
		c.Delivery.HostConcurrency /= n
		c.Fit(func(string) bool { return false })
	}
	return c
}

// Shareable returns every fault of a configuration that does not suffice for n relays, each a *[FieldError].
func (c Config) Shareable(n int) []error {
	var f faults
	least := func(key string, value, least any, short bool) {
		if short {
			f.add(key, value, "is shared by %d relays, one for each database and shard: must be at least %v", n, least)
		}
	}
	least("window.deliveries", c.Window.Deliveries, n, c.Window.Deliveries < n)
	least("window.bytes", c.Window.Bytes, MiB*ByteSize(n), c.Window.Bytes < MiB*ByteSize(n))
	least("delivery.workers", c.Delivery.Workers, n, c.Delivery.Workers < n)
	least("delivery.host_concurrency", c.Delivery.HostConcurrency, n, c.Delivery.HostConcurrency < n)
	return f
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
