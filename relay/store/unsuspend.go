package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Unsuspend ends the suspension of a tenant, if outcomes of it can be recorded: what it missed is queued while it is active, and all of that would be sent
// each time that it is resumed, to no end, were they lost again. It is paused afterwards if an operator has paused it; empty: it was not suspended any more. The
// error tells what is still wrong with it, and that nothing has changed.
func (s *Store) Unsuspend(ctx context.Context, tenant string) (state string, err error) {
	conn, err := s.pool.Acquire(ctx)
	if err == nil {
		defer conn.Release()
		state, err = s.unsuspend(ctx, conn.Conn(), tenant)
		err = inTransaction(ctx, conn.Conn(), err)
	}
	if err != nil {
		return "", fmt.Errorf("resume tenant %q: %w", tenant, err)
	}
	return state, nil
}

func (s *Store) unsuspend(ctx context.Context, conn *pgx.Conn, tenant string) (state string, err error) {
	if _, err := conn.Exec(ctx, "BEGIN"); err != nil {
		return "", err
	}
	// First, since it makes good what has been changed about the tables.
	if err := conn.QueryRow(ctx, `SELECT coalesce(outbox_relay.unsuspend_tenant($1::text), '')`, tenant).Scan(&state); err != nil {
		return "", err
	}
	if state != "" {
		if err := s.tryOutcomes(ctx, conn, tenant); err != nil {
			return "", err
		}
	}
	_, err = conn.Exec(ctx, "COMMIT")
	return state, err
}

// unrecorded is an event, one of the latest, with an endpoint that has no delivery of it.
const unrecorded = `SELECT v.id, e.id FROM (SELECT v.id FROM {tenant}.webhook_events v WHERE v.xid IS NOT NULL ORDER BY v.xid DESC LIMIT 100) v
CROSS JOIN {tenant}.webhook_endpoints e
WHERE NOT EXISTS (SELECT FROM {tenant}.webhook_deliveries d WHERE d.webhook_event_id = v.id AND d.webhook_endpoint_id = e.id) LIMIT 1`

// tryOutcomes records one outcome of each kind, as the recorder does, and takes it back. Where there is nothing that one could be of, it does nothing.
func (s *Store) tryOutcomes(ctx context.Context, conn *pgx.Conn, tenant string) error {
	if _, err := conn.Exec(ctx, "SET LOCAL lock_timeout = '400ms'; SET CONSTRAINTS ALL IMMEDIATE; SAVEPOINT outcomes"); err != nil {
		return err
	}
	d := Delivery{ID: outbox.NewUUID(), Tenant: tenant, URL: "https://example.com/", Method: "POST", Attempts: 1}
	err := conn.QueryRow(ctx, forTenant(unrecorded, tenant)).Scan(&d.EventID, &d.EndpointID)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	m := delivery.Encode(nil, delivery.FormatStandard, &outbox.Event{ID: d.EventID, Data: []byte("{}")}, "")
	d.Message = &m
	w := writer{owner: outbox.NewUUID(), slot: s.slot}
	for _, o := range []Outcome{
		{Delivery: &d, Status: Success, Result: delivery.Result{Class: delivery.ClassSuccess, Status: 200}},
		{Delivery: &d, Status: Retrying, Result: delivery.Result{Class: delivery.Class5xx, Status: 500, Err: "none"}},
		{Delivery: &d, Status: Failed, Result: delivery.Result{Class: delivery.Class5xx, Status: 500, Err: "none"}},
	} {
		o.Attempted, o.Result.Started = true, time.Now()
		if err := w.tryTenant(ctx, conn, &tenantBatch{tenant: tenant, outcomes: []*Outcome{&o}}); err != nil {
			return fmt.Errorf("an outcome (%s) could not be recorded: %w", o.Status, err)
		}
		if _, err := conn.Exec(ctx, "ROLLBACK TO SAVEPOINT outcomes"); err != nil {
			return err
		}
	}
	return nil
}
