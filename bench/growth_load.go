package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/neo-commons/outbox-relay/schema"
)

// together is the number of tenants that are added in one transaction, and part that of the rows of a load that are written at once.
const (
	together = 50
	part     = 100_000
)

// growing is a contender: relays under a load.
type growing struct {
	*stage
	load load

	progress io.Writer
}

func name(tenant int) string { return fmt.Sprintf("t%d", tenant) }

// found makes the tenants with what they have, and what waits in the queue.
func (g *growing) found(ctx context.Context) error {
	if err := schema.Migrate(ctx, g.dsn, schema.Options{Slot: schema.Slot}); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	if err := g.exec(ctx, g.noteSQL()); err != nil {
		return err
	}
	for from := 0; from < g.load.tenants; from += together {
		var b strings.Builder
		b.WriteString("SET jit = off;") // compiling the checks of a tenant takes longer than all they do
		for i := from; i < min(from+together, g.load.tenants); i++ {
			b.WriteString(g.tenantSQL(name(i)))
		}
		b.WriteString("RESET jit")
		if err := g.exec(ctx, b.String()); err != nil { // a transaction, as it has no parameters
			return fmt.Errorf("add tenants from %s on: %w", name(from), err)
		}
		g.tell("tenants added", from+together, g.load.tenants, 4*together)
	}
	if g.load.idle > 0 {
		if err := g.exec(ctx, fmt.Sprintf(`INSERT INTO t0.webhook_subscriptions (endpoint_id, event_type_id, event_type, event_filters)
			SELECT e.id, t.id, t.event_type, jsonb_build_object('n', jsonb_build_object('$lt', -i))
			FROM t0.webhook_endpoints e, t0.webhook_event_types t, generate_series(1, %d) i WHERE e.name = 'other' AND t.event_type = 'type.0'`, g.load.idle)); err != nil {
			return err
		}
	}
	return g.wait(ctx)
}

// noteSQL keeps the text of the events where every INSERT finds it: it is one that does not compress, and makes data of the size that is asked for.
func (g *growing) noteSQL() string {
	size := max(g.load.data-len(`{"n": 10000, "note": ""}`), 1)
	return fmt.Sprintf(`CREATE TABLE note AS SELECT left(translate(encode(string_agg(sha256(random()::text::bytea), ''), 'base64'), E'\n', ''), %d) AS text
		FROM generate_series(1, %d)`, size, size/32+1)
}

// tenantSQL makes a tenant with its endpoints, types and subscriptions, and one endpoint more to which no event goes.
func (g *growing) tenantSQL(tenant string) string {
	return fmt.Sprintf(`
CREATE SCHEMA %[1]s;
SELECT outbox_relay.add_tenant('%[1]s');
INSERT INTO %[1]s.webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id)
	SELECT 'e' || i, '%[2]s/%[1]s/' || i, '%[3]s', gen_random_uuid() FROM generate_series(0, %[4]d - 1) i
	UNION ALL SELECT 'other', '%[2]s/%[1]s/other', '%[3]s', gen_random_uuid();
INSERT INTO %[1]s.webhook_event_types (event_type, category, display_name) SELECT 'type.' || i, 'order', 'Type ' || i FROM generate_series(0, %[5]d - 1) i;
INSERT INTO %[1]s.webhook_subscriptions (endpoint_id, event_type_id, event_type)
	SELECT e.id, t.id, t.event_type FROM generate_series(0, greatest(%[4]d, %[5]d) - 1) i
	JOIN %[1]s.webhook_endpoints e ON e.name = 'e' || i %% %[4]d JOIN %[1]s.webhook_event_types t ON t.event_type = 'type.' || i %% %[5]d;
`, tenant, g.receiver.url, secret, g.load.endpoints, g.load.types)
}

