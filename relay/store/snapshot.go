package store

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

// Snapshot is a pg_snapshot: which transactions had ended when it was taken. The zero value shows none. It is not changed after
// ParseSnapshot and then safe for concurrent use.
type Snapshot struct {
	text       string
	xmin, xmax uint64   // all below xmin had ended, none from xmax on
	running    []uint64 // those between that had not, ascending
}

// ParseSnapshot reads PostgreSQL's form, xmin:xmax:xip,xip.
func ParseSnapshot(s string) (Snapshot, error) {
	fault := fmt.Errorf("parse snapshot %.60q: want xmin:xmax:xip_list", s)
	parts := strings.Split(s, ":")
	if len(parts) != 3 {
		return Snapshot{}, fault
	}
	snap := Snapshot{text: s}
	var err error
	if snap.xmin, err = strconv.ParseUint(parts[0], 10, 64); err != nil {
		return Snapshot{}, fault
	}
	if snap.xmax, err = strconv.ParseUint(parts[1], 10, 64); err != nil {
		return Snapshot{}, fault
	}
	if parts[2] == "" {
		return snap, nil
	}
	for xip := range strings.SplitSeq(parts[2], ",") {
		xid, err := strconv.ParseUint(xip, 10, 64)
		if err != nil {
			return Snapshot{}, fault
		}
		snap.running = append(snap.running, xid)
	}
	slices.Sort(snap.running)
	return snap, nil
}

// String returns PostgreSQL's form, empty for the zero value.
func (s Snapshot) String() string { return s.text }

// Visible tells whether a transaction that committed is visible in the snapshot: whether its commit came first. xid is what the stream
// carries, the lower 32 bits of a top-level transaction's id; it is taken for the id closest to the snapshot's xmax, which is right
// for every transaction less than 2^31 away, as all are whose ids PostgreSQL itself still compares. Transactions that rolled back
// count as visible once they have ended, so ask for committed ones only.
func (s Snapshot) Visible(xid uint32) bool {
	if s.text == "" {
		return false
	}
	// The difference of the lower halves, as a signed number, is the distance.
	full := s.xmax + uint64(int64(int32(xid-uint32(s.xmax)))) //nolint:gosec // arithmetic modulo 2^32 and 2^64 is the point
	switch {
	case full < s.xmin:
		return true
	case full >= s.xmax:
		return false
	}
	_, running := slices.BinarySearch(s.running, full)
	return !running
}

// readPosition comes after the snapshot was taken: a transaction that is visible had written its commit record by then.
const readPosition = `SELECT pg_current_wal_insert_lsn()::text`

const readSnapshot = `SELECT pg_current_snapshot()::text`

// Snapshot reads the present snapshot and then a position in the log: the commit records of all transactions visible in the snapshot
// end at or before it.
func (s *Store) Snapshot(ctx context.Context) (Snapshot, pglogrepl.LSN, error) {
	var (
		snap Snapshot
		lsn  pglogrepl.LSN
	)
	b := &pgx.Batch{}
	queueSnapshot(b, &snap, &lsn)
	if err := s.pool.SendBatch(ctx, b).Close(); err != nil {
		return Snapshot{}, 0, fmt.Errorf("read snapshot and position: %w", err)
	}
	return snap, lsn, nil
}

func queueSnapshot(b *pgx.Batch, snap *Snapshot, lsn *pglogrepl.LSN) {
	var value string
	b.Queue(readSnapshot).QueryRow(func(row pgx.Row) (err error) {
		if err = row.Scan(&value); err == nil {
			*snap, err = ParseSnapshot(value)
		}
		return err
	})
	b.Queue(readPosition).QueryRow(func(row pgx.Row) (err error) {
		if err = row.Scan(&value); err == nil {
			*lsn, err = pglogrepl.ParseLSN(value)
		}
		return err
	})
}

// Visible tells whether a committed transaction of the stream is visible to other sessions by now. With a synchronous standby the log
// carries a commit before that.
func (s *Store) Visible(ctx context.Context, xid uint32) (bool, error) {
	snap, _, err := s.Snapshot(ctx)
	return snap.Visible(xid), err
}
