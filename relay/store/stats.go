package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// QueueCountLimit is how far rows of the retry queue are counted: every replica asks every few seconds, and must not read a queue of millions for it.
const QueueCountLimit = 100_000

// Stats is what the database says of the relay's backlog. What is of the queue and what is of the slot are read apart.
type Stats struct {
	Queued    int64         // rows of the retry queue; from QueueCountLimit on the server's estimate, if that is greater
	Due       int64         // of these, due now, but for those of endpoints with an open breaker; QueueCountLimit stands for that many or more
	OldestDue time.Duration // for how long the oldest of these has been due; zero if none is

	SlotExists    bool
	SlotActive    bool   // somebody streams from it
	WALStatus     string // reserved, extended, unreserved or lost; empty without a slot
	LagBytes      int64  // of the log that is not confirmed yet
	RetainedBytes int64  // of the log that the server keeps for the slot
	SafeBytes     int64  // that may still be written before the slot is lost; negative: no limit, or unknown
	Written       int64  // of the log since the cluster was made: the server's position as a number
}

const (
	// shut are the endpoints that only probes go to, though what waits for them may have been due for long: their breaker is open, or has been and no attempt
	// has succeeded since. Where something is due of such, the others are found lane by lane as in dueByEndpoint, since a million rows of one may come first. With
	// an equality instead of its first comparison the planner would now and then go through all of the other index.
	queueStats = `
WITH RECURSIVE shut AS MATERIALIZED (
  SELECT l.lane FROM outbox_relay.endpoint_health h CROSS JOIN LATERAL (SELECT outbox_relay.lane(h.tenant, h.endpoint_id) AS lane) l
  WHERE (h.open_until > now() OR (h.open_until IS NOT NULL AND h.failing_since IS NOT NULL))
    AND EXISTS (SELECT FROM (
      SELECT q.lane, q.due_at FROM outbox_relay.retry_queue q WHERE (uuid_send(q.lane), q.due_at) >= (uuid_send(l.lane), '-infinity')
      ORDER BY uuid_send(q.lane), q.due_at LIMIT 1) f WHERE f.lane = l.lane AND f.due_at <= now())),
queued AS (
  (SELECT q.lane, q.due_at FROM outbox_relay.retry_queue q ORDER BY uuid_send(q.lane), q.due_at LIMIT 1)
  UNION ALL
  SELECT n.* FROM queued CROSS JOIN LATERAL (
    SELECT q.lane, q.due_at FROM outbox_relay.retry_queue q WHERE uuid_send(q.lane) > uuid_send(queued.lane) ORDER BY uuid_send(q.lane), q.due_at LIMIT 1) n),
open AS MATERIALIZED (
  SELECT q.lane, q.due_at FROM (SELECT * FROM queued LIMIT $1::int8) q WHERE q.due_at <= now() AND NOT EXISTS (SELECT FROM shut s WHERE s.lane = q.lane)),
n AS MATERIALIZED (
  SELECT (SELECT count(*) FROM (SELECT FROM outbox_relay.retry_queue q LIMIT $1::int8) q) AS queued, d.* FROM (
    SELECT (SELECT count(*) FROM (SELECT FROM outbox_relay.retry_queue q WHERE q.due_at <= now() LIMIT $1::int8) q) AS due,
      (SELECT min(q.due_at) FROM outbox_relay.retry_queue q WHERE q.due_at <= now()) AS oldest WHERE NOT EXISTS (SELECT FROM shut)
    UNION ALL
    SELECT (SELECT count(*) FROM (SELECT FROM open o CROSS JOIN LATERAL (
        SELECT FROM outbox_relay.retry_queue q
        WHERE (uuid_send(q.lane), q.due_at) > (uuid_send(o.lane), '-infinity') AND (uuid_send(q.lane), q.due_at) <= (uuid_send(o.lane), now())
        ORDER BY uuid_send(q.lane), q.due_at LIMIT $1::int8) l LIMIT $1::int8) q),
      (SELECT min(o.due_at) FROM open o) WHERE EXISTS (SELECT FROM shut)) d)
SELECT CASE WHEN n.queued < $1::int8 THEN n.queued
    ELSE greatest(n.queued, (SELECT c.reltuples::int8 FROM pg_catalog.pg_class c WHERE c.oid = 'outbox_relay.retry_queue'::regclass)) END,
  n.due, coalesce(extract(epoch FROM now() - n.oldest) * 1e6, 0)::int8
FROM n`
	slotStats = `
SELECT r.active, coalesce(r.wal_status, ''), coalesce(pg_wal_lsn_diff(w.lsn, r.confirmed_flush_lsn), 0)::int8,
  coalesce(pg_wal_lsn_diff(w.lsn, r.restart_lsn), 0)::int8, coalesce(r.safe_wal_size, -1),
  pg_wal_lsn_diff(w.lsn, '0/0')::int8
FROM pg_catalog.pg_replication_slots r, (SELECT pg_current_wal_lsn() AS lsn) w WHERE r.slot_name = $1::text`
)

