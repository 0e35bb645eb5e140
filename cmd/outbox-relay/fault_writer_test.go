package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
)

// strictKind is written by the first writer alone, so that the order of all its events is known.
const strictKind = "ledger.entry"

// A faultWriter commits transactions of a few events, one after the other, whatever happens to the server.
type faultWriter struct {
	o       *oracle
	pool    *pgxpool.Pool
	rnd     *rand.Rand
	number  int
	tenants []string
	keys    []outbox.UUID
	place   int
	pace    time.Duration // between transactions, on average
	least   int           // events in a transaction; zero: one
	size    int           // and at most so many more
	open    time.Duration // how long a transaction stays open before it ends
	twoFold string        // the prefix of names for two-phase commits; empty: plain ones
}

func newFaultWriter(o *oracle, pool *pgxpool.Pool, seed uint64, number int, tenants []string) *faultWriter {
	w := &faultWriter{o: o, pool: pool, rnd: rand.New(rand.NewPCG(seed, uint64(number))), number: number, tenants: tenants, pace: 8 * time.Millisecond, size: 4}
	for range 3 {
		w.keys = append(w.keys, outbox.NewUUID())
	}
	return w
}

// run goes on until stop is closed.
func (w *faultWriter) run(ctx context.Context, stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		case <-ctx.Done():
			return nil // the run is over, and says why
		case <-time.After(time.Duration(w.rnd.Int64N(int64(2*w.pace) + 1))):
		}
		if err := w.transaction(ctx, stop); err != nil && ctx.Err() == nil {
			return err
		}
	}
}

// transaction writes one. A server that is away ends it, which is no error.
func (w *faultWriter) transaction(ctx context.Context, stop <-chan struct{}) error {
	begun := time.Now()
	conn, err := w.pool.Acquire(ctx)
	if err != nil {
		return w.tolerate(err)
	}
	defer conn.Release()
	var xid string
	tenant := w.tenants[w.rnd.IntN(len(w.tenants))]
	if _, err := conn.Exec(ctx, "BEGIN"); err != nil {
		return w.tolerate(err)
	}
	if err := conn.QueryRow(ctx, "SELECT pg_current_xact_id()::text").Scan(&xid); err != nil {
		return w.abandon(ctx, conn, err)
	}
	var list []*entry
	for range max(w.least, 1) + w.rnd.IntN(w.size) {
		e := w.event(tenant, begun)
		w.o.begin(e)
		kept, err := w.insert(ctx, conn, e)
		if err != nil {
			return w.abandon(ctx, conn, err)
		}
		if kept {
			list = append(list, e)
		}
	}
	if w.open > 0 {
		select {
		case <-stop:
		case <-ctx.Done():
		case <-time.After(w.open):
		}
	}
	if w.rnd.IntN(8) == 0 {
		_, err := conn.Exec(ctx, "ROLLBACK")
		return w.tolerate(err)
	}
	committed, err := w.end(ctx, conn, xid, list)
	if err != nil || !committed {
		return err
	}
	end, err := w.position(ctx)
	if err != nil {
		return err
	}
	w.o.commit(list, end)
	return nil
}

func (w *faultWriter) event(tenant string, begun time.Time) *entry {
	w.place++
	e := &entry{
		id: outbox.NewUUID(), tenant: tenant, kind: e2eTypes[w.rnd.IntN(len(e2eTypes))], amount: w.rnd.IntN(100),
		key: w.keys[w.rnd.IntN(len(w.keys))], writer: w.number, place: w.place, begun: begun,
	}
	if w.number == 0 && w.rnd.IntN(6) == 0 {
		e.kind = strictKind
	}
	return e
}

// insert writes one event, now and then in a savepoint, which may be rolled back.
func (w *faultWriter) insert(ctx context.Context, conn *pgxpool.Conn, e *entry) (kept bool, err error) {
	sub := w.rnd.IntN(6) == 0
	if sub {
		if _, err := conn.Exec(ctx, "SAVEPOINT sub"); err != nil {
			return false, err
		}
	}
	_, err = outbox.Insert(ctx, conn, e.tenant, outbox.Event{
		ID: e.id, Type: e.kind, AggregateID: e.key, AggregateType: "order",
		Data: fmt.Appendf(nil, `{"amount": %d, "note": "%s"}`, e.amount, strings.Repeat("x", w.rnd.IntN(300))),
	})
	if err != nil || !sub {
		return err == nil, err
	}
	if w.rnd.IntN(2) == 0 {
		_, err := conn.Exec(ctx, "ROLLBACK TO SAVEPOINT sub")
		return false, err
	}
	_, err = conn.Exec(ctx, "RELEASE SAVEPOINT sub")
	return true, err
}

