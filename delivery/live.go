package delivery

import (
	"context"
	"net/netip"
	"slices"
	"syscall"
	"time"
)

// live is what may change while a Client is there. An attempt looks at it when it begins and when it has its answer, a connection while it is opened.
type live struct {
	policy                              *Policy
	guard                               *guard
	allow, deny                         []netip.Prefix // what the guard was made of
	connectTimeout, tlsHandshakeTimeout time.Duration
	keepResponseBytes                   int
	receiverDisable, receiverAbort      bool
}

func newLive(cfg *Config) *live {
	return &live{
		policy: cfg.Policy(), guard: newGuard(cfg.Allow, cfg.Deny), allow: cfg.Allow, deny: cfg.Deny,
		connectTimeout: cfg.ConnectTimeout, tlsHandshakeTimeout: cfg.TLSHandshakeTimeout,
		keepResponseBytes: cfg.KeepResponseBytes, receiverDisable: cfg.ReceiverDisable, receiverAbort: cfg.ReceiverAbort,
	}
}

// Reconfigure takes over from cfg, which must be valid, what may change while attempts are made: Allow to Ports, HTTPSOnly and AllowInsecureTLS, the timeouts of
// connecting, KeepResponseBytes, ReceiverDisable and ReceiverAbort. All else stays as it was. It is safe for concurrent use.
//
// Whoever was let in by other addresses has to be looked at again: after a change of Allow or Deny no attempt begins on a connection of before. Those that are
// idle are closed at once, those in use when their attempts have ended.
func (c *Client) Reconfigure(cfg Config) {
	next := newLive(&cfg)
	c.renewing.Lock()
	defer c.renewing.Unlock()
	before := c.live.Swap(next) // first: what is dialed for the transports made below has to be looked at by the new guard
	if slices.Equal(before.allow, next.allow) && slices.Equal(before.deny, next.deny) {
		return
	}
	now := time.Now()
	for _, p := range c.allProfiles() {
		c.retire(p.now.Swap(c.again(p.now.Load())), now)
	}
	c.plain.renew()
	c.closeIdle()
}

// control is a net.Dialer.ControlContext.
func (d *dialer) control(ctx context.Context, network, address string, raw syscall.RawConn) error {
	return d.live.Load().guard.control(ctx, network, address, raw)
}
