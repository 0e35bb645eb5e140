package relay

// Reloaded returns the configuration of a relay that runs with c once it is told of next: what may change while it runs is that of next, all else stays as it
// was. A value that is above what stays is lowered to it: delivery.endpoint_concurrency to delivery.workers, say.
//
// What stays is what the process or its connections were made with: which databases and tenants, how much memory, how many workers and connections.
func (c Config) Reloaded(next Config) Config {
	d := &c.Delivery
	d.EndpointConcurrency, d.EndpointRate, d.HostConcurrency = next.Delivery.EndpointConcurrency, next.Delivery.EndpointRate, next.Delivery.HostConcurrency
	d.ConnectTimeout, d.TLSHandshakeTimeout, d.DefaultTimeout = next.Delivery.ConnectTimeout, next.Delivery.TLSHandshakeTimeout, next.Delivery.DefaultTimeout
	d.KeepResponse, d.Source, d.AllowInsecureTLS = next.Delivery.KeepResponse, next.Delivery.Source, next.Delivery.AllowInsecureTLS
	d.ReceiverDisable, d.ReceiverAbort = next.Delivery.ReceiverDisable, next.Delivery.ReceiverAbort

	stays := c.Network
	c.Network = next.Network
	c.Network.Proxy, c.Network.ProxyFile = stays.Proxy, stays.ProxyFile
	if c.Validation.Profile != next.Validation.Profile { // which stays, and so does what it says of networks
		c.Network.Allow, c.Network.HTTPSOnly = stays.Allow, stays.HTTPSOnly
	}

	c.Queue.Poll, c.Queue.Batch = next.Queue.Poll, next.Queue.Batch
	c.Retry, c.Breaker, c.Record, c.Health, c.Retention = next.Retry, next.Breaker, next.Record, next.Health, next.Retention
	c.Secrets, c.Shutdown = next.Secrets, next.Shutdown
	c.Fit(func(string) bool { return false })
	return c
}
