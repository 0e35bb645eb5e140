package schema_test

import (
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/schema"
)

// neo builds a tenant schema as neo-commons left it, with old rows.
func (b *bundle) neo(name string, events int) {
	b.t.Helper()
	text, err := os.ReadFile("testdata/neo.sql")
	require.NoError(b.t, err)
	sql := strings.NewReplacer("{{s}}", pgx.Identifier{name}.Sanitize(), "{{n}}", strconv.Itoa(events)).Replace(string(text))
	_, err = b.conn.PgConn().Exec(b.ctx, sql).ReadAll()
	require.NoError(b.t, err)
}

// fingerprint is what adoption must leave alone: every row with its version, the file of every table, and all that hangs on them.
func (b *bundle) fingerprint(name string) []string {
	b.t.Helper()
	var all []string
	for _, table := range list(b, `SELECT tablename FROM pg_tables WHERE schemaname = $1 AND tablename = ANY($2) ORDER BY 1`, name, neoTables) {
		id := pgx.Identifier{name, table}.Sanitize()
		all = append(all, list(b, `SELECT relname || ' ' || relfilenode || ' ' || relowner::text FROM pg_class WHERE oid = $1::regclass`, id)...)
		all = append(all, list(b, `SELECT count(*) || ' rows of '||$1||', versions ' || md5(string_agg(ctid::text || xmin::text || id, '' ORDER BY ctid)) FROM `+id, table)...)
		all = append(all, list(b, `SELECT 'trigger ' || tgname FROM pg_trigger WHERE tgrelid = $1::regclass AND NOT tgisinternal ORDER BY 1`, id)...)
		all = append(all, list(b, `SELECT 'column ' || attname || ' ' || format_type(atttypid, atttypmod) || attnotnull || coalesce(pg_get_expr(adbin, adrelid), '')
			FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attrelid = $1::regclass AND attnum > 0
			AND ($2, attname) NOT IN (SELECT tbl, col FROM outbox_relay.tenant_columns()) ORDER BY attnum`, id, table)...)
		all = append(all, list(b, `SELECT 'index ' || indexrelid || pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = $1::regclass
			AND NOT EXISTS (SELECT FROM outbox_relay.tenant_indexes() x JOIN pg_class c ON c.oid = indexrelid WHERE x.name = c.relname) ORDER BY 1`, id)...)
		all = append(all, list(b, `SELECT 'constraint ' || oid || conname || convalidated FROM pg_constraint WHERE conrelid = $1::regclass AND contype <> 'n' -- which 18 has
			AND conname NOT IN ('fk deliveries->events', 'webhook_deliveries_webhook_endpoint_id_fkey', 'webhook_endpoints_payload_format_check', 'webhook_endpoints_delivery_order_check',
			'webhook_endpoints_max_concurrency_check', 'webhook_endpoints_rate_limit_check') ORDER BY 1`, id)...)
	}
	return all
}

var neoTables = []string{ //nolint:gochecknoglobals // a constant that Go has no constants for
	"webhook_endpoints", "webhook_event_types", "webhook_event_subscriptions", "webhook_subscriptions", "webhook_events", "webhook_deliveries", "webhook_delivery_stats",
}

func TestAdoptLeavesWhatIsThereAlone(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"tenant_1", `O'Neill "&" Söhne; DROP`, "Ünder %s %1$I"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.neo(name, 2000)
			before := b.fingerprint(name)
			require.NoError(t, schema.AddTenant(b.ctx, b.dsn, name, schema.AddOptions{}))
			assert.Equal(t, before, b.fingerprint(name))

			q := pgx.Identifier{name}.Sanitize()
			assert.Equal(t, []string{"neo"}, list(b, "SELECT DISTINCT payload_format FROM "+q+".webhook_endpoints"))
			assert.Equal(t, int64(0), get[int64](b, "SELECT count(*) FROM "+q+".webhook_deliveries WHERE relayed"))
			assert.Equal(t, int64(0), get[int64](b, "SELECT count(xid) FROM "+q+".webhook_events"))
			assert.Empty(t,
				list(b, "SELECT c.relname::text FROM pg_constraint JOIN pg_class c ON c.oid = confrelid WHERE contype = 'f' AND conrelid = $1::regclass", q+".webhook_deliveries"))
			assert.Equal(t, int64(2), get[int64](b, `SELECT count(*) FROM pg_indexes WHERE schemaname = $1 AND indexname IN
				('webhook_events_xid_idx', 'webhook_deliveries_relayed_key')`, name))
			assert.True(t, get[bool](b, `INSERT INTO `+q+`.webhook_events (event_type, aggregate_id, aggregate_type)
				VALUES ('order.created', gen_random_uuid(), 'order') RETURNING xid = pg_current_xact_id()`))

			require.NoError(t, schema.AddTenant(b.ctx, b.dsn, name, schema.AddOptions{Unprocessed: true}), "again")
			tenants, err := schema.Tenants(b.ctx, b.conn)
			require.NoError(t, err)
			require.Len(t, tenants, 1)
			assert.Equal(t, name, tenants[0].Schema)
			assert.Equal(t, "unprocessed", tenants[0].Backfill)
			require.NoError(t, schema.RemoveTenant(b.ctx, b.dsn, name, nil))
			assert.Equal(t, int64(1), get[int64](b, "SELECT count(*) FROM pg_publication_tables"))
		})
	}
}

