package outbox_test

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// The order and the event that tells of it are committed together, or neither is.
func ExampleInsert() {
	placeOrder := func(ctx context.Context, conn *pgx.Conn, order outbox.UUID) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "INSERT INTO tenant_a.orders (id) VALUES ($1)", order); err != nil {
				return err
			}
			_, err := outbox.Insert(ctx, tx, "tenant_a", outbox.Event{
				Type:          "order.created",
				AggregateID:   order,
				AggregateType: "order",
				Data:          json.RawMessage(`{"total": "19.90", "currency": "EUR"}`),
			})
			return err
		})
	}
	_ = placeOrder
}

func ExampleInsertSQL() {
	placeOrder := func(ctx context.Context, db *sql.DB, order outbox.UUID) error {
		tx, err := db.BeginTx(ctx, nil)
		if err != nil {
			return err
		}
		_, err = outbox.InsertSQL(ctx, tx, "tenant_a", outbox.Event{Type: "order.created", AggregateID: order, AggregateType: "order"})
		if err != nil {
			return errors.Join(err, tx.Rollback())
		}
		return tx.Commit()
	}
	_ = placeOrder
}

func ExampleEvent_Validate() {
	e := outbox.Event{Type: "OrderCreated", AggregateID: outbox.NewUUID(), Data: json.RawMessage(`{"total": }`)}
	fmt.Println(e.Validate())
	// Output:
	// Type: "OrderCreated" has one segment; use two or more segments of a-z, 0-9, _ and - joined by dots, such as order.created
	// AggregateType: is missing; set the kind of thing AggregateID names, such as order
	// Data: is not valid JSON; set a JSON document that jsonb can hold, or leave it empty for {}
}
