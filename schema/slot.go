package schema

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ShardSlot is the name of a shard's slot: that of the first shard is the one configured.
func ShardSlot(slot string, shard int) string {
	if shard == 0 {
		return slot
	}
	return slot + "_" + strconv.Itoa(shard)
}

// complete fills in what is left to us, and checks the names of the slots.
func (o *Options) complete() error {
	o.Slot, o.Shards = cmp.Or(o.Slot, Slot), max(o.Shards, 1)
	slot := ShardSlot(o.Slot, o.Shards-1) // the longest
	if ok, err := regexp.MatchString(`^[a-z0-9_]{1,63}$`, slot); err != nil || !ok {
		return &Error{Op: fmt.Sprintf("check slot name %q", slot), Err: ErrSlotUnusable, Hint: "A slot name has 1 to 63 of the characters a-z, 0-9 and _."}
	}
	return nil
}

// slotState is what the catalog says of a slot name; the zero value is a slot that was never made.
type slotState struct {
	Exists, Named            bool // Named: the progress table knows it
	Plugin, Database, Status string
	Here                     bool // it is of this database; that of the DSN need not be its name
	Maker                    int  // server process that is making it; 0: none is
}

func (in *installer) slotState(ctx context.Context, slot string) (slotState, error) {
	rows, err := in.conn.Query(ctx, `
		SELECT s.slot_name IS NOT NULL, EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $1),
		       coalesce(s.plugin, ''), coalesce(s.database, ''), coalesce(s.wal_status, ''),
		       coalesce(s.database = current_database(), false), CASE WHEN s.confirmed_flush_lsn IS NULL THEN coalesce(s.active_pid, 0) ELSE 0 END
		  FROM (SELECT) one LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $1`, slot)
	if err != nil {
		return slotState{}, err
	}
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[slotState])
}

// ensureSlot creates the slot of a shard unless it is there. The progress row comes second: a crash in between leaves a slot that the next run takes
// over, never a row that names a slot which did not exist.
func (in *installer) ensureSlot(ctx context.Context, slot string, shard int) error {
	op := fmt.Sprintf("create replication slot %q", slot)
	s, err := in.madeSlot(ctx, op, slot)
	if err != nil {
		return err
	}
	switch {
	case s.Named && !s.Exists:
		in.progress("replication slot: gone; a relay that starts makes it anew and queues what it missed from the tables")
		return nil
	case s.Status == "lost":
		in.progress("replication slot: lost; a relay that starts makes it anew and queues what it missed from the tables; raise max_slot_wal_keep_size")
	case !s.Exists:
		in.progress("replication slot: waiting for the transactions that are open now to end")
		create := "SELECT pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput')"
		if in.version(ctx) >= failoverVersion {
			create = "SELECT pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput', failover => true)"
		}
		if _, err := in.conn.Exec(ctx, create, slot); err != nil {
			return slotError(op, err)
		}
	}
	// The position is kept from the first moment: a slot that is ahead of it was made anew by somebody.
	_, err = in.conn.Exec(ctx, `INSERT INTO outbox_relay.progress (slot, lsn, high_lsn, shard)
		SELECT s.slot_name, s.confirmed_flush_lsn, s.confirmed_flush_lsn, $2 FROM pg_catalog.pg_replication_slots s
		 WHERE s.slot_name = $1 AND s.confirmed_flush_lsn IS NOT NULL ON CONFLICT DO NOTHING`, slot, shard)
	return opError(op, err)
}

// madeSlot waits until nobody is making the slot any more: it has no position before.
func (in *installer) madeSlot(ctx context.Context, op, slot string) (slotState, error) {
	var told time.Time
	for {
		s, err := in.slotState(ctx, slot)
		if err != nil {
			return s, opError(op, err)
		}
		if err := in.checkSlot(op, s); err != nil || s.Maker == 0 {
			return s, err
		}
		if time.Since(told) >= time.Minute {
			told = time.Now()
			in.progress(fmt.Sprintf("replication slot: waiting for server process %d, which is making it and waits for open transactions; outbox-relay status names them", s.Maker))
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return s, fmt.Errorf("%s: wait for server process %d, which is making it: %w", op, s.Maker, err)
		}
	}
}

// failoverVersion is the first that can carry a slot over to a standby.
const failoverVersion = 170000

func (in *installer) version(ctx context.Context) (n int) {
	if err := in.conn.QueryRow(ctx, "SELECT pg_catalog.current_setting('server_version_num')::int").Scan(&n); err != nil {
		return 0 // whatever is wrong, the next statement says it
	}
	return n
}

func (in *installer) checkSlot(op string, s slotState) error {
	switch {
	case !s.Exists:
		return nil
	case s.Plugin != "pgoutput":
		return &Error{Op: op, Err: ErrSlotUnusable, Hint: fmt.Sprintf("A slot of this name with plugin %q exists: choose another one, database.slot.", s.Plugin)}
	case !s.Here:
		return &Error{
			Op: op, Err: ErrSlotUnusable,
			Hint: fmt.Sprintf("A slot of this name belongs to database %q: slots are named for the whole server, choose another one, database.slot.", s.Database),
		}
	}
	return nil
}

// slotError adds what would do to what the server says.
func slotError(op string, err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return opError(op, err)
	}
	hint := pg.Hint
	switch pg.Code {
	case "55000":
		hint = "Set wal_level = logical in postgresql.conf and restart the server (RDS: rds.logical_replication = 1, Cloud SQL: cloudsql.logical_decoding = on)."
	case "53400":
		hint = "Every slot is taken: drop one that nobody uses (see pg_replication_slots), or raise max_replication_slots and restart the server."
	case "42501":
		hint = "Run: ALTER ROLE <this role> REPLICATION; as a superuser (RDS: GRANT rds_replication TO <this role>)."
	}
	return &Error{Op: op, Err: err, Hint: hint}
}
