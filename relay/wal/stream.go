// Package wal streams committed rows out of PostgreSQL's write-ahead log: it checks a logical replication slot, keeps the replication session
// alive, decodes what arrives and confirms what its caller has made durable. It decides nothing about events.
package wal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// Handler takes what a Stream reads, in the goroutine of Run and in the order of the log. Its first error ends Run, which returns it as it is.
// While it makes Run wait, for room say, it must call Stream.Beat now and then.
type Handler interface {
	Begin(context.Context, Begin) error
	// Change may use the rows it is given until it returns; Relations are immutable and may be kept.
	Change(context.Context, *Change) error
	Commit(context.Context, Commit) error
	// Keepalive tells, between transactions, that whatever commits below lsn has been handed over, so that lsn may be confirmed once nothing of it
	// is unrecorded. It is called for each sign of life of the server and about ten times a second while nothing arrives. With replyRequested the
	// server waits for an answer; while it shuts down it goes on asking until all it has sent is confirmed.
	Keepalive(ctx context.Context, lsn LSN, replyRequested bool) error
}

const (
	// tick is how often a Stream looks up from reading: at its timers, and whether the confirmed position has moved.
	tick = 100 * time.Millisecond
	// replyGap is the least time between answers that say the same. A server that shuts down asks again at each answer (181,000 times in 11 s
	// have been seen) until its last byte is confirmed, which takes a commit of the recorder.
	replyGap = 10 * time.Millisecond
	// farewell bounds Close.
	farewell = 5 * time.Second
)

// Stream is a replication session that holds its slot. It belongs to one goroutine.
type Stream struct {
	conn     *pgconn.PgConn
	log      *slog.Logger
	onHeard  func(time.Time)
	systemID string
	slot     Slot
	carries  []string // publications
	// publications are the OIDs of these.
	publications []uint32
	interval     time.Duration // between status updates at most
	timeout      time.Duration // of silence at most

	decoder   decoder
	handed    LSN // whatever commits below has been handed over
	confirmed func() LSN
	dead      bool // the session is beyond a farewell

	sent   LSN // position of the last status update
	sentAt time.Time
	owed   bool // an answer was put off

	heard    bool      // something arrived since the last tick
	heardAt  time.Time // the tick that saw the last arrival
	pingedAt time.Time // when an answer was asked for; zero if the server has spoken since

	reached atomic.Uint64 // the position that the server has said it has come to
	still   atomic.Int64  // ticks in a row that saw neither a piece of the log nor that position move
	moved   bool          // one of the two did since the last tick

	lockstep lockstep
}

