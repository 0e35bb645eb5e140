package pgtest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// CreateDatabase creates an empty database.
func (s *Server) CreateDatabase(ctx context.Context) (name string, err error) {
	name = fmt.Sprintf("db%d", s.names.Add(1))
	if err := s.exec(ctx, "CREATE DATABASE "+name); err != nil {
		return "", fmt.Errorf("create database %s: %w", name, err)
	}
	return name, nil
}

// DropDatabase drops a database of CreateDatabase with its replication slots, whoever is still connected to it.
func (s *Server) DropDatabase(ctx context.Context, name string) error {
	err := s.exec(ctx, "ALTER DATABASE "+name+" ALLOW_CONNECTIONS false") // a client that reconnects stays out
	if err != nil {
		return fmt.Errorf("drop database %s: %w", name, err)
	}
	for {
		// DROP takes idle slots with it, but refuses while one is active, and FORCE does not end the client of a slot.
		err = s.exec(ctx, "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = '"+name+"'")
		if err == nil {
			err = s.exec(ctx, "DROP DATABASE "+name+" WITH (FORCE)")
		}
		const objectInUse = "55006"
		var pgErr *pgconn.PgError
		if err == nil {
			return nil
		}
		if !errors.As(err, &pgErr) || pgErr.Code != objectInUse {
			return fmt.Errorf("drop database %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("drop database %s: %w", name, errors.Join(err, ctx.Err()))
		case <-time.After(pollInterval):
		}
	}
}

// exec runs one statement in the database postgres.
func (s *Server) exec(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, sql)
	return errors.Join(err, conn.Close(ctx))
}
