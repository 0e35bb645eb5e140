// Package guest works in sessions that belong to others as well. A pooler in transaction mode lends a session of the server for one transaction, and what is set
// for the session stays behind for the next client: an application would not find its tables any more. So what is set here holds for a transaction, and
// every statement has one.
package guest

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Conn is a connection whose statements all run under settings of their own, and that leaves the session as it was. It must be used by one goroutine at a time.
type Conn struct {
	conn            *pgx.Conn
	begin, settings string
	args            []any
}

// New makes one of a connection, which stays the caller's. begin is the statement that begins a transaction, and settings the one that makes settings with
// set_config(…, …, true), with its arguments.
func New(conn *pgx.Conn, begin, settings string, args ...any) *Conn {
	return &Conn{conn, begin, settings, args}
}

// Conn returns the connection itself.
func (c *Conn) Conn() *pgx.Conn { return c.conn }

// Begin begins a transaction under the settings.
func (c *Conn) Begin(ctx context.Context) (pgx.Tx, error) {
	tx, err := c.conn.BeginTx(ctx, pgx.TxOptions{BeginQuery: c.begin})
	if err != nil {
		return nil, err
	}
	if _, err := tx.Exec(ctx, c.settings, c.args...); err != nil {
		return nil, errors.Join(err, tx.Rollback(ctx))
	}
	return tx, nil
}

// SendBatch sends a batch as one transaction, or within the one that is under way.
func (c *Conn) SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults {
	if c.conn.PgConn().TxStatus() != 'I' {
		return c.conn.SendBatch(ctx, b)
	}
	all := &pgx.Batch{}
	all.Queue(c.begin)
	all.Queue(c.settings, c.args...)
	all.QueuedQueries = append(all.QueuedQueries, b.QueuedQueries...)
	all.Queue("COMMIT")
	r := &results{c.conn.SendBatch(ctx, all), ctx, c.conn}
	for range 2 {
		_, _ = r.Exec() // the next one has the error as well
	}
	return r
}

// Exec runs a statement.
func (c *Conn) Exec(ctx context.Context, sql string, args ...any) (tag pgconn.CommandTag, err error) {
	r := c.one(ctx, sql, args)
	tag, err = r.Exec()
	if end := r.Close(); err == nil {
		err = end
	}
	return tag, err
}

// Query runs a statement. Its transaction ends when the rows are closed.
func (c *Conn) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	r := c.one(ctx, sql, args)
	list, err := r.Query()
	if err != nil {
		list.Close()
		_ = r.Close() // it is the same error
		return list, err
	}
	return &rows{Rows: list, results: r}, nil
}

// QueryRow runs a statement for its first row.
func (c *Conn) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	list, err := c.Query(ctx, sql, args...)
	return &row{list, err}
}

func (c *Conn) one(ctx context.Context, sql string, args []any) pgx.BatchResults {
	b := &pgx.Batch{}
	b.Queue(sql, args...)
	return c.SendBatch(ctx, b)
}

// results are those of a transaction.
type results struct {
	pgx.BatchResults
	ctx  context.Context //nolint:containedctx // of the batch
	conn *pgx.Conn
}

// Close also ends the transaction where a statement has failed: the COMMIT behind it was not run then.
func (r *results) Close() error {
	err := r.BatchResults.Close()
	if !r.conn.IsClosed() && r.conn.PgConn().TxStatus() != 'I' {
		_, end := r.conn.Exec(r.ctx, "ROLLBACK")
		err = errors.Join(err, end)
	}
	return err
}

// rows are those of the only statement of a transaction.
type rows struct {
	pgx.Rows
	results pgx.BatchResults
	closed  bool
	err     error
}

// Next implements pgx.Rows.
func (r *rows) Next() bool {
	if r.Rows.Next() {
		return true
	}
	r.Close()
	return false
}

// Close implements pgx.Rows.
func (r *rows) Close() {
	r.Rows.Close()
	if !r.closed {
		r.closed, r.err = true, r.results.Close()
	}
}

// Err implements pgx.Rows.
func (r *rows) Err() error {
	if err := r.Rows.Err(); err != nil {
		return err
	}
	return r.err
}

// row is the first one.
type row struct {
	rows pgx.Rows
	err  error
}

// Scan implements pgx.Row.
func (r *row) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}
