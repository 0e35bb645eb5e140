package delivery

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/go-retryablehttp"
)

const (
	maxRedirects           = 5
	maxResponseHeaderBytes = 64 << 10
	maxSessions            = 256 // hosts whose TLS session is kept to be resumed, by each transport
)

// Client makes attempts. It is safe for concurrent use.
type Client struct {
	config    Config // as it was at the start
	live      atomic.Pointer[live]
	userAgent []string
	m         *Metrics
	bodies    sync.Pool // *[maxResponseBytes]byte
	requests  sync.Pool // *[]byte, whole requests of http1

	log      *slog.Logger
	dialer   *dialer
	plain    *http1                  // for http://; nil: net/http does all requests
	common   *profile                // of endpoints that have none of their own
	profiles map[profileKey]*profile // not written to
	insecure func()                  // says once that an endpoint is not checked

	cancel     context.CancelFunc
	background sync.WaitGroup
	renewing   sync.Mutex // held by who puts a generation into the place of another
	mu         sync.Mutex
	retired    []retired
}

// NewClient checks cfg and returns a Client that must be closed. A nil m counts for itself. log gets what concerns the Client as a
// whole; attempts are for the caller to log.
func NewClient(cfg Config, m *Metrics, log *slog.Logger) (*Client, error) {
	return newClient(cfg, m, log, net.DefaultResolver.LookupHost)
}

func newClient(
	cfg Config, m *Metrics, log *slog.Logger, lookup func(context.Context, string) ([]string, error),
) (*Client, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configure delivery client: %w", err)
	}
	if m == nil {
		m = NewMetrics(nil)
	}
	life, cancel := context.WithCancel(context.Background())
	c := &Client{config: cfg, userAgent: []string{"outbox-relay/" + cfg.Version}, m: m, log: log, cancel: cancel}
	c.live.Store(newLive(&cfg))
	c.bodies.New = func() any { return new([maxResponseBytes]byte) }
	c.requests.New = func() any { return new([]byte) }

	bound := func(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
		ctx, cancel := context.WithTimeout(ctx, d)
		stop := context.AfterFunc(life, cancel)
		return ctx, func() { stop(); cancel() }
	}
	boundLookup := func(ctx context.Context, host string) ([]string, error) {
		ctx, cancel := bound(ctx, c.live.Load().connectTimeout)
		defer cancel()
		return lookup(ctx, host)
	}
	c.dialer = &dialer{
		live:  &c.live,
		names: newNames(boundLookup, cfg.DNSCacheTime, m),
		slots: make(chan struct{}, cfg.MaxConns),
		evict: c.closeIdle,
		bound: bound,
		start: c.background.Go,
		m:     m,
		log:   log,
	}
	c.dialer.net.ControlContext = c.dialer.control
	c.insecure = sync.OnceFunc(func() {
		log.Warn("endpoints with verify_ssl=false are delivered to without a check of the certificate")
	})
	if err := c.open(life); err != nil {
		cancel()
		return nil, fmt.Errorf("configure delivery client: %w", err)
	}
	return c, nil
}

// open reads the files of the configuration and starts what lasts until life ends.
func (c *Client) open(life context.Context) error {
	if err := c.readProfiles(); err != nil {
		return err
	}
	var err error
	if c.dialer.proxy, err = newProxy(&c.config, func() *x509.CertPool { return c.common.now.Load().roots }); err != nil {
		return err
	}
	if canLook && !c.config.netHTTP && !c.dialer.proxy.secure() {
		c.plain = newHTTP1(&c.config, c.dialer, nil)
		c.background.Go(func() { every(life, max(c.config.IdleTimeout/4, time.Second), c.sweep) })
	}
	c.background.Go(func() { every(life, cmp.Or(c.config.reload, reloadEvery), c.reload) })
	return nil
}

