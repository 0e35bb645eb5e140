-- A tenant schema as neo-commons makes it: ids from a function in another schema, triggers for updated_at, secondary indexes, both
-- cascading references of webhook_deliveries, old rows. {{s}} is the quoted schema, {{n}} the number of events.
CREATE SCHEMA IF NOT EXISTS platform;
CREATE OR REPLACE FUNCTION platform.uuid7() RETURNS uuid LANGUAGE sql VOLATILE AS $$
  SELECT (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0') || '7' || substr(md5(random()::text), 1, 3)
    || '8' || substr(md5(random()::text), 1, 15))::uuid $$;
CREATE OR REPLACE FUNCTION platform.touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.updated_at := now(); RETURN NEW; END $$;
CREATE SCHEMA {{s}};
SET search_path = {{s}};
CREATE TABLE webhook_endpoints (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), name varchar(255) NOT NULL, description text, endpoint_url text NOT NULL,
  http_method varchar(10) NOT NULL DEFAULT 'POST' CHECK (http_method IN ('POST', 'PUT', 'PATCH')), secret_token varchar(512) NOT NULL,
  signature_header varchar(100) NOT NULL DEFAULT 'X-Webhook-Signature', custom_headers jsonb NOT NULL DEFAULT '{}',
  timeout_seconds int NOT NULL DEFAULT 30 CHECK (timeout_seconds BETWEEN 5 AND 300), follow_redirects bool NOT NULL DEFAULT false,
  verify_ssl bool NOT NULL DEFAULT true, max_retry_attempts int NOT NULL DEFAULT 3 CHECK (max_retry_attempts BETWEEN 0 AND 10),
  retry_backoff_seconds int NOT NULL DEFAULT 5, retry_backoff_multiplier decimal(3,2) NOT NULL DEFAULT 2.0, is_active bool NOT NULL DEFAULT true,
  is_verified bool NOT NULL DEFAULT false, created_by_user_id uuid NOT NULL, context_id uuid, created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(), last_used_at timestamptz, verified_at timestamptz);
CREATE TABLE webhook_event_types (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), event_type varchar(255) NOT NULL UNIQUE, category varchar(100) NOT NULL,
  display_name varchar(255) NOT NULL, description text, is_enabled bool NOT NULL DEFAULT true, requires_verification bool NOT NULL DEFAULT false,
  payload_schema jsonb, example_payload jsonb, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE webhook_event_subscriptions (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), webhook_endpoint_id uuid NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
  event_type_id uuid NOT NULL REFERENCES webhook_event_types (id) ON DELETE CASCADE, is_active bool NOT NULL DEFAULT true,
  event_filters jsonb NOT NULL DEFAULT '{}', created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (webhook_endpoint_id, event_type_id));
CREATE TABLE webhook_subscriptions (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), endpoint_id uuid NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
  event_type_id uuid NOT NULL REFERENCES webhook_event_types (id) ON DELETE CASCADE, event_type varchar(255) NOT NULL,
  event_filters jsonb NOT NULL DEFAULT '{}', is_active bool NOT NULL DEFAULT true, context_id uuid, subscription_name varchar(255),
  description text, created_at timestamptz NOT NULL DEFAULT now(), updated_at timestamptz NOT NULL DEFAULT now(), last_triggered_at timestamptz);
CREATE TABLE webhook_events (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), event_type varchar(255) NOT NULL, event_name varchar(255), aggregate_id uuid NOT NULL,
  aggregate_type varchar(100) NOT NULL, aggregate_version int NOT NULL DEFAULT 1, event_data jsonb NOT NULL DEFAULT '{}',
  event_metadata jsonb NOT NULL DEFAULT '{}', correlation_id uuid, causation_id uuid, triggered_by_user_id uuid, context_id uuid,
  occurred_at timestamptz NOT NULL DEFAULT now(), processed_at timestamptz, created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX idx_events_type ON webhook_events (event_type);
