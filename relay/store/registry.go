package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay/route"
)

// The states of a tenant.
const (
	StateActive    = "active"
	StatePaused    = "paused"    // its deliveries wait
	StateSuspended = "suspended" // something about its tables is wrong; its events wait in the outbox table
)

// Registry is the routing rows of tenants, all as of one snapshot.
type Registry struct {
	Snapshot Snapshot
	// LSN is a position in the log. Changes whose commit is at or after it are not in the rows; of those before, the ones visible in
	// Snapshot are.
	LSN     pglogrepl.LSN
	Tenants []TenantRows // by schema

	schemas bool // of payloads are read
}

// TenantRows is a tenant with its routing rows.
type TenantRows struct {
	Schema, State string
	Reason        string // why it is paused or suspended
	Backfilling   bool   // earlier events are still to be queued
	Err           error  // why its tables could not be read; then there are no rows
	// Moved is the position of the log where the tenant came to its shard; zero: it has always been there. Left tells that it has gone to another one there.
	Moved pglogrepl.LSN
	Left  bool
	// Tables tells which tables its routing rows are in. The log does not tell of rows that go with their table, but of the tenant, that it has others.
	Tables string
	// Digest is what a leader has saved of the rows that follow with SaveDigests; nil: nothing.
	Digest *int64
	// Added is when it became a tenant, and Restored when its tables were found to come from another cluster; zero: never.
	Added, Restored time.Time

	Endpoints     []delivery.EndpointRow
	EventTypes    []route.EventTypeRow
	Subscriptions []route.SubscriptionRow // of both tables
}

// Routing makes a routing table of the rows. Those that cannot be used are in its Invalid.
func (t *TenantRows) Routing(defaults delivery.Defaults) *route.Tenant {
	table := route.NewTenant(t.Schema, defaults)
	for _, row := range t.EventTypes {
		_ = table.SetEventType(row)
	}
	for _, row := range t.Endpoints {
		_ = table.SetEndpoint(row)
	}
	for _, row := range t.Subscriptions {
		_ = table.SetSubscription(row)
	}
	return table
}

// loadChunk is how many tenants are read in one round trip.
const loadChunk = 50

// Columns are cast to what the rows hold: an adopted table may have other types, and nulls where ours has none.
const (
	endpointColumns = `e.id, coalesce(e.endpoint_url, '')::text, coalesce(e.http_method, '')::text, coalesce(e.secret_token, '')::text,
  coalesce(e.secondary_secret_token, '')::text,
  CASE WHEN e.secondary_secret_expires_at IS NOT NULL THEN least(greatest(e.secondary_secret_expires_at::timestamptz, ` + firstTime + `), ` + lastTime + `) END,
  coalesce(e.signature_header, '')::text, coalesce(e.custom_headers, '{}')::text, coalesce(e.timeout_seconds, 0)::text, coalesce(e.max_retry_attempts, -1)::text,
  coalesce(e.retry_backoff_seconds, 0)::text, coalesce(e.retry_backoff_multiplier, 0)::text, coalesce(e.follow_redirects, false),
  coalesce(e.verify_ssl, true), coalesce(e.is_active, true), coalesce(e.is_verified, false), e.context_id, coalesce(e.payload_format, '')::text,
  coalesce(e.delivery_order, '')::text, coalesce(e.max_concurrency, 0)::text, coalesce(e.rate_limit_per_second, 0)::text,
  e.paused_at IS NOT NULL, v.verified_for`

	// verificationOf is the join of endpointColumns, on the tenant in an argument.
	verificationOf = ` LEFT JOIN outbox_relay.endpoint_verification v ON v.endpoint_id = e.id AND v.tenant = `

	loadEndpoints = `SELECT ` + endpointColumns + ` FROM {tenant}.webhook_endpoints e` + verificationOf + `$1::text`

	eventTypeColumns = `t.id, coalesce(t.event_type, '')::text, coalesce(t.is_enabled, true), coalesce(t.requires_verification, false)`

	loadEventTypes = `SELECT ` + eventTypeColumns + `, '' FROM {tenant}.webhook_event_types t`

	loadEventTypesWithSchemas = `SELECT ` + eventTypeColumns + `, coalesce(nullif(t.payload_schema::text, 'null'), '') FROM {tenant}.webhook_event_types t`

	loadSubscriptions = `SELECT s.id, s.endpoint_id, s.event_type_id, coalesce(s.event_type, '')::text, coalesce(s.event_filters, '{}')::text,
  coalesce(s.is_active, true), s.context_id FROM {tenant}.webhook_subscriptions s`

	loadOlderSubscriptions = `SELECT s.id, s.webhook_endpoint_id, s.event_type_id, '', coalesce(s.event_filters, '{}')::text,
  coalesce(s.is_active, true), NULL::uuid FROM {tenant}.webhook_event_subscriptions s`
)

