package relay

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// The keeper keeps what is worth knowing beyond the deliveries themselves: how endpoints fare, how much they are used, and the news of them. It is
// told of outcomes once they are durable, and writes sums of them now and then, in transactions of its own: none of it is worth holding a delivery
// up for, and what it cannot write is lost with the process.
//
//	recorder ──note──► health (every 5 s) ──► endpoint_health ──► steward (the leader's) ──► warning, disabled
//	                   usage (every 30 s) ──► webhook_delivery_stats, last_used_at, last_triggered_at
//	                   news (at once) ──► webhook_events
type keeper struct {
	store *store.Store
	log   *slog.Logger
	wake  chan struct{} // there is news

	mu       sync.Mutex
	seen     map[laneKey]*seen
	usage    map[usageKey]*store.Usage
	triggers map[triggerKey]time.Time
	disabled map[laneKey]time.Time // the news was given, and when the last attempt ended that belongs to it
	news     []*store.News
	dropped  int // news that found no room
}

// seen is what has happened to an endpoint since the last save.
type seen struct {
	failing   time.Time // first failure since the last success, if that is none
	succeeded time.Time // last success
	open      time.Time // until when the breaker is, if it has opened
	lastError string
}

type usageKey struct {
	laneKey
	day int64 // since the epoch, UTC
}

type triggerKey struct {
	tenant       string
	subscription outbox.UUID
}

const (
	healthEvery = 5 * time.Second
	usageEvery  = 30 * time.Second
	// disabling is for how long attempts still begin at an endpoint that has just been disabled, at most: the routing table learns of it by the log. What they
	// and those in flight lead to is not another disabling.
	disabling = 10 * time.Second
	// maxNews bounds what waits to be told.
	maxNews = 10_000
)

func newKeeper(s *store.Store, log *slog.Logger) *keeper {
	return &keeper{
		store: s, log: log, wake: make(chan struct{}, 1),
		seen: make(map[laneKey]*seen), usage: make(map[usageKey]*store.Usage), triggers: make(map[triggerKey]time.Time), disabled: make(map[laneKey]time.Time),
	}
}

// note takes durable outcomes. It keeps nothing of them.
func (k *keeper) note(out []store.Outcome) {
	for key, reason := range k.sum(out) {
		k.log.Warn("endpoint disabled", "tenant", key.tenant, "endpoint", key.endpoint, "error", reason, "hint", resumeHint)
	}
}

// resumeHint is what to do about an endpoint that the relay has disabled.
const resumeHint = "once it is mended: outbox-relay endpoints resume, then endpoints recover --since"

// sum adds outcomes to what is kept, and returns the endpoints that are disabled by them, and why.
func (k *keeper) sum(out []store.Outcome) (disabled map[laneKey]string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range out {
		o := &out[i]
		if o.Attempted {
			key := laneKey{o.Delivery.Tenant, o.Delivery.EndpointID}
			if reason := k.noteHealth(key, o); reason != "" {
				if disabled == nil {
					disabled = make(map[laneKey]string)
				}
				disabled[key] = reason
			}
			k.noteUsage(key, o)
		}
		if o.Status == store.Failed && !strings.HasPrefix(o.Delivery.EventType, route.NewsPrefix) {
			k.tell(newsOfDead(o))
		}
	}
	return disabled
}

// noteHealth returns why the endpoint is disabled, if it is from now on.
func (k *keeper) noteHealth(key laneKey, o *store.Outcome) string {
	s := k.see(key)
	ended := o.Result.Started.Add(o.Result.Duration)
	if o.Result.OK() {
		s.failing, s.succeeded = time.Time{}, ended
	} else {
		if s.failing.IsZero() {
			s.failing = o.Result.Started
		}
		s.lastError = o.Result.Err
	}
	if !o.Disable {
		return ""
	}
	before := k.disabled[key]
	k.disabled[key] = time.Now()
	if o.Result.Started.After(before.Add(disabling)) {
		reason := cmp.Or(o.Reason, o.Result.Err)
		k.tell(newsOfEndpoint(newsDisabled, key, map[string]any{"reason": reason}))
		return reason
	}
	return ""
}

func (k *keeper) see(key laneKey) *seen {
	s := k.seen[key]
	if s == nil {
		s = &seen{}
		k.seen[key] = s
	}
	return s
}

const dayLength = 24 * time.Hour

func (k *keeper) noteUsage(key laneKey, o *store.Outcome) {
	res := &o.Result
	day := usageKey{key, res.Started.Unix() / int64(dayLength/time.Second)}
	u := k.usage[day]
	if u == nil {
		u = &store.Usage{
			Endpoint: store.Endpoint{Tenant: key.tenant, ID: key.endpoint}, Day: time.Unix(day.day*int64(dayLength/time.Second), 0).UTC(),
			Min: res.Duration,
		}
		k.usage[day] = u
	}
	switch {
	case res.OK():
		u.Successes++
	case res.Class == delivery.ClassTimeout:
		u.Timeouts++
	default:
		u.Failures++
	}
	if !res.OK() {
		if u.Errors == nil {
			u.Errors = make(map[string]int64)
		}
		u.Errors[string(res.Class)]++
	}
	u.Total += res.Duration
	u.Min, u.Max = min(u.Min, res.Duration), max(u.Max, res.Duration)
	u.LastUsed = res.Started
	if sub := o.Delivery.Subscription; !sub.IsZero() {
		k.triggers[triggerKey{key.tenant, sub}] = res.Started
	}
}

