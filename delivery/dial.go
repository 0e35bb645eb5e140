package delivery

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// stage is the step in which opening a connection failed.
type stage string

const (
	stageDNS     stage = "dns"
	stageConnect stage = "connect"
	stageTLS     stage = "tls"
	stageDenied  stage = "denied"
	stageProxy   stage = "proxy"
)

// dialError tells the stages apart; net/http hands it up as it is.
type dialError struct {
	stage stage
	err   error
}

func (e *dialError) Error() string { return string(e.stage) + ": " + e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

var errNoSlot = errors.New("all connections are in use: see delivery.max_connections")

// dialer opens connections: name, address check, TCP, TLS.
type dialer struct {
	net    net.Dialer
	live   *atomic.Pointer[live] // the Client's
	proxy  *proxy                // nil: none
	names  *names
	slots  chan struct{}                                                              // holds one element per open connection
	evict  func()                                                                     // closes idle connections
	queued atomic.Int32                                                               // how many wait for a slot
	bound  func(context.Context, time.Duration) (context.Context, context.CancelFunc) // a timeout that also ends with the Client
	start  func(func())                                                               // a goroutine that the Client waits for
	m      *Metrics
	log    *slog.Logger
}

// dial opens a TCP connection. It may go on when the attempt that asked for it has ended, so it has its own time limit.
func (d *dialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	exchangeOf(ctx).step(waitPlace, waitOpen)
	ctx, cancel := d.bound(ctx, d.live.Load().connectTimeout)
	defer cancel()
	conn, err := d.open(ctx, network, addr)
	if err != nil {
		return nil, d.failed(err)
	}
	d.m.connOpened.Inc()
	return conn, nil
}

// dialTLS returns a function that opens a connection and shakes hands.
func (d *dialer) dialTLS(config *tls.Config) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := d.dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		secure, err := d.shake(ctx, conn, addr, config)
		if err != nil {
			return nil, err
		}
		return secure, nil
	}
}

// shake shakes hands over a connection to addr, and closes it where that fails. A config with one protocol insists on it: errNotHTTP1.
func (d *dialer) shake(ctx context.Context, conn net.Conn, addr string, config *tls.Config) (*tls.Conn, error) {
	cfg := config.Clone()
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(addr) // it was made of host and port
	}
	if counted := countedOf(conn); counted != nil {
		cfg.GetClientCertificate = counted.noteAsked(cfg.GetClientCertificate)
	}
	secure := tls.Client(conn, cfg)
	ctx, cancel := d.bound(ctx, d.live.Load().tlsHandshakeTimeout)
	defer cancel()
	err := secure.HandshakeContext(ctx)
	agreed := err == nil && secure.ConnectionState().NegotiatedProtocol != ""
	if err == nil && (agreed || len(cfg.NextProtos) > 1) {
		return secure, nil
	}
	_ = conn.Close()
	if err == nil || len(cfg.NextProtos) == 1 && isNoProtocol(err) {
		return nil, errNotHTTP1
	}
	return nil, d.failed(&dialError{stageTLS, err})
}

// isNoProtocol tells whether the other side has ended a handshake since it speaks none of the protocols that it was offered (RFC 7301, section 3.2).
func isNoProtocol(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error" && op.Err.Error() == "tls: no application protocol" // crypto/tls has no name for it
}

// failed counts err by its stage and returns it.
func (d *dialer) failed(err error) error {
	s := stageConnect
	if de := new(dialError); errors.As(err, &de) {
		s = de.stage
	}
	d.m.connErrors[s].Inc()
	return err
}

