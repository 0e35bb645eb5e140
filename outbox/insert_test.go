package outbox_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// tenant is a schema name that only works when it is quoted.
const tenant = `Tenant "A"`

const createTable = `CREATE SCHEMA "Tenant ""A"""; CREATE TABLE "Tenant ""A""".webhook_events (
	id uuid PRIMARY KEY, event_type varchar(255) NOT NULL, event_name varchar(255), aggregate_id uuid NOT NULL,
	aggregate_type varchar(100) NOT NULL, aggregate_version int NOT NULL DEFAULT 1, event_data jsonb NOT NULL DEFAULT '{}',
	event_metadata jsonb NOT NULL DEFAULT '{}', correlation_id uuid, causation_id uuid, triggered_by_user_id uuid, context_id uuid,
	occurred_at timestamptz NOT NULL DEFAULT now(), processed_at timestamptz, created_at timestamptz NOT NULL DEFAULT now())`

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// setup connects to a database that holds an empty webhook_events.
func setup(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), pgtest.Database(t))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	_, err = conn.Exec(t.Context(), createTable)
	require.NoError(t, err)
	return conn
}

// inserters runs test with every way of inserting, each in a transaction of its own kind and an empty table of its own.
func inserters(t *testing.T, test func(t *testing.T, conn *pgx.Conn, insert func(...outbox.Event) ([]outbox.UUID, error))) {
	t.Helper()
	one := func(id outbox.UUID, err error) ([]outbox.UUID, error) { return []outbox.UUID{id}, err }
	type insert = func(...outbox.Event) ([]outbox.UUID, error)
	for name, start := range map[string]func(t *testing.T, ctx context.Context, conn *pgx.Conn) insert{
		"Insert": func(_ *testing.T, ctx context.Context, conn *pgx.Conn) insert {
			return func(events ...outbox.Event) (ids []outbox.UUID, err error) {
				return ids, pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
					for _, e := range events {
						id, err := one(outbox.Insert(ctx, tx, tenant, e))
						if err != nil {
							return err
						}
						ids = append(ids, id...)
					}
					return nil
				})
			}
		},
		"InsertMany": func(_ *testing.T, ctx context.Context, conn *pgx.Conn) insert {
			return func(events ...outbox.Event) (ids []outbox.UUID, err error) {
				return ids, pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) (err error) {
					ids, err = outbox.InsertMany(ctx, tx, tenant, events)
					return err
				})
			}
		},
		"InsertSQL": func(t *testing.T, ctx context.Context, conn *pgx.Conn) insert {
			db := stdlib.OpenDB(*conn.Config())
			t.Cleanup(func() { _ = db.Close() })
			return func(events ...outbox.Event) (ids []outbox.UUID, err error) {
				return ids, inSQL(ctx, db, func(tx *sql.Tx) error {
					for _, e := range events {
						id, err := one(outbox.InsertSQL(ctx, tx, tenant, e))
						if err != nil {
							return err
						}
						ids = append(ids, id...)
					}
					return nil
				})
			}
		},
		"InsertManySQL": func(t *testing.T, ctx context.Context, conn *pgx.Conn) insert {
			db := stdlib.OpenDB(*conn.Config())
			t.Cleanup(func() { _ = db.Close() })
			return func(events ...outbox.Event) (ids []outbox.UUID, err error) {
				return ids, inSQL(ctx, db, func(tx *sql.Tx) (err error) {
					ids, err = outbox.InsertManySQL(ctx, tx, tenant, events)
					return err
				})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := setup(t)
			test(t, conn, start(t, t.Context(), conn))
		})
	}
}

func inSQL(ctx context.Context, db *sql.DB, do func(*sql.Tx) error) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if err := do(tx); err != nil {
		return err
	}
	return tx.Commit()
}

const selectEvents = `SELECT id, event_type, coalesce(event_name, ''), aggregate_id, aggregate_type, aggregate_version, event_data::text,
	event_metadata::text, correlation_id, causation_id, triggered_by_user_id, context_id, occurred_at
	FROM "Tenant ""A""".webhook_events ORDER BY id`