// newHTTP returns the HTTP client of one TLS profile. Proxies are not for net/http: it would have them look up names, and the guard see nothing but their
// addresses.
func (c *Client) newHTTP(tlsConfig *tls.Config) (*retryablehttp.Client, *http.Transport) {
	tlsConfig.NextProtos = []string{"h2", "http/1.1"}
	tlsConfig.ClientSessionCache = tls.NewLRUClientSessionCache(maxSessions)
	t := &http.Transport{
		DialContext:            c.dialer.dial,
		DialTLSContext:         c.dialer.dialTLS(tlsConfig),
		DisableCompression:     true, // a gzip bomb stays what it is
		MaxIdleConns:           c.config.MaxConns,
		MaxIdleConnsPerHost:    c.config.MaxConnsPerHost,
		MaxConnsPerHost:        c.config.MaxConnsPerHost,
		IdleConnTimeout:        c.config.IdleTimeout,
		MaxResponseHeaderBytes: maxResponseHeaderBytes,
		ForceAttemptHTTP2:      true,
		// Without pings a dead HTTP/2 connection takes request after request into its timeout.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}
	return &retryablehttp.Client{
		HTTPClient:   &http.Client{Transport: roundTripper{t}},
		RetryMax:     1,
		CheckRetry:   resendStale,
		Backoff:      func(time.Duration, time.Duration, int, *http.Response) time.Duration { return 0 },
		ErrorHandler: retryablehttp.PassthroughErrorHandler,
	}, t
}

// roundTripper hides CloseIdleConnections of net/http's: retryablehttp calls it after every failed request, and one dead receiver would cost all the
// others their kept connections.
type roundTripper struct{ t *http.Transport }

// RoundTrip implements http.RoundTripper.
func (r roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	if x := exchangeOf(req.Context()); x != nil {
		req = req.WithContext(x.trace(req.Context()))
	}
	resp, err := r.t.RoundTrip(req)
	if err == nil {
		hideLocation(resp)
	}
	return resp, err
}

// headerLocation is where an answer has its Location: out of sight of http.Client, which would follow it, or make an error of one that is no URL.
const headerLocation = "(location)" // no header that arrives can be called so

func hideLocation(resp *http.Response) {
	if resp.StatusCode >= 300 && resp.StatusCode <= 399 {
		resp.Header[headerLocation] = resp.Header["Location"]
		resp.Header.Del("Location")
	}
}

func (c *Client) closeIdle() {
	c.plain.CloseIdleConnections()
	for _, p := range c.allProfiles() {
		p.now.Load().closeIdle()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.retired {
		r.closeIdle()
	}
}

// sweep closes connections of http1 that have been idle for too long. Those of net/http have timers.
func (c *Client) sweep(now time.Time) {
	c.plain.sweep(now)
	for _, p := range c.allProfiles() {
		p.now.Load().sweep(now)
	}
}

// every calls f again and again, until ctx is done.
func every(ctx context.Context, d time.Duration, f func(now time.Time)) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			f(now)
		}
	}
}

// Close ends name lookups, connections being opened and idle connections. Call it after the last Attempt has returned.
func (c *Client) Close() {
	c.cancel()
	c.background.Wait()
	c.closeIdle()
}

// Attempt sends m to ep once and says what came of it. attempt counts from 1 and is sent along. Within the endpoint's timeout it follows
// redirects if the endpoint wants that, and sends once more if a kept connection turned out dead before any byte of an answer, or HTTP/2
// refused the request. The status line decides: a body that breaks off or never ends changes nothing. ctx ends the attempt as ClassCanceled.
func (c *Client) Attempt(ctx context.Context, ep *Endpoint, m *Message, attempt int) Result {
	c.m.inFlight.Inc()
	defer c.m.inFlight.Dec()
	res := Result{Started: time.Now()}
	c.deliver(ctx, ep, m, attempt, &res)
	res.Duration = time.Since(res.Started)
	c.m.duration.Observe(res.Duration.Seconds())
	c.m.attempts[res.Class].Inc()
	return res
}

func (c *Client) deliver(ctx context.Context, ep *Endpoint, m *Message, attempt int, res *Result) {
	policy := c.live.Load().policy
	if denied := policy.Denied(ep); denied != "" {
		res.Class, res.Err = ClassDenied, denied
		return
	}
	if !ep.verifyTLS {
		c.insecure()
	}
	if !m.valid() {
		res.Class, res.Err = ClassInvalid, "a header of the message is not valid"
		return
	}
	deadline := res.Started.Add(ep.Timeout)
	sent := &exchange{m: c.m, began: res.Started, hops: 1}
	defer sent.note(res)
	signed := ep.sign(m, res.Started)
	res.Signature = signed.legacy
	target, redirects := ep.url, 0
	if t := c.small(ep, m); t != nil {
		status, resp, err := c.sendSmall(ctx, t, deadline, sent, ep, m, attempt, signed) //nolint:bodyclose // settle does
		if status > 0 {
			res.Status, res.Class = status, ClassSuccess
			return
		}
		if !errors.Is(err, errNotHTTP1) {
			if target = c.settle(ctx, deadline, sent, ep, target, redirects, resp, err, res); target == nil {
				return
			}
			redirects++
			sent.hops++
		}
	}
	limited, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	for ; target != nil; redirects, sent.hops = redirects+1, sent.hops+1 {
		var header http.Header
		profile := c.common
		if ep.owns(target) { // its authorities and its certificate are as much between the two as its signature is
			header, profile = c.header(ep, m, attempt, signed), c.profileOf(ep)
		} else {
			header = c.foreignHeader(m, attempt, signed)
		}
		elsewhere := redirects > 0 && strings.ToLower(hostPort(target)) != ep.Host
		resp, err := c.send(limited, profile.road(ep.verifyTLS, elsewhere).http(), sent, request(ep, target, header), m.Body) //nolint:bodyclose // settle does
		target = c.settle(ctx, deadline, sent, ep, target, redirects, resp, err, res)
		if c.dialer.crowded() {
			c.closeIdle()
		}
	}
}

