package schema

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/schema/guest"
)

const (
	// installLock is the advisory lock under which one process at a time changes a database.
	installLock = 5270932107463862817
	// lockTimeout bounds one wait for a table lock, because writers queue up behind the waiter. A step may wait three times, for a table and
	// for those it references, and still be done within a second.
	lockTimeout = 300 * time.Millisecond
)

// installer is the connection that the work on a database is done on.
type installer struct {
	conn     *guest.Conn
	progress func(step string)
}

// install runs work under the install lock.
func install(ctx context.Context, dsn string, progress func(string), work func(*installer) error) (err error) {
	if progress == nil {
		progress = func(string) {}
	}
	lock, err := takeLock(ctx, dsn, progress)
	if err != nil {
		return err
	}
	defer func() {
		if lost := lock.release(ctx); err == nil {
			err = lost
		}
	}()
	conn, err := connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, conn.Conn())) }()
	return work(&installer{conn: conn, progress: progress})
}

// lock is the install lock. It is held by a transaction, on a connection of its own: one that a session holds stays behind in the pool of a pooler that lends
// sessions by the transaction, and everybody would wait for it for ever.
type lock struct {
	conn *pgx.Conn
	tx   pgx.Tx
}

// The transaction does nothing else. In this mode it has no snapshot between two statements, and it has no number: nothing waits for it, be it a concurrent
// index build or the making of a slot. No timeout of an administrator's ends it; pg_settings leaves out what this server's version does not know.
const (
	lockBegin    = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY"
	lockSettings = `SELECT pg_catalog.set_config(s.name, '0', true) FROM pg_catalog.pg_settings s
		WHERE s.name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')`
)

// takeLock polls for it: who sleeps in pg_advisory_lock holds a snapshot, for which the concurrent index build of the lock's holder would wait for ever.
func takeLock(ctx context.Context, dsn string, progress func(string)) (*lock, error) {
	conn, err := dial(ctx, dsn)
	if err != nil {
		return nil, err
	}
	c := guest.New(conn, lockBegin, lockSettings)
	for told := int32(-1); ; {
		tx, holder, err := tryLock(ctx, c)
		switch {
		case err != nil:
			return nil, errors.Join(opError("take the install lock", err), closeConn(ctx, conn))
		case tx != nil:
			return &lock{conn, tx}, nil
		case holder != told && holder != 0: // 0: it has just ended
			told = holder
			progress(fmt.Sprintf("waiting for another process that is changing this database: its server process is %[1]d "+
				"(hint: if none is at work, something has left the lock behind, and SELECT pg_terminate_backend(%[1]d) ends it)", holder))
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return nil, errors.Join(fmt.Errorf("wait for the install lock: %w", err), closeConn(ctx, conn))
		}
	}
}

// tryLock returns the transaction that holds the lock, or which server process holds it.
func tryLock(ctx context.Context, c *guest.Conn) (held pgx.Tx, holder int32, err error) {
	tx, err := c.Begin(ctx)
	if err != nil {
		return nil, 0, err
	}
	// In the simple protocol: a portal of the other one would stay open, and the snapshot with it.
	got, err := c.Conn().PgConn().Exec(ctx, fmt.Sprintf("SELECT pg_catalog.pg_try_advisory_xact_lock(%d)", int64(installLock))).ReadAll()
	if err != nil {
		return nil, 0, err
	}
	if string(got[0].Rows[0][0]) == "t" {
		return tx, 0, nil
	}
	err = tx.QueryRow(ctx, `SELECT coalesce(pg_catalog.min(l.pid), 0) FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database
		WHERE d.datname = pg_catalog.current_database() AND l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
		AND (l.classid::bigint << 32) + l.objid::bigint = $1`, int64(installLock)).Scan(&holder)
	return nil, holder, errors.Join(err, tx.Rollback(ctx))
}

// release gives it up, also when ctx is over. The error is that it was lost before.
func (l *lock) release(ctx context.Context) error {
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	err := l.tx.Commit(end)
	_ = closeConn(ctx, l.conn) // nothing is left in it
	if err == nil {
		return nil
	}
	return &Error{
		Op: "keep the install lock", Err: fmt.Errorf("it was lost: %w", err),
		Hint: "All is done, but another process may have changed the database at the same time: run this again. It is a transaction that is idle: look for what ends such ones, as a pooler may.",
	}
}

// short runs statements in one transaction that waits briefly for locks, and repeats it until it gets them or ctx ends. Between two
// tries it waits at least as long as it may have held writers up.
func (in *installer) short(ctx context.Context, op string, statements func(tx pgx.Tx) error) error {
	return in.patiently(ctx, op, func() error {
		return pgx.BeginFunc(ctx, in.conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL lock_timeout = %d", lockTimeout.Milliseconds())); err != nil {
				return err
			}
			return statements(tx)
		})
	})
}

// patiently repeats what takes its locks quickly or not at all until it has them.
func (in *installer) patiently(ctx context.Context, op string, do func() error) error {
	for pause := lockTimeout; ; pause = min(2*pause, 5*time.Second) {
		err := do()
		if err == nil || !lockConflict(err) {
			return opError(op, err)
		}
		in.progress(op + ": an open transaction holds the lock, trying again")
		if wait := sleep(ctx, pause+rand.N(pause/2)); wait != nil { //nolint:gosec // Jitter is no secret.
			return errors.Join(opError(op, err), wait)
		}
	}
}

// lockConflict tells errors that go away when other transactions end: lock timeout and deadlock.
func lockConflict(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (pg.Code == "55P03" || pg.Code == "40P01")
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
