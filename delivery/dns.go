package delivery

import (
	"context"
	"maps"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// names resolves host names and keeps the answers, no errors, for ttl. Each name has its own expiry and is looked up by whoever needs it then, once
// for all of them: a name server that does not answer delays its own hosts and nobody else's.
type names struct {
	ask func(ctx context.Context, host string) ([]string, error) // within its own time limit, and ends with the Client
	ttl time.Duration                                            // zero: nothing is kept
	m   *Metrics

	asking singleflight.Group
	mu     sync.Mutex
	kept   map[string]answer
	sweep  time.Time // when the old ones go
}

// answer is what a name resolved to, not to be written to.
type answer struct {
	addrs []string
	until time.Time
}

func newNames(ask func(ctx context.Context, host string) ([]string, error), ttl time.Duration, m *Metrics) *names {
	return &names{ask: ask, ttl: ttl, m: m, kept: map[string]answer{}}
}

// addresses returns the addresses of host in the order in which they should be tried.
func (n *names) addresses(ctx context.Context, host string) ([]string, error) {
	if n.ttl == 0 {
		return n.lookup(ctx, host)
	}
	n.mu.Lock()
	known, ok := n.kept[host]
	n.mu.Unlock()
	if ok && time.Now().Before(known.until) {
		n.m.dnsHits.Inc()
		return known.addrs, nil
	}
	asked := n.asking.DoChan(host, func() (any, error) {
		addrs, err := n.lookup(context.WithoutCancel(ctx), host) // others may wait for it when ctx is done
		if err == nil {
			n.keep(host, addrs)
		}
		return addrs, err
	})
	select {
	case got := <-asked:
		addrs, _ := got.Val.([]string)
		return addrs, got.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (n *names) lookup(ctx context.Context, host string) ([]string, error) {
	n.m.dnsLookups.Inc()
	addrs, err := n.ask(ctx, host)
	if err != nil {
		n.m.dnsLookupsFailed.Inc()
	}
	return addrs, err
}

// keep also drops what is too old, once per ttl: redirects can lead to any number of names.
func (n *names) keep(host string, addrs []string) {
	now := time.Now()
	n.mu.Lock()
	defer n.mu.Unlock()
	if now.After(n.sweep) {
		maps.DeleteFunc(n.kept, func(_ string, a answer) bool { return now.After(a.until) })
		n.sweep = now.Add(n.ttl)
	}
	n.kept[host] = answer{addrs, now.Add(n.ttl)}
}
