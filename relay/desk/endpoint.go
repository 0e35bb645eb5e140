package desk

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// EndpointStates are what Endpoints can be asked for.
func EndpointStates() []string {
	return []string{"active", "paused", "inactive", "disabled", "failing"}
}

// State is whether an endpoint takes deliveries.
type State struct {
	State        string `json:"state"` // active, paused, inactive, disabled (by the relay); gone
	Since        Time   `json:"since,omitzero"`
	Reason       string `json:"reason,omitempty"`
	FailingSince Time   `json:"failing_since,omitzero"` // since when every attempt has failed
	OpenUntil    Time   `json:"breaker_open_until,omitzero"`
	LastError    string `json:"last_error,omitempty"`

	maxTries int // zero: the configuration's
}

// Endpoint is a row of webhook_endpoints with what the relay has for it.
type Endpoint struct {
	ID         outbox.UUID `json:"id"`
	Name       string      `json:"name"`
	URL        string      `json:"url"` // without its query
	State      State       `json:"status"`
	Order      string      `json:"delivery_order"`
	LastUsedAt Time        `json:"last_used_at,omitzero"`
	// LastSuccess is the day of the last delivery, as the statistics have it: empty if there was none.
	LastSuccess string `json:"last_success_on,omitempty"`
	Waiting     int    `json:"waiting"`         // deliveries that are due some time; as the others up to CountLimit
	Parked      int    `json:"parked"`          // deliveries that wait for the endpoint, or behind others
	Dead        int    `json:"dead_letters"`    // open ones
	Fault       string `json:"fault,omitempty"` // why the relay cannot use the row
}

const stateOfEndpoint = `CASE WHEN e.id IS NULL THEN 'gone' WHEN NOT e.is_active AND e.disabled_at IS NOT NULL THEN 'disabled' WHEN NOT e.is_active THEN 'inactive'
  WHEN e.paused_at IS NOT NULL THEN 'paused' ELSE 'active' END`

const stateColumns = stateOfEndpoint + `,
  CASE WHEN e.is_active THEN e.paused_at ELSE e.disabled_at END,
  CASE WHEN e.is_active AND e.paused_at IS NULL THEN '' ELSE coalesce(e.disabled_reason, '') END,
  h.failing_since, h.open_until, coalesce(h.last_error, ''), least(greatest(coalesce(e.max_retry_attempts, -1)::numeric, -2147483648), 2147483646)::int4 + 1`

const healthJoin = ` LEFT JOIN outbox_relay.endpoint_health h ON h.endpoint_id = e.id AND h.tenant = `

func (s *State) fields() []any {
	return []any{&s.State, &s.Since, &s.Reason, &s.FailingSince, &s.OpenUntil, &s.LastError, &s.maxTries}
}

// endpointState looks up whether an endpoint takes deliveries.
func (d *Desk) endpointState(ctx context.Context, id outbox.UUID) (s State, err error) {
	err = d.conn.QueryRow(ctx, d.sql(`SELECT `+stateColumns+` FROM (SELECT $1::uuid AS id) x LEFT JOIN {tenant}.webhook_endpoints e ON e.id = x.id`+
		healthJoin+`$2::text`), id, d.tenant).Scan(s.fields()...)
	if err != nil {
		return s, d.fault("look up endpoint", err)
	}
	return s, nil
}

// The counts look at no more rows than they may count.
const selectEndpoints = `
SELECT e.id, coalesce(e.name, '')::text, coalesce(e.endpoint_url, '')::text, coalesce(e.delivery_order, '')::text, e.last_used_at::timestamptz,
  coalesce((SELECT s.date_recorded::text FROM {tenant}.webhook_delivery_stats s WHERE s.webhook_endpoint_id = e.id AND s.successful_deliveries > 0
     ORDER BY s.date_recorded DESC LIMIT 1), ''),
  (SELECT count(*) FROM (SELECT FROM outbox_relay.retry_queue q WHERE uuid_send(q.lane) = uuid_send(outbox_relay.lane($1::text, e.id)) AND q.due_at < 'infinity' LIMIT $2::int4) q)::int4,
  (SELECT count(*) FROM (SELECT FROM outbox_relay.retry_queue q WHERE uuid_send(q.lane) = uuid_send(outbox_relay.lane($1::text, e.id)) AND q.due_at = 'infinity' LIMIT $2::int4) q)::int4,
  (SELECT count(*) FILTER (WHERE l.open) FROM (SELECT ` + open + ` AS open FROM {tenant}.webhook_dead_letters l
     WHERE l.webhook_endpoint_id = e.id ORDER BY l.dead_at DESC LIMIT $2::int4) l)::int4,
  ` + stateColumns + `
FROM {tenant}.webhook_endpoints e` + healthJoin + `$1::text WHERE `

