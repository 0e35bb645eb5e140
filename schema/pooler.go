package schema

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// lendsSessions tells that a pooler in transaction mode is in the way, as far as that shows. It does when two of its clients have the same session, or one has
// several. Two clients of a server, or of a pooler in session mode, never do. A pooler with one idle session more gives that which was used last, as a rule, or
// each in turn.
func lendsSessions(ctx context.Context, conn *pgx.Conn) (lends bool, err error) {
	first, err := pid(ctx, conn)
	if err != nil || first == conn.PgConn().PID() { // a pooler makes up what it greets with
		return false, err
	}
	other, err := pgx.ConnectConfig(ctx, conn.Config())
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, closeConn(ctx, other)) }()
	for range 5 {
		lends, err = shares(ctx, conn, other, first)
		if lends || err != nil {
			return lends, err
		}
	}
	return false, nil
}

// shares tells that a connection does not have a session for itself, which was first before.
func shares(ctx context.Context, conn, other *pgx.Conn, first uint32) (yes bool, err error) {
	is, err := pid(ctx, conn)
	if err != nil || is != first {
		return err == nil, err
	}
	err = pgx.BeginFunc(ctx, other, func(tx pgx.Tx) error {
		its, err := pid(ctx, tx.Conn())
		if err != nil || its == first {
			yes = err == nil
			return err
		}
		is, err = pid(ctx, conn)
		yes = err == nil && is != first
		return err
	})
	return yes, err
}

func pid(ctx context.Context, conn *pgx.Conn) (pid uint32, err error) {
	err = conn.QueryRow(ctx, "SELECT pg_catalog.pg_backend_pid()").Scan(&pid)
	return pid, err
}
