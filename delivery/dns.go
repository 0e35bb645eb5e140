package delivery

import (
	"context"
	"net"
	"net/http/httptrace"
	"sync/atomic"
	"time"

	"github.com/rs/dnscache"
)

// names resolves host names, through a cache if it has one.
type names struct {
	lookup func(ctx context.Context, host string) ([]string, error) // ends with the Client
	cache  *dnscache.Resolver                                       // nil: no cache
	m      *Metrics
}

func newNames(lookup func(ctx context.Context, host string) ([]string, error), cached bool, timeout time.Duration, m *Metrics) *names {
	n := &names{m: m}
	n.lookup = func(ctx context.Context, host string) ([]string, error) {
		m.dnsLookups.Inc()
		addrs, err := lookup(ctx, host)
		if err != nil {
			m.dnsLookupsFailed.Inc()
		}
		return addrs, err
	}
	if cached {
		n.cache = &dnscache.Resolver{Timeout: timeout, Resolver: cacheSource{n.lookup}}
	}
	return n
}

// addresses returns the addresses of host in the order in which they should be tried.
func (n *names) addresses(ctx context.Context, host string) ([]string, error) {
	if n.cache == nil {
		return n.lookup(ctx, host)
	}
	var missed atomic.Bool
	traced := httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{DNSStart: func(httptrace.DNSStartInfo) { missed.Store(true) }})
	addrs, err := n.cache.LookupHost(traced, host)
	switch {
	case missed.Load() || ctx.Err() != nil:
		return addrs, err
	case err != nil:
		// The cache keeps errors as long as addresses: one lost answer would fail a host until the next refresh.
		return n.lookup(ctx, host)
	default:
		n.m.dnsHits.Inc()
		return addrs, nil
	}
}

// refresh looks the used names up again every interval and drops the others, until ctx ends.
func (n *names) refresh(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			n.cache.Refresh(true)
		}
	}
}

// cacheSource is what the cache asks. It is given the trace of the caller for whom it looks up (dnscache copies the DNS hooks), which
// tells that caller that its answer did not come from the cache.
type cacheSource struct {
	lookup func(ctx context.Context, host string) ([]string, error)
}

func (s cacheSource) LookupHost(ctx context.Context, host string) ([]string, error) {
	if t := httptrace.ContextClientTrace(ctx); t != nil && t.DNSStart != nil {
		t.DNSStart(httptrace.DNSStartInfo{Host: host})
	}
	return s.lookup(ctx, host)
}

// LookupAddr is part of dnscache.DNSResolver and never called here.
func (cacheSource) LookupAddr(_ context.Context, addr string) ([]string, error) {
	return nil, &net.DNSError{Err: "reverse lookup is not used", Name: addr}
}