// endpointFields are the targets of endpointColumns. All but the first tolerate the nulls of an outer join.
func endpointFields(r *delivery.EndpointRow) []any {
	return []any{
		&r.ID, &r.URL, &r.Method, &r.SecretToken, &r.SecondarySecret, (*nullTime)(&r.SecondarySecretExpires), &r.SignatureHeader,
		&r.CustomHeaders, (*integer)(&r.TimeoutSeconds), (*integer)(&r.MaxRetryAttempts), (*integer)(&r.BackoffSeconds), (*number)(&r.BackoffMultiplier), &r.FollowRedirects,
		&r.VerifySSL, &r.Active, &r.Verified, &r.ContextID, &r.PayloadFormat, &r.Order, (*integer)(&r.MaxConcurrency), (*number)(&r.RatePerSecond),
		&r.Paused, &r.VerifiedFor,
	}
}

// nullTime reads NULL as the zero time, and any other as the stream does, in UTC.
type nullTime time.Time

// ScanTimestamptz implements pgtype.TimestamptzScanner.
func (t *nullTime) ScanTimestamptz(v pgtype.Timestamptz) error {
	*t = nullTime{}
	if v.Valid {
		*t = nullTime(v.Time.UTC())
	}
	return nil
}

// number reads a numeric as the stream does (wal.Tuple.Float): what is beyond a float64 is infinite. A cast by the server would be an error, and the end of all
// rows that are read together with this one.
type number float64

// ScanText implements pgtype.TextScanner.
func (n *number) ScanText(v pgtype.Text) error {
	f, err := strconv.ParseFloat(v.String, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return err
	}
	*n = number(f)
	return nil
}

// integer is number for a whole number, which an adopted table may have in a column that is wider than an int4: what is beyond it is the greatest or the least.
type integer int32

// ScanText implements pgtype.TextScanner.
func (n *integer) ScanText(v pgtype.Text) error {
	var f number
	err := f.ScanText(v)
	*n = integer(min(max(math.Round(float64(f)), math.MinInt32), math.MaxInt32))
	return err
}

// Tenants lists the registered tenants of the shard, whatever their state.
func (s *Store) Tenants(ctx context.Context) ([]string, error) {
	rows, _ := s.pool.Query(ctx, `SELECT t.schema FROM outbox_relay.tenants t WHERE t.shard = $1::int4 ORDER BY 1`, s.shard)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return names, wrap(err, "list tenants")
}

const unpublished = `
SELECT t.schema, string_agg(v.tbl, ', ' ORDER BY v.tbl) FROM outbox_relay.tenants t JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema
CROSS JOIN (VALUES ('outbox_relay_events', 'webhook_events'), ('outbox_relay_registry', 'webhook_endpoints'), ('outbox_relay_registry', 'webhook_event_types'),
  ('outbox_relay_registry', 'webhook_event_subscriptions'), ('outbox_relay_registry', 'webhook_subscriptions')) v (pub, tbl)
WHERE t.state <> 'suspended' AND NOT EXISTS (SELECT FROM pg_catalog.pg_publication_rel pr JOIN pg_catalog.pg_publication p ON p.oid = pr.prpubid
  JOIN pg_catalog.pg_class c ON c.oid = pr.prrelid WHERE p.pubname = v.pub AND c.relname = v.tbl AND c.relnamespace = n.oid)
GROUP BY 1`

