package outbox

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Execer is what Insert needs of pgx: a pgx.Tx, *pgx.Conn or *pgxpool.Pool.
type Execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

// SQLExecer is what InsertSQL needs of database/sql: a *sql.Tx, *sql.Conn or *sql.DB of any PostgreSQL driver.
type SQLExecer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// chunkBytes is about how much InsertMany sends in one statement. Both sides hold a chunk in memory as a whole.
const chunkBytes = 4 << 20

// rowBytes is about what one event adds to a chunk apart from its documents.
const rowBytes = 512

const (
	columns = `id, event_type, event_name, aggregate_id, aggregate_type, aggregate_version, event_data, event_metadata, ` +
		`correlation_id, causation_id, triggered_by_user_id, context_id, occurred_at`

	// Every parameter is cast, so that a driver may send it as text and the server need not guess.
	oneRow = ` (` + columns + `) VALUES ($1::uuid, $2::text, nullif($3::text, ''), $4::uuid, $5::text, $6::int, $7::jsonb, $8::jsonb, ` +
		`$9::uuid, $10::uuid, $11::uuid, $12::uuid, coalesce($13::timestamptz, now()))`

	// One text parameter is the only list that every driver can send. A JSON null as event_data would become NULL, hence coalesce.
	manyRows = ` (` + columns + `) SELECT id, event_type, event_name, aggregate_id, aggregate_type, aggregate_version, ` +
		`coalesce(event_data, 'null'), event_metadata, ` +
		`correlation_id, causation_id, triggered_by_user_id, context_id, coalesce(occurred_at, now()) ` +
		`FROM json_to_recordset($1::json) AS e (id uuid, event_type text, event_name text, aggregate_id uuid, aggregate_type text, ` +
		`aggregate_version int, event_data jsonb, event_metadata jsonb, ` +
		`correlation_id uuid, causation_id uuid, triggered_by_user_id uuid, context_id uuid, occurred_at timestamptz)`
)

// Insert writes e into webhook_events of schema and returns its id. Run it in the transaction that makes the change e tells of: the
// event is delivered if that transaction commits, and never if it rolls back. An event that Validate refuses is not sent to the
// database, so the transaction can go on; any other error has aborted it.
func Insert(ctx context.Context, tx Execer, schema string, e Event) (UUID, error) {
	return insertOne(pgxExec(ctx, tx), schema, e)
}

// InsertSQL is Insert through database/sql.
func InsertSQL(ctx context.Context, tx SQLExecer, schema string, e Event) (UUID, error) {
	return insertOne(sqlExec(ctx, tx), schema, e)
}

// InsertMany writes events in their order and returns their ids in the same order. It makes one round trip for every few MiB. If any
// event is invalid none is written, and the error names each by its index. Run it in a transaction: outside of one, an error can
// leave the events of earlier round trips behind.
func InsertMany(ctx context.Context, tx Execer, schema string, events []Event) ([]UUID, error) {
	return insertMany(pgxExec(ctx, tx), schema, events)
}

// InsertManySQL is InsertMany through database/sql.
func InsertManySQL(ctx context.Context, tx SQLExecer, schema string, events []Event) ([]UUID, error) {
	return insertMany(sqlExec(ctx, tx), schema, events)
}

type exec func(query string, args ...any) error

func pgxExec(ctx context.Context, tx Execer) exec {
	return func(query string, args ...any) error {
		_, err := tx.Exec(ctx, query, args...)
		return err
	}
}

func sqlExec(ctx context.Context, tx SQLExecer) exec {
	return func(query string, args ...any) error {
		_, err := tx.ExecContext(ctx, query, args...)
		return err
	}
}

