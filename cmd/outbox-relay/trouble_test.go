package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestTroubleStaysInItsTenant breaks one tenant in every way that a database lets an operator do, while deliveries are in flight, and looks each
// time whether the other tenant's next event arrives.
func TestTroubleStaysInItsTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t, "window:\n  hold: 500ms\nqueue:\n  poll: 100ms\n", func(outbox.UUID, string) int {
		<-time.After(20 * time.Millisecond) // so that something is in flight
		return http.StatusOK
	}, "sound", "sick")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s.asRunner(t)
	sound, sick := s.endpoint(t, "sound", 3), s.endpoint(t, "sick", 3)
	s.subscribe(t, "sound", sound, "order.created", "{}")
	s.subscribe(t, "sick", sick, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	arrived := 0
	goesOn := func(after string) {
		t.Helper()
		s.insertMany(t, "sound", "order.created", 1)
		arrived++
		s.receiver.await(ctx, t, "the other tenant's event after "+after, func() bool { return s.arrivedAt(sound) >= arrived })
	}
	state := func() (state string) {
		require.NoError(t, s.pool.QueryRow(ctx, `SELECT state FROM outbox_relay.tenants WHERE schema = 'sick'`).Scan(&state))
		return state
	}
	goesOn("nothing")

	// Rows that cannot be used match nothing, and their tenant's good ones go on.
	s.exec(t, `INSERT INTO sick.webhook_endpoints (name, endpoint_url, secret_token, custom_headers, created_by_user_id) VALUES
		('url', 'ftp://nowhere', 'x', '{}', gen_random_uuid()), ('header', $1, 'x', '{"Host": "a\r\nb"}', gen_random_uuid()), ('secret', $1, '', '{}', gen_random_uuid())`,
		s.receiver.URL)
	s.exec(t, `INSERT INTO sick.webhook_subscriptions (endpoint_id, event_type_id, event_type, event_filters)
		SELECT e.id, t.id, f.pattern, f.filter::jsonb FROM sick.webhook_endpoints e, sick.webhook_event_types t,
		(VALUES ('order.created', '{}'), ('order.created', '{"n": {"$nonsense": 1}}'), ('**order', '{}')) f (pattern, filter) WHERE e.name <> 'e2e' OR f.filter <> '{}'`)
	s.insertMany(t, "sick", "order.created", 1)
	s.receiver.await(ctx, t, "the tenant's own good endpoint", func() bool { return s.arrivedAt(sick) == 1 })
	goesOn("unusable rows")

	// A payload of 50 MB, and one of 3,000 levels.
	s.exec(t, `INSERT INTO sick.webhook_events (event_type, aggregate_id, aggregate_type, event_data) VALUES
		('order.created', gen_random_uuid(), 'order', jsonb_build_object('blob', repeat('x', 50000000))), ('order.created', gen_random_uuid(), 'order', $1::jsonb)`,
		strings.Repeat(`{"a":`, 3000)+"1"+strings.Repeat("}", 3000))
	s.receiver.await(ctx, t, "large and deep payloads", func() bool { return s.arrivedAt(sick) == 3 })
	goesOn("large and deep payloads")

	// An event deleted, then all endpoints truncated, while deliveries are in flight.
	s.insertMany(t, "sick", "order.created", 200)
	s.exec(t, `DELETE FROM sick.webhook_events`)
	s.receiver.await(ctx, t, "events that are gone from their table", func() bool { return s.arrivedAt(sick) == 203 })
	s.insertMany(t, "sick", "order.created", 200)
	s.cascade(t, `TRUNCATE sick.webhook_endpoints CASCADE`)
	goesOn("a truncated table")
	require.Equal(t, "active", state())

	// A right taken away: the tenant is suspended, and what it missed is queued when it is resumed, for whoever subscribes by then.
	s.exec(t, `DELETE FROM sick.webhook_events`)
	sick = s.endpoint(t, "sick", 3)
	s.subscribe(t, "sick", sick, "order.created", "{}")
	s.exec(t, `REVOKE INSERT ON sick.webhook_deliveries FROM outbox_relay_runner`)
	s.insertMany(t, "sick", "order.created", 50)
	s.receiver.await(ctx, t, "the tenant's suspension", func() bool { return state() == "suspended" })
	s.insertMany(t, "sick", "order.created", 50)
	goesOn("a right taken away")
	s.exec(t, `GRANT INSERT ON sick.webhook_deliveries TO outbox_relay_runner`)
	s.command(t, "tenants", "resume", "sick")
	s.receiver.await(ctx, t, "what the tenant missed", func() bool { return s.arrivedAt(sick) == 100 })

	// A required column gone under the relay.
	s.exec(t, `ALTER TABLE sick.webhook_events RENAME COLUMN aggregate_type TO kind`)
	s.exec(t, `INSERT INTO sick.webhook_events (event_type, aggregate_id, kind) VALUES ('order.created', gen_random_uuid(), 'order')`)
	s.receiver.await(ctx, t, "the tenant's suspension", func() bool { return state() == "suspended" })
	goesOn("a column gone")
	s.exec(t, `ALTER TABLE sick.webhook_events RENAME COLUMN kind TO aggregate_type`)
	s.command(t, "tenants", "resume", "sick")
	s.receiver.await(ctx, t, "the event without the column", func() bool { return s.arrivedAt(sick) == 101 })

	// The whole tenant dropped while deliveries are in flight.
	s.insertMany(t, "sick", "order.created", 500)
	s.cascade(t, `DROP SCHEMA sick CASCADE`)
	goesOn("a dropped schema")
	s.exec(t, `SELECT outbox_relay.remove_tenant('sick')`) // by its owner: the relay's own role may not
	goesOn("the tenant's removal")
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Empty(t, s.receiver.bad)
	require.Equal(t, arrived, s.recorded(t, []string{"sound"}))
}

// cascade runs a statement that locks tables from the referenced to the referencing one, as TRUNCATE ... CASCADE does, or all of a
// schema. A transaction of the relay locks them in an order of its own, so that the server may have to break a deadlock: the relay or the operator, whoever it
// chose, says the same again.
func (s *site) cascade(t *testing.T, sql string) {
	t.Helper()
	for {
		_, err := s.pool.Exec(t.Context(), sql)
		if deadlock := (*pgconn.PgError)(nil); errors.As(err, &deadlock) && deadlock.Code == "40P01" {
			t.Log("deadlock: ", sql)
			continue
		}
		require.NoError(t, err, sql)
		return
	}
}