func newStream(conn *pgconn.PgConn, o Options, senderTimeout time.Duration) *Stream {
	s := &Stream{
		conn: conn, log: o.Log, carries: o.Publications, timeout: senderTimeout,
		confirmed: func() LSN { return 0 }, sentAt: time.Now(),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.onHeard = o.Heard; s.onHeard == nil {
		s.onHeard = func(time.Time) {}
	}
	if s.timeout <= 0 {
		s.timeout = defaultSenderTimeout
	}
	s.interval = min(statusInterval, s.timeout/3)
	return s
}

// SystemID identifies the database cluster; a restored logical backup has another than its origin.
func (s *Stream) SystemID() string { return s.systemID }

// SenderTimeout is how long the server waits for a sign of life before it gives the slot to another one: its wal_sender_timeout, or a minute where that
// is off.
func (s *Stream) SenderTimeout() time.Duration { return s.timeout }

// Slot is what the catalog said of the slot when the stream was opened.
func (s *Stream) Slot() Slot { return s.slot }

// Publications are the OIDs of Options.Publications before the stream was opened: one that is dropped and made anew has another.
func (s *Stream) Publications() []uint32 { return s.publications }

// Standing tells how far the server says it has read the log, and for how long Run has listened without any of it arriving or that position moving. The
// time that the handler takes does not count. It is safe for concurrent use.
func (s *Stream) Standing() (at LSN, still time.Duration) {
	return LSN(s.reached.Load()), time.Duration(s.still.Load()) * tick
}

// Run hands what arrives to h until ctx is done, h returns an error or the session ends; the error is never nil. It tells the server the position
// that confirmed returns: soon after it has moved, when the server asks, and every ten seconds or more often. What lies below that position is never sent
// again and its log may be removed, so confirmed must return what is durable. Zero confirms nothing, and a position less than the last one is not
// sent.
//
//	socket ─► Receive ─► decode ─► Handler ─► … recorded … ─► confirmed ─┐
//	   ▲         └─ deadline passed: tick ─► status, ping, idle Keepalive │
//	   └──────────────────────────────────────────────────────────────────┘
func (s *Stream) Run(ctx context.Context, h Handler, confirmed func() LSN) error {
	s.confirmed = confirmed
	conn := s.conn.Conn()
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = conn.SetReadDeadline(time.Unix(1, 0)) // fails on a closed connection only, and then Receive does too
	})
	defer func() {
		if !stop() {
			<-interrupted // or it would spoil the deadline of Close
		}
	}()
	// The deadline of the socket is the ticker. It costs nothing per message, unlike a context, and passes even while data keeps coming; the
	// Frontend keeps a half-read message and goes on with it at the next Receive.
	s.heardAt, s.heard, s.pingedAt = time.Now(), false, time.Time{}
	if err := s.wake(time.Now().Add(tick)); err != nil {
		return err
	}
	front := s.conn.Frontend()
	for {
		read := front.ReadBufferLen() == 0 // else the message, or a part of it, is here
		if read {
			s.lockstep.read(ctx)
		}
		msg, err := front.Receive()
		switch {
		case err == nil:
			now := time.Now()
			if read {
				s.lockstep.has(now)
			}
			s.heard = true
			s.onHeard(now)
			err = s.take(ctx, h, msg)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded):
			s.lockstep.idle()
			err = s.tick(ctx, h)
		default:
			s.dead = true
			err = fmt.Errorf("receive from slot %q: %w", s.slot.Name, err)
		}
		if err != nil {
			return err
		}
	}
}

// Beat keeps the session alive while the handler makes Run wait: it tells the server the confirmed position if that is due, and costs next to
// nothing if not. Before Run it confirms nothing. The error is that of ctx or of the connection.
func (s *Stream) Beat(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	now := time.Now()
	if !s.due(now) {
		return nil
	}
	return s.send(ctx, now, false)
}

// Close tells the server the confirmed position once more, ends the session, waits until the server has let go of the slot, 5 s at most or as long
// as ctx allows, and closes the connection. It must not be called while Run runs; a second call does nothing.
func (s *Stream) Close(ctx context.Context) error {
	if s.conn.IsClosed() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, farewell)
	defer cancel()
	if !s.dead && ctx.Err() == nil {
		s.leave(ctx)
	}
	if err := s.conn.Close(ctx); err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close replication connection: %w", err)
	}
	return nil
}

// leave ends the copy mode and reads what is still under way: closing a socket with unread data would reset the connection, and the server could
// lose the last status update. Errors are of no interest, since the connection is closed next.
func (s *Stream) leave(ctx context.Context) {
	deadline, _ := ctx.Deadline()
	conn, front := s.conn.Conn(), s.conn.Frontend()
	if s.send(ctx, time.Now(), false) != nil || conn.SetDeadline(deadline) != nil {
		return
	}
	front.Send(&pgproto3.CopyDone{})
	if front.Flush() != nil {
		return
	}
	for {
		msg, err := front.Receive()
		if err != nil {
			return
		}
		if _, done := msg.(*pgproto3.ReadyForQuery); done {
			return
		}
	}
}

