package delivery

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/net/idna"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// EndpointRow is a row of webhook_endpoints, as stored. Zero values stand for NULL. It prints without its secrets.
type EndpointRow struct {
	ID              outbox.UUID
	URL, Method     string
	SecretToken     string
	SecondarySecret string // during a rotation
	SignatureHeader string
	// SecondarySecretExpires ends the second signature; zero does not.
	SecondarySecretExpires time.Time
	CustomHeaders          []byte // jsonb
	TimeoutSeconds         int32
	MaxRetryAttempts       int32 // retries after the first attempt; negative is NULL, since zero means none
	BackoffSeconds         int32
	BackoffMultiplier      float64
	FollowRedirects        bool
	VerifySSL              bool
	Active, Verified       bool
	VerifiedFor            []byte // HashURL of the URL that Verified is about; nil: whichever there is
	Paused                 bool   // paused_at is set
	ContextID              outbox.UUID
	PayloadFormat, Order   string
	MaxConcurrency         int32
	RatePerSecond          float64
}

// String names the endpoint.
func (r EndpointRow) String() string { return "endpoint " + r.ID.String() }

// GoString is String: a row must not print its secrets.
func (r EndpointRow) GoString() string { return r.String() }

// LogValue is the endpoint's id.
func (r EndpointRow) LogValue() slog.Value { return slog.StringValue(r.ID.String()) }

// Defaults stand for what an endpoint's row leaves open.
type Defaults struct {
	Timeout     time.Duration
	MaxRetries  int // retries after the first attempt
	Backoff     Backoff
	Schedule    []time.Duration // waits before each retry, instead of any backoff; empty: none
	Concurrency int             // attempts at once; zero: no limit of the endpoint's own
	Rate        float64         // attempts per second; zero: no limit

	// Bounds are what a row may ask for; the zero value is DefaultBounds. What it leaves open is the operator's to say, and not bounded.
	Bounds Bounds

	// Tenant is the schema that the rows are of. Secrets are bound to it, and TLSProfiles are for it; empty: there is none for it.
	Tenant string
	// OneURL has an endpoint count as verified only with the URL that it was verified with, where that is known.
	OneURL bool
	// Keys open the secrets that are sealed; nil: none of them. With RequireSealed a plain one is a fault.
	Keys          *seal.Ring
	RequireSealed bool
}

// Order is an endpoint's delivery_order.
type Order uint8

// The orders. The zero value is the default.
const (
	OrderNone      Order = iota // as they come
	OrderAggregate              // one in flight per aggregate
	OrderStrict                 // one at a time
)

func (o Order) String() string {
	switch o {
	case OrderNone:
		return "none"
	case OrderAggregate:
		return "aggregate"
	case OrderStrict:
		return "strict"
	default:
		return "order " + strconv.Itoa(int(o))
	}
}

// parseOrder reads a delivery_order. Empty is OrderNone.
func parseOrder(s string) (Order, error) {
	if s == "" {
		return OrderNone, nil
	}
	for o := range OrderStrict + 1 {
		if o.String() == s {
			return o, nil
		}
	}
	return 0, fmt.Errorf("unknown delivery order %q: want none, aggregate or strict", s)
}

// Endpoint is a checked row with all that its attempts share worked out. It never changes and is safe for concurrent use.
type Endpoint struct {
	ID               outbox.UUID
	Format           Format
	Order            Order
	Active, Verified bool
	Paused           bool   // its deliveries wait
	Host             string // host:port in lower case, which endpoints share
	MaxRetries       int    // retries after the first attempt
	Retry            Backoff
	Concurrency      int     // zero: no limit of its own
	Rate             float64 // attempts per second; zero: no limit
	Timeout          time.Duration
	Method           string
	// URL is for people and for the delivery's row: without userinfo, query and fragment, which may carry secrets.
	URL string

	tenant           string
	url              *url.URL
	signatureHeader  string
	custom           []field
	primary          *secret
	legacy           *secret // the raw token; the same as primary unless the token is whsec_; nil if it is whsk_
	secondary        *secret // nil: none
	secondaryExpires time.Time
	schedule         []time.Duration
	ownConcurrency   int     // of the row; zero: it leaves that open
	ownRate          float64 // likewise
	followRedirects  bool
	verifyTLS        bool
	keepAnswer       bool          // also that of a success
	head             []byte        // see requestHead
	like             *http.Request // has the method, which the parser of an answer asks for
}

