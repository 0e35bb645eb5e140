package store

import (
	"context"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
)

// announce writes an event of the relay's own, if a subscription may want it: the exact type, or a pattern of news. There is no news of news: an endpoint
// that takes none would make more and more of it. $6 is the event that it is about, if any.
const announce = `
INSERT INTO {tenant}.webhook_events (id, event_type, event_name, aggregate_id, aggregate_type, event_data)
SELECT $1::uuid, $2::text, $2::text, $3::uuid, $4::text, $5::text::jsonb
WHERE (EXISTS (SELECT FROM {tenant}.webhook_subscriptions s WHERE s.is_active AND (s.event_type = $2::text OR starts_with(s.event_type, '` + route.NewsPrefix + `') AND s.event_type LIKE '%*%'))
  OR EXISTS (SELECT FROM {tenant}.webhook_event_subscriptions s JOIN {tenant}.webhook_event_types t ON t.id = s.event_type_id
    WHERE s.is_active AND t.event_type = $2::text))
  AND NOT EXISTS (SELECT FROM {tenant}.webhook_events v WHERE v.id = $6::uuid AND starts_with(v.event_type, '` + route.NewsPrefix + `'))`

// News is something that the relay has to say of an endpoint, or of one of its deliveries.
type News struct {
	Tenant string
	Event  outbox.Event // to be inserted
	About  outbox.UUID  // the event it is about; zero: none
}

// Announce inserts an event into the tenant's own outbox, from where it goes the way of all events. False: nobody subscribes to it, or it is about
// news. What is wrong with the tenant's own tables is a *TenantError.
func (s *Store) Announce(ctx context.Context, n *News) (bool, error) {
	e := &n.Event
	tag, err := s.pool.Exec(ctx, forTenant(announce, n.Tenant), e.ID, e.Type, e.AggregateID, e.AggregateType, string(e.Data), n.About)
	return tag.RowsAffected() > 0, tenantFault(err, n.Tenant, "announce %s in tenant %q", e.Type, n.Tenant)
}