// take handles one message of the connection.
func (s *Stream) take(ctx context.Context, h Handler, msg pgproto3.BackendMessage) error {
	op := func() string { return fmt.Sprintf("stream from slot %q", s.slot.Name) }
	switch m := msg.(type) {
	case *pgproto3.CopyData:
		return s.copyData(ctx, h, m.Data)
	case *pgproto3.NoticeResponse:
		pg := pgconn.ErrorResponseToPgError((*pgproto3.ErrorResponse)(m))
		s.log.Warn("notice of the server", "severity", pg.Severity, "code", pg.Code, "message", pg.Message)
		// Version 18 does not stop at a missing publication, as older ones do: it warns and skips the changes. Going on would confirm the gap. The code
		// alone does not tell: version 17 has it for a standby of synchronized_standby_slots that is away. The name is in the text in every language.
		if pg.Code == "55000" && slices.ContainsFunc(s.carries, func(name string) bool { return strings.Contains(pg.Message, name) }) {
			return &StreamError{Op: op(), Kind: ErrPublicationMissing, Err: pg}
		}
		return nil
	case *pgproto3.ErrorResponse:
		pg := pgconn.ErrorResponseToPgError(m)
		// program_limit_exceeded within a transaction: a row of it, or a value, has more than 1 GB as it is sent, which one that is stored may well come to. The
		// session lives on, and Close is to wait until it has let go of the slot: whoever drops that next would come too early.
		if pg.Code == "54000" && s.decoder.open {
			return &StreamError{Op: op(), Kind: ErrRowTooLarge, At: s.decoder.begin.CommitLSN, XID: s.decoder.begin.XID, Err: pg}
		}
		s.dead = true
		return fault(op(), pg, map[string]error{"42704": ErrPublicationMissing})
	case *pgproto3.CopyDone, *pgproto3.CommandComplete:
		s.dead = true
		return &StreamError{Op: op(), Kind: ErrShutdown}
	case *pgproto3.ParameterStatus:
		return nil
	default:
		return fmt.Errorf("%s: unexpected message %T", op(), msg)
	}
}

