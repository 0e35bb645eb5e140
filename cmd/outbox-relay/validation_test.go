package main

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// fates are what became of the events at an endpoint, by event: the error code of a dead letter, else the status.
func (s *site) fates(ctx context.Context, t *testing.T, endpoint outbox.UUID) map[outbox.UUID]string {
	t.Helper()
	rows, err := s.pool.Query(ctx, `SELECT d.webhook_event_id, CASE d.delivery_status WHEN 'failed' THEN d.error_code || coalesce(' ' || nullif(l.last_error_code, d.error_code), '')
		ELSE d.delivery_status END FROM acme.webhook_deliveries d LEFT JOIN acme.webhook_dead_letters l ON l.delivery_id = d.id WHERE d.webhook_endpoint_id = $1`, endpoint)
	require.NoError(t, err)
	defer rows.Close()
	fates := make(map[outbox.UUID]string)
	for rows.Next() {
		var event outbox.UUID
		var fate string
		require.NoError(t, rows.Scan(&event, &fate))
		fates[event] = fate
	}
	require.NoError(t, rows.Err())
	return fates
}

// TestValidation: what breaks the bounds of the configuration is a dead letter or an invalid endpoint, with its reason; everything around it is delivered, and
// what the payload holds is nowhere but in the dead letter.
func TestValidation(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s := newSite(t, "validation:\n  profile: production\n  max_depth: 3\n  max_payload: 4KiB\n  payload_schema: enforce\nqueue:\n  poll: 100ms\n",
		func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	httpToo := "OUTBOX_RELAY_NETWORK_HTTPS_ONLY=false"
	good, slow := s.endpoint(t, "acme", 0), s.endpoint(t, "acme", 0)
	s.exec(t, `UPDATE acme.webhook_endpoints SET retry_backoff_seconds = 5, delivery_order = CASE id WHEN $1 THEN 'strict' ELSE 'none' END`, good)
	s.exec(t, `UPDATE acme.webhook_endpoints SET timeout_seconds = 61 WHERE id = $1`, slow)
	for _, kind := range []string{"order.created", "Order Made"} {
		s.subscribe(t, "acme", good, kind, "{}")
		s.subscribe(t, "acme", slow, kind, "{}")
	}
	schema := func(text any) {
		s.exec(t, `UPDATE acme.webhook_event_types SET payload_schema = $1 WHERE event_type = 'order.created'`, text)
	}
	schema(`{"type": "object", "properties": {"amount": {"type": "number"}}}`)
	want := make(map[outbox.UUID]string)
	commit := func(kind, data, fate string) {
		id := outbox.NewUUID()
		s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data) VALUES ($1, $2, $1, 'order', $3)`, id, kind, data)
		want[id] = fate
	}
	await := func(what string, endpoint outbox.UUID, fates map[outbox.UUID]string) {
		s.receiver.await(ctx, t, what, func() bool { return len(s.fates(ctx, t, endpoint)) >= len(fates) })
		assert.Equal(t, fates, s.fates(ctx, t, endpoint), what)
	}

	p := startBinary(t, binary(t), s.config, httpToo)
	fill := func(n int) string {
		return fmt.Sprintf(`{"note":%q}`, strings.Repeat("x", n-len(`{"note":""}`)-len("{}")))
	}
	commit("order.created", `{"amount": 1}`, "success")
	commit("order.created", `{"a": {"b": [1]}}`, "success")
	commit("order.created", `{"a": {"b": [{"planted-secret": 1}]}}`, "event_invalid")
	commit("order.created", fill(4096), "success")
	commit("order.created", fill(4097), "event_invalid")
	commit("Order Made", `{}`, "event_invalid")
	commit("order.created", `{"amount": "planted-secret"}`, "schema_invalid")
	commit("order.created", `{"amount": 2}`, "success")
	await("each event has its fate", good, want)

	// The log carries changes of the schema in the order of the commits.
	schema(`{"properties": {"planted-secret": false}}`)
	commit("order.created", `{"planted-secret": 1}`, "schema_invalid")
	schema(`{"$ref": "https://example.com/schema.json"}`)
	commit("order.created", `{"amount": "planted-secret"}`, "success")
	commit("order.created", `{"amount": "planted-secret", "again": true}`, "success")
	schema(nil)
	commit("order.created", `{"amount": "planted-secret", "once": "more"}`, "success")
	await("the schema has changed", good, want)
	assert.Empty(t, s.fates(ctx, t, slow))

	// An endpoint that wants what was before: its rows are made from the table.
	late := s.endpoint(t, "acme", 0)
	s.exec(t, `UPDATE acme.webhook_endpoints SET retry_backoff_seconds = 5 WHERE id = $1`, late)
	s.subscribe(t, "acme", late, "order.created", "{}")
	s.exec(t, `SELECT outbox_relay.recover_endpoint('acme', $1, now() - interval '1 hour')`, late)
	recovered := make(map[string]int)
	s.receiver.await(ctx, t, "recovery", func() bool {
		clear(recovered)
		for _, fate := range s.fates(ctx, t, late) {
			recovered[fate]++
		}
		return recovered["event_invalid"] == 2 && recovered["success"] == len(want)-3
	})

	// Whoever replays a dead letter wants it sent as it is.
	s.exec(t, `SELECT outbox_relay.replay('acme', $1)`, good)
	s.receiver.await(ctx, t, "replay", func() bool {
		n := 0
		for _, fate := range s.fates(ctx, t, good) {
			if fate == "success" {
				n++
			}
		}
		return n == len(want)
	})
	_, err := p.stop(t)
	require.NoError(t, err)

	log := p.said(t)
	assert.NotContains(t, log, "planted-secret")
	assert.Contains(t, log, "use 5 to 60, see validation.min_timeout and max_timeout")
	assert.Equal(t, 1, strings.Count(log, "events of the type are not held against it"), "a schema that cannot be used is told of once")
	assert.Regexp(t, `an event is not valid.*code"?[=:]"?event_invalid.*sent"?[=:]false`, log)
	assert.Regexp(t, `an event is not valid.*code"?[=:]"?schema_invalid.*sent"?[=:]false`, log)
	var reasons string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT string_agg(last_error, E'\n') FROM acme.webhook_dead_letters`).Scan(&reasons))
	assert.NotContains(t, reasons, "secret\": 1")
	for _, reason := range []string{
		"Data: is nested more than 3 deep; make it flatter", "Data: has 4097 bytes together with Metadata, more than 4096; ",
		`Type: "Order Made" has one segment; `, "payload_schema: the payload does not match #/properties/amount/type",
	} {
		assert.Contains(t, reasons, reason)
	}

	schema(`{"type": 5}`)
	o := invoke(t, []string{httpToo}, "check", "--config", s.config)
	assert.Contains(t, o.out, "ok    validation: profile production, payload_schema enforce\n")
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_endpoints `+slow.String()+`: timeout_seconds 61: use 5 to 60, .* → it is left out`, o.out)
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_event_types \S+: Type: "Order Made" has one segment; .* → its events become dead letters`, o.out)
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_event_types \S+: payload_schema: .* → change it, or set it to NULL`, o.out)
	assert.NotContains(t, o.out, good.String())
}

