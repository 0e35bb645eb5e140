-- +goose Up
-- The shape of a tenant, as functions, so that it can be made inside an application's own transaction. shape_version() names it: a
-- migration that changes what is below raises it, and every registered tenant is then brought up to it.

CREATE OR REPLACE FUNCTION outbox_relay.shape_version() RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 1';

-- The base shape of each table in the order of its references; %1$I stands for the schema. What the relay adds to a table that
-- may exist already is in tenant_columns, so that a fresh and an adopted table go the same way.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_tables() RETURNS TABLE (ord int, name text, ddl text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
(1, 'webhook_endpoints', $$CREATE TABLE %1$I.webhook_endpoints (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name varchar(255) NOT NULL,
  description text,
  endpoint_url text NOT NULL,
  http_method varchar(10) NOT NULL DEFAULT 'POST' CHECK (http_method IN ('POST', 'PUT', 'PATCH')),
  secret_token varchar(512) NOT NULL,
  signature_header varchar(100) NOT NULL DEFAULT 'X-Webhook-Signature',
  custom_headers jsonb NOT NULL DEFAULT '{}',
  timeout_seconds int NOT NULL DEFAULT 30 CHECK (timeout_seconds BETWEEN 5 AND 300),
  follow_redirects boolean NOT NULL DEFAULT false,
  verify_ssl boolean NOT NULL DEFAULT true,
  max_retry_attempts int NOT NULL DEFAULT 3 CHECK (max_retry_attempts BETWEEN 0 AND 10),
  retry_backoff_seconds int NOT NULL DEFAULT 5 CHECK (retry_backoff_seconds BETWEEN 1 AND 3600),
  retry_backoff_multiplier decimal(3,2) NOT NULL DEFAULT 2.0 CHECK (retry_backoff_multiplier BETWEEN 1.0 AND 5.0),
  is_active boolean NOT NULL DEFAULT true,
  is_verified boolean NOT NULL DEFAULT false,
  created_by_user_id uuid NOT NULL,
  context_id uuid,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  last_used_at timestamptz,
  verified_at timestamptz)$$),
(2, 'webhook_event_types', $$CREATE TABLE %1$I.webhook_event_types (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  event_type varchar(255) NOT NULL UNIQUE,
  category varchar(100) NOT NULL,
  display_name varchar(255) NOT NULL,
  description text,
  is_enabled boolean NOT NULL DEFAULT true,
  requires_verification boolean NOT NULL DEFAULT false,
  payload_schema jsonb,
  example_payload jsonb,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now())$$),
(3, 'webhook_event_subscriptions', $$CREATE TABLE %1$I.webhook_event_subscriptions (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  webhook_endpoint_id uuid NOT NULL REFERENCES %1$I.webhook_endpoints (id) ON DELETE CASCADE,
  event_type_id uuid NOT NULL REFERENCES %1$I.webhook_event_types (id) ON DELETE CASCADE,
  is_active boolean NOT NULL DEFAULT true,
  event_filters jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (webhook_endpoint_id, event_type_id))$$),
(4, 'webhook_subscriptions', $$CREATE TABLE %1$I.webhook_subscriptions (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  endpoint_id uuid NOT NULL REFERENCES %1$I.webhook_endpoints (id) ON DELETE CASCADE,
  event_type_id uuid NOT NULL REFERENCES %1$I.webhook_event_types (id) ON DELETE CASCADE,
  event_type varchar(255) NOT NULL,
  event_filters jsonb NOT NULL DEFAULT '{}',
  is_active boolean NOT NULL DEFAULT true,
  context_id uuid,
  subscription_name varchar(255),
  description text,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  last_triggered_at timestamptz);
CREATE INDEX webhook_subscriptions_endpoint_id_idx ON %1$I.webhook_subscriptions (endpoint_id)$$),
(5, 'webhook_events', $$CREATE TABLE %1$I.webhook_events (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  event_type varchar(255) NOT NULL,
  event_name varchar(255),
  aggregate_id uuid NOT NULL,
  aggregate_type varchar(100) NOT NULL,
  aggregate_version int NOT NULL DEFAULT 1,
  event_data jsonb NOT NULL DEFAULT '{}',
  event_metadata jsonb NOT NULL DEFAULT '{}',
  correlation_id uuid,
  causation_id uuid,
  triggered_by_user_id uuid,
  context_id uuid,
  occurred_at timestamptz NOT NULL DEFAULT now(),
  processed_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now())$$),
-- No reference to webhook_events or webhook_endpoints: a key check would lock and dirty the application's rows at every delivery, and fails while a
-- commit that already streams is not visible yet, be it that it waits for a synchronous standby. So deliveries outlive their endpoint, as dead letters do.
(6, 'webhook_deliveries', $$CREATE TABLE %1$I.webhook_deliveries (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  webhook_endpoint_id uuid NOT NULL,
  webhook_event_id uuid NOT NULL,
  attempt_number int NOT NULL DEFAULT 1 CHECK (attempt_number >= 1),
  delivery_status varchar(50) NOT NULL DEFAULT 'pending'
    CHECK (delivery_status IN ('pending', 'success', 'failed', 'timeout', 'retrying', 'cancelled')),
  request_url text NOT NULL,
  request_method varchar(10) NOT NULL,
  request_headers jsonb NOT NULL DEFAULT '{}',
  request_body text,
  request_signature varchar(255),
  response_status_code int,
  response_headers jsonb,
  response_body text,
  response_time_ms int,
  error_message text,
  error_code varchar(100),
  next_retry_at timestamptz,
  max_attempts_reached boolean NOT NULL DEFAULT false,
  attempted_at timestamptz NOT NULL DEFAULT now(),
  completed_at timestamptz,
  created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX webhook_deliveries_webhook_endpoint_id_idx ON %1$I.webhook_deliveries (webhook_endpoint_id)$$),
(7, 'webhook_delivery_attempts', $$CREATE TABLE %1$I.webhook_delivery_attempts (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  delivery_id uuid NOT NULL,
  webhook_endpoint_id uuid NOT NULL,
  attempt_number int NOT NULL,
  error_class varchar(32) NOT NULL,
  response_status_code int,
  error_message text,
  response_body text,
  response_time_ms int,
  attempted_at timestamptz NOT NULL);
CREATE INDEX webhook_delivery_attempts_delivery_id_idx ON %1$I.webhook_delivery_attempts (delivery_id)$$),
-- No references at all: a dead letter outlives the endpoint and the event it came from.
(8, 'webhook_dead_letters', $$CREATE TABLE %1$I.webhook_dead_letters (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  delivery_id uuid NOT NULL UNIQUE,
  webhook_event_id uuid NOT NULL,
  webhook_endpoint_id uuid NOT NULL,
  request_url text NOT NULL,
  request_method varchar(10) NOT NULL,
  request_headers jsonb NOT NULL,
  request_body text,
  attempts int NOT NULL,
  last_error text,
  last_error_code varchar(100),
  last_status_code int,
  last_response_body text,
  dead_at timestamptz NOT NULL DEFAULT now(),
  replayed_at timestamptz);
CREATE INDEX webhook_dead_letters_endpoint_idx ON %1$I.webhook_dead_letters (webhook_endpoint_id, dead_at)$$),
(9, 'webhook_delivery_stats', $$CREATE TABLE %1$I.webhook_delivery_stats (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  webhook_endpoint_id uuid NOT NULL REFERENCES %1$I.webhook_endpoints (id) ON DELETE CASCADE,
  date_recorded date NOT NULL,
  total_attempts int NOT NULL DEFAULT 0,
  successful_deliveries int NOT NULL DEFAULT 0,
  failed_deliveries int NOT NULL DEFAULT 0,
  timeout_deliveries int NOT NULL DEFAULT 0,
  avg_response_time_ms int,
  min_response_time_ms int,
  max_response_time_ms int,
  most_common_error_code varchar(100),
  error_rate decimal(5,2) CHECK (error_rate BETWEEN 0 AND 100),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  UNIQUE (webhook_endpoint_id, date_recorded))$$),
(10, 'event_archives', $$CREATE TABLE %1$I.event_archives (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  archive_name varchar(255) NOT NULL,
  description text,
  policy varchar(50) NOT NULL CHECK (policy IN ('age_based', 'size_based', 'hybrid', 'custom')),
  storage_type varchar(50) NOT NULL
    CHECK (storage_type IN ('database_partition', 'cold_storage', 'compressed_archive', 'data_warehouse')),
  storage_location text NOT NULL,
  status varchar(50) NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'in_progress', 'completed', 'failed', 'restored')),
  event_count int NOT NULL DEFAULT 0 CHECK (event_count >= 0),
  size_bytes bigint NOT NULL DEFAULT 0 CHECK (size_bytes >= 0),
  compression_ratio decimal(5,4) CHECK (compression_ratio BETWEEN 0 AND 1),
  checksum varchar(128),
  events_from timestamptz NOT NULL,
  events_to timestamptz NOT NULL,
  context_ids uuid[],
  event_types text[],
  retention_days int CHECK (retention_days > 0),
  auto_delete_after_days int CHECK (auto_delete_after_days > 0),
  created_by_user_id uuid NOT NULL,
  tags jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now(),
  archived_at timestamptz,
  restored_at timestamptz,
  CHECK (events_from < events_to))$$),
