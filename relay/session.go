package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// A session is one period of leadership: from the slot's acquisition to the end of the stream. It is the handler of the stream. What is set before the stream
// runs stays as it is, and everybody may read it; of the rest, whatever does not say whose it is belongs to the stream's goroutine.
type session struct {
	*engine
	epoch     int64
	ledger    *ledger
	confirmed atomic.Uint64 // durable position; what the slot is told
	read      atomic.Uint64 // events
	stream    *wal.Stream
	tenure    *tenure
	end       context.CancelCauseFunc

	start     wal.LSN        // commits below are recorded
	startHigh wal.LSN        // commits up to here may be recorded
	handled   store.Snapshot // whatever it shows is recorded
	mu        sync.Mutex     // of woken, and of the map of tenants for all but the stream's goroutine, which alone changes it
	tenants   map[string]*tenant
	woken     []laneKey     // endpoints that take deliveries again
	resumed   atomic.Bool   // a tenant does
	verify    chan struct{} // an endpoint has changed, or a try to verify one has ended
	relations map[uint32]*relation
	owed      wal.LSN // position up to which another shard waits for us

	tx         transaction
	positioned time.Time
	repeated   []*job // held back for a look into the deliveries
	// repeatedBytes is what these occupy.
	repeatedBytes int64
	targets       []route.Target
	batch         []*job
	decoded       outbox.Event   // the event that is being taken; its documents are the stream's memory
	scratch       [16 << 10]byte // where bodies are encoded

	gates map[store.Backfill]wal.LSN // of backfills: the position up to which the routing table has to know the log; fill's alone
}

// transaction is what the session knows of the one being read.
type transaction struct {
	begin  wal.Begin
	skip   bool  // its commit is covered: no event of it is looked at
	repeat bool  // an earlier session may have recorded deliveries of it
	entry  int   // in the ledger; noCommit until the first delivery
	n      int32 // events so far
}

// session opens the stream, which is the lock of leadership, and works until it ends. A nil error means that ctx is done.
func (e *engine) session(ctx context.Context) error {
	began := time.Now()
	e.moved = false
	options := e.streamOptions()
	s := &session{
		engine: e, tenants: make(map[string]*tenant), relations: make(map[uint32]*relation), gates: make(map[store.Backfill]wal.LSN), verify: make(chan struct{}, 1),
	}
	options.Heard = func(now time.Time) { s.tenure.heard(now) }
	var err error
	if s.stream, err = wal.Open(ctx, options); err != nil {
		return err
	}
	s.tenure = newTenure(began, s.stream.SenderTimeout())
	err = s.run(ctx)
	e.moved = wal.LSN(s.confirmed.Load()) > s.start
	return errors.Join(err, s.close(ctx))
}

// close ends the stream, which frees the slot; a second call does nothing.
func (s *session) close(ctx context.Context) error {
	closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return s.stream.Close(closing)
}

// run takes up where the last leader left off and handles the stream until it ends.
func (s *session) run(parent context.Context) error {
	ctx, end := context.WithCancelCause(parent)
	defer end(nil)
	s.end = end
	// Before an epoch is begun: another relay may be healing, and would be fenced.
	if state, err := s.store.SlotState(ctx); err != nil {
		return err
	} else if state.Known && !state.Sound {
		return fmt.Errorf("slot %q begins at %s: %w", s.cfg().Database.Slot, s.stream.Slot().ConfirmedFlush, errSlotAhead)
	} else if state.Remade {
		return remadeError()
	}
	if err := s.store.CheckShards(ctx, s.cfg().Database.Shards); err != nil {
		return err
	}
	progress, err := s.store.Lead(ctx, store.LeadOptions{InstanceID: s.cfg().Database.InstanceID, SystemID: s.stream.SystemID()})
	if err != nil {
		return fmt.Errorf("take leadership of slot %q: %w", s.cfg().Database.Slot, err)
	}
	failpoint.Hit(failpoint.Taken)
	s.lastEpoch = progress.Epoch
	s.admitted.Store(true)
	s.epoch, s.start, s.startHigh = progress.Epoch, progress.LSN, progress.High
	if s.handled, err = s.store.Handled(ctx); err != nil {
		return err
	}
	s.confirmed.Store(uint64(progress.LSN))
	s.dispatcher.beat = s.beat
	s.ledger = newLedger(progress.LSN, progress.High)
	s.ledger.tenure = s.tenure
	s.leading.Store(s) // before the routing tables are loaded: a configuration that changes meanwhile is to reach those that are there
	defer s.leading.Store(nil)
	s.warnOfOthers(ctx)
	if err := s.loadTenants(ctx); err != nil {
		return err
	}
	if err := s.blockOrdered(ctx, s.schemas()); err != nil {
		return fmt.Errorf("load what waits in order: %w", err)
	}
	if err := s.heedBreakers(ctx); err != nil {
		return err
	}
	s.log.Info("leading", "slot", s.cfg().Database.Slot, "epoch", s.epoch, "position", s.start.String(), "tenants", len(s.tenants))
	s.recorder.lead(s)
	s.status.set(true, "leading slot %q", s.cfg().Database.Slot)
	s.metrics.leading(true, s.epoch)
	defer s.metrics.leading(false, s.epoch)

	background, stop := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.attend(background)
	}()
	err = s.stream.Run(ctx, s, func() wal.LSN { return wal.LSN(s.confirmed.Load()) })
	stop()
	<-done
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	if parent.Err() == nil {
		s.status.set(false, "no stream: %v", err)
	}
	return errors.Join(err, s.finish(parent))
}