func scanEndpoint(row pgx.CollectableRow) (e Endpoint, err error) {
	err = row.Scan(append([]any{&e.ID, &e.Name, &e.URL, &e.Order, &e.LastUsedAt, &e.LastSuccess, &e.Waiting, &e.Parked, &e.Dead}, e.State.fields()...)...)
	e.URL = withoutQuery(e.URL)
	return e, err
}

// Endpoints lists up to n that are in any of the states, none for any state, by name. table says which rows the relay cannot use.
func (d *Desk) Endpoints(ctx context.Context, table *route.Tenant, states []string, n int) ([]Endpoint, error) {
	c := conditions{args: []any{d.tenant, CountLimit}}
	if len(states) > 0 {
		c.add("("+stateOfEndpoint+" = ANY($::text[]) OR 'failing' = ANY($::text[]) AND h.failing_since IS NOT NULL)", states)
	}
	c.args = append(c.args, n)
	list, err := collect(ctx, d, "list endpoints", scanEndpoint, selectEndpoints+c.String()+limit("e.name, e.id", len(c.args)), c.args...)
	faults := faultsOf(table, "webhook_endpoints")
	for i := range list {
		list[i].Fault = faults[list[i].ID]
	}
	return list, err
}

func faultsOf(table *route.Tenant, name string) map[outbox.UUID]string {
	faults := make(map[outbox.UUID]string)
	for _, row := range table.Invalid() {
		if row.Table == name {
			faults[row.ID] = strings.ReplaceAll(row.Err.Error(), "\n", "; ")
		}
	}
	return faults
}

// Settings are the columns of an endpoint. What is zero is left to the configuration. Secrets are not among them, nor are the values of headers.
type Settings struct {
	Method            string      `json:"http_method"`
	Format            string      `json:"payload_format"`
	Timeout           int         `json:"timeout_seconds"`
	MaxRetries        int         `json:"max_retry_attempts"` // negative: left to the configuration
	Backoff           int         `json:"retry_backoff_seconds"`
	Multiplier        float64     `json:"retry_backoff_multiplier"`
	Concurrency       int         `json:"max_concurrency,omitempty"`
	Rate              float64     `json:"rate_limit_per_second,omitempty"`
	FollowRedirects   bool        `json:"follow_redirects"`
	VerifySSL         bool        `json:"verify_ssl"`
	Verified          bool        `json:"is_verified"`
	ContextID         outbox.UUID `json:"context_id,omitzero"`
	SignatureHeader   string      `json:"signature_header"`
	CustomHeaders     []string    `json:"custom_header_names"`
	SecondSecret      bool        `json:"second_secret"`
	SecondSecretUntil Time        `json:"second_secret_until,omitzero"`
	CreatedAt         Time        `json:"created_at,omitzero"`
	UpdatedAt         Time        `json:"updated_at,omitzero"`
}