(11, 'archival_rules', $$CREATE TABLE %1$I.archival_rules (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name varchar(255) NOT NULL UNIQUE,
  description text,
  policy varchar(50) NOT NULL CHECK (policy IN ('age_based', 'size_based', 'hybrid', 'custom')),
  storage_type varchar(50) NOT NULL
    CHECK (storage_type IN ('database_partition', 'cold_storage', 'compressed_archive', 'data_warehouse')),
  is_enabled boolean NOT NULL DEFAULT true,
  archive_after_days int CHECK (archive_after_days > 0),
  max_table_size_gb decimal(10,2) CHECK (max_table_size_gb > 0),
  max_event_count int CHECK (max_event_count > 0),
  event_types_include text[],
  event_types_exclude text[],
  context_ids_include uuid[],
  context_ids_exclude uuid[],
  schedule_cron varchar(100),
  next_run_at timestamptz,
  last_run_at timestamptz,
  storage_location_template text NOT NULL,
  compression_enabled boolean NOT NULL DEFAULT true,
  encryption_enabled boolean NOT NULL DEFAULT false,
  retention_days int CHECK (retention_days > 0),
  auto_delete_after_days int CHECK (auto_delete_after_days > 0),
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  created_by_user_id uuid NOT NULL)$$),
(12, 'archival_jobs', $$CREATE TABLE %1$I.archival_jobs (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  rule_id uuid NOT NULL REFERENCES %1$I.archival_rules (id) ON DELETE CASCADE,
  archive_id uuid REFERENCES %1$I.event_archives (id) ON DELETE SET NULL,
  status varchar(50) NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'in_progress', 'completed', 'failed', 'restored')),
  started_at timestamptz,
  completed_at timestamptz,
  events_processed int NOT NULL DEFAULT 0,
  events_archived int NOT NULL DEFAULT 0,
  events_skipped int NOT NULL DEFAULT 0,
  processing_time_seconds decimal(10,3),
  throughput_events_per_second decimal(10,2),
  storage_location text,
  compressed_size_bytes bigint,
  uncompressed_size_bytes bigint,
  error_message text,
  retry_count int NOT NULL DEFAULT 0,
  max_retries int NOT NULL DEFAULT 3,
  created_at timestamptz NOT NULL DEFAULT now(),
  updated_at timestamptz NOT NULL DEFAULT now(),
  CHECK (events_processed >= events_archived AND events_processed >= events_skipped),
  CHECK (retry_count <= max_retries))$$)