// TestSchemasThatOnlyWarn: the event is sent, counted, and told of without its payload.
func TestSchemasThatOnlyWarn(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	s := newSite(t, "validation:\n  payload_schema: warn\n", func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	endpoint := s.endpoint(t, "acme", 0)
	s.subscribe(t, "acme", endpoint, "order.created", "{}")
	s.exec(t, `UPDATE acme.webhook_event_types SET payload_schema = '{"required": ["amount"]}'`)
	p := startRelay(t, s.config)
	for range 3 {
		s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
			VALUES (gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{"x": "planted-secret"}')`)
	}
	s.receiver.await(ctx, t, "all of them", func() bool { return s.receiver.pairs() == 3 })
	_, err := p.stop(t)
	require.NoError(t, err)
	log := p.said(t)
	assert.Regexp(t, `an event is not valid.*code"?[=:]"?schema_invalid.*sent"?[=:]true`, log)
	assert.Contains(t, log, "payload does not match #/required")
	assert.NotContains(t, log, "planted-secret")
}

// TestFiltersAreBounded: an event that filters would look at for too long is a dead letter for those whose filter was not asked, and holds up nobody.
func TestFiltersAreBounded(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	s := newSite(t, "", func(outbox.UUID, string) int { return http.StatusOK }, "acme")
	all, some := s.endpoint(t, "acme", 0), s.endpoint(t, "acme", 0)
	var keys []string
	for i := range 500 {
		keys = append(keys, fmt.Sprintf(`{"in.key%d": 1}`, i))
	}
	s.subscribe(t, "acme", all, "order.created", "{}")
	s.subscribe(t, "acme", some, "order.created", `{"$or": [`+strings.Join(keys, ",")+`]}`)
	p := startBinary(t, binary(t), s.config)
	commit := func(data string) (id outbox.UUID) {
		id = outbox.NewUUID()
		s.exec(t, `INSERT INTO acme.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data) VALUES ($1, 'order.created', $1, 'order', $2)`, id, data)
		return id
	}
	large := commit(`{"in": {"note": "` + strings.Repeat("x", 600_000) + `", "key499": 1}}`)
	small, other := commit(`{"in": {"key499": 1}}`), commit(`{"in": {"key500": 1}}`)
	s.receiver.await(ctx, t, "all", func() bool { return len(s.fates(ctx, t, all)) == 3 && len(s.fates(ctx, t, some)) == 2 })
	assert.Equal(t, map[outbox.UUID]string{large: "success", small: "success", other: "success"}, s.fates(ctx, t, all))
	assert.Equal(t, map[outbox.UUID]string{large: "event_invalid", small: "success"}, s.fates(ctx, t, some))
	var reason string
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT last_error FROM acme.webhook_dead_letters`).Scan(&reason))
	assert.Contains(t, reason, "for one event all filters walk over 256MiB of JSON at most")
	_, err := p.stop(t)
	require.NoError(t, err)
	assert.Regexp(t, `an event is not valid.*event_invalid`, p.said(t))
}
