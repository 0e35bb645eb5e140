package store

import (
	"context"
	"errors"
	"fmt"
)

// ErrShards says that tenants are on a shard that the configuration does not have: nobody would relay for them.
var ErrShards = errors.New("there are tenants on a shard that database.shards does not count: run outbox-relay tenants move with as many shards as before, or raise it")

// CheckShards returns ErrShards if a tenant is on a shard from the given number on, or still waits for what the slot of such a one has to bring.
func (s *Store) CheckShards(ctx context.Context, shards int) error {
	var tenant *string
	err := s.pool.QueryRow(ctx, `
SELECT min(t.schema) FROM outbox_relay.tenants t LEFT JOIN outbox_relay.progress f ON f.slot = t.moved_from
WHERE t.shard >= $1::int4 OR f.shard >= $1::int4 AND `+open, shards).Scan(&tenant)
	switch {
	case err != nil:
		return fmt.Errorf("look for tenants on other shards: %w", err)
	case tenant != nil:
		return fmt.Errorf("tenant %q: %w", *tenant, ErrShards)
	}
	return nil
}
