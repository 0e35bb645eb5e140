package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
)

const advance = `SELECT outbox_relay.advance($1::text, $2::int8, $3::pg_lsn, $4::pg_lsn)`

// Record makes outcomes durable, all or none, together with the position that they cover: in one transaction for all tenants, sent in
// one round trip. A server that has no locks left for so many tenants gets them in several, of which the last has the position. owner is the process in
// the leases of the retry queue; p is nil where this process does not lead.
//
// A tenant that cannot be written to does not hold up the others: its part is left out and reported as a TenantError. On an error
// nothing is known to be written, and the caller repeats the batch with the same Delivery.IDs: what was written is found and left as
// it is. ErrFenced means that repeating is of no use. Outcomes and what they point to are only read.
func (s *Store) Record(ctx context.Context, owner outbox.UUID, p *Progress, outcomes []Outcome) ([]TenantError, error) {
	return s.record(ctx, s.recording, owner, p, outcomes, nil)
}

// record is Record over a pool of the caller's choice, with one more statement at the end of the transaction.
func (s *Store) record(ctx context.Context, pool *pgxpool.Pool, owner outbox.UUID, p *Progress, outcomes []Outcome, last *statement) ([]TenantError, error) {
	if len(outcomes) == 0 && p == nil {
		return nil, nil
	}
	var broken []TenantError
	again := s.unclear.Load()
	if time.Since(time.UnixMilli(s.short.Load())) > shortFor {
		s.most.Store(0)
	}
	for rest := split(outcomes); ; {
		n := len(rest)
		if most := int(s.most.Load()); most > 0 {
			n = min(n, most)
		}
		w := writer{owner: owner, slot: s.slot, progress: p, batches: rest[:n], last: last, often: pool == s.recording, again: again}
		if n < len(rest) { // the position and what comes last are for all of it
			w.progress, w.last = p.part(), nil
		}
		more, err := w.write(ctx, pool)
		if w.often && (err != nil || n == len(rest)) {
			s.unclear.Store(err != nil)
		}
		switch {
		case code(err) == codeFenced:
			return nil, ErrFenced
		case code(err) == codeOutOfMemory && n > 1:
			s.most.Store(int32(n / 2)) //nolint:gosec // it is smaller than n
			s.short.Store(time.Now().UnixMilli())
			s.log.Warn("the server has no memory left for the locks of so many tenants: outcomes are recorded in parts; raise max_locks_per_transaction",
				"tenants", n, "part", n/2, "error", err)
			continue
		case err != nil:
			return nil, fmt.Errorf("record %d outcomes: %w", len(outcomes), err)
		}
		broken = append(broken, more...)
		if rest = rest[n:]; len(rest) == 0 {
			return broken, nil
		}
	}
}

// shortFor is how long parts are as small as they had to be: others may have had the locks.
const shortFor = time.Minute

// A writer writes one batch.
type writer struct {
	owner    outbox.UUID
	slot     string
	progress *Progress
	batches  []tenantBatch
	last     *statement
	often    bool // on a connection that does nothing else
	again    bool // some of it may have been written before
}

func (w *writer) write(ctx context.Context, pool *pgxpool.Pool) ([]TenantError, error) {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	err = w.writeAtOnce(ctx, conn.Conn())
	if code(err) == codeUnique && !w.again {
		w.again = true
		err = w.writeAtOnce(ctx, conn.Conn())
	}
	if len(w.batches) == 0 || !isTenants(err) {
		return nil, err
	}
	return w.writeApart(ctx, conn.Conn())
}

// recordingSQL is said in every transaction, since behind a pooler the session may be another one each time: a commit that was reported is durable,
// a lock is waited for only so long (the backend of a relay that was killed may hold some for a moment), and a process that freezes half-way does not keep the next leader out.
// With many tenants there are many statements, of which each would be planned five times over before the server keeps a plan, to see that what a parameter holds
// makes no difference. A plan that is kept must be good for large tables as well, though they are empty when it is made.
const recordingSQL = `SELECT set_config('synchronous_commit', 'on', true), set_config('lock_timeout', '5s', true),
  set_config('idle_in_transaction_session_timeout', '30s', true), set_config('plan_cache_mode', 'force_generic_plan', true), set_config('enable_seqscan', 'off', true)`

// begin starts the transaction and, for a leader, makes sure first that it is still the leader.
func (w *writer) begin(p *pipeline) {
	p.add("BEGIN")
	p.addOften(recordingSQL, recordingSQL)
	if pos := w.progress; pos != nil {
		p.addOften(advance, advance, w.slot, pos.Epoch, pos.LSN.String(), pos.High.String())
	}
}

// commit ends the transaction.
func (w *writer) commit(p *pipeline) {
	if w.last != nil {
		p.add(w.last.sql, w.last.args...)
	}
	p.add("COMMIT")
}

// writeAtOnce is the usual way: everything in one pipeline.
func (w *writer) writeAtOnce(ctx context.Context, conn *pgx.Conn) error {
	p := beginPipeline(ctx, conn)
	if w.often {
		p.prepared = preparedOn(conn)
		p.buf = p.prepared.buf
	}
	w.begin(p)
	if tenants, endpoints := ordered(w.batches...); len(endpoints) > 0 {
		p.add(lockOrder, tenants, endpoints)
	}
	for i := range w.batches {
		p.addAll(w.batches[i].statements(w.owner, w.again))
	}
	w.commit(p)
	return inTransaction(ctx, conn, p.run())
}

// inTransaction rolls back what an error has left open.
func inTransaction(ctx context.Context, conn *pgx.Conn, err error) error {
	const idle = 'I'
	if err == nil || conn.IsClosed() || conn.PgConn().TxStatus() == idle {
		return err
	}
	_, rollback := conn.Exec(ctx, "ROLLBACK")
	return errors.Join(err, rollback)
}
