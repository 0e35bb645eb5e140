// Package outbox is what an application imports to publish webhook events: it inserts them into its tenant's webhook_events, in the
// same transaction as the change they tell of, and does nothing else. The relay reads them from the write-ahead log and delivers.
//
// Nothing here is needed to publish. Plain SQL from any language does as well:
//
//	INSERT INTO tenant_a.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data)
//	VALUES (gen_random_uuid(), 'order.created', '0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11', 'order', '{"total": "19.90"}');
//
// What the package adds are version 7 ids, which keep the primary key's index compact, and validation before the statement is sent:
// an error in PostgreSQL would abort the application's transaction.
package outbox