$fn$;
-- +goose StatementEnd

-- What the relay adds to tables that may exist already. Nullable or with a constant default: no rewrite, no row touched. %1$L is the
-- payload format of endpoints that name none: a table that existed keeps the body its receivers read today.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_columns() RETURNS TABLE (tbl text, col text, definition text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_events', 'xid', 'xid8'),
('webhook_endpoints', 'payload_format', $$varchar(32) NOT NULL DEFAULT %1$L
  CONSTRAINT webhook_endpoints_payload_format_check CHECK (payload_format IN ('standard', 'neo', 'cloudevents', 'cloudevents-binary', 'raw'))$$),
('webhook_endpoints', 'delivery_order', $$varchar(16) NOT NULL DEFAULT 'none'
  CONSTRAINT webhook_endpoints_delivery_order_check CHECK (delivery_order IN ('none', 'aggregate', 'strict'))$$),
('webhook_endpoints', 'max_concurrency', 'int CONSTRAINT webhook_endpoints_max_concurrency_check CHECK (max_concurrency > 0)'),
('webhook_endpoints', 'rate_limit_per_second', 'numeric CONSTRAINT webhook_endpoints_rate_limit_check CHECK (rate_limit_per_second > 0)'),
('webhook_endpoints', 'disabled_reason', 'text'),
('webhook_endpoints', 'disabled_at', 'timestamptz'),
('webhook_endpoints', 'paused_at', 'timestamptz'),
('webhook_endpoints', 'verified_at', 'timestamptz'),
('webhook_endpoints', 'secondary_secret_token', 'varchar(512)'),
('webhook_endpoints', 'secondary_secret_expires_at', 'timestamptz'),
('webhook_deliveries', 'relayed', 'boolean NOT NULL DEFAULT false'),
('webhook_deliveries', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_delivery_attempts', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_dead_letters', 'replay', 'int NOT NULL DEFAULT 0'),
('webhook_dead_letters', 'discarded_at', 'timestamptz'),
('webhook_dead_letters', 'order_key', 'uuid'),
('webhook_dead_letters', 'order_lsn', 'pg_lsn'),
('webhook_dead_letters', 'order_n', 'int'),
('webhook_delivery_stats', 'error_counts', 'jsonb'), -- what most_common_error_code is of
('webhook_delivery_stats', 'total_response_ms', 'bigint') -- what avg_response_time_ms is of: an average of averages that were rounded drifts
$fn$;
-- +goose StatementEnd

-- Indexes on tables that may be large: built concurrently by the relay's own commands, inline by add_tenant where that is short.
-- A polling dispatcher wrote several deliveries for one (event, endpoint): only the relay's own rows are unique.
-- A recovery asks of each event whether it has a delivery, be it one of an older dispatcher. Of those a tenant that began with the relay has none.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_indexes() RETURNS TABLE (tbl text, name text, uniq boolean, spec text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_events', 'webhook_events_xid_idx', false, '(xid)'),
('webhook_deliveries', 'webhook_deliveries_relayed_key', true, '(webhook_event_id, webhook_endpoint_id) WHERE relayed'),
('webhook_deliveries', 'webhook_deliveries_older_idx', false, '(webhook_event_id, webhook_endpoint_id) WHERE NOT relayed')
$fn$;
-- +goose StatementEnd

-- What the running relay may do in a tenant's schema, and no more: it never changes a webhook_events row.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_grants() RETURNS TABLE (tbl text, privileges text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_events', 'SELECT, INSERT'), -- INSERT: the relay's own news
('webhook_endpoints', 'SELECT, UPDATE (is_active, paused_at, disabled_reason, disabled_at, last_used_at, is_verified, verified_at)'),
('webhook_event_types', 'SELECT'),
('webhook_event_subscriptions', 'SELECT'),
('webhook_subscriptions', 'SELECT, UPDATE (last_triggered_at)'),
('webhook_deliveries', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_attempts', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_dead_letters', 'SELECT, INSERT, UPDATE, DELETE'),
('webhook_delivery_stats', 'SELECT, INSERT, UPDATE, DELETE')
$fn$;
-- +goose StatementEnd

-- The columns the relay reads or writes in tables that may exist already, and the type where only one will do.
-- +goose StatementBegin
CREATE OR REPLACE FUNCTION outbox_relay.tenant_requires() RETURNS TABLE (tbl text, cols text)
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $fn$
VALUES
('webhook_endpoints', 'id:uuid endpoint_url http_method secret_token signature_header custom_headers:jsonb timeout_seconds follow_redirects:boolean'
  ' verify_ssl:boolean max_retry_attempts retry_backoff_seconds retry_backoff_multiplier is_active:boolean is_verified:boolean context_id:uuid last_used_at'),
('webhook_event_types', 'id:uuid event_type is_enabled:boolean requires_verification:boolean'),
('webhook_event_subscriptions', 'id:uuid webhook_endpoint_id:uuid event_type_id:uuid is_active:boolean event_filters:jsonb'),
('webhook_subscriptions', 'id:uuid endpoint_id:uuid event_type_id:uuid event_type event_filters:jsonb is_active:boolean context_id:uuid last_triggered_at'),
('webhook_events', 'id:uuid event_type event_name aggregate_id:uuid aggregate_type aggregate_version event_data:jsonb event_metadata:jsonb'
  ' correlation_id:uuid causation_id:uuid triggered_by_user_id:uuid context_id:uuid occurred_at processed_at created_at'),
('webhook_deliveries', 'id:uuid webhook_endpoint_id:uuid webhook_event_id:uuid attempt_number delivery_status request_url request_method'
  ' request_headers:jsonb request_body request_signature response_status_code response_headers:jsonb response_body response_time_ms'
  ' error_message error_code next_retry_at max_attempts_reached:boolean attempted_at completed_at created_at'),
('webhook_delivery_attempts', 'id:uuid delivery_id:uuid webhook_endpoint_id:uuid attempt_number error_class response_status_code'
  ' error_message response_body response_time_ms attempted_at'),
('webhook_dead_letters', 'id:uuid delivery_id:uuid webhook_event_id:uuid webhook_endpoint_id:uuid request_url request_method'
  ' request_headers:jsonb request_body attempts last_error last_error_code last_status_code last_response_body dead_at replayed_at'),
('webhook_delivery_stats', 'id:uuid webhook_endpoint_id:uuid date_recorded total_attempts successful_deliveries failed_deliveries'
  ' timeout_deliveries avg_response_time_ms min_response_time_ms max_response_time_ms most_common_error_code error_rate')
$fn$;
-- +goose StatementEnd
