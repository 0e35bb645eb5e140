package store

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

const (
	presentTenants   = `SELECT t.schema FROM outbox_relay.tenants t WHERE t.shard = $1::int4 AND t.schema = ANY($2::text[])`
	presentEndpoints = `SELECT e.id FROM {tenant}.webhook_endpoints e WHERE e.id = ANY($1::uuid[])`
)

// Present tells which of some endpoints, by tenant, still are, of tenants that are registered with the shard. The zero id stands for the tenant itself. Those
// of a tenant that cannot be read for now are taken to be.
func (s *Store) Present(ctx context.Context, of map[string][]outbox.UUID) (map[Endpoint]struct{}, error) {
	there := make(map[Endpoint]struct{})
	if len(of) == 0 {
		return there, nil
	}
	rows, _ := s.pool.Query(ctx, presentTenants, s.shard, slices.Collect(maps.Keys(of)))
	tenants, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("look which tenants there are: %w", err)
	}
	for _, tenant := range tenants {
		ids := of[tenant]
		if slices.ContainsFunc(ids, func(id outbox.UUID) bool { return !id.IsZero() }) {
			rows, _ := s.pool.Query(ctx, forTenant(presentEndpoints, tenant), ids)
			ids, err = pgx.CollectRows(rows, pgx.RowTo[outbox.UUID])
			switch {
			case code(err) == codeUndefinedTable:
				continue
			case isTenants(err):
				ids = of[tenant]
			case err != nil:
				return nil, fmt.Errorf("look which endpoints of tenant %q there are: %w", tenant, err)
			}
		}
		for _, id := range ids {
			there[Endpoint{tenant, id}] = struct{}{}
		}
	}
	return there, nil
}