func stored(t *testing.T, conn *pgx.Conn) []outbox.Event {
	t.Helper()
	rows, err := conn.Query(t.Context(), selectEvents)
	require.NoError(t, err)
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (e outbox.Event, err error) {
		var data, metadata string
		err = row.Scan(&e.ID, &e.Type, &e.Name, &e.AggregateID, &e.AggregateType, &e.AggregateVersion, &data, &metadata,
			&e.CorrelationID, &e.CausationID, &e.TriggeredByUserID, &e.ContextID, &e.OccurredAt)
		e.Data, e.Metadata, e.OccurredAt = json.RawMessage(data), json.RawMessage(metadata), e.OccurredAt.UTC()
		return e, err
	})
	require.NoError(t, err)
	return events
}

func TestInsertKeepsEveryField(t *testing.T) {
	t.Parallel()
	inserters(t, func(t *testing.T, conn *pgx.Conn, insert func(...outbox.Event) ([]outbox.UUID, error)) {
		full := outbox.Event{
			ID: outbox.NewUUID(), Type: "order.line-item.created", Name: "Größe \"L\" <b>\u2028\\",
			AggregateID: outbox.NewUUID(), AggregateType: "order", AggregateVersion: 7,
			Data:          json.RawMessage(`{"a": [12345678901234567890.10, "<&\n\u0001 \ud83d\ude00"], "zz": null}`),
			Metadata:      json.RawMessage(`{"traceparent": "00-1-2-00"}`),
			CorrelationID: outbox.NewUUID(), CausationID: outbox.NewUUID(), TriggeredByUserID: outbox.NewUUID(), ContextID: outbox.NewUUID(),
			OccurredAt: time.Date(1999, 12, 31, 23, 59, 59, 123456789, time.FixedZone("", -3600)),
		}
		scalar := outbox.Event{Type: "order.noted", AggregateID: outbox.NewUUID(), AggregateType: "order", Data: json.RawMessage(`null`)}
		ids, err := insert(full, scalar)
		require.NoError(t, err)
		require.Len(t, ids, 2)
		assert.Equal(t, full.ID, ids[0])

		got := stored(t, conn)
		require.Len(t, got, 2)
		full.Data = json.RawMessage(`{"a": [12345678901234567890.10, "<&\n\u0001 😀"], "zz": null}`)
		full.OccurredAt = time.Date(2000, 1, 1, 0, 59, 59, 123456000, time.UTC)
		assert.Equal(t, full, got[0])
		assert.Equal(t, ids[1], got[1].ID)
		assert.Equal(t, `null`, string(got[1].Data))
	})
}

func TestInsertFillsDefaults(t *testing.T) {
	t.Parallel()
	inserters(t, func(t *testing.T, conn *pgx.Conn, insert func(...outbox.Event) ([]outbox.UUID, error)) {
		e := outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order"}
		ids, err := insert(e, e)
		require.NoError(t, err)
		require.Len(t, ids, 2)
		assert.Less(t, ids[0].String(), ids[1].String())

		for i, got := range stored(t, conn) {
			assert.WithinDuration(t, time.Now(), got.OccurredAt, time.Minute)
			e.ID, e.AggregateVersion, e.OccurredAt = ids[i], 1, got.OccurredAt
			e.Data, e.Metadata = json.RawMessage(`{}`), json.RawMessage(`{}`)
			assert.Equal(t, e, got)
		}
		var nulls int
		require.NoError(t, conn.QueryRow(t.Context(), `SELECT count(*) FROM "Tenant ""A""".webhook_events WHERE event_name IS NULL
			AND correlation_id IS NULL AND causation_id IS NULL AND triggered_by_user_id IS NULL AND context_id IS NULL`).Scan(&nulls))
		assert.Equal(t, 2, nulls)
	})
}

