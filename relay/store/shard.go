package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ErrShards says that tenants are on a shard that the configuration does not have: nobody would relay for them.
var ErrShards = errors.New("there are tenants on a shard that database.shards does not count: run outbox-relay tenants move with as many shards as before, or raise it")

// OtherReaderRemedy is what to do about one of OtherReaders.
const OtherReaderRemedy = "events of tenants that both serve are sent twice: stop one of the two for good, and then do with its slot as outbox-relay check says, " +
	"or divide the tenants between them with tenants.include"

// OtherReaders lists the slots by which other relays than those of our slot serve the tenants of our shard.
func (s *Store) OtherReaders(ctx context.Context) ([]string, error) {
	rows, err := s.pool.Query(ctx, `
SELECT p.slot FROM outbox_relay.progress p JOIN pg_catalog.pg_replication_slots r ON r.slot_name = p.slot AND r.database = current_database()
WHERE r.active AND p.shard = $1::int4 AND p.slot <> $2::text ORDER BY 1`, s.shard, s.slot)
	if err != nil {
		return nil, fmt.Errorf("look for other relays: %w", err)
	}
	slots, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("look for other relays: %w", err)
	}
	return slots, nil
}

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
