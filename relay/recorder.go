package relay

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// The recorder makes outcomes durable in batches: one transaction for all tenants, together with the position in the log that it covers.
//
//	add ──► pending ──(full, or interval since the last flush)──► store.Record ──► release room, publish the confirmed LSN
//
// A batch that cannot be written is kept and tried again: recording is safe to repeat. What waits for it keeps its room in the window, so the
// recorder needs no bound of its own beyond that of the deferred.
type recorder struct {
	cfg        atomic.Pointer[Config]
	store      *store.Store
	owner      outbox.UUID
	dispatcher *dispatcher
	metrics    *metrics
	log        *slog.Logger
	// durable is told of outcomes that were written. It keeps nothing of them.
	durable func([]store.Outcome)
	// dueNow is called after rows that are due at once were written.
	dueNow func()

	mu      sync.Mutex
	jobs    []*job
	out     []store.Outcome
	old     recorded // to be used again
	whole   bool     // the batch under way is all of its arrays; run's alone
	force   bool     // write the position even without an outcome
	tenants int      // with outcomes in the last batch
	size    int      // of the last batch
	session *session

	kick    chan struct{}
	failure atomic.Pointer[error] // of the last flush; nil after a success
}

// recorded are the arrays of a batch that is done with.
type recorded struct {
	jobs []*job
	out  []store.Outcome
}

func newRecorder(cfg *Config, s *store.Store, owner outbox.UUID, d *dispatcher, m *metrics, log *slog.Logger) *recorder {
	r := &recorder{store: s, owner: owner, dispatcher: d, metrics: m, log: log, kick: make(chan struct{}, 1), durable: func([]store.Outcome) {}, dueNow: func() {}}
	r.cfg.Store(cfg)
	return r
}

// add takes the outcome of a job. The recorder owns both from now on.
func (r *recorder) add(j *job, o store.Outcome) {
	r.mu.Lock()
	if r.out == nil { // the next batch will be about as large as the last one
		if r.jobs, r.out, r.old = r.old.jobs, r.old.out, (recorded{}); cap(r.out) < r.size {
			r.jobs, r.out = make([]*job, 0, r.size), make([]store.Outcome, 0, r.size)
		}
	}
	r.jobs = append(r.jobs, j)
	r.out = append(r.out, o)
	r.mu.Unlock()
	signal(r.kick)
}

// pending tells how many outcomes wait for a flush.
func (r *recorder) pending() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.out)
}

// writePosition asks for a flush of the position alone.
func (r *recorder) writePosition() {
	r.mu.Lock()
	r.force = true
	r.mu.Unlock()
	signal(r.kick)
}

// lead makes s the session whose position the flushes write; nil: none.
func (r *recorder) lead(s *session) {
	r.mu.Lock()
	r.session = s
	r.mu.Unlock()
}

// restartLag is how far in time the session's position is behind what it has read.
func (r *recorder) restartLag(now time.Time) time.Duration {
	r.mu.Lock()
	s := r.session
	r.mu.Unlock()
	if s == nil {
		return 0
	}
	if at := s.ledger.oldest(); !at.IsZero() {
		return max(now.Sub(at), 0)
	}
	return 0
}

// err is why the last flush did not succeed; nil if it did.
func (r *recorder) err() error {
	if p := r.failure.Load(); p != nil {
		return *p
	}
	return nil
}

// run flushes until ctx is done. The engine ends it only once nothing is left, or its time is over.
func (r *recorder) run(ctx context.Context) error {
	var last time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.kick:
		}
		if err := r.linger(ctx, last); err != nil {
			return nil //nolint:nilerr // ctx is done
		}
		last = time.Now()
		for more := true; more; {
			var err error
			if more, err = r.flush(ctx); err != nil {
				return nil //nolint:nilerr // ctx is done; other errors are retried inside
			}
		}
		if r.pending() > 0 {
			signal(r.kick)
		}
	}
}

// linger lets outcomes gather: at most one flush an interval, unless a whole batch is there.
func (r *recorder) linger(ctx context.Context, last time.Time) error {
	interval := r.cfg.Load().Record.Interval
	if r.scattered() {
		interval *= scatteredIntervals
	}
	wait := interval - time.Since(last)
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	for {
		if r.full() {
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			return nil
		case <-r.kick:
		}
	}
}

// limit is how many outcomes a batch may have, as far as the last one tells: a larger transaction is not faster, but costs memory on both sides. Not so
// with many tenants: every one of them costs the server a statement, whose start a few outcomes have to pay for. Then a batch has some for each, but not more
// than half the window: what is being written has its room there, and the workers would run out of work meanwhile. It is called under the lock.
func (r *recorder) limit() int {
	cfg := r.cfg.Load()
	return max(cfg.Record.Batch, min(outcomesPerTenant*r.tenants, cfg.Window.Deliveries/2))
}