func TestInsertRefusesBeforeItSends(t *testing.T) {
	t.Parallel()
	inserters(t, func(t *testing.T, conn *pgx.Conn, insert func(...outbox.Event) ([]outbox.UUID, error)) {
		_, err := insert(outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order"}, outbox.Event{Type: "order"})
		require.ErrorContains(t, err, `Type: "order" has one segment`)
		require.ErrorContains(t, err, "AggregateID: is missing")
		assert.Empty(t, stored(t, conn))
	})
}

func TestInsertFollowsItsTransaction(t *testing.T) {
	t.Parallel()
	conn := setup(t)
	e := outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order"}

	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	kept, err := outbox.Insert(t.Context(), tx, tenant, e)
	require.NoError(t, err)
	savepoint, err := tx.Begin(t.Context())
	require.NoError(t, err)
	_, err = outbox.InsertMany(t.Context(), savepoint, tenant, []outbox.Event{e, e})
	require.NoError(t, err)
	require.NoError(t, savepoint.Rollback(t.Context()))
	require.NoError(t, tx.Commit(t.Context()))

	db := stdlib.OpenDB(*conn.Config())
	t.Cleanup(func() { _ = db.Close() })
	sqlTx, err := db.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	_, err = outbox.InsertManySQL(t.Context(), sqlTx, tenant, []outbox.Event{e, e})
	require.NoError(t, err)
	_, err = outbox.InsertSQL(t.Context(), sqlTx, tenant, e)
	require.NoError(t, err)
	require.NoError(t, sqlTx.Rollback())

	got := stored(t, conn)
	require.Len(t, got, 1)
	assert.Equal(t, kept, got[0].ID)
}

func TestInsertManyInSeveralRoundTrips(t *testing.T) {
	t.Parallel()
	conn := setup(t)
	events := make([]outbox.Event, 7)
	for i := range events {
		events[i] = outbox.Event{
			Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order",
			Data: json.RawMessage(fmt.Sprintf(`{"n": %d, "text": %q}`, i, strings.Repeat("x", i%2*5<<20))),
		}
	}
	ids, err := outbox.InsertMany(t.Context(), conn, tenant, events)
	require.NoError(t, err)
	got := stored(t, conn)
	require.Len(t, got, len(events))
	for i := range got {
		assert.Equal(t, ids[i], got[i].ID)
		assert.JSONEq(t, string(events[i].Data), string(got[i].Data))
	}
}

func TestInsertManyOfNothing(t *testing.T) {
	t.Parallel()
	ids, err := outbox.InsertMany(t.Context(), nil, tenant, nil)
	require.NoError(t, err)
	assert.Empty(t, ids)
}

// Poolers need the modes of pgx that prepare nothing.
func TestInsertInEveryQueryMode(t *testing.T) {
	t.Parallel()
	conn := setup(t)
	e := outbox.Event{
		Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order", ContextID: outbox.NewUUID(),
		Data: json.RawMessage(`{"it's": "\\"}`), OccurredAt: time.Now(),
	}
	for _, mode := range []pgx.QueryExecMode{
		pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec, pgx.QueryExecModeExec,
		pgx.QueryExecModeSimpleProtocol,
	} {
		config := conn.Config()
		config.DefaultQueryExecMode = mode
		other, err := pgx.ConnectConfig(t.Context(), config)
		require.NoError(t, err)
		_, err = outbox.Insert(t.Context(), other, tenant, e)
		require.NoError(t, err, mode)
		_, err = outbox.InsertMany(t.Context(), other, tenant, []outbox.Event{e})
		require.NoError(t, err, mode)
		require.NoError(t, other.Close(t.Context()))
	}
	got := stored(t, conn)
	require.Len(t, got, 10)
	for _, g := range got {
		assert.Equal(t, string(e.Data), string(g.Data))
		assert.Equal(t, e.OccurredAt.UTC().Truncate(time.Microsecond), g.OccurredAt)
	}
}

func TestInsertRefusesSchemaNames(t *testing.T) {
	t.Parallel()
	e := outbox.Event{Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order"}
	for _, schema := range []string{"", strings.Repeat("a", 64), "a\x00b"} {
		_, err := outbox.Insert(t.Context(), nil, schema, e)
		require.ErrorContains(t, err, "want a name of 1 to 63 bytes")
		_, err = outbox.InsertMany(t.Context(), nil, schema, []outbox.Event{e})
		require.ErrorContains(t, err, "want a name of 1 to 63 bytes")
	}
}

func TestUUIDsInBothFormats(t *testing.T) {
	t.Parallel()
	conn := setup(t)
	sent := []outbox.UUID{outbox.NewUUID(), {}, outbox.NewUUID()}
	for _, format := range []int16{pgx.BinaryFormatCode, pgx.TextFormatCode} {
		var got []outbox.UUID
		var second *outbox.UUID
		err := conn.QueryRow(t.Context(), `SELECT $1::uuid[], ($1::uuid[])[2]`, pgx.QueryResultFormats{format}, sent).Scan(&got, &second)
		require.NoError(t, err)
		assert.Equal(t, sent, got, "NULL and zero are the same")
		assert.Nil(t, second)
	}
}

// BenchmarkInsertMany compares one statement for 1,000 events with one statement each.
func BenchmarkInsertMany(b *testing.B) {
	conn, err := pgx.Connect(b.Context(), pgtest.Database(b))
	require.NoError(b, err)
	b.Cleanup(func() { _ = conn.Close(context.Background()) })
	_, err = conn.Exec(b.Context(), createTable)
	require.NoError(b, err)
	events := make([]outbox.Event, 1000)
	for i := range events {
		events[i] = outbox.Event{
			Type: "order.created", AggregateID: outbox.NewUUID(), AggregateType: "order",
			Data: json.RawMessage(`{"text": "` + strings.Repeat("x", 300) + `"}`),
		}
	}
	b.Run("many", func(b *testing.B) {
		for b.Loop() {
			_, err := outbox.InsertMany(b.Context(), conn, tenant, events)
			require.NoError(b, err)
		}
	})
	b.Run("one by one", func(b *testing.B) {
		for b.Loop() {
			require.NoError(b, pgx.BeginFunc(b.Context(), conn, func(tx pgx.Tx) error {
				for _, e := range events {
					if _, err := outbox.Insert(b.Context(), tx, tenant, e); err != nil {
						return err
					}
				}
				return nil
			}))
		}
	})
}

// TestNumbersAsPostgreSQL holds Validate against the server, at the bounds of numeric.
func TestNumbersAsPostgreSQL(t *testing.T) {
	t.Parallel()
	conn := setup(t)
	zeros := func(n int) string { return strings.Repeat("0", n) }
	for _, number := range []string{
		"0", "-0", "1e131071", "1e131072", "9.9e131071", "10e131071", "0.1e131072", "0.1e131073", "0.00001e131076", "0.00001e131077",
		"1" + zeros(131071), "1" + zeros(131072), "1" + zeros(131071) + ".5", "1e-16383", "1e-16384", "1.0e-16382", "1.0e-16383", "-1E-16384",
		"0." + zeros(16382) + "1", "0." + zeros(16383) + "1", "0." + zeros(16383), "0." + zeros(16384), "0e131072", "0e-16384", "0e1000000", "0.0e-16383",
		"1" + zeros(20000) + "e-20000", "1" + zeros(20000) + "e-36383", "1" + zeros(20000) + "e-36384", "1e1073741824", "0e1073741825", "0e-1073741825",
		"1e+131071", "1e+131072", "0e99999999999999999999", "1e-99999999999999999999", "1e0000000000000000000000131071",
	} {
		e := outbox.Event{Type: "a.b", AggregateID: outbox.UUID{1}, AggregateType: "a", Data: json.RawMessage(`{"n": [` + number + `]}`)}
		_, err := conn.Exec(t.Context(), "SELECT $1::text::jsonb", string(e.Data))
		assert.Equal(t, err == nil, e.Validate() == nil, "%.40s (%d bytes): the server says %v", number, len(number), err)
	}
}