// warnOfOthers tells of relays that send what this one sends, each with a slot of its own, as relays have that divide the tenants between them. Which those of
// another one are the database does not know.
func (s *session) warnOfOthers(ctx context.Context) {
	if len(s.cfg().Tenants.Include) > 0 {
		return
	}
	slots, err := s.store.OtherReaders(ctx)
	if err != nil {
		s.log.Debug("other relays could not be looked for", "error", err)
	}
	for _, slot := range slots {
		s.log.Warn("another relay serves this database", "slot", slot, "hint", store.OtherReaderRemedy)
	}
}

// finish waits until what the session has in flight is recorded, or the engine gives up. What it has read but not started is left to the log,
// which the next session reads again; only while the relay stops the engine defers it, so that another replica can work on it at once.
//
// A stream that was told to stop is kept until the last position is confirmed; any other is closed first, since a server that shuts down waits
// for that, and nothing can be recorded before it is back.
func (s *session) finish(ctx context.Context) error {
	defer s.recorder.lead(nil)
	var err error
	s.ledger.abandon(len(s.repeated))
	s.repeated = nil
	if ctx.Err() == nil {
		s.ledger.abandon(s.dispatcher.abandon(s.ledger)) // first: another leader may be sending the same already
		err = s.close(ctx)
	}
	sealed := s.ledger.seal()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-sealed:
			if ctx.Err() != nil {
				s.lastPosition()
			}
			return err
		case <-s.quit:
			return err
		case <-tick.C:
			if wal.IsShutdown(s.recorder.err()) {
				err = errors.Join(err, s.close(ctx))
			}
		}
	}
}

// lastPosition records what is covered, for which no outcome did so: events that match nothing, and a commit that was read to its end after its outcomes were
// recorded. The next session would read them again, and match them by what is subscribed then.
func (s *session) lastPosition() {
	s.recordPosition(true)
	covered, _ := s.ledger.position()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for last := time.Now().Add(time.Second); wal.LSN(s.confirmed.Load()) < covered && s.recorder.err() == nil && time.Now().Before(last); {
		select {
		case <-s.quit:
			return
		case <-tick.C:
		}
	}
}

// beat keeps the stream alive while it waits for room. It comes to an end if the server shuts down: that waits for the stream, and room for the server.
func (s *session) beat(ctx context.Context) {
	if err := s.recorder.err(); wal.IsShutdown(err) {
		s.end(err)
		return
	}
	_ = s.stream.Beat(ctx) // the stream will meet the error itself
}

// suspend stops a tenant whose tables are not as they should be: nothing of it is lost, and nobody else is held up. Its events stay where they
// are, and resuming it queues what it has missed. It is for the stream's goroutine.
func (s *session) suspend(ctx context.Context, t *tenant, reason error) error {
	err := s.markSuspended(ctx, t, reason)
	if err == nil {
		t.setState(store.StateSuspended) // not before: what is left out comes again only if the database knows of it
	}
	return err
}

// markSuspended is suspend for any goroutine: the session heeds it as soon as the stream brings it, in the order of whatever else becomes of the tenant.
func (s *session) markSuspended(ctx context.Context, t *tenant, reason error) error {
	if err := s.store.Suspend(ctx, s.epoch, t.schema, reason.Error()); err != nil {
		return fmt.Errorf("suspend tenant %q: %w", t.schema, err)
	}
	tellSuspended(s.log, t.schema, reason)
	return nil
}

// tellSuspended says so. Outcomes that are lost, if any, are among the facts: what they were of is sent again.
func tellSuspended(log *slog.Logger, tenant string, reason error, facts ...any) {
	log.With(facts...).Error("tenant suspended", "tenant", tenant, "error", reason,
		"hint", "it is tried again by itself; once mended, this does it at once: outbox-relay tenants resume "+tenant)
}
