package store

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// A slot is ready once the transactions have ended that were writing, anywhere in the cluster, when it was begun. Until then it has no confirmed
// position, no relay leads, and everything else about it looks as always.

// Making says who makes a slot or heals, and what for.
type Making struct {
	PID    int32     `json:"server_pid,omitempty"`  // of the server process that makes the slot; 0: none does
	Since  time.Time `json:"since,omitzero"`        // when it began; zero: this role may not know
	Healer int32     `json:"healing_pid,omitempty"` // the server process of the relay that heals the slot; 0: none does
	Open   []Open    `json:"open_transactions"`     // that it waits for, or will probably: the first of them
}

// Open is a transaction that writes and has been open for a while. What of it this role may not know is empty.
type Open struct {
	PID         int32     `json:"server_pid,omitempty"` // 0: it is a prepared one
	GID         string    `json:"gid,omitempty"`        // of a prepared one
	Since       time.Time `json:"since,omitzero"`
	Database    string    `json:"database,omitempty"`
	Role        string    `json:"role,omitempty"`
	Application string    `json:"application,omitempty"`
	State       string    `json:"state,omitempty"`
}

const (
	making = `
SELECT coalesce(r.active_pid, 0), a.query_start, coalesce((SELECT min(l.pid) FROM pg_catalog.pg_locks l
    JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = current_database()
    WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
      AND (l.classid::int8 << 32) | l.objid::int8 = pg_catalog.hashtextextended($1::text, ` + lockHeal + `)), 0)
FROM (SELECT) one LEFT JOIN pg_catalog.pg_replication_slots r ON r.slot_name = $1::text AND r.plugin = 'pgoutput' AND r.database = current_database()
  AND r.confirmed_flush_lsn IS NULL
LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = r.active_pid`

	// The server waits for one transaction after the other: those that have been open for a while come next.
	openTransactions = `
WITH waited AS MATERIALIZED (
  SELECT h.pid, h.transactionid AS xid FROM pg_catalog.pg_locks w
  JOIN pg_catalog.pg_locks h ON h.locktype = 'transactionid' AND h.transactionid = w.transactionid AND h.granted AND h.mode = 'ExclusiveLock'
  WHERE w.pid = $1::int4 AND w.locktype = 'transactionid' AND NOT w.granted)
SELECT o.pid, o.gid, o.since, o.database, o.role, o.application, o.state FROM (
  SELECT a.pid, '' AS gid, a.xact_start AS since, coalesce(a.datname::text, '') AS database, coalesce(a.usename::text, '') AS role,
    coalesce(a.application_name, '') AS application, coalesce(a.state, '') AS state, a.pid IN (SELECT w.pid FROM waited w) AS first
  FROM pg_catalog.pg_stat_activity a WHERE a.backend_xid IS NOT NULL
  UNION ALL
  SELECT 0, x.gid, x.prepared, x.database::text, x.owner::text, '', 'prepared', x.transaction IN (SELECT w.xid FROM waited w) FROM pg_catalog.pg_prepared_xacts x) o
WHERE o.first OR o.since < now() - interval '5 s' ORDER BY o.first DESC, o.since LIMIT 5`
)

// Making reads it; nil: the slot is not being made, and nobody heals it.
func (s *Store) Making(ctx context.Context) (*Making, error) { return ReadMaking(ctx, s.pool, s.slot) }

// Querier is a connection or a pool.
type Querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// ReadMaking reads it of any slot.
func ReadMaking(ctx context.Context, db Querier, slot string) (*Making, error) {
	const op = "look who makes the slot"
	m := &Making{Open: []Open{}}
	var since *time.Time
	err := db.QueryRow(ctx, making, slot).Scan(&m.PID, &since, &m.Healer)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", op, err)
	}
	if m.PID == 0 && m.Healer == 0 {
		return nil, nil //nolint:nilnil // nobody
	}
	if since != nil && m.PID != 0 {
		m.Since = since.UTC()
	}
	rows, _ := db.Query(ctx, openTransactions, m.PID)
	m.Open, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (o Open, err error) {
		var since *time.Time
		err = row.Scan(&o.PID, &o.GID, &since, &o.Database, &o.Role, &o.Application, &o.State)
		if since != nil {
			o.Since = since.UTC()
		}
		return o, err
	})
	return m, wrap(err, op)
}

// String says who makes the slot and what that waits for, as the end of a sentence about the slot.
func (m *Making) String() string {
	if len(m.Open) == 0 {
		return m.Who()
	}
	return m.Who() + ", which waits for transactions that are open: " + m.OpenText()
}

// Who says who makes the slot.
func (m *Making) Who() string {
	var parts []string
	if m.PID != 0 {
		parts = append(parts, fmt.Sprintf("server process %d is making it%s", m.PID, sinceText(m.Since)))
	}
	if m.Healer == 0 {
		parts = append(parts, "no relay is healing")
	} else {
		parts = append(parts, fmt.Sprintf("a relay is healing as server process %d", m.Healer))
	}
	return strings.Join(parts, ", ")
}

// OpenText lists the transactions.
func (m *Making) OpenText() string {
	list := make([]string, len(m.Open))
	for i := range m.Open {
		list[i] = m.Open[i].String()
	}
	return strings.Join(list, "; ")
}

// Remedy is what to do about the first transaction.
func (m *Making) Remedy() string {
	if len(m.Open) == 0 {
		return "this takes seconds unless a transaction is open for long: look again"
	}
	return "let it end, or end it: " + m.Open[0].Remedy()
}

func sinceText(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return " since " + t.Format(time.RFC3339)
}

// String names it, and says for how long it has been open.
func (o *Open) String() string {
	if o.PID == 0 {
		return fmt.Sprintf("prepared transaction %q%s in database %q", o.GID, sinceText(o.Since), o.Database)
	}
	var more []string
	if o.State != "" {
		more = append(more, o.State)
	}
	if o.Application != "" {
		more = append(more, fmt.Sprintf("application %q", o.Application))
	}
	if o.Role != "" {
		more = append(more, fmt.Sprintf("role %q", o.Role))
	}
	if o.Database != "" {
		more = append(more, fmt.Sprintf("database %q", o.Database))
	}
	return strings.TrimSuffix(fmt.Sprintf("server process %d%s (%s)", o.PID, sinceText(o.Since), strings.Join(more, ", ")), " ()")
}

// Remedy is the statement that ends it.
func (o *Open) Remedy() string {
	if o.PID == 0 {
		return fmt.Sprintf("ROLLBACK PREPARED '%s'", strings.ReplaceAll(o.GID, "'", "''"))
	}
	return fmt.Sprintf("SELECT pg_terminate_backend(%d)", o.PID)
}
