package relay

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

const (
	stewardEvery = 5 * time.Second
	// purgeEvery is how often old rows are looked for. A round goes through all tenants in steps of purgeLook a second, or purgeTime where there is
	// much to delete, purgeBatch rows at once: few enough to be no load and to hold no lock for long. Where nothing is old, a thousand tenants take 20 minutes.
	purgeEvery = time.Hour
	purgeLook  = 5 * time.Millisecond
	purgeTime  = 250 * time.Millisecond
	purgeBatch = 1000
	// healthKept is how long the health of an endpoint is kept that is gone: it may be back in a moment, as where a tool writes its row anew.
	healthKept = time.Hour
)

// A steward gives up endpoints that have only failed for too long, and tries tenants again that are suspended. Only the leader has one.
type steward struct {
	looked  time.Time
	waiting map[string]*patience // by suspended tenant
}

// patience is how long until a tenant is tried again. What suspended it may have been a lock, a table that was away for a moment or
// something that a person has mended meanwhile; or it has not been, and then it is tried ever more seldom.
type patience struct {
	wait time.Duration
	next time.Time
	last time.Time // that it was seen suspended
}

const (
	firstPatience = 5 * time.Second
	lastPatience  = 10 * time.Minute
	// lastAside is the longest that a tenant is left out which has work waiting.
	lastAside = time.Minute
)

// aside are the tenants that a chore leaves out for a while, since it failed for them: if a table is locked, every try takes as long as a lock is
// waited for, and all others wait for their turn.
type aside map[string]*patience

func (a aside) has(tenant string) bool {
	p := a[tenant]
	return p != nil && time.Now().Before(p.next)
}

// note takes what a try has led to. A tenant that was suspended is the steward's.
func (a aside) note(tenant string, err error) {
	if broken, ok := errors.AsType[*store.TenantError](err); err == nil || ok && broken.Suspended {
		delete(a, tenant)
		return
	}
	p := a[tenant]
	if p == nil {
		p = &patience{}
		a[tenant] = p
	}
	p.wait = min(max(2*p.wait, firstPatience), lastAside)
	p.next = time.Now().Add(p.wait)
}

func (w *steward) look(ctx context.Context, s *session) error {
	if time.Since(w.looked) < stewardEvery {
		return nil
	}
	w.looked = time.Now()
	s.countServed()
	return errors.Join(w.tryAgain(ctx, s), w.giveUp(ctx, s), s.missSchemas(ctx))
}

// missSchemas tells of tenants whose schema has been dropped: no event of theirs comes any more that could show it.
func (s *session) missSchemas(ctx context.Context) error {
	gone, err := s.store.WithoutSchema(ctx)
	if err != nil {
		return err
	}
	for _, t := range s.served() {
		if t.setGone(slices.Contains(gone, t.schema)) {
			s.log.Warn("the schema of a tenant is gone", "tenant", t.schema, "hint", "outbox-relay tenants remove ends it; a schema that comes back is added with tenants add")
		}
	}
	return nil
}