// selectSettings shows a number that is beyond what holds it here, and that makes the row invalid, as the nearest there is.
const selectSettings = `
SELECT coalesce(e.http_method, '')::text, coalesce(e.payload_format, '')::text,
  least(greatest(coalesce(e.timeout_seconds, 0)::numeric, -2147483648), 2147483647)::int4,
  least(greatest(coalesce(e.max_retry_attempts, -1)::numeric, -2147483648), 2147483647)::int4,
  least(greatest(coalesce(e.retry_backoff_seconds, 0)::numeric, -2147483648), 2147483647)::int4, coalesce(e.retry_backoff_multiplier, 0)::float8,
  least(greatest(coalesce(e.max_concurrency, 0)::numeric, -2147483648), 2147483647)::int4,
  CASE WHEN e.rate_limit_per_second IS NULL THEN 0 ELSE least(greatest(e.rate_limit_per_second, 5e-324), 1.7976931348623157e308)::float8 END, coalesce(e.follow_redirects, false), coalesce(e.verify_ssl, true), coalesce(e.is_verified, false), e.context_id,
  coalesce(e.signature_header, '')::text,
  ARRAY(SELECT k FROM jsonb_object_keys(CASE WHEN jsonb_typeof(e.custom_headers) = 'object' THEN e.custom_headers ELSE '{}' END) k ORDER BY 1)::text[],
  coalesce(e.secondary_secret_token, '') <> '', e.secondary_secret_expires_at::timestamptz, e.created_at::timestamptz, e.updated_at::timestamptz
FROM {tenant}.webhook_endpoints e WHERE e.id = $1::uuid`

// Week is what the statistics say of the last seven days.
type Week struct {
	Attempts  int64 `json:"attempts"`
	Delivered int64 `json:"delivered"`
	Failed    int64 `json:"failed"` // attempts, those that ran into their timeout included
}

// Subscription is one of an endpoint.
type Subscription struct {
	ID        outbox.UUID `json:"id"`
	Table     string      `json:"table"`
	EventType string      `json:"event_type"`
	Active    bool        `json:"active"`
	ContextID outbox.UUID `json:"context_id,omitzero"`
	Filter    string      `json:"filter,omitempty"`
	Fault     string      `json:"fault,omitempty"` // why it cannot be used
}

// EndpointDetail is all there is to say about an endpoint.
type EndpointDetail struct {
	Endpoint
	Settings      Settings       `json:"settings"`
	Verification  Verification   `json:"verification"`
	Week          Week           `json:"last_7_days"`
	Subscriptions []Subscription `json:"subscriptions"`
	Recoveries    []Recovery     `json:"recoveries,omitempty"` // the latest
}

// Endpoint looks one up. rows are the tenant's, table is made of them.
func (d *Desk) Endpoint(ctx context.Context, rows *store.TenantRows, table *route.Tenant, id outbox.UUID) (*EndpointDetail, error) {
	const op = "look up endpoint"
	list, err := collect(ctx, d, op, scanEndpoint, selectEndpoints+"e.id = $3::uuid", d.tenant, CountLimit, id)
	if err != nil {
		return nil, err
	}
	settings, err := collect(ctx, d, op, pgx.RowToStructByPos[Settings], selectSettings, id)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 || len(settings) == 0 {
		return nil, d.notFound(ctx, "endpoint", id)
	}
	x := &EndpointDetail{Endpoint: list[0], Settings: settings[0], Subscriptions: subscriptionsOf(rows, table, id)}
	x.Fault = faultsOf(table, "webhook_endpoints")[id]
	if x.Verification, err = d.verification(ctx, id); err != nil {
		return nil, err
	}
	week, err := collect(ctx, d, op, pgx.RowToStructByPos[Week], `
SELECT coalesce(sum(s.total_attempts), 0)::int8, coalesce(sum(s.successful_deliveries), 0)::int8,
  coalesce(sum(s.failed_deliveries + s.timeout_deliveries), 0)::int8
FROM {tenant}.webhook_delivery_stats s WHERE s.webhook_endpoint_id = $1::uuid AND s.date_recorded > current_date - 7`, id)
	if err != nil {
		return nil, err
	}
	x.Week = week[0]
	x.Recoveries, err = collect(ctx, d, op, pgx.RowToStructByPos[Recovery],
		selectRecoveries+`r.tenant = $1::text AND r.endpoint_id = $2::uuid ORDER BY r.id DESC LIMIT 3`, d.tenant, id)
	return x, err
}

