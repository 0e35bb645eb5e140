package relay

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// recoverMissed takes every request to recover an endpoint one page further, until none is left that can be worked on: what matches the endpoint now
// and has no delivery to it becomes pending rows. A tenant whose page failed is left out for a while.
func (s *session) recoverMissed(ctx context.Context, left aside) error {
	for {
		list, err := s.store.Recoveries(ctx, s.epoch)
		if err != nil {
			return err
		}
		worked, faults := false, error(nil)
		for _, r := range list {
			if !s.cfg().Tenants.Includes(r.Tenant) || left.has(r.Tenant) {
				continue
			}
			if !r.Ready {
				s.recorder.writePosition() // or a quiet log keeps it waiting
				continue
			}
			done, err := s.recoverPage(ctx, r)
			var broken *store.TenantError
			isTenants := errors.As(err, &broken)
			if !isTenants && store.IsDataException(err) { // what was asked for cannot be computed, and will not be by the next try
				err = s.store.EndRecovery(ctx, s.epoch, r.Number, err.Error())
			}
			if !errors.Is(err, errNotYet) {
				left.note(r.Tenant, err)
			}
			switch {
			case errors.Is(err, errNotYet):
				err = nil
			case isTenants && broken.Suspended: // nothing of the page was written: it comes again when the tenant is resumed
				s.log.Error("a tenant could not be written to", "tenant", broken.Tenant, "suspended", true, "error", broken.Err)
				err = nil
			case isTenants:
				err = s.store.EndRecovery(ctx, s.epoch, r.Number, broken.Err.Error())
			case err == nil:
				worked = worked || done
			}
			faults = errors.Join(faults, err)
		}
		if !worked || faults != nil {
			return faults
		}
	}
}

// errNotYet puts a recovery off until the stream has come to where its tenant is, or the tenant is resumed.
var errNotYet = errors.New("the tenant is not known yet, or suspended")

// recoverPage tells whether it has done a page. One that ends the recovery has not: of a leader whose epoch is over it changes nothing.
func (s *session) recoverPage(ctx context.Context, r store.Recovery) (done bool, err error) {
	t := s.tenant(r.Tenant)
	switch {
	case t == nil && r.Registered: // it has just come, and the stream has not brought that yet
		return false, errNotYet
	case t == nil:
		return false, s.store.EndRecovery(ctx, s.epoch, r.Number, "the tenant is not served any more")
	}
	if t.is(store.StateSuspended) {
		return false, errNotYet
	}
	ep := t.endpoint(r.ID)
	switch {
	case ep == nil:
		return false, s.store.EndRecovery(ctx, s.epoch, r.Number, "the endpoint is gone, or its row cannot be used")
	case !ep.Active:
		return false, s.store.EndRecovery(ctx, s.epoch, r.Number, "the endpoint is not active: resume it first")
	}
	page, err := s.store.RecoveryPage(ctx, r, backfillPage)
	if err != nil {
		return false, err
	}
	var out []store.Outcome
	for i := range page.Events {
		e := &page.Events[i]
		target, ok := t.MatchFor(e, r.ID)
		if !ok {
			continue
		}
		refused := s.inspector.look(t.schema, t, e, []route.Target{target})
		o := missed(t.schema, e, target, &messages{}, 0, s.cfg().Delivery.Source, store.DeferRecovery, refused)
		if page.Rate > 0 {
			o.Due = page.Due + time.Duration(float64(len(out))/page.Rate*float64(time.Second))
		}
		out = append(out, o)
	}
	if err := s.store.RecordRecovery(ctx, s.epoch, page, out); err != nil {
		return false, fmt.Errorf("recover endpoint %s: %w", r.ID, err)
	}
	s.queued(out)
	if page.Done {
		s.log.Info("recovery done", "tenant", r.Tenant, "endpoint", r.ID, "recovery", r.Number)
	}
	return true, nil
}

// queued wakes the claimer for rows that were written past the recorder, and makes the stream queue behind those that are ordered.
func (s *session) queued(out []store.Outcome) {
	var keys []store.OrderedKey
	for i := range out {
		if out[i].Status != store.Pending {
			s.metrics.outcome(&out[i])
			continue
		}
		s.metrics.deferred(out[i].Reason)
		if d := out[i].Delivery; !d.Order.Key.IsZero() {
			keys = append(keys, store.OrderedKey{Tenant: d.Tenant, Endpoint: d.EndpointID, Key: d.Order.Key})
		}
	}
	if len(keys) > 0 {
		s.dispatcher.block(keys)
	}
	signal(s.claim)
}