// Unpublished lists the tenants with tables that are not in the publications any more, and which: somebody has put another table in the place of
// one that was. A tenant whose schema is gone is not among them.
func (s *Store) Unpublished(ctx context.Context) (map[string]string, error) {
	rows, _ := s.pool.Query(ctx, unpublished)
	tables := make(map[string]string)
	var tenant, list string
	_, err := pgx.ForEachRow(rows, []any{&tenant, &list}, func() error {
		tables[tenant] = list
		return nil
	})
	return tables, wrap(err, "look for tables that are not published")
}

// ReadRegistry reads the routing rows of the named schemas that are registered, nil for all, in one snapshot. What is wrong with one tenant is in its Err and
// does not keep the others from being read. The session of the connection stays as it is. payloadSchemas has it read those of event types.
func ReadRegistry(ctx context.Context, conn *pgx.Conn, schemas []string, payloadSchemas bool) (*Registry, error) {
	registerTypes(conn)
	reg := &Registry{schemas: payloadSchemas}
	list := statement{sql: listTenants + " ORDER BY 1", args: []any{schemas}}
	if err := inTransaction(ctx, conn, reg.load(ctx, conn, `SELECT set_config(s.name, w.value, true)`+settingsSQL, list, 0, nil)); err != nil {
		return nil, fmt.Errorf("load routing rows: %w", explain(err))
	}
	return reg, nil
}

// LoadShard is ReadRegistry for the tenants of the shard, and for those that have left it for another one at a place of the log behind a position: up to
// there their events are still for this shard's slot to bring. beat, unless it is nil, is called now and then while it lasts; its error ends it.
func (s *Store) LoadShard(ctx context.Context, schemas []string, position pglogrepl.LSN, beat func(context.Context) error) (*Registry, error) {
	reg := &Registry{schemas: s.schemas}
	conn, err := s.pool.Acquire(ctx)
	if err == nil {
		defer conn.Release()
		list := statement{sql: listTenants + ofShard + " ORDER BY 1", args: []any{schemas, s.shard, s.slot, position.String()}}
		err = inTransaction(ctx, conn.Conn(), reg.load(ctx, conn.Conn(), "", list, s.shard, beat))
	}
	if err != nil {
		return nil, fmt.Errorf("load routing rows: %w", explain(err))
	}
	return reg, nil
}

const (
	listTenants = `
SELECT t.schema, t.state, coalesce(t.reason, ''), t.backfill IS NOT NULL AND t.backfill_done_at IS NULL, t.shard, coalesce(t.moved_lsn, '0/0')::text, t.digest, t.since,
  t.restored_at, coalesce(t.tables, '')
FROM outbox_relay.tenants t WHERE ($1::text[] IS NULL OR t.schema = ANY($1::text[]))`

	ofShard = ` AND (t.shard = $2::int4 OR t.moved_from = $3::text AND t.moved_lsn > $4::text::pg_lsn)`
)

// load reads under the settings that a statement makes; empty: the session has them.
func (reg *Registry) load(ctx context.Context, conn *pgx.Conn, settings string, list statement, shard int, beat func(context.Context) error) error {
	b := &pgx.Batch{}
	b.Queue("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
	if settings != "" {
		b.Queue(settings)
	}
	queueSnapshot(b, &reg.Snapshot, &reg.LSN)
	b.Queue(list.sql, list.args...).Query(func(rows pgx.Rows) (err error) {
		reg.Tenants, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (t TenantRows, err error) {
			var home int
			var moved string
			var restored *time.Time
			if err = row.Scan(&t.Schema, &t.State, &t.Reason, &t.Backfilling, &home, &moved, &t.Digest, &t.Added, &restored, &t.Tables); err == nil {
				t.Moved, err = pglogrepl.ParseLSN(moved)
			}
			if restored != nil {
				t.Restored = *restored
			}
			t.Left = home != shard
			return t, err
		})
		return err
	})
	if err := conn.SendBatch(ctx, b).Close(); err != nil {
		return err
	}
	for rest := reg.Tenants; len(rest) > 0; {
		n := min(loadChunk, len(rest))
		if err := loadTenants(ctx, conn, rest[:n], reg.schemas, beat); err != nil {
			return err
		}
		rest = rest[n:]
	}
	_, err := conn.Exec(ctx, "COMMIT")
	return err
}