CREATE INDEX idx_events_aggregate ON webhook_events (aggregate_type, aggregate_id);
CREATE INDEX idx_events_unprocessed ON webhook_events (occurred_at) WHERE processed_at IS NULL;
CREATE TABLE webhook_deliveries (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(),
  webhook_endpoint_id uuid NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
  webhook_event_id uuid NOT NULL CONSTRAINT "fk deliveries->events" REFERENCES webhook_events (id) ON DELETE CASCADE,
  attempt_number int NOT NULL DEFAULT 1 CHECK (attempt_number >= 1), delivery_status varchar(50) NOT NULL DEFAULT 'pending',
  request_url text NOT NULL, request_method varchar(10) NOT NULL, request_headers jsonb NOT NULL DEFAULT '{}', request_body text,
  request_signature varchar(255), response_status_code int, response_headers jsonb, response_body text, response_time_ms int, error_message text,
  error_code varchar(100), next_retry_at timestamptz, max_attempts_reached bool NOT NULL DEFAULT false, attempted_at timestamptz NOT NULL DEFAULT now(),
  completed_at timestamptz, created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX idx_deliveries_endpoint ON webhook_deliveries (webhook_endpoint_id);
CREATE INDEX idx_deliveries_retry ON webhook_deliveries (next_retry_at) WHERE delivery_status = 'retrying';
CREATE TABLE webhook_delivery_stats (
  id uuid PRIMARY KEY DEFAULT platform.uuid7(), webhook_endpoint_id uuid NOT NULL REFERENCES webhook_endpoints (id) ON DELETE CASCADE,
  date_recorded date NOT NULL, total_attempts int NOT NULL DEFAULT 0, successful_deliveries int NOT NULL DEFAULT 0,
  failed_deliveries int NOT NULL DEFAULT 0, timeout_deliveries int NOT NULL DEFAULT 0, avg_response_time_ms int, min_response_time_ms int,
  max_response_time_ms int, most_common_error_code varchar(100), error_rate decimal(5,2), created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(), UNIQUE (webhook_endpoint_id, date_recorded));
CREATE TRIGGER touch BEFORE UPDATE ON webhook_endpoints FOR EACH ROW EXECUTE FUNCTION platform.touch();
CREATE TRIGGER touch BEFORE UPDATE ON webhook_subscriptions FOR EACH ROW EXECUTE FUNCTION platform.touch();

INSERT INTO webhook_endpoints (name, endpoint_url, secret_token, created_by_user_id) VALUES ('old', 'https://example.com/hook', 'secret', platform.uuid7());
INSERT INTO webhook_event_types (event_type, category, display_name) VALUES ('order.created', 'order', 'Order created');
INSERT INTO webhook_subscriptions (endpoint_id, event_type_id, event_type) SELECT e.id, t.id, t.event_type FROM webhook_endpoints e, webhook_event_types t;
INSERT INTO webhook_event_subscriptions (webhook_endpoint_id, event_type_id) SELECT e.id, t.id FROM webhook_endpoints e, webhook_event_types t;
INSERT INTO webhook_events (id, event_type, aggregate_id, aggregate_type, event_data, processed_at)
  SELECT gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', jsonb_build_object('n', i, 'text', repeat('x', 100)),
         CASE WHEN i % 10 > 0 THEN now() END FROM generate_series(1, {{n}}) i;
-- The polling dispatcher wrote a row for each attempt.
INSERT INTO webhook_deliveries (webhook_endpoint_id, webhook_event_id, attempt_number, request_url, request_method)
  SELECT e.id, v.id, a, e.endpoint_url, 'POST' FROM webhook_endpoints e, (SELECT id FROM webhook_events LIMIT 1000) v, generate_series(1, 3) a;
INSERT INTO webhook_delivery_stats (webhook_endpoint_id, date_recorded) SELECT id, current_date FROM webhook_endpoints;
RESET search_path;