// end commits, and finds out what has become of it if the server did not say.
func (w *faultWriter) end(ctx context.Context, conn *pgxpool.Conn, xid string, list []*entry) (committed bool, err error) {
	if w.twoFold != "" {
		return w.endTwoFold(ctx, conn, xid, list)
	}
	_, err = conn.Exec(ctx, "COMMIT")
	if err == nil {
		return true, nil
	}
	return w.ask(ctx, xid, list)
}

func (w *faultWriter) endTwoFold(ctx context.Context, conn *pgxpool.Conn, xid string, list []*entry) (committed bool, err error) {
	name := fmt.Sprintf("%s_%d_%d", w.twoFold, w.number, w.place)
	if _, err := conn.Exec(ctx, "PREPARE TRANSACTION '"+name+"'"); err != nil && !conn.Conn().IsClosed() {
		return false, w.abandon(ctx, conn, err)
	} // of a connection that broke, the verdict finds out whether it was prepared
	verdict := "COMMIT PREPARED '"
	if w.rnd.IntN(4) == 0 {
		verdict = "ROLLBACK PREPARED '"
	}
	for {
		_, err := w.pool.Exec(ctx, verdict+name+"'")
		var pg *pgconn.PgError
		switch {
		case err == nil:
			return verdict[0] == 'C', nil
		case errors.As(err, &pg) && pg.Code == "42704": // said before, and done without an answer
			return w.ask(ctx, xid, list)
		case ctx.Err() != nil:
			return false, ctx.Err()
		}
		<-time.After(20 * time.Millisecond)
	}
}

// ask asks the server what has become of a transaction, until it says. A crash may have given the number of one that was never written to another one:
// that it has ended is told by the number, how it has ended by its rows.
func (w *faultWriter) ask(ctx context.Context, xid string, list []*entry) (committed bool, err error) {
	w.o.mu.Lock()
	w.o.unclear++
	w.o.mu.Unlock()
	if len(list) == 0 {
		return false, nil
	}
	for {
		var status *string
		err := w.pool.QueryRow(ctx, "SELECT pg_xact_status($1::text::xid8)", xid).Scan(&status)
		var pg *pgconn.PgError
		future := errors.As(err, &pg) && pg.Code == "22023"
		if future || err == nil && (status == nil || *status != "in progress") {
			err = w.pool.QueryRow(ctx, "SELECT EXISTS (SELECT FROM "+pgx.Identifier{list[0].tenant, "webhook_events"}.Sanitize()+" WHERE id = $1)", list[0].id).Scan(&committed)
			if err == nil {
				return committed, nil
			}
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		<-time.After(20 * time.Millisecond)
	}
}

// position reads where the log has got to.
func (w *faultWriter) position(ctx context.Context) (pglogrepl.LSN, error) {
	for {
		var text string
		err := w.pool.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&text)
		if err == nil {
			return pglogrepl.ParseLSN(text)
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		<-time.After(20 * time.Millisecond)
	}
}

func (w *faultWriter) abandon(ctx context.Context, conn *pgxpool.Conn, err error) error {
	if !conn.Conn().IsClosed() {
		_, _ = conn.Exec(ctx, "ROLLBACK")
	}
	return w.tolerate(err)
}

// tolerate lets what a fault of the server leads to pass, and nothing else.
func (w *faultWriter) tolerate(err error) error {
	var pg *pgconn.PgError
	if err == nil || !errors.As(err, &pg) {
		return nil // a connection that broke
	}
	switch pg.Code[:2] {
	case "57", "53", "08": // operator intervention, resources, connection
		return nil
	case "40", "55": // deadlock, lock: the application says it again
		return nil
	}
	return err
}
