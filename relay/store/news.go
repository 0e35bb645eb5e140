package store

import (
	"context"
	"fmt"

	"github.com/neo-commons/outbox-relay/outbox"
)

// announce writes an event of the relay's own, if a subscription may want it: the exact type, or any pattern.
const announce = `
INSERT INTO {tenant}.webhook_events (id, event_type, event_name, aggregate_id, aggregate_type, event_data)
SELECT $1::uuid, $2::text, $2::text, $3::uuid, $4::text, $5::text::jsonb
WHERE EXISTS (SELECT FROM {tenant}.webhook_subscriptions s WHERE s.is_active AND (s.event_type = $2::text OR s.event_type LIKE '%*%'))
  OR EXISTS (SELECT FROM {tenant}.webhook_event_subscriptions s JOIN {tenant}.webhook_event_types t ON t.id = s.event_type_id
    WHERE s.is_active AND t.event_type = $2::text)`

// Announce inserts an event into the tenant's own outbox, from where it goes the way of all events. False: nobody subscribes to it. What is wrong with
// the tenant's own tables is a *TenantError.
func (s *Store) Announce(ctx context.Context, tenant string, e outbox.Event) (bool, error) {
	tag, err := s.pool.Exec(ctx, forTenant(announce, tenant), e.ID, e.Type, e.AggregateID, e.AggregateType, string(e.Data))
	switch {
	case isTenants(err):
		return false, &TenantError{Tenant: tenant, Err: err}
	case err != nil:
		return false, fmt.Errorf("announce %s in tenant %q: %w", e.Type, tenant, err)
	}
	return tag.RowsAffected() > 0, nil
}
