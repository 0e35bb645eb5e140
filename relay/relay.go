// Package relay is the way of an event through the house: from the write-ahead log to the durable outcome of its deliveries.
//
//	wal.Stream ─► session (decode, match) ─► dispatcher ─► worker (one attempt) ─► recorder ─► ledger ─► confirmed LSN
//	                                             ▲  │ no room, breaker open, held too long            ▲
//	                                             │  └───────────────► a pending row ─────────────────┘
//	                         retry queue ─► claimer
//
// One goroutine owns the replication connection and does everything up to the dispatcher; it is the session. Workers, recorder, claimer and
// keeper belong to the engine and outlive sessions: every replica works the retry queue, only the leader of the slot has a session.
//
// What could go wrong, and where that is answered: a receiver that hangs (dispatcher: sweep hands its attempts to the retry queue), a burst
// (dispatcher: admit waits or defers), a database that is away (recorder: keeps and repeats), two leaders (store.ErrFenced: the older one ends
// its session and drops what it has not recorded), a tenant whose tables are broken (store: suspended, everyone else goes on), a restart
// (session: skips what is covered, looks up what may be recorded).
package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// What the schema package creates.
const (
	ownSchema           = "outbox_relay"
	eventsPublication   = "outbox_relay_events"
	registryPublication = "outbox_relay_registry"
)

// Options are what Run needs besides its configuration. Config, Version, Log and Registry are required.
type Options struct {
	Config Config
	// Shard is the number of the shard to relay for, below Config.Database.Shards.
	Shard    int
	Version  string // sent as part of User-Agent
	Log      *slog.Logger
	Registry prometheus.Registerer // of this Run alone: names that it has already panic. Relays of one process tell theirs apart by a label
	// Client makes the attempts; Run does not close it. Nil: Run makes one of its own. Relays of one process share one, see [Config.Share].
	Client *delivery.Client
	// Patient has Run wait out also what only a person can mend, and a database that does not answer at the start: it is one of several, and the
	// others are to go on.
	Patient bool
	// Status is told what the relay is doing; its zero value is ready for use.
	Status *Status
	// Tracing makes spans; nil: none.
	Tracing *Tracing
	// Abort, once closed, ends a drain at once. Nil: a drain takes its time.
	Abort <-chan struct{}
	// Updates brings configurations that are to take the place of Config while Run works, as far as [Config.Reloaded] says. Each must be valid; where Client
	// is shared, it is reconfigured by each of its relays to the same. Nil: there are none.
	Updates <-chan Config
}

// Status says how a relay is. It is safe for concurrent use; its zero value says that nothing has begun.
type Status struct {
	now     atomic.Pointer[role]
	besides atomic.Pointer[string] // what holds the work up, whatever that is just now; nil: nothing
}

type role struct {
	ready bool
	what  string
}

// Ready tells whether the relay works, as leader or standing by, and what it does or why it does not.
func (s *Status) Ready() (bool, string) {
	r := s.now.Load()
	if r == nil {
		r = &role{false, "starting"}
	}
	if besides := s.besides.Load(); besides != nil {
		return r.ready, r.what + "; " + *besides
	}
	return r.ready, r.what
}

func (s *Status) set(ready bool, format string, args ...any) {
	s.now.Store(&role{ready, fmt.Sprintf(format, args...)})
}

// engine is what sessions come and go on.
type engine struct {
	config     atomic.Pointer[Config] // see cfg
	shard      int
	version    string
	log        *slog.Logger
	patient    bool
	status     *Status
	store      *store.Store
	client     *delivery.Client
	defaults   atomic.Pointer[delivery.Defaults] // of config
	leading    atomic.Pointer[session]           // nil: none
	inspector  *inspector
	dispatcher *dispatcher
	recorder   *recorder
	metrics    *metrics
	tracing    *Tracing      // nil: none
	owner      outbox.UUID   // this process, in leases
	claim      chan struct{} // something is due in the retry queue
	claimLater atomic.Bool   // claiming waits for room
	admitted   atomic.Bool   // this is no copy of somebody's database: claiming may begin
	backfill   chan struct{} // a tenant has a backfill to do
	attention  chan struct{} // an endpoint takes deliveries again
	keeper     *keeper
	lastEpoch  int64         // of our last session, or heal; lead's alone
	moved      bool          // our last session has recorded a position; lead's alone
	quit       chan struct{} // closed when nothing more will be recorded
}

