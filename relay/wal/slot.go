package wal

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5/pgconn"
)

// Slot is a replication slot, as the catalog had it when the stream began.
type Slot struct {
	Name string
	// ConfirmedFlush is what has been confirmed: it moves with this relay's confirmations only, so a value beyond what the relay has recorded tells that
	// somebody made the slot anew or used it.
	ConfirmedFlush LSN
}

// catalogSlot is a row of pg_replication_slots, whose columns differ from version to version.
type catalogSlot struct {
	Plugin         string `json:"plugin"`
	Database       string `json:"database"`
	ActivePID      int32  `json:"active_pid"`
	RestartLSN     string `json:"restart_lsn"`
	ConfirmedFlush string `json:"confirmed_flush_lsn"`
	WALStatus      string `json:"wal_status"`
	Invalidation   string `json:"invalidation_reason"`
	Conflicting    bool   `json:"conflicting"`
}

// checkSlot reads a slot and refuses one that cannot be streamed from.
func checkSlot(ctx context.Context, conn *pgconn.PgConn, name, database string) (Slot, error) {
	op := fmt.Sprintf("check slot %q", name)
	rows, err := query(ctx, conn, "SELECT pg_catalog.to_jsonb(s) FROM pg_catalog.pg_replication_slots s WHERE slot_name = "+quoteLiteral(name))
	if err != nil {
		return Slot{}, fault(op, err, nil)
	}
	if len(rows) == 0 {
		return Slot{}, &StreamError{Op: op, Kind: ErrSlotMissing}
	}
	var c catalogSlot
	if err := json.Unmarshal(rows[0][0], &c); err != nil {
		return Slot{}, fmt.Errorf("%s: %w", op, err)
	}
	s := Slot{Name: name}
	switch {
	case c.Plugin != "pgoutput" || c.Database != database:
		return s, &StreamError{Op: op, Kind: ErrSlotForeign, Err: fmt.Errorf("database %q, plugin %q", c.Database, c.Plugin)}
	case c.ActivePID != 0 && c.ConfirmedFlush == "":
		return s, &StreamError{Op: op, Kind: ErrSlotUnfinished, ActivePID: c.ActivePID}
	case c.WALStatus == "lost" || c.RestartLSN == "" || c.Invalidation != "" || c.Conflicting:
		return s, &StreamError{Op: op, Kind: ErrSlotLost}
	case c.ActivePID != 0:
		return s, &StreamError{Op: op, Kind: ErrSlotActive, ActivePID: c.ActivePID}
	}
	if c.ConfirmedFlush != "" {
		if err := s.ConfirmedFlush.Scan(c.ConfirmedFlush); err != nil {
			return s, fmt.Errorf("%s: confirmed_flush_lsn: %w", op, err)
		}
	}
	return s, nil
}