func insertOne(run exec, schema string, e Event) (UUID, error) {
	into, err := insertInto(schema)
	if err != nil {
		return UUID{}, err
	}
	if err := e.Validate(); err != nil {
		return UUID{}, fmt.Errorf("insert event into schema %q: %w", schema, err)
	}
	r := newRow(&e)
	var occurredAt any
	if !r.OccurredAt.IsZero() {
		occurredAt = r.OccurredAt
	}
	err = run(into+oneRow, r.ID, r.Type, r.Name, r.AggregateID, r.AggregateType, r.AggregateVersion, string(r.Data), string(r.Metadata),
		r.CorrelationID, r.CausationID, r.TriggeredByUserID, r.ContextID, occurredAt)
	if err != nil {
		return UUID{}, fmt.Errorf("insert event into schema %q: %w", schema, err)
	}
	return r.ID, nil
}

func insertMany(run exec, schema string, events []Event) ([]UUID, error) {
	into, err := insertInto(schema)
	if err != nil {
		return nil, err
	}
	var faults []error
	for i := range events {
		if err := events[i].Validate(); err != nil {
			faults = append(faults, fmt.Errorf("event %d: %w", i, err))
		}
	}
	if len(faults) > 0 {
		return nil, fmt.Errorf("insert %d events into schema %q: %w", len(events), schema, errors.Join(faults...))
	}

	ids := make([]UUID, 0, len(events))
	for len(events) > 0 {
		n := chunk(events)
		rows := make([]row, n)
		for i := range rows {
			rows[i] = newRow(&events[i])
			ids = append(ids, rows[i].ID)
		}
		doc, err := json.Marshal(rows)
		if err != nil {
			return nil, fmt.Errorf("encode %d events for schema %q: %w", n, schema, err)
		}
		if err := run(into+manyRows, string(doc)); err != nil {
			return nil, fmt.Errorf("insert %d events into schema %q: %w", n, schema, err)
		}
		events = events[n:]
	}
	return ids, nil
}

// chunk returns how many leading events go into the next statement, at least one.
func chunk(events []Event) int {
	size := 0
	for i := range events {
		size += rowBytes + len(events[i].Data) + len(events[i].Metadata)
		if size > chunkBytes && i > 0 {
			return i
		}
	}
	return len(events)
}

// insertInto names the table. PostgreSQL cuts a longer name than 63 bytes off, and the rest could be another tenant's schema.
func insertInto(schema string) (string, error) {
	if schema == "" || len(schema) > 63 || strings.Contains(schema, "\x00") {
		return "", fmt.Errorf("insert into schema %.80q: want a name of 1 to 63 bytes", schema)
	}
	return "INSERT INTO " + pgx.Identifier{schema, "webhook_events"}.Sanitize(), nil
}

// row is an Event with its defaults filled in. Its JSON form has the names of the columns; what is left out is NULL.
type row struct {
	ID                UUID            `json:"id"`
	Type              string          `json:"event_type"`
	Name              string          `json:"event_name,omitzero"`
	AggregateID       UUID            `json:"aggregate_id"`
	AggregateType     string          `json:"aggregate_type"`
	AggregateVersion  int32           `json:"aggregate_version"`
	Data              json.RawMessage `json:"event_data"`
	Metadata          json.RawMessage `json:"event_metadata"`
	CorrelationID     UUID            `json:"correlation_id,omitzero"`
	CausationID       UUID            `json:"causation_id,omitzero"`
	TriggeredByUserID UUID            `json:"triggered_by_user_id,omitzero"`
	ContextID         UUID            `json:"context_id,omitzero"`
	OccurredAt        time.Time       `json:"occurred_at,omitzero"`
}

func newRow(e *Event) row {
	r := row{
		ID: e.ID, Type: e.Type, Name: e.Name,
		AggregateID: e.AggregateID, AggregateType: e.AggregateType, AggregateVersion: max(e.AggregateVersion, 1),
		Data: e.Data, Metadata: e.Metadata,
		CorrelationID: e.CorrelationID, CausationID: e.CausationID, TriggeredByUserID: e.TriggeredByUserID, ContextID: e.ContextID,
		OccurredAt: e.OccurredAt.UTC().Truncate(time.Microsecond),
	}
	if r.ID.IsZero() {
		r.ID = NewUUID()
	}
	if len(r.Data) == 0 {
		r.Data = json.RawMessage("{}")
	}
	if len(r.Metadata) == 0 {
		r.Metadata = json.RawMessage("{}")
	}
	return r
}
