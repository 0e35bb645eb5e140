package desk

import (
	"context"
	"net/http"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Verification is what is known of the verification of an endpoint, beside whether it is verified.
type Verification struct {
	VerifiedAt Time `json:"verified_at,omitzero"`
	// OtherURL says that it was verified with another URL than it has now.
	OtherURL bool   `json:"other_url,omitempty"`
	TriedAt  Time   `json:"tried_at,omitzero"`      // last, by whomever
	Tries    int    `json:"failed_tries,omitempty"` // of the leader, with one URL
	NextAt   Time   `json:"next_try_at,omitzero"`   // of the leader
	Error    string `json:"last_error,omitempty"`   // why the last try failed; empty: it did not
}

const selectVerification = `
SELECT e.verified_at::timestamptz, coalesce(e.is_verified AND v.verified_for <> sha256(convert_to(e.endpoint_url::text, 'UTF8')), false), v.tried_at,
  coalesce(v.tries, 0), v.next_at, coalesce(v.error, '')
FROM {tenant}.webhook_endpoints e LEFT JOIN outbox_relay.endpoint_verification v ON v.endpoint_id = e.id AND v.tenant = $2::text WHERE e.id = $1::uuid`

func (d *Desk) verification(ctx context.Context, id outbox.UUID) (v Verification, err error) {
	list, err := collect(ctx, d, "look up verification", pgx.RowToStructByPos[Verification], selectVerification, id, d.tenant)
	if err == nil && len(list) > 0 {
		v = list[0]
	}
	return v, err
}

// Unverified lists the active endpoints that are not verified, by id.
func (d *Desk) Unverified(ctx context.Context) ([]outbox.UUID, error) {
	return collect(ctx, d, "list endpoints", pgx.RowTo[outbox.UUID], `SELECT e.id FROM {tenant}.webhook_endpoints e
WHERE coalesce(e.is_active, true) AND NOT coalesce(e.is_verified, false) ORDER BY e.id`)
}

// VerifyResult is what came of a try to verify an endpoint.
type VerifyResult struct {
	EndpointID outbox.UUID    `json:"endpoint_id"`
	URL        string         `json:"url"` // without its query
	Verified   bool           `json:"verified"`
	Class      delivery.Class `json:"class"`
	Status     int            `json:"status_code,omitempty"`
	TookMS     int64          `json:"took_ms"`
	Error      string         `json:"error,omitempty"`
	Answer     string         `json:"answer,omitempty"` // the beginning of its body
	Hint       string         `json:"hint,omitempty"`
}

// Verifier tries to verify endpoints of one tenant. It is safe for concurrent use if its parts are.
type Verifier struct {
	Client   *delivery.Client
	Store    *store.Store
	Tenant   string
	Defaults delivery.Defaults
	Method   string // one of delivery.VerifyHead and delivery.VerifyChallenge
	Source   string // of CloudEvents
}

// Verify asks the receiver of an endpoint once, and says in its row that it is verified if it is. That it is not is noted beside; what the row says stays.
func (v *Verifier) Verify(ctx context.Context, row delivery.EndpointRow) (*VerifyResult, error) {
	defaults := v.Defaults
	defaults.Tenant = v.Tenant
	e := store.Endpoint{Tenant: v.Tenant, ID: row.ID}
	r := &VerifyResult{EndpointID: row.ID, URL: withoutQuery(row.URL)}
	ep, err := delivery.NewEndpoint(row, defaults)
	if err != nil {
		r.Class, r.Error = delivery.ClassInvalid, "its row cannot be used: "+strings.ReplaceAll(err.Error(), "\n", "; ")
		r.Hint = "mend the columns named; the relay leaves the endpoint alone until then"
		return r, nil
	}
	got := v.Client.Verify(ctx, ep, v.Method, v.Source)
	res := &got.Result
	r.Class, r.Status, r.TookMS, r.Error, r.Answer = res.Class, res.Status, res.Duration.Milliseconds(), got.Reason, string(res.Body)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if !got.OK {
		r.Hint = verifyHint(v.Method, res, ep)
		return r, v.Store.NoteTry(ctx, e, got.Reason)
	}
	if r.Verified, err = v.Store.Verified(ctx, e, row.URL); err == nil && !r.Verified {
		r.Error, r.Hint = "its URL has changed meanwhile, or it is gone", "try again"
	}
	return r, err
}

func verifyHint(method string, res *delivery.Result, ep *delivery.Endpoint) string {
	switch {
	case res.OK():
		return "the receiver has to answer events of type " + delivery.VerifyEvent + ` with what is in their data: {"challenge": "…"}`
	case method == delivery.VerifyHead && (res.Status == http.StatusMethodNotAllowed || res.Status == http.StatusNotFound || res.Status == http.StatusNotImplemented):
		return "the receiver has to answer HEAD as well, at the path in endpoint_url; or verify by challenge"
	}
	return probeHint(res.Class, res.Status, ep)
}
