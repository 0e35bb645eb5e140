package wal

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// peer plays the server on the other end of a Stream, in the time of a synctest bubble.
type peer struct {
	t        *testing.T
	conn     net.Conn
	stream   *Stream
	updates  chan update
	position atomic.Uint64 // what the stream may confirm
}

// update is a standby status update as it was received.
type update struct {
	write, flush, apply LSN
	ping                bool
	at                  time.Time
}

func newPeer(t *testing.T, o Options, senderTimeout time.Duration) *peer {
	t.Helper()
	client, server := net.Pipe()
	cfg, err := pgconn.ParseConfig("host=localhost user=u database=d sslmode=disable")
	require.NoError(t, err)
	conn, err := pgconn.Construct(&pgconn.HijackedConn{Conn: client, Config: cfg})
	require.NoError(t, err)
	p := &peer{t: t, conn: server, stream: newStream(conn, o, senderTimeout), updates: make(chan update, 100_000)}
	p.stream.slot.Name = "s"
	t.Cleanup(func() { _ = client.Close(); _ = server.Close() })
	return p
}

// listen takes what the stream sends until the connection ends.
func (p *peer) listen() {
	defer close(p.updates)
	backend := pgproto3.NewBackend(p.conn, p.conn)
	for {
		msg, err := backend.Receive()
		if err != nil {
			return
		}
		switch m := msg.(type) {
		case *pgproto3.CopyData:
			d := m.Data
			p.updates <- update{LSN(be64(d[1:])), LSN(be64(d[9:])), LSN(be64(d[17:])), d[33] != 0, time.Now()}
		case *pgproto3.CopyDone:
			p.send(&pgproto3.CopyDone{}, &pgproto3.ReadyForQuery{})
		default:
			return
		}
	}
}

func (p *peer) run(h Handler) <-chan error {
	go p.listen()
	ended := make(chan error, 1)
	go func() {
		ended <- p.stream.Run(p.t.Context(), h, func() LSN { return LSN(p.position.Load()) })
	}()
	return ended
}

// end closes the connection and returns the error Run ended with.
func (p *peer) end(ended <-chan error) error {
	_ = p.conn.Close()
	return <-ended
}

func (p *peer) send(messages ...pgproto3.BackendMessage) {
	var b []byte
	for _, m := range messages {
		b, _ = m.Encode(b)
	}
	_, _ = p.conn.Write(b)
}

func (p *peer) log(messages ...[]byte) {
	for _, m := range messages {
		p.send(&pgproto3.CopyData{Data: append(append([]byte{'w'}, make([]byte, 24)...), m...)})
	}
}

func (p *peer) keepalive(lsn LSN, reply bool) {
	d := binary.BigEndian.AppendUint64([]byte{'k'}, uint64(lsn))
	d = append(d, make([]byte, 9)...)
	if reply {
		d[17] = 1
	}
	p.send(&pgproto3.CopyData{Data: d})
}

// handler is a Handler of functions; nil ones do nothing.
type handler struct {
	begin  func(Begin) error
	change func(context.Context, *Change) error
	commit func(Commit) error
	alive  func(lsn LSN, replyRequested bool) error
}

func (h handler) Begin(_ context.Context, b Begin) error {
	if h.begin == nil {
		return nil
	}
	return h.begin(b)
}

func (h handler) Change(ctx context.Context, c *Change) error {
	if h.change == nil {
		return nil
	}
	return h.change(ctx, c)
}

func (h handler) Commit(_ context.Context, c Commit) error {
	if h.commit == nil {
		return nil
	}
	return h.commit(c)
}

func (h handler) Keepalive(_ context.Context, lsn LSN, replyRequested bool) error {
	if h.alive == nil {
		return nil
	}
	return h.alive(lsn, replyRequested)
}

func TestStatusUpdates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		start := time.Now()
		ended := p.run(handler{})

		u := <-p.updates
		assert.Equal(t, update{at: start.Add(10 * time.Second)}, u, "nothing to confirm: zeros in all fields, at the interval")

		p.position.Store(5)
		moved := time.Now()
		u = <-p.updates
		assert.Equal(t, [3]LSN{5, 5, 5}, [3]LSN{u.write, u.flush, u.apply})
		assert.LessOrEqual(t, u.at.Sub(moved), tick)

		p.position.Store(3)
		u = <-p.updates
		assert.Equal(t, [3]LSN{5, 5, 5}, [3]LSN{u.write, u.flush, u.apply}, "never back")

		for i := range 1000 { // ten updates a second at most
			p.position.Store(uint64(100 + i))
			time.Sleep(time.Millisecond)
		}
		assert.LessOrEqual(t, len(p.updates), 11)
		require.Error(t, p.end(ended))
	})
}

