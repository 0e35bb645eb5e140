package wal

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// Identify returns the identifier of the database cluster. What a person must act on is a *StreamError, ErrPooler above all.
func Identify(ctx context.Context, o Options) (systemID string, err error) {
	err = connected(ctx, o, func(conn *pgconn.PgConn) (bool, error) {
		system, err := pglogrepl.IdentifySystem(ctx, conn)
		if err != nil {
			return false, fault("identify system", err, map[string]error{"42601": ErrPooler})
		}
		systemID = system.SystemID
		return false, nil
	})
	return systemID, err
}

// Renew drops the slot, if there is one, makes it anew and returns the position after which every commit is in the stream. It waits for the transactions
// that are open now to end. What a person must act on is a *StreamError: a slot that somebody streams from is left alone (ErrSlotActive), as is one of another database
// (ErrSlotForeign), and the publications have to be there first (ErrPublicationMissing).
//
// The slot could export the snapshot of that position, which would be the very border between what was before and what the stream brings. But the server
// refuses that ("initial slot snapshot too large") where more transactions than it has room for began while it waited: some 20,000, seconds of a busy one.
func Renew(ctx context.Context, o Options) (at LSN, err error) {
	err = connected(ctx, o, func(conn *pgconn.PgConn) (bool, error) {
		at, err = renew(ctx, conn, o)
		return false, err
	})
	return at, err
}

// connected runs work on a replication connection, and closes it unless work wants to keep it.
func connected(ctx context.Context, o Options, work func(*pgconn.PgConn) (keep bool, err error)) error {
	cfg, err := config(o)
	if err != nil {
		return err
	}
	conn, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		// A pooler that knows no replication refuses the start-up parameter as a violation of the protocol.
		return fault("connect for replication", err, map[string]error{"08P01": ErrPooler})
	}
	keep, err := work(conn)
	if keep {
		return err
	}
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	err = errors.Join(err, conn.Close(closing))
	if ctx.Err() == nil {
		return err
	}
	// What was broken off is closed in the background. A process that ended before its request to cancel has left would leave the server at work.
	patience := time.NewTimer(cancelPatience)
	defer patience.Stop()
	select {
	case <-conn.CleanupDone():
	case <-patience.C:
	}
	return err
}

// cancelPatience bounds how long a session that was broken off is waited for.
const cancelPatience = 3 * time.Second

// watchClient has the server look every two seconds whether this side is still there, also while it waits for transactions, and ask for a sign of life
// from a machine that says nothing. Otherwise the server process of a relay that was killed would go on making the slot for as long as these last.
// It sets in when the next statement begins, and goes on through the command that makes the slot.
const watchClient = `SELECT pg_catalog.set_config(s.name, w.value, false) FROM pg_catalog.pg_settings s JOIN (VALUES ('client_connection_check_interval', '2s'),
	('tcp_keepalives_idle', '10'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3')) AS w (name, value) ON s.name = w.name`

func renew(ctx context.Context, conn *pgconn.PgConn, o Options) (at LSN, err error) {
	if err := prepare(ctx, conn); err != nil {
		return 0, err
	}
	_, _ = query(ctx, conn, watchClient)                                    // not every system can
	if _, err := checkPublications(ctx, conn, o.Publications); err != nil { // they come first: the slot could not be read past their making
		return 0, err
	}
	op := fmt.Sprintf("drop slot %q", o.Slot)
	drop := "SELECT pg_catalog.pg_drop_replication_slot(slot_name) FROM pg_catalog.pg_replication_slots WHERE slot_name = " + quoteLiteral(o.Slot) +
		" AND database = pg_catalog.current_database() AND plugin = 'pgoutput'"
	if _, err := query(ctx, conn, drop); err != nil {
		return 0, fault(op, err, nil)
	}
	failpoint.Hit(failpoint.HealDropped)
	rows, err := query(ctx, conn, "SELECT pg_catalog.current_setting('server_version_num')")
	if err != nil {
		return 0, fault("read server version", err, nil)
	}
	version, err := strconv.Atoi(string(rows[0][0]))
	if err != nil {
		return 0, fmt.Errorf("read server version: %w", err)
	}
	op = fmt.Sprintf("create slot %q", o.Slot)
	rows, err = query(ctx, conn, createSlot(o.Slot, version))
	if err != nil {
		return 0, fault(op, err, map[string]error{"42710": ErrSlotForeign}) // what the drop left is of another database or plugin
	}
	if len(rows) != 1 || len(rows[0]) != 4 {
		return 0, fmt.Errorf("%s: unexpected answer", op)
	}
	if err := at.Scan(string(rows[0][1])); err != nil {
		return 0, fmt.Errorf("%s: position: %w", op, err)
	}
	return at, nil
}

// createSlot is the command for a server version. From 17 on, the slot is carried over to standbys that ask for it.
func createSlot(slot string, version int) string {
	create := fmt.Sprintf(`CREATE_REPLICATION_SLOT "%s" LOGICAL pgoutput `, slot)
	switch {
	case version >= 170000:
		return create + "(SNAPSHOT 'nothing', FAILOVER true)"
	case version >= 150000:
		return create + "(SNAPSHOT 'nothing')"
	default:
		return create + "NOEXPORT_SNAPSHOT"
	}
}
