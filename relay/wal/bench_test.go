package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
)

// BenchmarkDecodeInsert decodes one event of about 300 bytes into an outbox.Event. The alternative is the parser of pglogrepl, which copies every
// column, and stops short of the event.
func BenchmarkDecodeInsert(b *testing.B) {
	rel, values := eventRow()
	msg := changeMessage(kindInsert, rel, values)
	b.Run("in place", func(b *testing.B) {
		var d decoder
		for _, m := range [][]byte{relationMessage(rel), beginMessage(1)} {
			_, err := d.decode(m)
			require.NoError(b, err)
		}
		plan, err := NewEventPlan(rel)
		require.NoError(b, err)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.decode(msg); err != nil {
				b.Fatal(err)
			}
			if _, err := plan.Decode(&d.change.New); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("pglogrepl", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := pglogrepl.Parse(msg); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkRead compares ways to take messages off a socket and yet look at a timer ten times a second: the deadline of the socket as the ticker,
// a context per message, and a context that lives for many messages.
func BenchmarkRead(b *testing.B) {
	rel, values := eventRow()
	msg, err := (&pgproto3.CopyData{Data: append(append([]byte{'w'}, make([]byte, 24)...), changeMessage(kindInsert, rel, values)...)}).Encode(nil)
	require.NoError(b, err)
	for _, c := range []struct {
		name string
		read func(*pgconn.PgConn) func() error
	}{
		{"deadline", readByDeadline},
		{"context per message", readByContext},
		{"context per tick", readByLongContext},
	} {
		b.Run(c.name, func(b *testing.B) {
			conn := replay(b, msg)
			read := c.read(conn)
			b.ReportAllocs()
			b.SetBytes(int64(len(msg)))
			for b.Loop() {
				if err := read(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func readByDeadline(conn *pgconn.PgConn) func() error {
	front := conn.Frontend()
	_ = conn.Conn().SetReadDeadline(time.Now().Add(tick))
	return func() error {
		_, err := front.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return conn.Conn().SetReadDeadline(time.Now().Add(tick))
		}
		return err
	}
}

func readByContext(conn *pgconn.PgConn) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), tick)
		defer cancel()
		_, err := conn.ReceiveMessage(ctx)
		if pgconn.Timeout(err) {
			return nil
		}
		return err
	}
}

func readByLongContext(conn *pgconn.PgConn) func() error {
	ctx, cancel := context.WithTimeout(context.Background(), tick)
	return func() error {
		_, err := conn.ReceiveMessage(ctx)
		if pgconn.Timeout(err) {
			cancel()
			ctx, cancel = context.WithTimeout(context.Background(), tick)
			return nil
		}
		return err
	}
}

// replay returns a connection on which msg arrives again and again.
func replay(b *testing.B, msg []byte) *pgconn.PgConn {
	b.Helper()
	chunk := bytes.Repeat(msg, 100) // or the writer's system calls would be what is measured
	l, err := (&net.ListenConfig{}).Listen(b.Context(), "tcp", "127.0.0.1:0")
	require.NoError(b, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		server, err := l.Accept()
		for err == nil {
			_, err = server.Write(chunk)
		}
		if server != nil {
			_ = server.Close()
		}
	}()
	client, err := (&net.Dialer{}).DialContext(b.Context(), "tcp", l.Addr().String())
	require.NoError(b, err)
	cfg, err := pgconn.ParseConfig("host=localhost user=u database=d sslmode=disable")
	require.NoError(b, err)
	conn, err := pgconn.Construct(&pgconn.HijackedConn{Conn: client, Config: cfg})
	require.NoError(b, err)
	b.Cleanup(func() { _ = client.Close(); _ = l.Close(); <-ended })
	return conn
}

// BenchmarkBacklog reads 50,000 events, one per transaction, from a real slot: once as they come, undecoded, for the speed of the server, once
// through Run into events.
func BenchmarkBacklog(b *testing.B) {
	const events = 50_000
	d := newDatabase(b, fmt.Sprintf(eventsTable, "public"))
	d.exec("SET synchronous_commit = off")
	d.exec("CREATE PROCEDURE fill(n int) LANGUAGE plpgsql AS $$ BEGIN FOR i IN 1..n LOOP INSERT INTO webhook_events (event_type, aggregate_id, " +
		"aggregate_type, event_data) VALUES ('order.created', gen_random_uuid(), 'order', jsonb_build_object('n', i, 'text', repeat('x', 200))); COMMIT; END LOOP; END $$")
	d.exec(fmt.Sprintf("CALL fill(%d)", events))
	d.exec("SET synchronous_commit = on")
	d.exec("SELECT pg_logical_emit_message(true, 'x', 'y')")
	done := errors.New("done")
	for _, decode := range []bool{false, true} {
		b.Run(fmt.Sprintf("events=%t", decode), func(b *testing.B) {
			for b.Loop() {
				s, err := Open(b.Context(), d.options())
				require.NoError(b, err)
				var plan *EventPlan
				n := 0
				err = s.Run(b.Context(), handler{change: func(_ context.Context, c *Change) (err error) {
					if n++; n == events {
						return done
					}
					if !decode {
						return nil
					}
					if plan == nil {
						if plan, err = NewEventPlan(c.Relation); err != nil {
							return err
						}
					}
					_, err = plan.Decode(&c.New)
					return err
				}}, func() LSN { return 0 })
				require.ErrorIs(b, err, done)
				require.NoError(b, s.Close(b.Context()))
			}
			b.ReportMetric(float64(events*b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}