// String names the endpoint.
func (ep *Endpoint) String() string { return "endpoint " + ep.ID.String() }

// GoString is String.
func (ep *Endpoint) GoString() string { return ep.String() }

// LogValue is the endpoint's id.
func (ep *Endpoint) LogValue() slog.Value { return slog.StringValue(ep.ID.String()) }

// NewEndpoint checks a row and works out the request parts. The error joins one *FieldError for each fault.
func NewEndpoint(row EndpointRow, d Defaults) (*Endpoint, error) {
	var f faults
	if d.Bounds == (Bounds{}) {
		d.Bounds = DefaultBounds()
	}
	ep := &Endpoint{
		ID:              row.ID,
		Active:          row.Active,
		Verified:        row.Verified && (!d.OneURL || row.VerifiedFor == nil || bytes.Equal(row.VerifiedFor, HashURL(row.URL))),
		Paused:          row.Paused,
		Method:          cmp.Or(row.Method, http.MethodPost),
		signatureHeader: cmp.Or(row.SignatureHeader, defaultSignatureHeader),
		followRedirects: row.FollowRedirects,
		verifyTLS:       row.VerifySSL,
		tenant:          d.Tenant,
	}
	var err error
	if ep.Format, err = parseFormat(row.PayloadFormat); err != nil {
		f.add("payload_format", fmt.Sprintf("%.60q", row.PayloadFormat), "use standard, neo, cloudevents, cloudevents-binary or raw")
	}
	if ep.Order, err = parseOrder(row.Order); err != nil {
		f.add("delivery_order", fmt.Sprintf("%.60q", row.Order), "use none, aggregate or strict")
	}
	f.check(slices.Contains([]string{http.MethodPost, http.MethodPut, http.MethodPatch}, ep.Method),
		"http_method", fmt.Sprintf("%.60q", row.Method), "use POST, PUT or PATCH")
	ep.setURL(row.URL, d.Bounds.MaxURLLength, &f)
	if !validHeaderName(ep.signatureHeader) || isReserved(ep.signatureHeader) {
		f.add("signature_header", fmt.Sprintf("%.60q", row.SignatureHeader), "use a header name of its own, such as "+defaultSignatureHeader)
	}
	ep.custom = parseCustomHeaders(row.CustomHeaders, ep.signatureHeader, &d.Bounds, &f)
	ep.setSecrets(&row, &d, &f)
	ep.setLimits(&row, d, &f)
	if len(f) > 0 {
		return nil, errors.Join(f...)
	}
	if strings.EqualFold(ep.signatureHeader, "Authorization") {
		ep.url.User = nil // there is one header of the name
	}
	ep.head, ep.like = ep.requestHead(), &http.Request{Method: ep.Method}
	return ep, nil
}

// HashURL stands for an endpoint_url where that itself, which may hold a secret, is not to be kept.
func HashURL(raw string) []byte {
	sum := sha256.Sum256([]byte(raw))
	return sum[:]
}

func (ep *Endpoint) setURL(raw string, longest int, f *faults) {
	const column = "endpoint_url"
	if len(raw) > longest {
		f.add(column, fmt.Sprintf("of %d bytes", len(raw)), fmt.Sprintf("at most %d, see validation.max_url_length", longest))
		return
	}
	u, err := url.Parse(raw)
	if err != nil {
		f.add(column, "(hidden)", "is not a URL: use https://host/path")
		return
	}
	shown := fmt.Sprintf("%.100q", u.Scheme+"://"+u.Host)
	if u.Scheme != "http" && u.Scheme != "https" {
		f.add(column, shown, "the scheme must be http or https")
		return
	}
	if u.Hostname() == "" || u.Opaque != "" || strings.ContainsAny(u.Hostname(), " /\\@") {
		f.add(column, shown, "has no valid host: use https://host/path")
		return
	}
	u.Host = strings.TrimSuffix(u.Host, ":")
	if !hostToASCII(u) {
		f.add(column, shown, "the host is no name that can be looked up: check its letters, or write it as xn--…")
		return
	}
	if port := u.Port(); port != "" {
		n, err := strconv.ParseUint(port, 10, 16)
		f.check(err == nil && n > 0, column, shown, "the port must be 1 to 65535")
	}
	f.check(validQuery(u), column, shown, "the query holds a space or a letter beyond ASCII: percent-encode it, a space as %20")
	u.Fragment, u.RawFragment = "", ""
	display := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	ep.url, ep.URL = u, display.String()
	ep.Host = strings.ToLower(hostPort(u))
}