func TestShortSenderTimeoutShortensTheInterval(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, 3*time.Second)
		start := time.Now()
		ended := p.run(handler{})
		u := <-p.updates
		assert.Equal(t, time.Second, u.at.Sub(start))
		require.Error(t, p.end(ended))
	})
}

func TestReplies(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		type call struct {
			lsn   LSN
			reply bool
		}
		var calls []call
		ended := p.run(handler{alive: func(lsn LSN, reply bool) error {
			calls = append(calls, call{lsn, reply})
			if reply {
				p.position.Store(uint64(lsn)) // nothing is unrecorded
			}
			return nil
		}})
		time.Sleep(time.Second)
		synctest.Wait()
		assert.Empty(t, calls, "nothing is known to have been handed over")

		p.keepalive(70, false)
		synctest.Wait()
		assert.Equal(t, []call{{70, false}}, calls)
		assert.Empty(t, p.updates)

		asked := time.Now()
		p.keepalive(80, true)
		u := <-p.updates
		assert.Equal(t, LSN(80), u.flush, "the answer follows the handler")
		assert.Equal(t, asked, u.at, "at once")

		// In a transaction the handler is not asked: rows below that position may still come.
		p.log(beginMessage(90))
		time.Sleep(time.Second)
		synctest.Wait()
		before := len(calls)
		p.keepalive(100, true)
		u = <-p.updates
		assert.Equal(t, LSN(80), u.flush)
		time.Sleep(time.Second)
		synctest.Wait()
		assert.Len(t, calls, before)

		p.log(commitMessage(90, 95))
		time.Sleep(time.Second)
		synctest.Wait()
		assert.Equal(t, call{95, false}, calls[len(calls)-1], "while idle: the end of what was handed over")
		require.Error(t, p.end(ended))
	})
}

// TestRepliesAreThrottled plays a server that shuts down: it asks again at each answer until all is confirmed.
func TestRepliesAreThrottled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		p.position.Store(50)
		ended := p.run(handler{})
		<-p.updates
		start, answers := time.Now(), 0
		for {
			if time.Since(start) > time.Second {
				p.position.Store(100)
			}
			p.keepalive(100, true)
			answers++
			if u := <-p.updates; u.flush == 100 {
				break
			}
		}
		assert.Less(t, time.Since(start), time.Second+3*replyGap)
		assert.Less(t, answers, 110)
		require.Error(t, p.end(ended))
	})
}

func TestSilentServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		ended := p.run(handler{})
		start := time.Now()
		for u := range p.updates { // answer the first ping only
			if u.ping {
				assert.InDelta(t, 20, u.at.Sub(start).Seconds(), 0.2)
				p.keepalive(10, false)
				break
			}
		}
		answered := time.Now()
		err := <-ended
		require.ErrorIs(t, err, ErrSilent)
		assert.InDelta(t, 40, time.Since(answered).Seconds(), 0.5)
		assert.True(t, p.stream.dead)
	})
}

// TestStanding: how far the server has come, and for how long nothing has, which tells a stream that has stalled from one that works.
func TestStanding(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		ended := p.run(handler{})
		for _, c := range []struct {
			name  string
			send  func()
			at    LSN
			moved bool
		}{
			{"nothing", func() {}, 0, false},
			{"a position", func() { p.keepalive(70, false) }, 70, true},
			{"the same one", func() { p.keepalive(70, false) }, 70, false},
			{"a piece of the log", func() { p.log(beginMessage(90)) }, 70, true},
			{"a position within a transaction", func() { p.keepalive(100, false) }, 100, true},
		} {
			_, before := p.stream.Standing()
			time.Sleep(5 * time.Second)
			c.send()
			time.Sleep(5 * time.Second)
			at, still := p.stream.Standing()
			want := 5 * time.Second
			if !c.moved {
				want = before + 10*time.Second
			}
			assert.Equal(t, c.at, at, c.name)
			assert.InDelta(t, want, still, float64(3*tick), c.name)
		}
		require.Error(t, p.end(ended))
	})
}

