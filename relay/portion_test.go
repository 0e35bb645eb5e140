package relay_test

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// earlier makes events of one aggregate that the log does not carry. Size is that of the payload.
func (p *place) earlier(tenant string, n, size int) {
	p.t.Helper()
	p.exec(`ALTER PUBLICATION outbox_relay_events DROP TABLE ` + tenant + `.webhook_events`)
	p.exec(`INSERT INTO `+tenant+`.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
		SELECT gen_random_uuid(), 'order.created', '11111111-1111-1111-1111-111111111111', 'order', jsonb_build_object('x', repeat('y', $2)) FROM generate_series(1, $1)`, n, size)
	p.exec(`ALTER PUBLICATION outbox_relay_events ADD TABLE ` + tenant + `.webhook_events`)
}

func get[T any](p *place, sql string, args ...any) (v T) {
	p.t.Helper()
	require.NoError(p.t, p.pool.QueryRow(p.ctx, sql, args...).Scan(&v), sql)
	return v
}

// written tells how many transactions have written the deliveries of a tenant whose endpoints are paused, and the most that one has.
func (p *place) written(tenant string) (transactions, rows, bytes int) {
	p.t.Helper()
	require.NoError(p.t, p.pool.QueryRow(p.ctx, `SELECT count(*), max(n), max(bytes) FROM (
		SELECT count(*) AS n, sum(length(request_body)) AS bytes FROM `+tenant+`.webhook_deliveries GROUP BY xmin::text) t`).Scan(&transactions, &rows, &bytes))
	return transactions, rows, bytes
}

// TestBackfillInPortions: a page of few events and many endpoints is more than one transaction should have. One of its transactions fails, and what comes
// again is there once.
func TestBackfillInPortions(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ events, size, endpoints, rows, bytes int }{
		"bytes":             {events: 40, size: 100_000, endpoints: 8, rows: 1000, bytes: 4<<20 + 8*101_000},
		"rows of one event": {events: 4, size: 10, endpoints: 1200, rows: 1000, bytes: 1 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			p := newPlace(ctx, t)
			p.cfg.Record.Batch = 500
			p.join("one", test.endpoints)
			p.exec(`UPDATE one.webhook_endpoints SET paused_at = now(), delivery_order = CASE name WHEN 'e1' THEN 'aggregate' ELSE 'none' END`)
			p.earlier("one", test.events/2, test.size)
			border := get[string](p, `SELECT pg_current_snapshot()::text`)
			p.earlier("one", test.events/2, test.size)
			p.exec(`SELECT outbox_relay.add_tenant('one', 'unprocessed')`)
			p.exec(`UPDATE outbox_relay.tenants SET backfill_border = $1::text::pg_snapshot, backfill_border_place = '0/5', backfill_place = '0/A'`, border)
			p.exec(`CREATE SEQUENCE public.steps`)
			p.exec(`CREATE FUNCTION public.step() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
				IF nextval('public.steps') = 2 THEN RAISE EXCEPTION 'the second step' USING ERRCODE = 'query_canceled'; END IF; RETURN NEW; END $$`)
			p.exec(`CREATE TRIGGER step BEFORE UPDATE OF backfill_cursor ON outbox_relay.tenants FOR EACH ROW EXECUTE FUNCTION public.step()`)

			p.run(slog.DiscardHandler, nil)
			require.Eventually(t, func() bool { return get[bool](p, `SELECT backfill_done_at IS NOT NULL FROM outbox_relay.tenants`) }, time.Minute, 10*time.Millisecond)
			require.Equal(t, test.events*test.endpoints, get[int](p, `SELECT count(*) FROM one.webhook_deliveries`))
			require.Equal(t, test.events*test.endpoints, get[int](p, `SELECT count(*) FROM outbox_relay.retry_queue JOIN one.webhook_deliveries d ON d.id = delivery_id`))
			require.GreaterOrEqual(t, get[int](p, `SELECT last_value FROM public.steps`), 4)
			_, rows, bytes := p.written("one")
			require.LessOrEqual(t, rows, test.rows)
			require.LessOrEqual(t, bytes, test.bytes)

			ids := func(sql string, args ...any) []outbox.UUID {
				list, err := p.pool.Query(ctx, sql, args...)
				require.NoError(t, err)
				found, err := pgx.CollectRows(list, pgx.RowTo[outbox.UUID])
				require.NoError(t, err)
				return found
			}
			require.Equal(t,
				ids(`SELECT id FROM one.webhook_events ORDER BY pg_visible_in_snapshot(xid, $1::text::pg_snapshot) DESC, id`, border),
				ids(`SELECT d.webhook_event_id FROM outbox_relay.retry_queue q JOIN one.webhook_deliveries d ON d.id = q.delivery_id
					WHERE q.order_key IS NOT NULL ORDER BY q.order_lsn, q.order_n, q.delivery_id`), "what was before the border is first, and each part in the order of its ids")
			require.Equal(t, 2, get[int](p, `SELECT count(DISTINCT order_lsn) FROM outbox_relay.retry_queue`))
		})
	}
}

