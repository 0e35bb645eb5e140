package delivery

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// exchange is what an attempt notes about its current request. The answer's first byte is reported by the connection's own goroutine.
type exchange struct {
	reused   atomic.Bool
	answered atomic.Bool
	asked    atomic.Bool  // for a client certificate, on a connection that is new
	waits    atomic.Int32 // a wait
	hops     int32        // requests that were made of the attempt: one, and one for each redirect
	given    atomic.Int32 // how many times one of them was given to a connection
	redirect int          // status of the answer that led to the current request; zero: it is the first
	m        *Metrics

	began       time.Time
	connectedAt atomic.Int64 // nanoseconds from began
	answeredAt  atomic.Int64
}

// wait is what a request waits for before it has a connection. Only waitOpen is for the receiver.
type wait int32

const (
	waitPlace wait = iota // among the connections to its host
	waitSlot              // among all connections
	waitProxy             // for the proxy itself
	waitOpen              // for a connection that is being opened
	waitOver
)

// held is why a request that came to no connection in time did not: empty if it is not for a lack of our own.
func (x *exchange) held() string {
	switch wait(x.waits.Load()) {
	case waitPlace:
		return "all connections to this host are in use: see delivery.max_connections_per_host"
	case waitSlot:
		return errNoSlot.Error()
	case waitProxy:
		return wordsNoProxy
	default:
		return ""
	}
}

// step goes on to another wait. A request takes a connection that another one gives back while its own is being opened, which must not bring it back to a wait:
// so who opens a connection names what it comes from. A nil exchange waits for nothing.
func (x *exchange) step(from, to wait) {
	if x != nil {
		x.waits.CompareAndSwap(int32(from), int32(to))
	}
}

type exchangeKey struct{}

// context returns ctx with the exchange.
func (x *exchange) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, exchangeKey{}, x)
}

// exchangeOf returns nil if there is none.
func exchangeOf(ctx context.Context) *exchange {
	x, _ := ctx.Value(exchangeKey{}).(*exchange)
	return x
}

// trace has net/http tell the exchange what http1 tells it itself.
func (x *exchange) trace(ctx context.Context) context.Context {
	x.waits.Store(int32(waitPlace))
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			x.connected(info.Reused)
			x.asked.Store(!info.Reused && isAsked(info.Conn))
		},
		GotFirstResponseByte: x.gotFirstByte,
	})
}

func (x *exchange) connected(reused bool) {
	x.waits.Store(int32(waitOver))
	x.reused.Store(reused)
	x.answered.Store(false)
	x.connectedAt.Store(int64(time.Since(x.began)))
	x.answeredAt.Store(0)
	if reused {
		x.m.connReused.Inc()
	}
	if x.given.Add(1) > x.hops {
		x.m.resends.Inc()
	}
}

func isAsked(conn net.Conn) bool {
	secure, ok := conn.(*tls.Conn)
	if !ok {
		return false
	}
	counted := countedOf(secure.NetConn())
	return counted != nil && counted.asked.Load()
}

func (x *exchange) gotFirstByte() {
	x.answered.Store(true)
	x.answeredAt.Store(int64(time.Since(x.began)))
}

// note takes down when what happened.
func (x *exchange) note(res *Result) {
	res.Connected, res.Answered, res.Reused = time.Duration(x.connectedAt.Load()), time.Duration(x.answeredAt.Load()), x.reused.Load()
}

// resendStale is a retryablehttp.CheckRetry: it asks for a second try only if a kept connection ended before any byte of an answer, or was closed by the
// Client before the answer was handed over. What net/http sends again by itself, send counts.
func resendStale(ctx context.Context, _ *http.Response, err error) (bool, error) {
	x := exchangeOf(ctx)
	return err != nil && x != nil && x.resend(ctx, err), nil // an error here would take the place of err
}

// resend tells whether the request is to be sent again.
func (x *exchange) resend(ctx context.Context, err error) bool {
	return ctx.Err() == nil && x.stale(err) && x.again()
}

// again tells whether a request may be given to one more connection: once in an attempt.
func (x *exchange) again() bool {
	if x.given.Load() > x.hops {
		return false
	}
	x.waits.Store(int32(waitPlace))
	return true
}

func (x *exchange) stale(err error) bool {
	var dial *dialError
	var timeout net.Error
	if errors.As(err, &dial) || errors.As(err, &timeout) && timeout.Timeout() {
		return false
	}
	// The receiver has most likely closed it while the request was on its way.
	return x.reused.Load() && !x.answered.Load() || isLost(err)
}

// isLost tells whether a request was answered and the Client itself lost the answer: net/http puts a connection among the idle ones before it hands over an
// answer without a body, and closes it there when the idle ones are closed. It has no name for that error, only these words.
func isLost(err error) bool {
	for next := err; next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return err != nil && err.Error() == "http: CloseIdleConnections called"
}