func subscriptionsOf(rows *store.TenantRows, table *route.Tenant, endpoint outbox.UUID) []Subscription {
	types := make(map[outbox.UUID]string, len(rows.EventTypes))
	for _, row := range rows.EventTypes {
		types[row.ID] = row.EventType
	}
	faults := make(map[string]map[outbox.UUID]string)
	list := []Subscription{}
	for i := range rows.Subscriptions {
		row := &rows.Subscriptions[i]
		if row.EndpointID != endpoint {
			continue
		}
		name := row.Source.String()
		if faults[name] == nil {
			faults[name] = faultsOf(table, name)
		}
		s := Subscription{ID: row.ID, Table: name, EventType: row.EventType, Active: row.Active, ContextID: row.ContextID, Fault: faults[name][row.ID]}
		if row.Source == route.Older {
			s.EventType = types[row.EventTypeID]
		}
		if filter := string(row.Filters); filter != "{}" {
			s.Filter = filter
		}
		list = append(list, s)
	}
	return list
}

// Rows reads the routing rows of the tenant the way the relay does.
func (d *Desk) Rows(ctx context.Context) (*store.TenantRows, error) {
	registry, err := store.ReadRegistry(ctx, d.conn.Conn(), []string{d.tenant}, false)
	switch {
	case err != nil:
		return nil, d.fault("read endpoints", err)
	case len(registry.Tenants) == 0:
		return nil, fmt.Errorf("tenant %s is no longer registered", d.tenant)
	case registry.Tenants[0].Err != nil:
		return nil, fmt.Errorf("read the routing rows of tenant %s: %w", d.tenant, registry.Tenants[0].Err)
	}
	return &registry.Tenants[0], nil
}

// Pause holds an endpoint's deliveries back, which must be active. False: it was paused already.
func (d *Desk) Pause(ctx context.Context, endpoint outbox.UUID, reason string) (bool, error) {
	return call[bool](ctx, d, "pause endpoint", `SELECT outbox_relay.pause_endpoint($1::text, $2::uuid, nullif($3::text, ''))`, d.tenant, endpoint, reason)
}

// Resume lets an endpoint go on that was paused, disabled or deactivated. False: it took deliveries already.
func (d *Desk) Resume(ctx context.Context, endpoint outbox.UUID) (bool, error) {
	return call[bool](ctx, d, "resume endpoint", `SELECT outbox_relay.resume_endpoint($1::text, $2::uuid)`, d.tenant, endpoint)
}

// Recovery is a request to queue what an endpoint missed. The relay that leads works it off.
type Recovery struct {
	ID          int64       `json:"id"`
	EndpointID  outbox.UUID `json:"endpoint_id"`
	Since       Time        `json:"since"`
	Rate        float64     `json:"rate,omitempty"` // deliveries a second; zero: all at once
	Begun       bool        `json:"begun"`
	Scanned     int64       `json:"scanned"` // events looked at
	Queued      int64       `json:"queued"`  // deliveries
	Error       string      `json:"error,omitempty"`
	RequestedAt Time        `json:"requested_at"`
	DoneAt      Time        `json:"done_at,omitzero"`
}

const recoveryColumns = `r.id, r.endpoint_id, r.since, coalesce(r.rate, 0)::float8, r.upto_lsn IS NOT NULL, r.scanned, r.queued, coalesce(r.error, ''), r.requested_at, r.done_at`

const selectRecoveries = `SELECT ` + recoveryColumns + ` FROM outbox_relay.recoveries r WHERE `

// Recover asks the relay to queue what the endpoint missed since a time or since an event, either being zero, to become due at rate a second, zero
// for all at once. It returns the request's number.
func (d *Desk) Recover(ctx context.Context, endpoint outbox.UUID, since time.Time, event outbox.UUID, rate float64) (int64, error) {
	return call[int64](ctx, d, "recover endpoint", `
SELECT outbox_relay.recover_endpoint($1::text, $2::uuid, $3::timestamptz, $4::uuid, nullif($5::float8, 0)::numeric)`, d.tenant, endpoint, orNull(since), event, rate)
}

// Recovery looks up how far a request is.
func (d *Desk) Recovery(ctx context.Context, id int64) (*Recovery, error) {
	list, err := collect(ctx, d, "look up recovery", pgx.RowToStructByPos[Recovery], selectRecoveries+`r.id = $1::int8`, id)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, &Error{Err: errGone, hint: "somebody has deleted it; ask again if it had not ended"}
	}
	return &list[0], nil
}

// withoutQuery is a URL without what may be a secret in it.
func withoutQuery(raw string) string {
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" {
		return "(no URL)"
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}