// full tells whether a whole batch waits.
func (r *recorder) full() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.out) >= r.limit()
}

// scattered tells whether, under load, the outcomes are those of so many tenants that more of them are worth waiting for.
func (r *recorder) scattered() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	batch := r.cfg.Load().Record.Batch
	return r.size >= batch && r.limit() > batch
}

// take returns the oldest outcomes, a batch at most. Where there are more tenants than it may have, it takes those that have waited longest, with all
// they have; the outcomes of one tenant stay in their order.
func (r *recorder) take() (jobs []*job, out []store.Outcome, s *session, force bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	limit := r.limit()
	of := make(map[string]struct{}, r.tenants)
	var others []int
	end, bytes := 0, 0
	for ; end < len(r.out) && end-len(others) < limit && bytes <= maxBatchBytes; end++ {
		d := r.out[end].Delivery
		if _, ok := of[d.Tenant]; !ok {
			if len(of) == maxBatchTenants {
				others = append(others, end)
				continue
			}
			of[d.Tenant] = struct{}{}
		}
		if r.out[end].Status != store.Success { // then the row keeps the body
			bytes += len(d.Message.Body)
		}
	}
	r.tenants = len(of)
	r.whole = end == len(r.out) && len(others) == 0
	r.size = end - len(others)
	jobs, r.jobs = part(r.jobs, end, others)
	out, r.out = part(r.out, end, others)
	s, force, r.force = r.session, r.force, false
	return jobs, out, s, force
}

// part splits off the first of a list, without the others among them, of which it has the places. Without others nothing is copied.
func part[T any](list []T, end int, others []int) (taken, left []T) {
	if len(others) == 0 {
		if end == len(list) {
			return list, nil
		}
		return list[:end:end], list[end:]
	}
	taken, left = make([]T, 0, end-len(others)), make([]T, 0, len(list)-end+len(others))
	for i := range list[:end] {
		if len(others) > 0 && others[0] == i {
			left, others = append(left, list[i]), others[1:]
		} else {
			taken = append(taken, list[i])
		}
	}
	return taken, append(left, list[end:]...)
}

// maxBatchTenants is how many tenants are written in one transaction: each costs it some six locks, of which a server with its defaults has 6,400 for
// all. maxBatchBytes is about how much of bodies: encoding and sending a batch occupies some four times that, whatever the window.
const (
	maxBatchTenants = 500
	maxBatchBytes   = 4 << 20
)

// outcomesPerTenant is how many outcomes of a tenant make its statement worth while, and scatteredIntervals how many times longer than usual they are waited
// for under load.
const (
	outcomesPerTenant  = 16
	scatteredIntervals = 8
)

// flush writes what is pending and repeats until that is durable, superseded by another leader, or ctx ends. It returns true if more came in
// meanwhile that fills a batch.
func (r *recorder) flush(ctx context.Context) (more bool, err error) {
	jobs, out, s, force := r.take()
	if len(out) == 0 && (!force || s == nil) {
		return false, nil
	}
	// Before they are written: the same transaction has the position that they complete, which write asks for. Nothing else of a session makes a
	// position durable, and there is one batch at a time: none is confirmed before the outcomes that it covers.
	settled := make(map[*ledger]int, 1)
	for _, j := range jobs {
		if j.ledger != nil && j.commit != noCommit {
			j.ledger.record(j.commit)
			settled[j.ledger]++
			j.commit = noCommit
		}
	}
	broken, err := r.write(ctx, s, out)
	fenced := errors.Is(err, store.ErrFenced)
	if fenced {
		s.end(err)
		if broken, err = r.writeClaimed(ctx, out); err != nil {
			return false, err
		}
	} else if err != nil {
		r.putBack(jobs, out)
		return false, err
	}
	isWritten := func(o *store.Outcome) bool {
		return (!fenced || o.Delivery.Queued) && !slices.ContainsFunc(broken, func(b store.TenantError) bool { return b.Tenant == o.Delivery.Tenant })
	}
	written := out
	if fenced || len(broken) > 0 {
		written = slices.DeleteFunc(slices.Clone(out), func(o store.Outcome) bool { return !isWritten(&o) })
	}
	r.durable(written)
	due, now := false, time.Now()
	for i := range out {
		if isWritten(&out[i]) {
			r.metrics.outcome(&out[i])
			r.metrics.recorded(jobs[i], now)
		}
		if span := jobs[i].span; span != nil && (!fenced || out[i].Delivery.Queued) {
			endDelivery(span, &out[i])
		}
		due = due || nextDue(&out[i])
	}
	for l, n := range settled {
		l.written(n)
	}
	r.done(jobs, out)
	if due {
		r.dueNow() // not before: what is claimed meanwhile is taken for what we still have
	}
	return r.full(), nil
}