// Run relays until ctx is done, then drains: what is in flight may finish within Config.Shutdown.Drain, the rest is deferred, and what is known
// is recorded within Config.Record.Timeout. A clean stop returns nil. Faults that may pass (a database that is away, a slot that another
// replica holds) are waited out; those that only a person can mend end it, unless Options.Patient says otherwise.
func Run(ctx context.Context, o Options) error {
	if d := &o.Config.Database; d.URL == "" { // else they have been read
		if faults := d.ReadFiles(); len(faults) > 0 {
			return errors.Join(faults...)
		}
	}
	if err := o.Config.Validate(); err != nil {
		return err
	}
	if o.Client == nil {
		client, err := delivery.NewClient(o.Config.ClientConfig(o.Version), delivery.NewMetrics(o.Registry), o.Log) //nolint:contextcheck // it lives until Close
		if err != nil {
			return err
		}
		defer client.Close()
		o.Client = client
	}
	e, err := newEngine(ctx, &o)
	if err != nil {
		return err
	}
	defer e.store.Close()
	return e.run(ctx, &o)
}

func newEngine(ctx context.Context, o *Options) (*engine, error) {
	cfg := &o.Config
	cfg.Database.Slot = cfg.Database.ShardSlot(o.Shard)
	e := &engine{
		shard: o.Shard, version: o.Version, log: o.Log, patient: o.Patient, status: o.Status, client: o.Client, owner: outbox.NewUUID(), tracing: o.Tracing,
		claim: make(chan struct{}, 1), backfill: make(chan struct{}, 1), attention: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	defaults := cfg.EndpointDefaults()
	e.config.Store(cfg)
	e.defaults.Store(&defaults)
	if e.status == nil {
		e.status = new(Status)
	}
	var err error
	e.store, err = store.New(ctx, store.Config{
		URL: cfg.Database.URL, Refresh: cfg.Database.DSN, MaxConns: int32(cfg.Database.MaxConnections), Slot: cfg.Database.Slot, //nolint:gosec // validated: small
		Shard: o.Shard, ConnectTimeout: cfg.Database.ConnectTimeout, Log: o.Log, Lazy: o.Patient,
		PayloadSchemas: cfg.Validation.PayloadSchema != SchemaOff,
	})
	if err != nil {
		return nil, err
	}
	e.metrics = newMetrics(o.Registry, cfg)
	e.inspector = newInspector(cfg, e.metrics, o.Log)
	e.dispatcher = newDispatcher(cfg, e.metrics)
	e.recorder = newRecorder(cfg, e.store, e.owner, e.dispatcher, e.metrics, o.Log)
	e.keeper = newKeeper(e.store, o.Log)
	e.recorder.durable, e.dispatcher.breakerOpened = e.keeper.note, e.keeper.breakerOpened
	e.dispatcher.deferred, e.dispatcher.lease, e.dispatcher.ended = e.deferJob, e.leaseJob, e.recorder.add
	e.dispatcher.turned = e.tellBreaker
	e.dispatcher.doubt = e.recorder.writePosition
	e.recorder.dueNow = func() { signal(e.claim) }
	e.dispatcher.claimedDone = e.claimedDone
	e.metrics.watch(e.dispatcher, e.recorder, e.store.Pool)
	return e, nil
}

// run holds the goroutines together. Work is told to stop by ctx; attempts and recording have contexts of their own, which end in that order.
func (e *engine) run(ctx context.Context, o *Options) error {
	recording, stopRecording := context.WithCancel(context.WithoutCancel(ctx))
	defer stopRecording()
	attempts, stopAttempts := context.WithCancel(recording)
	defer stopAttempts()

	group, ctx := errgroup.WithContext(ctx)
	e.dispatcher.spawn = func() { group.Go(func() error { return e.work(attempts) }) }
	group.Go(func() error { return e.recorder.run(recording) })
	group.Go(func() error { return e.keeper.run(recording) })
	group.Go(func() error { return e.sweep(recording) })
	group.Go(func() error { return e.renewLeases(recording) })
	group.Go(func() error { return e.rejudge(ctx) })
	group.Go(func() error { return e.claimDue(ctx) })
	group.Go(func() error { return e.observe(ctx) })
	group.Go(func() error { return e.lead(ctx) })
	group.Go(func() error { return e.follow(ctx, o.Updates) })
	group.Go(func() error {
		<-ctx.Done()
		e.drain(stopAttempts, o.Abort)
		e.dispatcher.close()
		close(e.quit)
		stopRecording()
		return nil
	})
	return group.Wait()
}

// drain ends the work in hand within its bounds.
func (e *engine) drain(stopAttempts func(), abort <-chan struct{}) {
	e.status.set(false, "stopping")
	drained := e.dispatcher.drain()
	failpoint.Hit(failpoint.Draining)
	_, _, _, running := e.dispatcher.load()
	e.log.Info("stopping", "in_flight", running, "drain", e.cfg().Shutdown.Drain)
	patience := time.NewTimer(e.cfg().Shutdown.Drain)
	defer patience.Stop()
	select {
	case <-drained:
		return
	case <-patience.C:
	case <-abort:
	}
	stopAttempts()
	last := time.NewTimer(e.cfg().Record.Timeout)
	defer last.Stop()
	select {
	case <-drained:
	case <-last.C:
		stream, _, claimed, _ := e.dispatcher.load()
		e.log.Warn("stopped before every outcome was recorded: those deliveries will be attempted again", "deliveries", stream+claimed)
	}
}

// lead takes the slot whenever it is free, until ctx is done or leading has become impossible.
func (e *engine) lead(ctx context.Context) error {
	wait := retryLeadAfter
	standing := false
	var obstacle barrier
	var nobody leaderless
	for {
		began := time.Now()
		err := e.session(ctx)
		if ctx.Err() == nil && (heals(err) || obstacle.blocks(err, e.log)) {
			if err = e.heal(ctx, err); err == nil {
				obstacle = barrier{}
				continue
			}
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the relay was told to stop; what the session could not do, the next one does
		}
		if errors.Is(err, store.ErrInstance) {
			e.admitted.Store(false)
		}
		if lasted := time.Since(began); lasted > longestLeadAfter || e.moved && lasted > wait {
			wait = retryLeadAfter // it has worked: what ended it is another matter than what ended the one before
		}
		if !awaits(err) {
			nobody = leaderless{}
		}
		switch {
		case isFinal(err) && !e.patient:
			return err
		case awaits(err):
			standing, wait = false, retryLeadAfter
			nobody.look(ctx, e, err)
		case errors.Is(err, wal.ErrSlotActive):
			e.status.set(true, "standing by: another relay leads slot %q", e.cfg().Database.Slot)
			if !standing {
				e.log.Info("standing by", "slot", e.cfg().Database.Slot, "reason", err)
			}
			standing, wait = true, retryLeadAfter
		default:
			standing = false
			e.status.set(false, "no stream: %v", err)
			e.tellEnd(err, wait)
		}
		t := time.NewTimer(spread(wait))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		if !standing {
			wait = min(2*wait, longestLeadAfter)
		}
	}
}

// tellEnd says why there is no stream, and who is to do something about it.
func (e *engine) tellEnd(err error, wait time.Duration) {
	if isFinal(err) {
		e.log.Error("there is no stream until somebody mends this, trying again", append([]any{"in", wait}, withHint(err, "outbox-relay check says more")...)...)
		return
	}
	e.log.Warn("the stream has ended, starting again", append([]any{"in", wait}, withHint(err, "")...)...)
}

// withHint is an error for a line of the log, and what to do about it. otherwise is for one that does not say that; empty: nothing.
func withHint(err error, otherwise string) []any {
	facts := []any{"error", err}
	var hinted interface{ Hint() string }
	if errors.As(err, &hinted) {
		otherwise = hinted.Hint()
	}
	if otherwise != "" {
		facts = append(facts, "hint", otherwise)
	}
	return facts
}

// isFinal tells the faults that waiting does not mend.
func isFinal(err error) bool {
	for _, kind := range []error{
		wal.ErrUnsupported, wal.ErrWALLevel, wal.ErrEncoding, wal.ErrNoReplication, wal.ErrPooler, wal.ErrSlotForeign, wal.ErrSlotMissing, wal.ErrSlotLost,
		wal.ErrPublicationMissing, store.ErrInstance, store.ErrDenied, store.ErrOutdated, store.ErrShards,
	} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// retryLeadAfter is the pause between two tries for the slot: short enough that a takeover takes about a second.
const retryLeadAfter = 500 * time.Millisecond

// longestLeadAfter is what that pause grows to, while one session after the other fails.
const longestLeadAfter = 10 * time.Second

// signal wakes whoever waits on c, without waiting for it.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