// copyData handles a message of the replication protocol: a piece of the log or a keepalive.
// Source: https://www.postgresql.org/docs/current/protocol-replication.html
func (s *Stream) copyData(ctx context.Context, h Handler, data []byte) error {
	const header = 1 + 8 + 8 + 8 // of 'w': start and end of the piece, time
	switch {
	case len(data) > header && data[0] == pglogrepl.XLogDataByteID:
		s.moved = true
		err := s.change(ctx, h, data[header:])
		s.lockstep.sent(int64(be64(data[1+8+8:]))) //nolint:gosec // two's complement on the wire
		return err
	case len(data) > 0 && data[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
		k, err := pglogrepl.ParsePrimaryKeepaliveMessage(data[1:])
		if err != nil {
			return fmt.Errorf("stream from slot %q: %w", s.slot.Name, err)
		}
		return s.keepalive(ctx, h, k)
	default:
		return fmt.Errorf("stream from slot %q: malformed replication message of %d bytes", s.slot.Name, len(data))
	}
}

func (s *Stream) change(ctx context.Context, h Handler, msg []byte) error {
	k, err := s.decoder.decode(msg)
	if err != nil {
		return fmt.Errorf("stream from slot %q: %w", s.slot.Name, err)
	}
	switch k {
	case kindBegin:
		s.lockstep.begins(s.decoder.begin.CommitTime)
		return h.Begin(ctx, s.decoder.begin)
	case kindCommit:
		s.handed = max(s.handed, s.decoder.commit.EndLSN)
		return h.Commit(ctx, s.decoder.commit)
	case kindInsert, kindUpdate, kindDelete:
		return h.Change(ctx, &s.decoder.change)
	case kindTruncate:
		for _, rel := range s.decoder.truncated {
			if err := h.Change(ctx, &Change{Relation: rel, Op: Truncate}); err != nil {
				return err
			}
		}
	case kindRelation, kindOrigin, kindType, kindMessage:
	}
	return nil
}

func (s *Stream) keepalive(ctx context.Context, h Handler, k pglogrepl.PrimaryKeepaliveMessage) error {
	s.moved = s.moved || uint64(k.ServerWALEnd) != s.reached.Load()
	s.reached.Store(uint64(k.ServerWALEnd))
	if !s.decoder.open { // else the position may lie behind rows that are still to come
		s.handed = max(s.handed, k.ServerWALEnd)
		if err := h.Keepalive(ctx, s.handed, k.ReplyRequested); err != nil {
			return err
		}
	}
	if !k.ReplyRequested {
		return nil
	}
	now := time.Now()
	if next := s.sentAt.Add(replyGap); s.confirmed() <= s.sent && now.Before(next) {
		s.owed = true
		return s.wake(next)
	}
	return s.send(ctx, now, false)
}

// tick does what is due and sets the time of the next one.
func (s *Stream) tick(ctx context.Context, h Handler) error {
	now := time.Now()
	if s.moved {
		s.moved = false
		s.still.Store(0)
	} else {
		s.still.Add(1)
	}
	switch {
	case s.heard:
		s.heard, s.heardAt, s.pingedAt = false, now, time.Time{}
	case !s.pingedAt.IsZero() && now.Sub(s.pingedAt) >= s.timeout/3: // this leader is to stop before the server gives its slot to another one
		s.dead = true
		return &StreamError{Op: fmt.Sprintf("stream from slot %q", s.slot.Name), Kind: ErrSilent, Err: fmt.Errorf("nothing received for %s", s.timeout*2/3)}
	case !s.decoder.open && s.handed != 0:
		if err := h.Keepalive(ctx, s.handed, false); err != nil {
			return err
		}
		now = time.Now()
	}
	// A dead peer takes what is written to it without complaint: only an answer proves that it lives.
	ping := s.pingedAt.IsZero() && now.Sub(s.heardAt) >= s.timeout/3
	if ping {
		s.pingedAt = now
	}
	if ping || s.owed || s.due(now) {
		if err := s.send(ctx, now, ping); err != nil {
			return err
		}
	}
	return s.wake(time.Now().Add(tick))
}

// wake makes the next tick happen at t, or at once if the read is interrupted for good.
func (s *Stream) wake(t time.Time) error {
	if err := s.conn.Conn().SetReadDeadline(t); err != nil {
		s.dead = true
		return fmt.Errorf("receive from slot %q: %w", s.slot.Name, err)
	}
	return nil
}

// due reports whether the server should hear the confirmed position now.
func (s *Stream) due(now time.Time) bool {
	since := now.Sub(s.sentAt)
	return since >= s.interval || since >= tick && s.confirmed() > s.sent
}

// send tells the server the confirmed position. All three fields carry it: pglogrepl fills a zero in with the first, and a server that shuts down
// waits for the flush position alone.
func (s *Stream) send(ctx context.Context, now time.Time, ping bool) error {
	s.sent, s.sentAt, s.owed = max(s.sent, s.confirmed()), now, false
	deadline := now.Add(s.timeout / 3) // it blocks only when the server has stopped reading long ago
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	err := s.conn.Conn().SetWriteDeadline(deadline)
	if err == nil {
		status := pglogrepl.StandbyStatusUpdate{
			WALWritePosition: s.sent, WALFlushPosition: s.sent, WALApplyPosition: s.sent, ClientTime: now, ReplyRequested: ping,
		}
		if failpoint.Planted(failpoint.FlushZero) {
			status.WALWritePosition, status.WALFlushPosition = max(s.sent, s.handed), 0
		}
		err = pglogrepl.SendStandbyStatusUpdate(ctx, s.conn, status)
		failpoint.Hit(failpoint.Acked)
	}
	if err != nil {
		s.dead = true
		return fmt.Errorf("confirm %s to slot %q: %w", s.sent, s.slot.Name, err)
	}
	return nil
}