// loadTenants reads some tenants in one pipeline, or, if that has an error, one by one.
func loadTenants(ctx context.Context, conn *pgx.Conn, tenants []TenantRows, schemas bool, beat func(context.Context) error) error {
	if beat != nil {
		if err := beat(ctx); err != nil {
			return err
		}
	}
	if _, err := conn.Exec(ctx, "SAVEPOINT tenant"); err != nil {
		return err
	}
	b := &pgx.Batch{}
	for i := range tenants {
		tenants[i].queue(b, schemas)
	}
	b.Queue("ROLLBACK TO SAVEPOINT tenant") // gives the locks back: those of a thousand tenants would be more than a server has
	b.Queue("RELEASE SAVEPOINT tenant")
	loadErr := conn.SendBatch(ctx, b).Close()
	if loadErr == nil || !isTenants(loadErr) {
		return loadErr
	}
	if conn.PgConn().TxStatus() == 'E' { // else it is what we could not read, and the savepoint is gone by now
		if _, err := conn.Exec(ctx, "ROLLBACK TO SAVEPOINT tenant"); err != nil {
			return errors.Join(loadErr, err)
		}
	}
	if len(tenants) == 1 {
		t := &tenants[0]
		*t = TenantRows{
			Schema: t.Schema, State: t.State, Reason: t.Reason, Backfilling: t.Backfilling, Added: t.Added, Restored: t.Restored, Moved: t.Moved, Left: t.Left, Tables: t.Tables,
			Err: loadErr,
		}
		return nil
	}
	for i := range tenants {
		if err := loadTenants(ctx, conn, tenants[i:i+1], schemas, beat); err != nil {
			return err
		}
	}
	return nil
}

func (t *TenantRows) queue(b *pgx.Batch, schemas bool) {
	b.Queue(forTenant(loadEndpoints, t.Schema), t.Schema).Query(func(rows pgx.Rows) (err error) {
		t.Endpoints, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (r delivery.EndpointRow, err error) {
			return r, row.Scan(endpointFields(&r)...)
		})
		return err
	})
	eventTypes := loadEventTypes
	if schemas {
		eventTypes = loadEventTypesWithSchemas
	}
	b.Queue(forTenant(eventTypes, t.Schema)).Query(func(rows pgx.Rows) (err error) {
		t.EventTypes, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (r route.EventTypeRow, err error) {
			return r, row.Scan(&r.ID, &r.EventType, &r.Enabled, &r.RequiresVerification, &r.PayloadSchema)
		})
		return err
	})
	t.Subscriptions = nil
	subscriptions := func(source route.Source) func(pgx.Rows) error {
		return func(rows pgx.Rows) error {
			more, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (route.SubscriptionRow, error) {
				r := route.SubscriptionRow{Source: source}
				return r, row.Scan(&r.ID, &r.EndpointID, &r.EventTypeID, &r.EventType, &r.Filters, &r.Active, &r.ContextID)
			})
			t.Subscriptions = append(t.Subscriptions, more...)
			return err
		}
	}
	b.Queue(forTenant(loadSubscriptions, t.Schema)).Query(subscriptions(route.Current))
	b.Queue(forTenant(loadOlderSubscriptions, t.Schema)).Query(subscriptions(route.Older))
}