// TestAdoptDoesNotStallWriters adopts a large tenant while it is written to, also by transactions that stay open for a while.
// OUTBOX_RELAY_TEST_EVENTS makes it larger.
func TestAdoptDoesNotStallWriters(t *testing.T) {
	t.Parallel()
	events := 100_000
	if s := os.Getenv("OUTBOX_RELAY_TEST_EVENTS"); s != "" {
		n, err := strconv.Atoi(s)
		require.NoError(t, err)
		events = n
	}
	b := setup(t)
	b.neo("big", events)
	var (
		g       errgroup.Group
		stop    = make(chan struct{})
		longest = make([]time.Duration, 4)
		written = make([]int, len(longest))
	)
	for i := range longest {
		conn := connect(t, b.dsn)
		g.Go(func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				begin := time.Now()
				err := pgx.BeginFunc(b.ctx, conn, func(tx pgx.Tx) error {
					_, err := tx.Exec(b.ctx, `WITH e AS (INSERT INTO big.webhook_events (event_type, aggregate_id, aggregate_type)
							VALUES ('order.created', gen_random_uuid(), 'order') RETURNING id)
						INSERT INTO big.webhook_deliveries (webhook_event_id, webhook_endpoint_id, request_url, request_method)
						SELECT e.id, p.id, '', 'POST' FROM e, big.webhook_endpoints p`)
					longest[i] = max(longest[i], time.Since(begin))
					if err == nil && i == 0 {
						_, err = tx.Exec(b.ctx, "SELECT pg_sleep(0.6)") // longer than the relay waits for a lock
					}
					return err
				})
				if err != nil {
					return err
				}
				written[i]++
			}
		})
	}
	begin := time.Now()
	var steps []string
	err := schema.AddTenant(b.ctx, b.dsn, "big", schema.AddOptions{Unprocessed: true, Progress: func(s string) { steps = append(steps, s) }})
	took := time.Since(begin)
	close(stop)
	require.NoError(t, g.Wait())
	require.NoError(t, err)
	for i := range longest {
		// A statement of theirs needs three tables, for each of which it may stand behind one try of 0.4 s to lock it; and the machine has other work.
		assert.Less(t, longest[i], 3*time.Second, "writer %d", i)
		assert.Positive(t, written[i])
	}
	t.Logf("%d events: adopted in %v, %d transactions meanwhile, longest wait of a writer %v, steps %q", events, took, written, longest, steps)

	// Each event is on one side of the border: before it for the backfill, after it in the log.
	b.exec(`SET synchronous_commit = on; INSERT INTO big.webhook_events (event_type, aggregate_id, aggregate_type) VALUES ('a.b', gen_random_uuid(), 'a')`)
	logged := get[int64](b, `SELECT count(*) FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
		'publication_names', 'outbox_relay_events') WHERE get_byte(data, 0) = ascii('I')`, b.slot)
	before := get[int64](b, `SELECT count(*) FROM big.webhook_events, outbox_relay.tenants WHERE xid IS NULL OR pg_visible_in_snapshot(xid, backfill_upto)`)
	assert.Positive(t, logged)
	assert.Equal(t, get[int64](b, "SELECT count(*) FROM big.webhook_events"), before+logged)
}

