package wal

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// consumer is a handler that writes down what it is given and, unless told otherwise, confirms it.
type consumer struct {
	mu       sync.Mutex
	lines    []string
	whole    int // of lines, at the last commit
	position LSN
	hold     bool // confirm nothing

	changed func(context.Context) error // called at each change; may be nil
}

func (c *consumer) Begin(context.Context, Begin) error { return nil }

func (c *consumer) Change(ctx context.Context, change *Change) error {
	c.mu.Lock()
	c.lines = append(c.lines, renderChange(change))
	c.mu.Unlock()
	if c.changed != nil {
		return c.changed(ctx)
	}
	return nil
}

func (c *consumer) Commit(_ context.Context, commit Commit) error {
	c.confirm(commit.EndLSN)
	c.mu.Lock()
	c.whole = len(c.lines)
	c.mu.Unlock()
	return nil
}

func (c *consumer) Keepalive(_ context.Context, lsn LSN, _ bool) error {
	c.confirm(lsn)
	return nil
}

func (c *consumer) confirm(lsn LSN) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.hold {
		c.position = lsn
	}
}

func (c *consumer) confirmed() LSN {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.position
}

// committed tells how many changes there were when a transaction was last confirmed, unless that is held: they are seen before.
func (c *consumer) committed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.whole
}

func (c *consumer) seen() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.lines...)
}

// stream runs a Stream until stop is called, or the test ends.
func (d *database) stream(c *consumer) (s *Stream, ended <-chan error, stop func() error) {
	d.t.Helper()
	s, err := Open(d.t.Context(), d.options())
	require.NoError(d.t, err)
	ctx, cancel := context.WithCancel(d.t.Context())
	result, closed := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(closed)
		result <- s.Run(ctx, c, c.confirmed)
		closing, done := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer done()
		_ = s.Close(closing)
	}()
	d.t.Cleanup(func() { cancel(); <-closed })
	return s, result, func() error { cancel(); <-closed; return <-result }
}

func (d *database) eventually(what string, condition func() bool) {
	d.t.Helper()
	require.Eventually(d.t, condition, 20*time.Second, 10*time.Millisecond, what)
}

func TestStreamGoesOnWhereItWasConfirmed(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)")
	d.exec("INSERT INTO t VALUES (1)") // before the relay starts, after the slot was made

	c := &consumer{}
	s, _, stop := d.stream(c)
	assert.Equal(t, d.text("SELECT system_identifier::text FROM pg_control_system()"), s.SystemID())
	assert.Equal(t, d.slot, s.Slot().Name)
	assert.NotZero(t, s.Slot().ConfirmedFlush)
	d.exec("INSERT INTO t VALUES (2)")
	d.eventually("two rows", func() bool { return c.committed() == 2 })
	require.ErrorIs(t, stop(), context.Canceled)
	assert.Equal(t, c.confirmed(), d.confirmed(), "Close confirms once more")
	assert.Empty(t, d.text("SELECT active_pid::text FROM pg_replication_slots WHERE slot_name = $1", d.slot), "Close lets go of the slot")

	d.exec("INSERT INTO t VALUES (3)")
	held := &consumer{hold: true, position: d.confirmed()}
	_, _, stop = d.stream(held)
	d.eventually("the third row", func() bool { return len(held.seen()) > 0 })
	require.ErrorIs(t, stop(), context.Canceled)

	again := &consumer{}
	_, _, stop = d.stream(again)
	d.exec("INSERT INTO t VALUES (4)")
	d.eventually("unconfirmed and new", func() bool { return len(again.seen()) > 1 })
	require.ErrorIs(t, stop(), context.Canceled)
	assert.Equal(t, []string{"insert public.t {id=1}", "insert public.t {id=2}"}, c.seen())
	assert.Equal(t, []string{"insert public.t {id=3}"}, held.seen())
	assert.Equal(t, []string{"insert public.t {id=3}", "insert public.t {id=4}"}, again.seen())
}