// settle makes the result of a request, or returns where it leads on.
func (c *Client) settle(
	ctx context.Context, deadline time.Time, sent *exchange, ep *Endpoint, target *url.URL, redirects int, resp *http.Response, err error, res *Result,
) (next *url.URL) {
	if err != nil {
		if res.Class, res.Err = classify(ctx, deadline, sent, err); res.Class == ClassDenied && redirects > 0 {
			res.Status = sent.redirect
			res.denyRedirect(res.Err)
		}
		return nil
	}
	if next = ep.redirect(resp, target); next == nil || redirects == maxRedirects {
		c.finish(resp, res, ep.keepAnswer)
		return nil
	}
	if denied := c.live.Load().policy.denied(next); denied != "" {
		c.finish(resp, res, ep.keepAnswer)
		res.denyRedirect(denied)
		return nil
	}
	sent.redirect = resp.StatusCode
	c.drain(resp)
	return next
}

// denyRedirect makes the result that of a redirect that was not followed. It is no ClassDenied: where a receiver leads is what it answers today.
func (r *Result) denyRedirect(why string) {
	r.Class, r.Err = Class3xx, describeStatus(r.Status)+": "+why
}

// header returns the headers of a request to the endpoint. The names of the wire page are kept in their lower case.
func (c *Client) header(ep *Endpoint, m *Message, attempt int, s signatures) http.Header {
	const own = 7
	h := make(http.Header, own+len(m.Header)+len(ep.custom))
	values := make([]string, 0, own+len(m.Header))
	set := func(name, value string) {
		values = append(values, value)
		h[name] = values[len(values)-1 : len(values) : len(values)]
	}
	c.setCommon(h, set, m, attempt, s)
	set(headerSignature, s.v1)
	if s.legacy != "" {
		set(ep.signatureHeader, s.legacy)
	}
	for _, f := range ep.custom {
		h[f.name] = f.values
	}
	return h
}

// foreignHeader returns the headers for another host, to which a redirect has led: no signature and no custom header, since both are
// between the relay and the endpoint's own host.
func (c *Client) foreignHeader(m *Message, attempt int, s signatures) http.Header {
	h := make(http.Header)
	c.setCommon(h, func(name, value string) { h[name] = []string{value} }, m, attempt, s)
	return h
}

func (c *Client) setCommon(h http.Header, set func(name, value string), m *Message, attempt int, s signatures) {
	h["User-Agent"] = c.userAgent
	set("Content-Type", m.ContentType)
	set(headerID, s.id)
	set(headerTimestamp, s.timestamp)
	set(headerAttempt, strconv.Itoa(attempt))
	for _, f := range m.Header {
		set(f.Name, f.Value)
	}
}

func request(ep *Endpoint, target *url.URL, header http.Header) *http.Request {
	return &http.Request{
		Method: ep.Method, URL: target, Host: target.Host, Header: header, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
}

var errSentTwice = errors.New("the request has been sent twice")

// send makes one request, or two if the first met a dead kept connection. Some requests net/http sends again by itself, as often as it likes: what HTTP/2 says
// was refused, and on a dead connection whatever has a header Idempotency-Key. For that it asks for the body again, up to twice for one more request, and gets it as
// long as the last one is the first.
func (c *Client) send(
	ctx context.Context, client *retryablehttp.Client, sent *exchange, req *http.Request, body []byte,
) (*http.Response, error) {
	r := retryablehttp.Request{Request: req.WithContext(sent.context(ctx))}
	if body != nil { // of HEAD there is none
		if err := r.SetBody(body); err != nil {
			return nil, err
		}
		again := r.GetBody
		r.GetBody = func() (io.ReadCloser, error) {
			if !sent.again() {
				return nil, errSentTwice
			}
			return again()
		}
	}
	return client.Do(&r)
}

// redirect returns where to send the same request again, nil if resp is to be taken as it is. Followed are the four codes that can mean
// "send it there"; 303 asks for a GET, and a step from https to http would show the body to everyone in between.
func (ep *Endpoint) redirect(resp *http.Response, from *url.URL) *url.URL {
	if !ep.followRedirects {
		return nil
	}
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
	default:
		return nil
	}
	location := resp.Header[headerLocation]
	if len(location) == 0 || location[0] == "" {
		return nil
	}
	to, err := from.Parse(location[0])
	if err != nil || to.Hostname() == "" || to.Scheme != "https" && (to.Scheme != "http" || from.Scheme == "https") {
		return nil
	}
	if !hostToASCII(to) || !validQuery(to) {
		return nil
	}
	to.User = nil
	if ep.owns(to) {
		to.User = ep.url.User
	}
	return to
}

// owns tells whether u leads to the endpoint's own host: the same scheme, name and port, or https:// instead of http:// with either's usual port.
func (ep *Endpoint) owns(u *url.URL) bool {
	name := func(u *url.URL) string { return strings.ToLower(strings.TrimSuffix(u.Hostname(), ".")) }
	if name(u) != name(ep.url) {
		return false
	}
	if u.Scheme == ep.url.Scheme {
		return portOf(u) == portOf(ep.url)
	}
	return u.Scheme == "https" && portOf(u) == "443" && portOf(ep.url) == "80"
}
