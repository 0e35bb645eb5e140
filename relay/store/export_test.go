package store

import (
	"context"

	"github.com/jackc/pgx/v5/pgxpool"
)

// Recording is the connection of Record.
func (s *Store) Recording() *pgxpool.Pool { return s.recording }

// Prepared is how many statements that connection is thought to have.
func (s *Store) Prepared(ctx context.Context) (int, error) {
	conn, err := s.recording.Acquire(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Release()
	return len(preparedOn(conn.Conn()).name), nil
}

// Crowded tells whether a claim has waited in vain for its turn.
func (s *Store) Crowded() bool { return s.crowded.Load() > 0 }

// PID is the server process that holds the lock.
func (l *HealLock) PID() uint32 { return l.tx.Conn().PgConn().PID() }

// Patience is how long the server waits for Keep, which is set to p where that is not empty.
func (l *HealLock) Patience(ctx context.Context, p string) (is string, err error) {
	err = l.tx.QueryRow(ctx, `SELECT set_config('idle_in_transaction_session_timeout', coalesce(nullif($1, ''), current_setting('idle_in_transaction_session_timeout')), true)`, p).Scan(&is)
	return is, err
}