// TestConfirmedFollowsUnrelatedTraffic: without changes for the relay, keepalives move the slot.
func TestConfirmedFollowsUnrelatedTraffic(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)", "CREATE UNLOGGED TABLE u (id int)")
	d.exec("DROP PUBLICATION p")
	d.exec("CREATE PUBLICATION p FOR TABLE t")
	c := &consumer{}
	d.stream(c)
	for range 3 {
		d.exec("SELECT pg_logical_emit_message(true, 'other', repeat('x', 100000))")
		target := d.flushed()
		d.eventually("the slot follows", func() bool { return d.confirmed() >= target })
	}
	assert.Empty(t, c.seen())
}

// impatience is a wal_sender_timeout. The server is told something in each third of it, and so waits for as long as the machine of a test may stand still.
const impatience = 5 * time.Second

func (d *database) impatient() {
	d.t.Helper()
	d.exec(fmt.Sprintf("ALTER DATABASE %s SET wal_sender_timeout = '%s'", d.text("SELECT current_database()"), impatience))
}

// TestNothingConfirmedIsAlive: while nothing is known to be durable the session lives on, and the slot stays where it is.
func TestNothingConfirmedIsAlive(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)")
	d.impatient()
	before := d.confirmed()
	c := &consumer{hold: true}
	_, ended, _ := d.stream(c)
	until := time.Now().Add(impatience + time.Second)
	d.eventually("more than the timeout", func() bool { return time.Now().After(until) })
	d.exec("INSERT INTO t VALUES (1)")
	d.eventually("the row", func() bool { return len(c.seen()) == 1 })
	assert.Empty(t, ended)
	assert.Equal(t, before, d.confirmed())
}

// TestBeatKeepsTheSession: a handler that waits longer than wal_sender_timeout keeps its session by Beat alone.
func TestBeatKeepsTheSession(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)")
	d.impatient()
	var s *Stream
	opened := make(chan struct{})
	c := &consumer{changed: func(ctx context.Context) error {
		<-opened
		beat := time.NewTicker(50 * time.Millisecond)
		defer beat.Stop()
		for room := time.After(impatience + time.Second); ; {
			select {
			case <-room:
				return nil
			case <-beat.C:
				if err := s.Beat(ctx); err != nil {
					return err
				}
			}
		}
	}}
	s, ended, _ := d.stream(c)
	close(opened)
	d.exec("INSERT INTO t VALUES (1), (2)")
	d.eventually("both rows", func() bool { return len(c.seen()) == 2 })
	target := d.flushed()
	d.eventually("the slot follows", func() bool { return d.confirmed() >= target })
	assert.Empty(t, ended)
}

