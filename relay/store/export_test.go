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