// open resolves the host and tries each address in turn. Of several errors the first one counts, but a denied address only if all are: a delivery
// that is denied is given up, and an address that did not answer today may do so tomorrow.
func (d *dialer) open(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &dialError{stageConnect, err}
	}
	addrs := []string{host}
	if _, err := netip.ParseAddr(host); err != nil {
		if addrs, err = d.names.addresses(ctx, host); err != nil {
			return nil, &dialError{stageDNS, err}
		}
	}
	if err := d.takeSlot(ctx); err != nil {
		return nil, err
	}
	var first *dialError
	for i, a := range addrs {
		conn, err := d.connect(ctx, network, net.JoinHostPort(a, port), len(addrs)-i)
		if err == nil {
			d.m.connOpen.Inc()
			return &countedConn{Conn: conn, release: sync.OnceFunc(func() { d.m.connOpen.Dec(); <-d.slots })}, nil
		}
		if first == nil || first.stage == stageDenied && err.stage != stageDenied {
			first = err
		}
		if err.stage == stageProxy {
			break // it is the same for all
		}
	}
	<-d.slots
	if first == nil {
		first = &dialError{stageDNS, &net.DNSError{Err: "no addresses", IsNotFound: true}}
	}
	return nil, first
}

// connect dials one address within its share of the remaining time; left counts the addresses still to try, this one included.
func (d *dialer) connect(ctx context.Context, network, addr string, left int) (net.Conn, *dialError) {
	if deadline, ok := ctx.Deadline(); ok && left > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)/time.Duration(left))
		defer cancel()
	}
	conn, err := d.reach(ctx, network, addr)
	if denied := new(deniedError); errors.As(err, &denied) {
		return nil, &dialError{stageDenied, denied}
	}
	if errors.As(err, new(*proxyError)) {
		return nil, &dialError{stageProxy, err}
	}
	if err != nil {
		return nil, &dialError{stageConnect, err}
	}
	return conn, nil
}

// reach connects to an address, itself or through the proxy. The guard sees the address either way.
func (d *dialer) reach(ctx context.Context, network, addr string) (net.Conn, error) {
	if d.proxy == nil {
		return d.net.DialContext(ctx, network, addr)
	}
	if err := d.control(ctx, network, addr, nil); err != nil {
		return nil, err
	}
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	exchangeOf(ctx).step(waitOpen, waitProxy)
	conn, err := d.proxy.connect(ctx, netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port()))
	switch sick := errors.As(err, new(*proxyError)) && !errors.Is(ctx.Err(), context.Canceled); {
	case sick && d.proxy.sick.CompareAndSwap(false, true):
		d.log.Warn("the proxy does not work: deliveries wait", "error", err)
	case err == nil && d.proxy.sick.CompareAndSwap(true, false):
		d.log.Info("the proxy works again")
	}
	return conn, err
}

// crowded tells a transport to close a connection rather than to keep it.
func (d *dialer) crowded() bool { return d.queued.Load() > 0 }

// takeSlot waits for one of the MaxConns places. Idle connections to other hosts give way, and those that become idle meanwhile.
func (d *dialer) takeSlot(ctx context.Context) error {
	select {
	case d.slots <- struct{}{}:
		return nil
	default:
	}
	x := exchangeOf(ctx)
	x.step(waitOpen, waitSlot)
	d.queued.Add(1) // first: what is kept after the look at the idle ones has to see it
	defer d.queued.Add(-1)
	again := time.NewTicker(evictEvery)
	defer again.Stop()
	for {
		d.evict()
		select {
		case d.slots <- struct{}{}:
			x.step(waitSlot, waitOpen) // and not if the time is over: the request may be asked after this what it has waited for
			return nil
		case <-again.C:
		case <-ctx.Done():
			return &dialError{stageConnect, errNoSlot}
		}
	}
}

// evictEvery is the time between two looks for idle connections while somebody waits for a place: net/http does not say of every one that it is idle now, of
// HTTP/2 for example.
const evictEvery = 50 * time.Millisecond

// countedConn gives its place back when it is closed.
type countedConn struct {
	net.Conn
	release func()
	asked   atomic.Bool // for a client certificate
}

// countedOf returns what is beneath conn; nil: nothing that was dialed.
func countedOf(conn net.Conn) *countedConn {
	if b, ok := conn.(*beneath); ok {
		conn = b.Conn
	}
	counted, _ := conn.(*countedConn)
	return counted
}

// noteAsked has the connection know that the server has asked for a client certificate.
func (c *countedConn) noteAsked(
	show func(*tls.CertificateRequestInfo) (*tls.Certificate, error),
) func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
	return func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		c.asked.Store(true)
		if show == nil {
			return new(tls.Certificate), nil // none
		}
		return show(info)
	}
}

func (c *countedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