// TestWaitingHandlerIsNotSilence: whoever does not listen must not complain of silence.
func TestWaitingHandlerIsNotSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		wait := func(ctx context.Context) error {
			for range 300 {
				time.Sleep(time.Second)
				if err := p.stream.Beat(ctx); err != nil {
					return err
				}
			}
			return nil
		}
		rel, values := eventRow()
		ended := p.run(handler{change: func(ctx context.Context, _ *Change) error { return wait(ctx) }})
		p.log(beginMessage(5), relationMessage(rel), changeMessage(kindInsert, rel, values))
		start := time.Now()
		p.log(commitMessage(5, 6)) // taken as soon as the handler returns
		assert.Equal(t, 300*time.Second, time.Since(start))
		assert.GreaterOrEqual(t, len(p.updates), 29, "the session is kept alive meanwhile")
		time.Sleep(time.Second)
		select {
		case err := <-ended:
			require.NoError(t, err)
		default:
		}
		require.Error(t, p.end(ended))
	})
}

// TestMessageInPieces interrupts a message with ticks wherever it can be cut.
func TestMessageInPieces(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Hour)
		rel, values := eventRow()
		var got []string
		ended := p.run(handler{change: func(_ context.Context, c *Change) error { got = append(got, renderChange(c)); return nil }})
		p.log(beginMessage(5), relationMessage(rel))
		msg, err := (&pgproto3.CopyData{Data: append(make([]byte, 25), changeMessage(kindInsert, rel, values)...)}).Encode(nil)
		require.NoError(t, err)
		msg[5] = 'w'
		for cut := 1; cut < len(msg); cut += 7 {
			_, _ = p.conn.Write(msg[:cut])
			time.Sleep(3 * tick)
			_, _ = p.conn.Write(msg[cut:])
		}
		synctest.Wait()
		assert.Len(t, got, (len(msg)+5)/7)
		for _, line := range got {
			assert.Equal(t, renderChange(&Change{Relation: rel, Op: Insert, New: Tuple{rel, values}}), line)
		}
		require.Error(t, p.end(ended))
	})
}

func TestServerThatDoesNotRead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		p.position.Store(1)
		start := time.Now()
		err := p.stream.Run(t.Context(), handler{}, func() LSN { return 1 })
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		require.ErrorContains(t, err, "confirm 0/1")
		assert.InDelta(t, 20, time.Since(start).Seconds(), 0.2)
	})
}

func TestEndOfStream(t *testing.T) {
	t.Parallel()
	copyData := func(s string) pgproto3.BackendMessage { return &pgproto3.CopyData{Data: []byte(s)} }
	for name, c := range map[string]struct {
		message pgproto3.BackendMessage
		want    error // nil: any
	}{
		"shutdown":                    {&pgproto3.ErrorResponse{Severity: "FATAL", Code: "57P01", Message: "x"}, ErrShutdown},
		"publication missing":         {&pgproto3.ErrorResponse{Severity: "ERROR", Code: "42704", Message: "x"}, ErrPublicationMissing},
		"publication skipped (18)":    {&pgproto3.NoticeResponse{Severity: "WARNING", Code: "55000", Message: `skipped loading publication "events"`}, ErrPublicationMissing},
		"end of copy":                 {&pgproto3.CopyDone{}, ErrShutdown},
		"end of command":              {&pgproto3.CommandComplete{CommandTag: []byte("COPY 0")}, ErrShutdown},
		"limit, but of no row":        {&pgproto3.ErrorResponse{Severity: "ERROR", Code: "54000", Message: "x"}, nil},
		"another error":               {&pgproto3.ErrorResponse{Severity: "ERROR", Code: "XX000", Message: "x"}, nil},
		"message of another place":    {&pgproto3.ReadyForQuery{TxStatus: 'I'}, nil},
		"empty replication message":   {copyData(""), nil},
		"unknown replication message": {copyData("z"), nil},
		"piece of the log, too short": {copyData("w" + be(0, 8)), nil},
		"piece of the log, empty":     {copyData("w" + be(0, 8) + be(0, 8) + be(0, 8)), nil},
		"piece of the log, malformed": {copyData("w" + be(0, 8) + be(0, 8) + be(0, 8) + "B"), nil},
		"keepalive, too short":        {copyData("k" + be(0, 8)), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				p := newPeer(t, Options{Publications: []string{"events"}, Log: slog.New(slog.NewTextHandler(&log, nil))}, time.Minute)
				ended := p.run(handler{})
				p.send(&pgproto3.NoticeResponse{Severity: "NOTICE", Code: "00000", Message: "x"}, &pgproto3.ParameterStatus{Name: "a", Value: "b"})
				p.send(c.message)
				err := <-ended
				require.Error(t, err)
				if c.want != nil {
					require.ErrorIs(t, err, c.want)
					var e *StreamError
					require.ErrorAs(t, err, &e)
					assert.NotEmpty(t, e.Hint())
				}
				assert.Contains(t, err.Error(), `"s"`)
				assert.Contains(t, log.String(), "code=00000")
				_ = p.conn.Close()
			})
		})
	}
}