func TestLargeMessage(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, fmt.Sprintf(eventsTable, "public"))
	const size = 20 << 20
	d.exec(`INSERT INTO webhook_events (event_type, aggregate_id, aggregate_type, event_data)
		VALUES ('a.b', gen_random_uuid(), 'a', jsonb_build_array(repeat('x', $1)))`, size)
	got := make(chan int, 1)
	s, err := Open(t.Context(), d.options())
	require.NoError(t, err)
	done := errors.New("done")
	err = s.Run(t.Context(), handler{change: func(_ context.Context, c *Change) error {
		plan, err := NewEventPlan(c.Relation)
		if err != nil {
			return err
		}
		e, err := plan.Decode(&c.New)
		got <- len(e.Data)
		return errors.Join(err, done)
	}}, func() LSN { return 0 })
	require.ErrorIs(t, err, done)
	assert.Equal(t, size+len(`[""]`), <-got)
	require.NoError(t, s.Close(t.Context()))
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)")
	name := d.text("SELECT current_database()")
	d.exec("SELECT pg_create_logical_replication_slot($1, 'test_decoding')", name+"_plugin")
	d.exec("SELECT pg_create_physical_replication_slot($1)", name+"_physical")
	d.exec("CREATE ROLE " + name + "_plain LOGIN")
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), d.url)
		require.NoError(t, err)
		_, err = conn.Exec(context.Background(), "DROP ROLE "+name+"_plain")
		require.NoError(t, err)
		_, err = conn.Exec(context.Background(), "SELECT pg_drop_replication_slot($1)", name+"_physical")
		require.NoError(t, err)
		require.NoError(t, conn.Close(context.Background()))
	})
	other := newDatabase(t)
	s, _, _ := d.stream(&consumer{})

	for what, c := range map[string]struct { //nolint:paralleltest // they share the databases of the parent, which end with it
		change func(*Options)
		want   error
	}{
		"slot in use":              {func(*Options) {}, ErrSlotActive},
		"slot missing":             {func(o *Options) { o.Slot = "nosuch" }, ErrSlotMissing},
		"slot of another plugin":   {func(o *Options) { o.Slot = name + "_plugin" }, ErrSlotForeign},
		"physical slot":            {func(o *Options) { o.Slot = name + "_physical" }, ErrSlotForeign},
		"slot of another database": {func(o *Options) { o.Slot = other.slot }, ErrSlotForeign},
		"publication missing":      {func(o *Options) { o.Publications = []string{"p", `no"such'\`} }, ErrPublicationMissing},
		"no right":                 {func(o *Options) { o.URL = strings.Replace(d.url, "postgres@", name+"_plain@", 1) }, ErrNoReplication},
		"no such role":             {func(o *Options) { o.URL = strings.Replace(d.url, "postgres@", "nosuch@", 1) }, ErrNoReplication},
		"slot name":                {func(o *Options) { o.Slot = `s" LOGICAL` }, nil},
		"no publications":          {func(o *Options) { o.Publications = nil }, nil},
		"URL":                      {func(o *Options) { o.URL = "postgres://u:secret@h:x/d" }, nil},
		"address":                  {func(o *Options) { o.URL = "postgres://u:secret@127.0.0.1:1/d" }, nil},
	} {
		t.Run(what, func(t *testing.T) {
			o := d.options()
			c.change(&o)
			_, err := Open(t.Context(), o)
			require.Error(t, err)
			assert.NotContains(t, err.Error(), "secret")
			if c.want == nil {
				return
			}
			require.ErrorIs(t, err, c.want)
			var e *StreamError
			require.ErrorAs(t, err, &e)
			assert.NotEmpty(t, e.Hint())
			if c.want == ErrSlotActive { //nolint:errorlint // the test's own value
				assert.Equal(t, s.conn.PID(), uint32(e.ActivePID))
			}
		})
	}
}

// TestStartError: what the catalog did not tell before the start is found out afterwards.
func TestStartError(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.stream(&consumer{})
	cfg, err := config(d.options())
	require.NoError(t, err)
	conn, err := pgconn.ConnectConfig(t.Context(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.Background())) }()
	for slot, want := range map[string]error{d.slot: ErrSlotActive, "nosuch": ErrSlotMissing} {
		err := startReplication(t.Context(), conn, Options{Slot: slot, Publications: []string{"p"}}, d.text("SELECT current_database()"))
		require.ErrorIs(t, err, want)
		var pg *pgconn.PgError
		require.ErrorAs(t, err, &pg, "the server's own error is kept")
	}
}

func TestPublicationDroppedUnderWay(t *testing.T) {
	t.Parallel()
	d := newDatabase(t, "CREATE TABLE t (id int PRIMARY KEY)")
	_, ended, _ := d.stream(&consumer{})
	d.exec("DROP PUBLICATION p")
	d.exec("INSERT INTO t VALUES (1)")
	err := <-ended
	require.ErrorIs(t, err, ErrPublicationMissing)
}

func TestSessionTerminated(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	s, ended, _ := d.stream(&consumer{})
	d.exec("SELECT pg_terminate_backend($1)", s.conn.PID())
	err := <-ended
	require.ErrorIs(t, err, ErrShutdown)
	assert.True(t, IsShutdown(err))
	assert.False(t, IsShutdown(errors.New("x")))
}

// TestPooler: a pooler refuses the start-up parameter, or swallows it and takes the first command for SQL.
func TestPooler(t *testing.T) {
	t.Parallel()
	for what, answer := range map[string]struct {
		atStart bool
		code    string
	}{"refuses": {true, "08P01"}, "swallows": {false, "42601"}} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
			require.NoError(t, err)
			served := make(chan struct{})
			go func() {
				defer close(served)
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer func() { _ = conn.Close() }()
				b := pgproto3.NewBackend(conn, conn)
				_, _ = b.ReceiveStartupMessage()
				if !answer.atStart {
					b.Send(&pgproto3.AuthenticationOk{})
					b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
					_ = b.Flush()
					_, _ = b.Receive()
				}
				b.Send(&pgproto3.ErrorResponse{Severity: "ERROR", Code: answer.code, Message: "no"})
				b.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
				_ = b.Flush()
			}()
			_, err = Open(t.Context(), Options{URL: "postgres://u@" + l.Addr().String() + "/d?sslmode=disable", Slot: "s", Publications: []string{"p"}})
			require.ErrorIs(t, err, ErrPooler)
			require.NoError(t, l.Close())
			<-served
		})
	}
}