// tryAgain ends suspensions. What tenants missed is queued; if what suspended them has not passed, and could not be told before, the next event suspends them
// again. One that an operator has paused is paused afterwards: only an operator ends that.
func (w *steward) tryAgain(ctx context.Context, s *session) error {
	suspended, err := s.store.Suspended(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	for _, name := range suspended {
		if !s.cfg().Tenants.Includes(name) {
			continue
		}
		p := w.waiting[name]
		if p == nil {
			p = &patience{wait: firstPatience, next: now.Add(firstPatience)}
			w.waiting[name] = p
		}
		p.last = now
		if now.Before(p.next) {
			continue
		}
		p.wait = min(2*p.wait, lastPatience)
		p.next = now.Add(p.wait)
		state, err := s.store.Unsuspend(ctx, name)
		switch {
		case err != nil:
			s.log.Debug("a suspended tenant cannot be resumed yet", "tenant", name, "again_in", p.wait, "error", err)
		case state == store.StatePaused:
			s.log.Info("tenant is not suspended any more, but paused: what it missed is queued when it is resumed", "tenant", name)
		case state == store.StateActive:
			s.log.Info("suspended tenant resumed: what it missed is being queued", "tenant", name)
		}
	}
	maps.DeleteFunc(w.waiting, func(_ string, p *patience) bool { return now.Sub(p.last) > 2*lastPatience })
	return nil
}

func (w *steward) giveUp(ctx context.Context, s *session) error {
	cfg := &s.cfg().Health
	if cfg.WarnAfter == 0 && cfg.DisableAfter == 0 {
		return nil
	}
	list, err := s.store.Troubled(ctx)
	if err != nil {
		return fmt.Errorf("look after endpoints: %w", err)
	}
	var faults error
	for i := range list {
		t := &list[i]
		if s.tenant(t.Tenant) == nil {
			continue
		}
		switch {
		case cfg.DisableAfter > 0 && t.Failing >= cfg.DisableAfter:
			faults = errors.Join(faults, s.disable(ctx, t))
		case cfg.WarnAfter > 0 && t.Failing >= cfg.WarnAfter && !t.Warned:
			faults = errors.Join(faults, s.warn(ctx, t))
		}
	}
	return faults
}

func (s *session) disable(ctx context.Context, t *store.Trouble) error {
	reason := fmt.Sprintf("every attempt has failed for %s: %s", t.Failing.Round(time.Second), t.LastError)
	disabled, err := s.store.Disable(ctx, t.Endpoint, reason)
	if err != nil || !disabled {
		return err
	}
	s.log.Warn("endpoint disabled", "tenant", t.Tenant, "endpoint", t.ID, "failing", t.Failing, "error", t.LastError,
		"hint", resumeHint)
	s.keeper.announce(newsOfEndpoint(newsDisabled, laneKey{t.Tenant, t.ID}, map[string]any{"reason": reason}))
	return nil
}

func (s *session) warn(ctx context.Context, t *store.Trouble) error {
	first, err := s.store.Warned(ctx, t.Endpoint)
	if err != nil || !first {
		return err
	}
	facts := map[string]any{"failing_seconds": int64(t.Failing.Seconds()), "error": t.LastError}
	if after := s.cfg().Health.DisableAfter; after > 0 {
		facts["disabled_in_seconds"] = int64((after - t.Failing).Seconds())
	}
	s.log.Warn("endpoint fails every attempt", "tenant", t.Tenant, "endpoint", t.ID, "failing", t.Failing, "error", t.LastError)
	s.keeper.announce(newsOfEndpoint(newsFailing, laneKey{t.Tenant, t.ID}, facts))
	return nil
}

// A purger deletes rows that have been kept for as long as they should be.
type purger struct {
	began time.Time
	keeps Retention // what todo was made of
	todo  []purge
}

type purge struct {
	tenant string
	kind   store.Kept
	age    time.Duration
	from   outbox.UUID // where it goes on
}

func (p *purger) advance(ctx context.Context, s *session) error {
	p.follow(s.cfg().Retention)
	if len(p.todo) == 0 {
		if time.Since(p.began) < purgeEvery {
			return nil
		}
		p.began = time.Now()
		p.todo = purges(&p.keeps, s.known())
	}
	budget := purgeLook
	for start := time.Now(); len(p.todo) > 0 && time.Since(start) < budget; {
		next := &p.todo[0]
		n, err := s.store.Purge(ctx, next.tenant, next.kind, next.age, purgeBatch, &next.from)
		if _, broken := errors.AsType[*store.TenantError](err); broken {
			s.log.Debug("old rows of a tenant stay", "error", err)
		} else if err != nil {
			return err
		}
		if n < purgeBatch {
			p.todo = p.todo[1:]
		} else {
			budget = purgeTime
		}
	}
	return nil
}

// follow begins a new round where something else is to be kept than the one under way knows.
func (p *purger) follow(keeps Retention) {
	if keeps != p.keeps {
		*p = purger{keeps: keeps}
	}
}

func purges(cfg *Retention, tenants []string) (todo []purge) {
	for _, tenant := range tenants {
		for _, p := range []purge{
			{tenant: tenant, kind: store.KeptDeliveries, age: cfg.Deliveries},
			{tenant: tenant, kind: store.KeptAttempts, age: cfg.Attempts},
			{tenant: tenant, kind: store.KeptDeadLetters, age: cfg.DeadLetters},
			{tenant: tenant, kind: store.KeptStats, age: cfg.Stats},
		} {
			if p.age > 0 {
				todo = append(todo, p)
			}
		}
	}
	for _, tenant := range append(slices.Clone(tenants), "") { // and of none that is registered any more
		if cfg.Deliveries > 0 {
			todo = append(todo, purge{tenant: tenant, kind: store.KeptRecoveries, age: cfg.Deliveries})
		}
		todo = append(todo, purge{tenant: tenant, kind: store.KeptHealth, age: healthKept})
	}
	return todo
}