// breakerOpened is called under the dispatcher's lock.
func (k *keeper) breakerOpened(key laneKey, openFor time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.see(key).open = time.Now().Add(openFor)
}

// tell queues news. It is called under the lock.
func (k *keeper) tell(n *store.News) {
	if len(k.news) >= maxNews {
		k.dropped++
		return
	}
	k.news = append(k.news, n)
	signal(k.wake)
}

// announce queues news from elsewhere.
func (k *keeper) announce(n *store.News) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tell(n)
}

// run saves until ctx is done, and then once more.
func (k *keeper) run(ctx context.Context) error {
	health, usage := time.NewTicker(healthEvery), time.NewTicker(usageEvery)
	defer health.Stop()
	defer usage.Stop()
	for {
		var err error
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if err := errors.Join(k.saveHealth(last), k.saveUsage(last), k.saveNews(last)); err != nil {
				k.log.Warn("statistics and health of endpoints were not saved at the end", "error", err)
			}
			return nil
		case <-health.C:
			err = errors.Join(k.saveHealth(ctx), k.saveNews(ctx))
		case <-usage.C:
			err = k.saveUsage(ctx)
		case <-k.wake:
			err = k.saveNews(ctx)
		}
		if err != nil && ctx.Err() == nil {
			k.log.Warn("statistics or health of endpoints could not be saved", "error", err)
		}
	}
}

// saveHealth tells what has changed since the last time.
func (k *keeper) saveHealth(ctx context.Context) error {
	list := k.takeHealth()
	if len(list) == 0 {
		return nil
	}
	recovered, err := k.store.SaveHealth(ctx, list)
	if err != nil {
		k.putBackHealth(list)
		return err
	}
	for _, e := range recovered {
		k.log.Warn("endpoint has recovered", "tenant", e.Tenant, "endpoint", e.ID)
		k.announce(newsOfEndpoint(newsRecovered, laneKey{e.Tenant, e.ID}, nil))
	}
	return nil
}

func (k *keeper) takeHealth() (list []store.Health) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, s := range k.seen {
		list = append(list, store.Health{
			Endpoint: store.Endpoint{Tenant: key.tenant, ID: key.endpoint},
			Failing:  s.failing, OpenUntil: s.open, Succeeded: s.succeeded, LastError: s.lastError,
		})
	}
	clear(k.seen)
	for key, at := range k.disabled {
		if time.Since(at) > delivery.MaxTimeout+disabling {
			delete(k.disabled, key)
		}
	}
	return list
}

// putBackHealth keeps what could not be saved, below what is known by now.
func (k *keeper) putBackHealth(list []store.Health) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range list {
		h := &list[i]
		s := k.see(laneKey{h.Tenant, h.ID})
		if s.succeeded.IsZero() {
			s.succeeded = h.Succeeded
			if !h.Failing.IsZero() {
				s.failing = h.Failing
			}
		}
		if s.lastError == "" {
			s.lastError = h.LastError
		}
		if s.open.IsZero() {
			s.open = h.OpenUntil
		}
	}
}

// saveUsage writes the sums of all tenants, one after the other. Those of a tenant that cannot take them are dropped: its own statistics are all that
// is lost.
func (k *keeper) saveUsage(ctx context.Context) error {
	k.mu.Lock()
	usage, triggers := k.usage, k.triggers
	k.usage, k.triggers = make(map[usageKey]*store.Usage), make(map[triggerKey]time.Time)
	k.mu.Unlock()

	type sums struct {
		usage    []*store.Usage
		triggers []store.Trigger
	}
	tenants := make(map[string]*sums)
	of := func(tenant string) *sums {
		if tenants[tenant] == nil {
			tenants[tenant] = &sums{}
		}
		return tenants[tenant]
	}
	for key, u := range usage {
		t := of(key.tenant)
		t.usage = append(t.usage, u)
	}
	for key, last := range triggers {
		t := of(key.tenant)
		t.triggers = append(t.triggers, store.Trigger{Subscription: key.subscription, Last: last})
	}
	for name, t := range tenants {
		err := k.store.SaveUsage(ctx, name, t.usage, t.triggers)
		var broken *store.TenantError
		switch {
		case errors.As(err, &broken):
			k.log.Debug("statistics of a tenant were dropped", "error", err)
		case err != nil:
			return err // those of the others go with it: what they are worth does not pay for keeping them
		}
	}
	return nil
}

// saveNews writes what there is to tell.
func (k *keeper) saveNews(ctx context.Context) error {
	k.mu.Lock()
	news, dropped := k.news, k.dropped
	k.news, k.dropped = nil, 0
	k.mu.Unlock()
	if dropped > 0 {
		k.log.Warn("more news of the relay's own than could be told in time", "dropped", dropped)
	}
	for i, n := range news {
		_, err := k.store.Announce(ctx, n)
		var broken *store.TenantError
		switch {
		case errors.As(err, &broken):
			k.log.Debug("news could not be told", "error", err)
		case err != nil:
			k.mu.Lock()
			k.news = append(news[i:], k.news...)
			k.mu.Unlock()
			return err
		}
	}
	return nil
}
