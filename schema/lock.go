package schema

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// installLock is the advisory lock under which one process at a time changes a database.
	installLock = 5270932107463862817
	// lockTimeout bounds one wait for a table lock, because writers queue up behind the waiter. A step may wait three times, for a table and
	// for those it references, and still be done within a second.
	lockTimeout = 300 * time.Millisecond
)

// installer holds the install lock of a database, and the connection that the work is done on.
type installer struct {
	conn     *pgx.Conn
	progress func(step string)
}

// install runs work under the install lock. It polls for it: a session that sleeps in pg_advisory_lock holds a snapshot, for which the
// concurrent index build of the lock's holder would wait for ever.
func install(ctx context.Context, dsn string, progress func(string), work func(*installer) error) (err error) {
	conn, err := connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, conn)) }()
	if progress == nil {
		progress = func(string) {}
	}
	for said := false; ; said = true {
		var got bool
		if err := conn.QueryRow(ctx, "SELECT pg_try_advisory_lock($1)", int64(installLock)).Scan(&got); err != nil {
			return opError("take the install lock", err)
		}
		if got {
			return work(&installer{conn: conn, progress: progress})
		}
		if !said {
			progress("waiting for another process that is changing this database")
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return fmt.Errorf("wait for the install lock: %w", err)
		}
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
