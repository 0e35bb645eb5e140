package schema

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ErrShardInUse says that shards are to go which still have tenants, or a relay.
var ErrShardInUse = errors.New("a shard that is to go is still in use")

// MoveTenant moves a tenant to another shard; nothing is lost or sent twice by it. It waits for nobody long: while the table of events is locked, it
// tries again until ctx ends, and tells progress, unless that is nil. A schema that is no tenant is ErrNotTenant.
func MoveTenant(ctx context.Context, dsn, schema string, shard int, progress func(step string)) error {
	return change(ctx, dsn, fmt.Sprintf("move tenant %q to shard %d", schema, shard), progress, "SELECT outbox_relay.move_tenant($1, $2)", schema, shard)
}

// leaveShards gives up the slots of shards that there are not to be any more: nobody would read them, and the server would keep its log for them.
func (in *installer) leaveShards(ctx context.Context, o Options) error {
	const op = "leave shards"
	rows, err := in.conn.Query(ctx, `SELECT p.slot, s.slot_name IS NOT NULL, coalesce(s.active, false)
		FROM outbox_relay.progress p LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = p.slot AND s.database = current_database()
		WHERE p.shard >= $2 AND p.slot = $1 || '_' || p.shard ORDER BY p.shard DESC`, o.Slot, o.Shards)
	if err != nil {
		return opError(op, err)
	}
	type leftover struct {
		Slot           string
		Exists, Active bool
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[leftover])
	if err != nil {
		return opError(op, err)
	}
	if err := shardsInUse(ctx, in.conn, op, o.Shards); err != nil {
		return err
	}
	for _, l := range list {
		if l.Active {
			return &Error{Op: op, Err: fmt.Errorf("%w: a relay reads slot %q", ErrShardInUse, l.Slot), Hint: "Stop the relays that are configured with more shards, then run this again."}
		}
		in.progress("replication slot " + l.Slot + ": dropped, as its shard is to go and has no tenants")
		if err := in.leaveShard(ctx, l.Slot, l.Exists, o.Shards); err != nil {
			return err
		}
	}
	return nil
}

// inLaterShards lists the tenants of shards from $1 on, and those that still wait for what the slot of such a one brings of them.
const inLaterShards = `SELECT t.schema FROM outbox_relay.tenants t LEFT JOIN outbox_relay.progress f ON f.slot = t.moved_from
	WHERE t.shard >= $1 OR f.shard >= $1 AND t.backfill IS NOT NULL AND t.backfill_done_at IS NULL ORDER BY 1`

func shardsInUse(ctx context.Context, q Querier, op string, shards int) error {
	held, err := collect[string](ctx, q, inLaterShards, shards)
	if err != nil || len(held) == 0 {
		return opError(op, err)
	}
	return &Error{
		Op: op, Err: fmt.Errorf("%w: by tenant %q and maybe others, where there are to be %d", ErrShardInUse, held[0], shards),
		Hint: "Move them first, while relays run with as many shards as before: outbox-relay tenants move. A move is over when tenants list shows its events as queued.",
	}
}

// leaveShard drops a slot and takes its shard out of the choice for new tenants, unless one has come meanwhile.
func (in *installer) leaveShard(ctx context.Context, slot string, exists bool, shards int) error {
	op := fmt.Sprintf("drop slot %q", slot)
	return in.short(ctx, op, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_catalog.pg_advisory_xact_lock(8245937120485516401)"); err != nil { // as add_tenant does
			return err
		}
		if err := shardsInUse(ctx, tx, op, shards); err != nil {
			return err
		}
		if exists {
			if _, err := tx.Exec(ctx, "SELECT pg_catalog.pg_drop_replication_slot($1)", slot); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, "DELETE FROM outbox_relay.progress p WHERE p.slot = $1", slot)
		return err
	})
}

// OtherSlot is a slot that relays have used, and that is none of those configured. If no relay reads it any more, its name was changed, as a rule; a
// relay that does serves the same database.
type OtherSlot struct {
	Slot string
	Read bool
	Kept int64 // bytes of the log that the server keeps for it
}

// OtherSlots lists them. Those of shards that are to go are not among them: Migrate drops these.
func OtherSlots(ctx context.Context, q Querier, o Options) ([]OtherSlot, error) {
	shards := max(o.Shards, 1)
	configured := make([]string, shards)
	for shard := range configured {
		configured[shard] = ShardSlot(o.Slot, shard)
	}
	rows, err := q.Query(ctx, `SELECT p.slot, s.active, coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn), 0)::int8
		FROM outbox_relay.progress p JOIN pg_catalog.pg_replication_slots s ON s.slot_name = p.slot AND s.database = current_database()
		WHERE p.slot <> ALL($1) AND NOT (p.shard >= $2 AND p.slot = $3 || '_' || p.shard) ORDER BY p.slot`, configured, shards, o.Slot)
	if err != nil {
		return nil, opError("look for other slots", err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowToStructByPos[OtherSlot])
	return list, opError("look for other slots", err)
}

// Remedy is what to do about one that no relay reads.
func (u OtherSlot) Remedy() string {
	return fmt.Sprintf("if no relay is to use it any more, run: SELECT pg_drop_replication_slot('%[1]s'); DELETE FROM outbox_relay.progress WHERE slot = '%[1]s'; then outbox-relay audit --repair queues what it had not brought", u.Slot)
}