// QueueStats reads the figures of the retry queue.
func (s *Store) QueueStats(ctx context.Context) (Stats, error) { return ReadQueue(ctx, s.pool) }

// SlotStats reads the figures of the store's slot.
func (s *Store) SlotStats(ctx context.Context) (Stats, error) {
	slots, err := ReadSlots(ctx, s.pool, s.slot)
	if err != nil {
		return Stats{}, err
	}
	return slots[0], nil
}

// Batcher is a connection or a pool.
type Batcher interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

// ReadQueue reads the figures of the retry queue alone, which is that of the whole database.
func ReadQueue(ctx context.Context, db Batcher) (st Stats, err error) {
	var oldest int64
	b := &pgx.Batch{}
	b.Queue(queueStats, int64(QueueCountLimit)).QueryRow(func(row pgx.Row) error { return row.Scan(&st.Queued, &st.Due, &oldest) })
	if err := db.SendBatch(ctx, b).Close(); err != nil {
		return Stats{}, fmt.Errorf("read statistics of the retry queue: %w", err)
	}
	st.OldestDue = max(time.Duration(oldest)*time.Microsecond, 0)
	return st, nil
}

// ReadSlots reads the figures of slots alone.
func ReadSlots(ctx context.Context, db Batcher, slots ...string) ([]Stats, error) {
	list := make([]Stats, len(slots))
	b := &pgx.Batch{}
	for i, slot := range slots {
		st := &list[i]
		b.Queue(slotStats, slot).Query(func(rows pgx.Rows) error {
			if rows.Next() {
				st.SlotExists = true
				return rows.Scan(&st.SlotActive, &st.WALStatus, &st.LagBytes, &st.RetainedBytes, &st.SafeBytes, &st.Written)
			}
			return rows.Err()
		})
	}
	if err := db.SendBatch(ctx, b).Close(); err != nil {
		return nil, fmt.Errorf("read statistics of slots: %w", err)
	}
	return list, nil
}

// Sender is what the server says of the process that streams from the slot.
type Sender struct {
	Flushed int64 // position of the log up to which it could be sent
	// Waiting: the process has nothing to do. Standby: it waits for a standby that the server is told to wait for (synchronized_standby_slots). Both are
	// false where it is at work, or where this role may not know.
	Waiting, Standby bool
}

// The names are spelt WalSenderWaitForWAL up to version 16, and WalSenderWaitForWal from 17 on.
const sender = `
SELECT pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::int8, coalesce(lower(a.wait_event) = 'walsenderwaitforwal', false),
  coalesce(lower(a.wait_event) = 'waitforstandbyconfirmation', false)
FROM (SELECT) one LEFT JOIN pg_catalog.pg_replication_slots r ON r.slot_name = $1::text LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = r.active_pid`

// Sender reads it.
func (s *Store) Sender(ctx context.Context) (Sender, error) {
	var w Sender
	if err := s.pool.QueryRow(ctx, sender, s.slot).Scan(&w.Flushed, &w.Waiting, &w.Standby); err != nil {
		return Sender{}, fmt.Errorf("look at the process that streams from slot %q: %w", s.slot, err)
	}
	return w, nil
}

// CommitWait is what the server says of commits that wait for a synchronous standby.
type CommitWait struct {
	Commits  int    `json:"commits"`                   // of this role, and of relays of this database, that have waited for longer than a standby should take
	Standbys string `json:"synchronous_standby_names"` // as the server has it
}

// String says so in words, for when there are such commits.
func (w CommitWait) String() string {
	return fmt.Sprintf("commits wait for a synchronous standby (synchronous_standby_names = %q)", w.Standbys)
}

// Hint is what a person can do about it.
func (w CommitWait) Hint() string {
	return "look after the standby, or take it off the server's synchronous_standby_names; nothing is lost meanwhile, and what is sent may be sent again"
}

// What other roles wait for, this one may not know unless it is of pg_read_all_stats. The look writes nothing, or it would wait as well.
const commitWait = `
SELECT count(*), current_setting('synchronous_standby_names') FROM pg_catalog.pg_stat_activity a
WHERE (a.usename = session_user OR a.datname = current_database() AND a.application_name = 'outbox-relay')
  AND a.wait_event = 'SyncRep' AND a.query_start < clock_timestamp() - interval '5 s'`

// CommitWait reads it.
func (s *Store) CommitWait(ctx context.Context) (CommitWait, error) {
	return ReadCommitWait(ctx, s.pool)
}

// ReadCommitWait reads it for the role of any connection.
func ReadCommitWait(ctx context.Context, db Querier) (w CommitWait, err error) {
	if err := db.QueryRow(ctx, commitWait).Scan(&w.Commits, &w.Standbys); err != nil {
		return CommitWait{}, fmt.Errorf("look for commits that wait for a standby: %w", err)
	}
	return w, nil
}
