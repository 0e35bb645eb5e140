package wal

import (
	"context"
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"
)

// logAt sends messages as if the server had done so at a time.
func (p *peer) logAt(sent time.Time, messages ...[]byte) {
	for _, m := range messages {
		d := binary.BigEndian.AppendUint64(append([]byte{'w'}, make([]byte, 16)...), uint64(sent.UnixMicro()-epochMicros))
		p.send(&pgproto3.CopyData{Data: append(d, m...)})
	}
}

// committed returns a transaction of so many rows, committed at a time.
func committed(at time.Time, rows int) (messages [][]byte) {
	rel, values := eventRow()
	begin := beginMessage(5)
	binary.BigEndian.PutUint64(begin[1+8:], uint64(at.UnixMicro()-epochMicros))
	messages = append(messages, begin, relationMessage(rel))
	for range rows {
		messages = append(messages, changeMessage(kindInsert, rel, values))
	}
	return append(messages, commitMessage(5, 6))
}

// TestLockstep: the reader leaves the server alone for a moment where it had to wait for a server that is behind, and at no other time.
func TestLockstep(t *testing.T) {
	t.Parallel()
	const gap = 100 * time.Microsecond // between what the server sends
	for name, c := range map[string]struct {
		late  func(i int) time.Duration // how long before it was sent a transaction had been committed
		rests bool
	}{
		"in time":           {func(int) time.Duration { return time.Millisecond }, false},
		"behind":            {func(int) time.Duration { return 5 * time.Millisecond }, true},
		"late now and then": {func(i int) time.Duration { return time.Duration(i%lateInRow) * 5 * time.Millisecond }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := newPeer(t, Options{}, time.Hour)
				var arrived []time.Time
				ended := p.run(handler{begin: func(Begin) error { arrived = append(arrived, time.Now()); return nil }})
				for i := range 40 {
					p.logAt(time.Now(), committed(time.Now().Add(-c.late(i)), 1)...)
					time.Sleep(gap)
				}
				time.Sleep(2 * tick)
				require.Error(t, p.end(ended))
				rested := 0
				for i := 1; i < len(arrived); i++ {
					if arrived[i].Sub(arrived[i-1]) >= rest {
						rested++
					}
				}
				if c.rests {
					require.Greater(t, rested, 10)
				} else {
					require.Zero(t, rested)
				}
				require.False(t, p.stream.lockstep.behind, "nothing has come since")
			})
		})
	}
}

// A large transaction is sent for long after its commit.
func TestLockstepWithinATransaction(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		p := newPeer(t, Options{}, time.Hour)
		var gaps []time.Duration
		last := time.Now()
		ended := p.run(handler{change: func(context.Context, *Change) error {
			gaps = append(gaps, time.Since(last))
			last = time.Now()
			return nil
		}})
		for _, m := range committed(time.Now(), 60) {
			p.logAt(time.Now(), m)
			time.Sleep(100 * time.Microsecond)
		}
		synctest.Wait()
		require.Error(t, p.end(ended))
		for i, d := range gaps[1:] {
			if d >= rest {
				require.Greater(t, i, int(lateAfter/(100*time.Microsecond))-5, "not before it was late")
				return
			}
		}
		require.Fail(t, "no rest")
	})
}