func ownServer(t *testing.T, config map[string]string) *pgtest.Server {
	t.Helper()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Config: config})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	return server
}

// TestServerThatCannotReplicate meets the settings in the way, one after the other.
func TestServerThatCannotReplicate(t *testing.T) {
	t.Parallel()
	server := ownServer(t, map[string]string{"wal_level": "replica", "max_wal_senders": "1"})
	o := Options{URL: server.URL("postgres"), Slot: "s", Publications: []string{"p"}}
	_, err := Open(t.Context(), o)
	require.ErrorIs(t, err, ErrWALLevel)

	cfg, err := config(o)
	require.NoError(t, err)
	var conn *pgconn.PgConn
	require.Eventually(t, func() bool { // the session refused above takes a moment to go
		conn, err = pgconn.ConnectConfig(t.Context(), cfg)
		return err == nil
	}, 20*time.Second, 10*time.Millisecond)
	_, err = Open(t.Context(), o)
	require.ErrorIs(t, err, ErrSendersExhausted)
	require.NoError(t, conn.Close(t.Context()))
}

// TestLostSlot makes a slot fall behind the WAL that is kept, with the relay away.
func TestLostSlot(t *testing.T) {
	t.Parallel()
	server := ownServer(t, map[string]string{"max_slot_wal_keep_size": "1MB", "min_wal_size": "32MB", "max_wal_size": "32MB"})
	d := newDatabaseAt(t, server.URL("postgres"), "CREATE TABLE t (v text)")
	d.eventually("the slot is lost", func() bool {
		d.exec("SELECT pg_logical_emit_message(false, 'x', 'y')")
		d.exec("SELECT pg_switch_wal()")
		d.exec("CHECKPOINT")
		return d.text("SELECT wal_status FROM pg_replication_slots") == "lost"
	})
	_, err := Open(t.Context(), d.options())
	require.ErrorIs(t, err, ErrSlotLost)
}

// TestFastShutdown: a server that stops waits for its last byte to be confirmed.
func TestFastShutdown(t *testing.T) {
	t.Parallel()
	server := ownServer(t, nil)
	d := newDatabaseAt(t, server.URL("postgres"), "CREATE TABLE t (id int PRIMARY KEY)")
	c := &consumer{}
	_, ended, _ := d.stream(c)
	d.exec("INSERT INTO t SELECT generate_series(1, 1000)")
	d.eventually("the rows", func() bool { return len(c.seen()) == 1000 })
	require.NoError(t, d.conn.Close(t.Context()))
	start := time.Now()
	require.NoError(t, server.Stop(t.Context(), "fast"))
	assert.Less(t, time.Since(start), 8*time.Second, "what is told every ten seconds anyway would come later")
	require.ErrorIs(t, <-ended, ErrShutdown)
	_, err := Open(t.Context(), d.options())
	require.Error(t, err)
}
