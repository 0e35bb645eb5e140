package relay

import (
	"errors"
	"math"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// A row reads the columns of a streamed row by name. A column that the table does not have, and a large value that an UPDATE did not touch, keep
// the value that the field has: the row before, which the log carried earlier, or the default. NULL, which an adopted table may hold, means what
// the queries of store.LoadShard make of it: a relay that was restarted must not see another row than one that was not.
type row struct {
	rel *wal.Relation
	t   *wal.Tuple
	err error
}

// column reads one column into field with one of Tuple's getters.
func column[T any](r *row, name string, get func(*wal.Tuple, int) (T, error), field *T) {
	i := r.rel.Column(name)
	if i < 0 || r.t.IsUnchanged(i) {
		return
	}
	v, err := get(r.t, i)
	if err != nil {
		r.err = errors.Join(r.err, err)
		return
	}
	*field = v
}

func (r *row) id(name string, field *outbox.UUID) { column(r, name, (*wal.Tuple).UUID, field) }
func (r *row) text(name string, field *string)    { column(r, name, (*wal.Tuple).Text, field) }
func (r *row) float(name string, field *float64)  { column(r, name, (*wal.Tuple).Float, field) }
func (r *row) time(name string, field *time.Time) { column(r, name, (*wal.Tuple).Time, field) }

func (r *row) bool(name string, field *bool, null bool) {
	column(r, name, func(t *wal.Tuple, i int) (bool, error) {
		if t.IsNull(i) {
			return null, nil
		}
		return t.Bool(i)
	}, field)
}

// object reads a jsonb of which NULL is {}.
func (r *row) object(name string, field *[]byte) {
	column(r, name, func(t *wal.Tuple, i int) ([]byte, error) {
		if t.IsNull(i) {
			return []byte("{}"), nil
		}
		b, err := t.JSON(i)
		return append([]byte(nil), b...), err // the tuple's bytes are gone after the callback
	}, field)
}

// int32 reads a column that may be of another type of number in an adopted table, as store does: rounded, and the greatest or the least for what is beyond.
func (r *row) int32(name string, field *int32, null int32) {
	column(r, name, func(t *wal.Tuple, i int) (int32, error) {
		if t.IsNull(i) {
			return null, nil
		}
		if n, err := t.Int(i); err == nil {
			return int32(min(max(n, math.MinInt32), math.MaxInt32)), nil
		}
		f, err := t.Float(i)
		return int32(min(max(math.Round(f), math.MinInt32), math.MaxInt32)), err
	}, field)
}

func (r *row) endpoint(e *delivery.EndpointRow) {
	r.id("id", &e.ID)
	r.text("endpoint_url", &e.URL)
	r.text("http_method", &e.Method)
	r.text("secret_token", &e.SecretToken)
	r.text("secondary_secret_token", &e.SecondarySecret)
	r.time("secondary_secret_expires_at", &e.SecondarySecretExpires)
	r.text("signature_header", &e.SignatureHeader)
	r.object("custom_headers", &e.CustomHeaders)
	r.int32("timeout_seconds", &e.TimeoutSeconds, 0)
	r.int32("max_retry_attempts", &e.MaxRetryAttempts, -1) // zero is a number of retries, too
	r.int32("retry_backoff_seconds", &e.BackoffSeconds, 0)
	r.float("retry_backoff_multiplier", &e.BackoffMultiplier)
	r.bool("follow_redirects", &e.FollowRedirects, false)
	r.bool("verify_ssl", &e.VerifySSL, true)
	r.bool("is_active", &e.Active, true)
	r.bool("is_verified", &e.Verified, false)
	r.id("context_id", &e.ContextID)
	r.text("payload_format", &e.PayloadFormat)
	r.text("delivery_order", &e.Order)
	r.int32("max_concurrency", &e.MaxConcurrency, 0)
	r.float("rate_limit_per_second", &e.RatePerSecond)
	if i := r.rel.Column("paused_at"); i >= 0 {
		e.Paused = !r.t.IsNull(i)
	}
}

func (r *row) subscription(s *route.SubscriptionRow) {
	r.id("id", &s.ID)
	r.id("endpoint_id", &s.EndpointID)
	r.id("webhook_endpoint_id", &s.EndpointID)
	r.id("event_type_id", &s.EventTypeID)
	r.text("event_type", &s.EventType)
	r.object("event_filters", &s.Filters)
	r.bool("is_active", &s.Active, true)
	r.id("context_id", &s.ContextID)
}

func (r *row) eventType(t *route.EventTypeRow, schema bool) {
	r.id("id", &t.ID)
	r.text("event_type", &t.EventType)
	r.bool("is_enabled", &t.Enabled, true)
	r.bool("requires_verification", &t.RequiresVerification, false)
	if schema {
		column(r, "payload_schema", func(t *wal.Tuple, i int) (string, error) {
			b, err := t.JSON(i)
			if err != nil {
				return t.Text(i) // of whatever type it is: the rest of the row counts all the same
			}
			return strings.TrimPrefix(string(b), "null"), nil
		}, &t.PayloadSchema)
	}
}
