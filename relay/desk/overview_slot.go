package desk

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// Slot is a shard's slot: who reads it, how far that is, and what the server keeps for it. Sizes are in bytes.
type Slot struct {
	Shard     int     `json:"shard"`
	Name      string  `json:"name"`
	Exists    bool    `json:"exists"`
	WALStatus string  `json:"wal_status,omitempty"`   // reserved, extended, unreserved or lost
	Invalid   string  `json:"invalidation,omitempty"` // why the server gave it up
	Leader    *Leader `json:"leader"`                 // null: nobody reads it
	// Making says who makes the slot, or heals it, and what that waits for. Nil: nobody does. While it is being made nobody reads it, and Lag is not known.
	Making     *store.Making `json:"making,omitempty"`
	Epoch      int64         `json:"epoch"`                // of the latest leader; zero: there was none
	RecordedAt Time          `json:"recorded_at,omitzero"` // when a leader moved the position last, or began
	Lag        int64         `json:"lag_bytes"`            // written, and not confirmed
	// LagSeconds is how old what was confirmed last had become. Nil: everything is confirmed, or this role may not know.
	LagSeconds *float64 `json:"lag_seconds"`
	Retained   int64    `json:"retained_bytes"`
	// Safe is what may still be written before the slot is lost, and Limit the server's max_slot_wal_keep_size. Nil: there is no limit.
	Safe  *int64 `json:"safe_bytes"`
	Limit *int64 `json:"limit_bytes"`
}

// Leader is the process that streams from a slot. Of another role's, only PID is known to a role without pg_read_all_stats.
type Leader struct {
	PID         int32  `json:"server_pid"`
	Role        string `json:"role,omitempty"`
	Address     string `json:"address,omitempty"` // host, or "local" for a socket of the server's own machine
	Application string `json:"application,omitempty"`
	Since       Time   `json:"since,omitzero"`
}

// invalidation_reason came with version 17: an older row has no such field.
const selectSlots = `
SELECT coalesce(p.epoch, 0), p.updated_at, coalesce(to_jsonb(r) ->> 'invalidation_reason', ''), coalesce(r.active_pid, 0), coalesce(a.usename::text, ''),
  CASE WHEN a.client_addr IS NOT NULL THEN host(a.client_addr) WHEN a.backend_start IS NOT NULL THEN 'local' ELSE '' END,
  coalesce(a.application_name, ''), a.backend_start, extract(epoch FROM l.flush_lag)::float8,
  (SELECT nullif(s.setting::int8, -1) << 20 FROM pg_catalog.pg_settings s WHERE s.name = 'max_slot_wal_keep_size')
FROM unnest($1::text[]) WITH ORDINALITY w (slot, n)
LEFT JOIN outbox_relay.progress p ON p.slot = w.slot
LEFT JOIN pg_catalog.pg_replication_slots r ON r.slot_name = w.slot
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = r.active_pid
LEFT JOIN pg_catalog.pg_stat_replication l ON l.pid = r.active_pid ORDER BY w.n`

func (d *Desk) surveySlots(ctx context.Context, o *Overview, names []string) error {
	stats, err := store.ReadSlots(ctx, d.conn, names...)
	if err != nil {
		return err
	}
	rows, err := d.conn.Query(ctx, selectSlots, names)
	if err != nil {
		return err
	}
	defer rows.Close()
	for i := 0; rows.Next(); i++ {
		st := &stats[i]
		s := Slot{Shard: i, Name: names[i], Exists: st.SlotExists, WALStatus: st.WALStatus, Lag: st.LagBytes, Retained: st.RetainedBytes}
		if st.SafeBytes >= 0 && st.SlotExists {
			s.Safe = &st.SafeBytes
		}
		var leader Leader
		err := rows.Scan(&s.Epoch, &s.RecordedAt, &s.Invalid, &leader.PID, &leader.Role, &leader.Address, &leader.Application, &leader.Since, &s.LagSeconds, &s.Limit)
		if err != nil {
			return err
		}
		if leader.PID != 0 {
			s.Leader = &leader
		}
		o.Slots = append(o.Slots, s)
	}
	if err := rows.Err(); err != nil {
		return err
	}
	for i := range o.Slots {
		s := &o.Slots[i]
		if s.Making, err = store.ReadMaking(ctx, d.conn, s.Name); err != nil {
			return err
		}
		if s.Making != nil && s.Making.PID != 0 {
			s.Leader = nil // who holds it is about to make it
		}
	}
	return nil
}

// Connected are the connections of relays, and of this program's commands, from a host.
type Connected struct {
	Address     string `json:"address"` // as of Leader; empty: this role may not know
	Connections int    `json:"connections"`
	Since       Time   `json:"since,omitzero"` // the oldest
}

func (d *Desk) surveyRelays(ctx context.Context, o *Overview) error {
	if o.Standby {
		o.gap(PartRelays, "they are connected to the primary")
		return nil
	}
	rows, err := d.conn.Query(ctx, `
SELECT CASE WHEN a.client_addr IS NOT NULL THEN host(a.client_addr) WHEN a.backend_start IS NOT NULL THEN 'local' ELSE '' END, count(*)::int4, min(a.backend_start)
FROM pg_catalog.pg_stat_activity a WHERE a.datname = current_database() AND a.application_name = 'outbox-relay' AND a.pid <> pg_backend_pid()
GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT 100`)
	if err != nil {
		return err
	}
	o.Relays, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Connected])
	return err
}

// CommitWait is that commits wait for a synchronous standby, and what to do about it. Nothing is recorded meanwhile, however well all else looks.
type CommitWait struct {
	store.CommitWait
	Hint string `json:"hint"`
}

func (d *Desk) surveyCommits(ctx context.Context, o *Overview) error {
	w, err := store.ReadCommitWait(ctx, d.conn)
	if err == nil && w.Commits > 0 {
		o.Commits = &CommitWait{w, w.Hint()}
	}
	return err
}