func TestAdoptPartitionedEvents(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("parts", 0)
	b.exec(`ALTER TABLE parts.webhook_deliveries DROP CONSTRAINT "fk deliveries->events";
		ALTER TABLE parts.webhook_events RENAME TO webhook_events_old;
		CREATE TABLE parts.webhook_events (LIKE parts.webhook_events_old INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
		CREATE TABLE parts."events 2025" PARTITION OF parts.webhook_events FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
		CREATE TABLE parts.events_rest PARTITION OF parts.webhook_events DEFAULT;
		INSERT INTO parts.webhook_events (id, event_type, aggregate_id, aggregate_type, occurred_at, event_data)
		SELECT gen_random_uuid(), 'a.b', gen_random_uuid(), 'a', '2025-06-01', jsonb_build_object('text', repeat('x', 300)) FROM generate_series(1, 40000)`)
	_, err := b.conn.Exec(b.ctx, "SELECT outbox_relay.add_tenant('parts')")
	require.ErrorContains(t, err, "too large")
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "parts", schema.AddOptions{}))
	assert.Empty(t, list(b, "SELECT name FROM outbox_relay.missing_indexes('parts')"))
	assert.Equal(t, int64(2), get[int64](b, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'parts.webhook_events_xid_idx'::regclass"))
	assert.Equal(t, []string{"webhook_events"}, list(b, "SELECT tablename::text FROM pg_publication_tables WHERE pubname = 'outbox_relay_events'"))
	assert.True(t, get[bool](b, `INSERT INTO parts.webhook_events (event_type, aggregate_id, aggregate_type)
		VALUES ('a.b', gen_random_uuid(), 'a') RETURNING xid = pg_current_xact_id()`))
}

// TestAdoptPartitionedEventsWithoutPartitions: none of it can be indexed concurrently, at either level, and a partition that comes has the index.
func TestAdoptPartitionedEventsWithoutPartitions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("parts", 0)
	b.exec(`ALTER TABLE parts.webhook_deliveries DROP CONSTRAINT "fk deliveries->events";
		ALTER TABLE parts.webhook_events RENAME TO webhook_events_old;
		CREATE TABLE parts.webhook_events (LIKE parts.webhook_events_old INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
		CREATE TABLE parts.later PARTITION OF parts.webhook_events FOR VALUES FROM ('2100-01-01') TO ('2200-01-01') PARTITION BY RANGE (occurred_at)`)
	require.NoError(t, schema.AddTenant(b.ctx, b.dsn, "parts", schema.AddOptions{}))
	assert.Empty(t, list(b, "SELECT name FROM outbox_relay.missing_indexes('parts')"))
	b.exec(`CREATE TABLE parts.events_rest PARTITION OF parts.webhook_events DEFAULT`)
	assert.Equal(t, int64(2), get[int64](b, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'parts.webhook_events_xid_idx'::regclass"))
	assert.True(t, get[bool](b, `INSERT INTO parts.webhook_events (event_type, aggregate_id, aggregate_type)
		VALUES ('a.b', gen_random_uuid(), 'a') RETURNING xid = pg_current_xact_id()`))
}

// TestMigrateBringsTenantsUpToDate starts from a tenant of an older shape, on which an index build failed half-way.
func TestMigrateBringsTenantsUpToDate(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.neo("acme", 10)
	b.neo("broken", 10)
	b.neo("gone", 10)
	for _, name := range []string{"acme", "broken", "gone"} {
		require.NoError(t, schema.AddTenant(b.ctx, b.dsn, name, schema.AddOptions{Unprocessed: true}))
	}
	b.exec(`UPDATE outbox_relay.tenants SET version = 0, state = 'paused', backfill_cursor = gen_random_uuid();
		ALTER TABLE acme.webhook_endpoints DROP COLUMN delivery_order; DROP TABLE acme.webhook_dead_letters;
		UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'acme.webhook_events_xid_idx'::regclass;
		ALTER TABLE broken.webhook_events DROP COLUMN event_type; DROP SCHEMA gone CASCADE`)
	err := schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot})
	require.ErrorIs(t, err, schema.ErrUnfit)
	require.ErrorContains(t, err, "webhook_events lacks column event_type")
	assert.Equal(t, []string{"acme 1 paused t", "broken 0 paused t", "gone 0 paused t"},
		list(b, "SELECT concat_ws(' ', schema, version, state, backfill_cursor IS NOT NULL) FROM outbox_relay.tenants ORDER BY 1"))
	assert.Empty(t, list(b, "SELECT name FROM outbox_relay.missing_indexes('acme')"))
	assert.Equal(t, "none", get[string](b, "SELECT delivery_order FROM acme.webhook_endpoints"))
	assert.Equal(t, int64(0), get[int64](b, "SELECT count(*) FROM acme.webhook_dead_letters"))
}