// TestRowTooLarge: the server says that it cannot send a row when it has begun the transaction.
func TestRowTooLarge(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]bool{"54000": true, "53200": false, "XX000": false} { // a limit; memory that is short; whatever else
		t.Run(code, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t, Options{}, time.Minute)
				ended := p.run(handler{})
				p.log(beginMessage(5))
				p.send(&pgproto3.ErrorResponse{Severity: "ERROR", Code: code, Message: "out of memory"})
				err := <-ended
				_ = p.conn.Close()
				var e *StreamError
				require.Equal(t, want, errors.As(err, &e), "%v", err)
				assert.Equal(t, !want, p.stream.dead, "Close waits for the server")
				if want {
					require.ErrorIs(t, err, ErrRowTooLarge)
					assert.Equal(t, LSN(5), e.At)
					assert.Contains(t, err.Error(), "in transaction 700 that commits at 0/5")
					assert.NotEmpty(t, e.Hint())
				}
			})
		})
	}
}

func TestHandlerErrorsEndRun(t *testing.T) {
	t.Parallel()
	stop := errors.New("stop")
	rel, values := eventRow()
	for name, h := range map[string]handler{
		"begin":  {begin: func(Begin) error { return stop }},
		"change": {change: func(context.Context, *Change) error { return stop }},
		"truncate": {change: func(_ context.Context, c *Change) error {
			if c.Op == Truncate {
				return stop
			}
			return nil
		}},
		"commit":    {commit: func(Commit) error { return stop }},
		"keepalive": {alive: func(LSN, bool) error { return stop }},
		"idle": {alive: func(lsn LSN, _ bool) error {
			if lsn == 6 { // the keepalive is 7
				return stop
			}
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t, Options{}, time.Minute)
				ended := p.run(h)
				fed := make(chan struct{})
				go func() {
					defer close(fed)
					p.log(beginMessage(5), relationMessage(rel), changeMessage(kindInsert, rel, values), truncateMessage(rel.ID), commitMessage(5, 6))
					time.Sleep(time.Second)
					p.keepalive(7, false)
				}()
				assert.Equal(t, stop, <-ended)
				assert.False(t, p.stream.dead, "the session can still be told goodbye")
				_ = p.conn.Close()
				<-fed
			})
		})
	}
}

func TestCloseConfirmsOnceMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		go p.listen()
		ended := make(chan error, 1)
		go func() { ended <- p.stream.Run(ctx, handler{}, func() LSN { return LSN(p.position.Load()) }) }()
		time.Sleep(time.Second)
		cancel()
		require.ErrorIs(t, <-ended, context.Canceled)
		require.ErrorIs(t, p.stream.Beat(ctx), context.Canceled)

		p.position.Store(9) // the recorder's last batch
		require.NoError(t, p.stream.Beat(t.Context()))
		p.position.Store(10)
		require.NoError(t, p.stream.Close(t.Context()))
		require.NoError(t, p.stream.Close(t.Context()))
		assert.Equal(t, LSN(9), (<-p.updates).flush)
		assert.Equal(t, LSN(10), (<-p.updates).flush)
	})
}

// TestCloseAfterSilence: whoever has been silent for long is not waited for once more.
func TestCloseAfterSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Minute)
		go func() { _, _ = io.Copy(io.Discard, p.conn) }()
		require.ErrorIs(t, p.stream.Run(t.Context(), handler{}, func() LSN { return 0 }), ErrSilent)
		start := time.Now()
		require.NoError(t, p.stream.Close(t.Context()))
		assert.Zero(t, time.Since(start))
	})
}

func TestCloseDoesNotWaitForADeadServer(t *testing.T) {
	t.Parallel()
	for name, play := range map[string]func(p *peer){
		"reads nothing":   func(*peer) {},
		"answers nothing": func(p *peer) { _, _ = io.Copy(io.Discard, p.conn) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				for _, wait := range []time.Duration{time.Second, time.Minute} {
					p := newPeer(t, Options{}, time.Minute)
					go play(p)
					start := time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), wait)
					_ = p.stream.Close(ctx)
					cancel()
					assert.Equal(t, min(wait, farewell), time.Since(start))
				}
			})
		})
	}
}