// TestAuditInPortions: the deliveries of one event are of one transaction, or the event would seem to be handled if that were the last one.
func TestAuditInPortions(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	const events, endpoints = 10, 300
	p.join("one", endpoints)
	p.earlier("one", events, 10)
	p.cfg.Record.Batch = 500
	st, err := store.New(ctx, store.Config{URL: p.cfg.Database.URL, Slot: p.cfg.Database.Slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(st.Close)
	progress, err := st.Lead(ctx, store.LeadOptions{})
	require.NoError(t, err)
	snapshot, _, err := st.Snapshot(ctx)
	require.NoError(t, err)
	require.NoError(t, st.SaveSnapshot(ctx, progress.Epoch, snapshot))

	reports, err := relay.Audit(ctx, st, &p.cfg, relay.AuditOptions{Repair: true})
	require.NoError(t, err)
	require.Len(t, reports, 1)
	require.False(t, reports[0].Added.IsZero(), "a period without a bound goes back to before it was added")
	reports[0].Added = time.Time{}
	require.Equal(t, []relay.AuditReport{{Tenant: "one", Events: events, Missing: events * endpoints, Queued: events * endpoints}}, reports)
	require.Equal(t, events*endpoints, get[int](p, `SELECT count(*) FROM outbox_relay.retry_queue`))
	transactions, rows, _ := p.written("one")
	require.Equal(t, 5, transactions)
	require.Equal(t, 2*endpoints, rows)
}

// TestBesideALock: a tenant whose table is locked is left out after the first try, and told of, instead of being waited for before each page of the others.
func TestBesideALock(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ ask, failed, done string }{
		"backfill": {`SELECT outbox_relay.add_tenant($1, 'unprocessed')`, `backfill tenant "aa"`, "backfill done "},
		"recovery": {`SELECT outbox_relay.recover_endpoint($1, NULL, since => now() - interval '9 days')`, "read recovery 1", "recovery done "},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			p := newPlace(ctx, t)
			const pages = 6
			for _, tenant := range []string{"aa", "bb"} {
				p.join(tenant, 1)
				p.exec(`UPDATE ` + tenant + `.webhook_endpoints SET paused_at = now()`)
				p.earlier(tenant, map[string]int{"aa": 10, "bb": pages*500 - 1}[tenant], 10)
				p.exec(`UPDATE ` + tenant + `.webhook_events SET occurred_at = now() - interval '8 days'`) // the audit does not look at it
				p.exec(strings.Replace(test.ask, "NULL", "(SELECT id FROM "+tenant+".webhook_endpoints)", 1), tenant)
			}
			lock, err := p.pool.Begin(ctx)
			require.NoError(t, err)
			defer func() { _ = lock.Rollback(ctx) }()
			_, err = lock.Exec(ctx, `LOCK TABLE aa.webhook_events IN ACCESS EXCLUSIVE MODE`)
			require.NoError(t, err)
			messages := make(chan string, 1000)
			p.run(heard{slog.DiscardHandler, messages}, nil)
			tries := 0
			until := func(said string) {
				for {
					select {
					case text := <-messages:
						if strings.Contains(text, test.failed) {
							tries++
						}
						if strings.Contains(text, said) {
							return
						}
					case <-ctx.Done():
						require.NoError(t, ctx.Err(), said)
					}
				}
			}
			until(test.done + "bb")
			require.Positive(t, tries, "it was told of")
			require.Less(t, tries, pages-1, "the other one's pages did not wait for it")
			require.NoError(t, lock.Rollback(ctx))
			until(test.done + "aa")
			require.Equal(t, 10, get[int](p, `SELECT count(*) FROM aa.webhook_deliveries`))
		})
	}
}