// classify turns the error of a request into its class and words that may be shown to anyone. ctx is the caller's context, deadline the end of the
// endpoint's timeout.
func classify(ctx context.Context, deadline time.Time, x *exchange, err error) (Class, string) {
	var dial *dialError
	isDial := errors.As(err, &dial)
	var denied *deniedError
	var netErr net.Error
	switch {
	case errors.As(err, &denied):
		return ClassDenied, denied.reason
	case ctx.Err() != nil:
		return ClassCanceled, "canceled"
	case isDial && (dial.stage == stageProxy || local(dial.err) != ""): // also where there was no time left to go on
		return classifyDial(dial)
	case !time.Now().Before(deadline):
		if words := x.held(); words != "" {
			return ClassLocal, words
		}
		return ClassTimeout, "no answer within the endpoint's timeout"
	case isDial:
		return classifyDial(dial)
	case !x.answered.Load() && isAlert(err): // a client certificate is refused after the handshake, as of TLS 1.3
		return ClassTLS, describeTLS(err)
	case !x.answered.Load() && x.asked.Load() && (!errors.As(err, &netErr) || !netErr.Timeout()): // the alert that says so may be lost with the connection
		return ClassTLS, "the server asked for a client certificate and ended the connection"
	case errors.As(err, &netErr) && netErr.Timeout():
		return ClassTimeout, "the connection timed out"
	case !x.answered.Load():
		return ClassReset, "the connection ended before the answer"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return ClassReset, "the connection ended within the head of the answer"
	case isLost(err):
		return ClassLocal, "the connection was given up while its answer arrived"
	default:
		return ClassProtocol, "the answer is not HTTP, or its head is too large"
	}
}

func classifyDial(dial *dialError) (Class, string) {
	var netErr net.Error
	timeout := errors.Is(dial.err, context.DeadlineExceeded) || errors.As(dial.err, &netErr) && netErr.Timeout()
	if words := local(dial.err); words != "" {
		return ClassLocal, words
	}
	var refused *refusedError
	switch {
	case dial.stage == stageProxy:
		return ClassLocal, dial.err.Error()
	case errors.As(dial.err, &refused):
		return ClassConnect, refused.Error()
	case dial.stage == stageDNS:
		return ClassDNS, describeDNS(dial.err)
	case dial.stage == stageTLS && timeout:
		return ClassTimeout, "the TLS handshake took too long"
	case dial.stage == stageTLS:
		return ClassTLS, describeTLS(dial.err)
	case timeout:
		return ClassTimeout, "no connection within the connect timeout"
	case errors.Is(dial.err, syscall.ECONNREFUSED):
		return ClassConnect, "connection refused"
	case errors.Is(dial.err, syscall.ECONNRESET):
		return ClassReset, "the connection was reset while it was made"
	case errors.Is(dial.err, syscall.ENETUNREACH), errors.Is(dial.err, syscall.EHOSTUNREACH):
		return ClassConnect, "host or network unreachable"
	default:
		return ClassConnect, "connection failed"
	}
}

// local tells what this machine has run out of; empty: it is not at fault. A lack of local ports (EADDRNOTAVAIL) is not among it: an address of a kind that
// the machine does not have gives the same error, and would be tried for ever.
func local(err error) string {
	var dns *net.DNSError
	named := errors.As(err, &dns)
	for _, ours := range []struct {
		err   error
		words string
	}{
		{errNoSlot, errNoSlot.Error()},
		{syscall.EMFILE, "no file descriptor is left: raise the limit of the process (ulimit -n)"},
		{syscall.ENFILE, "no file descriptor is left on this machine"},
		{syscall.ENOBUFS, "no memory is left for a socket"},
		{syscall.ENOMEM, "no memory is left for a socket"},
	} {
		if errors.Is(err, ours.err) || named && strings.HasSuffix(dns.Err, ours.err.Error()) { // which has nothing but the text of most errors
			return ours.words
		}
	}
	return ""
}

func describeDNS(err error) string {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return "the host name does not exist"
	case errors.As(err, &dns) && dns.IsTimeout, errors.Is(err, context.DeadlineExceeded):
		return "the name server did not answer in time"
	default:
		return "the host name could not be resolved"
	}
}

// isAlert tells whether the other side has ended TLS, with a reason.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}

func describeTLS(err error) string {
	var (
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
		alert    *net.OpError
	)
	switch {
	case errors.As(err, &unknown):
		return "the certificate is signed by an unknown authority"
	case errors.As(err, &hostname):
		return "the certificate is not valid for this host name"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "the certificate has expired or is not yet valid"
	case errors.As(err, &record):
		return "the server does not speak TLS on this port"
	case errors.As(err, &alert) && alert.Op == "remote error":
		return "the server refused the TLS handshake: " + alert.Err.Error() // one of the fixed texts of crypto/tls
	default:
		return "the TLS handshake failed"
	}
}