// validQuery reports whether the query can stand in a request line. It is sent as it is, unlike a path, which net/url encodes where it has to.
func validQuery(u *url.URL) bool {
	return !slices.ContainsFunc([]byte(u.RawQuery), func(c byte) bool { return c <= ' ' || c >= 0x7f })
}

// hostToASCII writes a host with letters beyond ASCII as it is looked up and sent, as net/http does; http1 and the cache of names take it as it is.
func hostToASCII(u *url.URL) bool {
	host := u.Hostname()
	ascii, err := toASCII(host)
	if err == nil && ascii == host {
		return true
	}
	if port := u.Port(); port != "" {
		ascii = net.JoinHostPort(ascii, port)
	}
	u.Host = ascii
	return err == nil && u.Hostname() != "" // of some letters nothing is left, of a soft hyphen for example
}

// toASCII leaves a host as it is that has no letter beyond ASCII: names with an underscore are no names of the web, but in use.
func toASCII(host string) (string, error) {
	if strings.IndexFunc(host, func(r rune) bool { return r > unicode.MaxASCII }) < 0 {
		return host, nil
	}
	return idna.Lookup.ToASCII(host)
}

func (ep *Endpoint) setLimits(row *EndpointRow, d Defaults, f *faults) {
	b := &d.Bounds
	ep.Timeout = cmp.Or(seconds(row.TimeoutSeconds), d.Timeout)
	f.checkSeconds("timeout_seconds", row.TimeoutSeconds, b.MinTimeout, b.MaxTimeout, "timeout")

	ep.MaxRetries = int(row.MaxRetryAttempts)
	if row.MaxRetryAttempts < 0 {
		ep.MaxRetries = d.MaxRetries
	}
	f.check(int(row.MaxRetryAttempts) <= b.MaxRetries, "max_retry_attempts", row.MaxRetryAttempts, fmt.Sprintf("use 0 to %d, see validation.max_retries", b.MaxRetries))

	ep.Retry = Backoff{
		First:      cmp.Or(seconds(row.BackoffSeconds), d.Backoff.First),
		Max:        d.Backoff.Max,
		Multiplier: cmp.Or(row.BackoffMultiplier, d.Backoff.Multiplier),
	}
	ep.schedule = d.Schedule
	f.checkSeconds("retry_backoff_seconds", row.BackoffSeconds, b.MinBackoff, b.MaxBackoff, "backoff")
	f.check(row.BackoffMultiplier == 0 || row.BackoffMultiplier >= 1 && row.BackoffMultiplier <= maxMultiplier,
		"retry_backoff_multiplier", row.BackoffMultiplier, "use 1.0 to 5.0")

	ep.ownConcurrency, ep.ownRate = int(row.MaxConcurrency), row.RatePerSecond
	ep.Concurrency, ep.Rate = ep.Limits(d)
	f.check(row.MaxConcurrency >= 0, "max_concurrency", row.MaxConcurrency, "use 1 or more, or NULL for the default")
	f.check(row.RatePerSecond >= 0 && !math.IsInf(row.RatePerSecond, 1),
		"rate_limit_per_second", row.RatePerSecond, "use a number above 0, or NULL for the default")
}

// Limits returns what Concurrency and Rate would be with other defaults.
func (ep *Endpoint) Limits(d Defaults) (concurrency int, rate float64) {
	return cmp.Or(ep.ownConcurrency, d.Concurrency), cmp.Or(ep.ownRate, d.Rate)
}