// deliverySQL inserts as many deliveries that have failed once, as the relay does. Their events are gone, which does no harm: the rows keep the bodies.
const deliverySQL = `INSERT INTO t0.webhook_deliveries (id, webhook_event_id, webhook_endpoint_id, attempt_number, delivery_status, request_url, request_method,
		request_headers, request_body, response_status_code, response_time_ms, error_message, error_code, next_retry_at, relayed)
	SELECT ` + idSQL + `, v.id, e.id, 1, 'retrying', e.endpoint_url, 'POST', '{"content-type": "application/json"}', jsonb_build_object('id', v.id, 'type', 'type.0',
		'timestamp', now(), 'data', jsonb_build_object('n', i, 'note', note.text))::text, 503, 1, 'status 503', 'http_5xx', now() + interval '1 day', true
	FROM t0.webhook_endpoints e, note, LATERAL (SELECT i, ` + idSQL + ` AS id FROM generate_series(1, %d) i) v WHERE e.name = '%s'`

// queueSQL puts the deliveries of an endpoint that are not there yet into the retry queue.
const queueSQL = `INSERT INTO outbox_relay.retry_queue (delivery_id, tenant, endpoint_id, due_at)
	SELECT d.id, 't0', e.id, now() + %s FROM t0.webhook_deliveries d JOIN t0.webhook_endpoints e ON e.id = d.webhook_endpoint_id
	WHERE e.name = '%s' AND d.delivery_status = 'retrying' ON CONFLICT DO NOTHING`

// wait makes what waits in the queue for hours.
func (g *growing) wait(ctx context.Context) error {
	for done := 0; done < g.load.waiting; done += part {
		if err := g.exec(ctx, fmt.Sprintf(deliverySQL, min(part, g.load.waiting-done), "other")); err != nil {
			return err
		}
		g.tell("deliveries made to wait", done+part, g.load.waiting, part)
	}
	if g.load.waiting == 0 {
		return nil
	}
	if err := g.exec(ctx, fmt.Sprintf(queueSQL, "(1 + random()) * interval '6 hours'", "other")); err != nil {
		return err
	}
	// Else the server does it by itself, beside the deliveries that are measured, for minutes.
	return g.exec(ctx, "VACUUM ANALYZE t0.webhook_deliveries, outbox_relay.retry_queue")
}

// fill makes the n deliveries that are to be measured: a backlog of events, or, if they are to be due, rows that only have to be put into the queue.
func (g *growing) fill(ctx context.Context, n int) error {
	if g.load.due {
		return g.exec(ctx, fmt.Sprintf(deliverySQL, n, "e0"), "ANALYZE", "CHECKPOINT") // what has been loaded is not theirs to write
	}
	events := n / g.load.fanOut()
	for done := 0; done < events; done += part {
		if err := g.stage.fill(ctx, min(part, events-done), g.eventSQL()); err != nil {
			return err
		}
		g.tell("events committed", done+part, events, part)
	}
	return nil
}

// eventSQL inserts one event, within a loop over i. With more than one tenant its table is another one each time.
func (g *growing) eventSQL() string {
	const table = `.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)`
	values := fmt.Sprintf(`%s, 'type.' || i / %d %% %d, gen_random_uuid(), 'order', jsonb_build_object('n', i %% 100000, 'note', (SELECT text FROM public.note))`,
		idSQL, g.load.tenants, g.load.types)
	if g.load.tenants == 1 {
		return "INSERT INTO " + name(0) + table + " VALUES (" + values + ")"
	}
	return fmt.Sprintf("EXECUTE 'INSERT INTO t' || i %% %d || '%s VALUES ($1, $2, $3, $4, $5)' USING ", g.load.tenants, table) + values
}

// delivered counts the deliveries that are recorded as successes.
func (g *growing) delivered(ctx context.Context) (all int, err error) {
	for i := range g.load.tenants {
		var n int
		err := g.pool.QueryRow(ctx, fmt.Sprintf("SELECT count(*) FROM %s.webhook_deliveries WHERE delivery_status = 'success'", name(i))).Scan(&n)
		if err != nil {
			return 0, fmt.Errorf("count outcomes: %w", err)
		}
		all += n
	}
	return all, nil
}

// tell reports how far it has come every so often, of what takes longer than that.
func (g *growing) tell(what string, done, of, often int) {
	if of > often && done%often == 0 {
		fmt.Fprintf(g.progress, "  %s: %d of %d\n", what, min(done, of), of)
	}
}