// nextDue tells whether an outcome has made a row due at once: its own, or the next one of its key.
func nextDue(o *store.Outcome) bool {
	switch o.Status {
	case store.Pending:
		return o.Due == 0 && !o.Park
	case store.Success, store.Failed, store.Cancelled:
		return o.Delivery.Queued && !o.Delivery.Order.Key.IsZero()
	default:
		return false
	}
}

// sayDifferent is how soon another reason is said for which a batch cannot be recorded. The texts of some differ each time.
const sayDifferent = 5 * time.Second

// recordPatience bounds one try to record a batch. A connection that died without a word, behind a proxy say, is found out by nothing else.
const recordPatience = 30 * time.Second

// write records the batch and, where this replica leads, the position that it covers. It returns the tenants whose part could not be written.
func (r *recorder) write(ctx context.Context, s *session, out []store.Outcome) (broken []store.TenantError, err error) {
	var p *store.Progress
	if s != nil {
		covered, high := s.ledger.position()
		p = &store.Progress{Epoch: s.epoch, LSN: covered, High: high}
	}
	wait := 50 * time.Millisecond
	var told string // what was said last of this batch
	var toldAt time.Time
	for {
		start := time.Now()
		try, cancel := context.WithTimeout(ctx, recordPatience)
		failpoint.Hit(failpoint.Recording)
		if failpoint.Planted(failpoint.AckBeforePersist) && p != nil {
			s.confirm(p.LSN)
		}
		broken, err = r.store.Record(try, r.owner, p, out)
		cancel()
		if err == nil {
			r.metrics.flushed(len(out), time.Since(start))
			r.failure.Store(nil)
			for i := range broken {
				if b := &broken[i]; b.Suspended {
					tellSuspended(r.log, b.Tenant, b.Err, "outcomes_lost", b.Lost)
				} else {
					r.log.Error("outcomes of a tenant could not be recorded", "tenant", b.Tenant, "discarded", b.Discarded, "error", b.Err)
				}
			}
			failpoint.Hit(failpoint.Persisted)
			if p != nil {
				s.confirm(p.LSN)
				if s.tenure.proved(start, time.Now()) {
					r.dispatcher.sure()
				}
			}
			return broken, nil
		}
		if errors.Is(err, store.ErrFenced) {
			r.failure.Store(nil) // the database has answered
			return nil, err
		}
		if ctx.Err() != nil {
			return nil, err
		}
		r.failure.Store(&err)
		if text, since := err.Error(), time.Since(toldAt); text != told && since > sayDifferent || since > tellAgain {
			r.log.Warn("recording outcomes does not succeed, trying again", "outcomes", len(out), "error", err)
			told, toldAt = text, time.Now()
		}
		r.metrics.recordErrors.Inc()
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil, err
		case <-t.C:
		}
		wait = min(2*wait, time.Second)
	}
}

// writeClaimed records what does not depend on leadership after another replica has taken over the slot; the rest is the new leader's to send.
func (r *recorder) writeClaimed(ctx context.Context, out []store.Outcome) (broken []store.TenantError, err error) {
	claimed := slices.DeleteFunc(slices.Clone(out), func(o store.Outcome) bool { return !o.Delivery.Queued })
	if len(claimed) == 0 {
		return nil, nil
	}
	return r.write(ctx, nil, claimed)
}

// done lets go of a batch.
func (r *recorder) done(jobs []*job, out []store.Outcome) {
	released := jobs[:0]
	for i, j := range jobs {
		if out[i].Status != store.Leased { // still in flight
			released = append(released, j)
		}
	}
	r.dispatcher.release(released)
	clear(jobs)
	clear(out)
	if len(out) == 0 || !r.whole { // a part would keep an array alive that has grown while the database was away
		return
	}
	r.mu.Lock()
	r.old = recorded{jobs[:0], out[:0]}
	r.mu.Unlock()
}

func (r *recorder) putBack(jobs []*job, out []store.Outcome) {
	r.mu.Lock()
	r.jobs = append(jobs, r.jobs...)
	r.out = append(out, r.out...)
	r.mu.Unlock()
}

// confirm publishes a durable position to the stream. It never goes back.
func (s *session) confirm(lsn pglogrepl.LSN) {
	for {
		old := s.confirmed.Load()
		if uint64(lsn) <= old || s.confirmed.CompareAndSwap(old, uint64(lsn)) {
			return
		}
	}
}
