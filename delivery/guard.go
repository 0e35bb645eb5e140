package delivery

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"syscall"

	"code.dny.dev/ssrf"
)

// guard decides which addresses may be connected to. It looks at what a name has resolved to, at the moment of connecting, so that a name
// that changes its address in between gains nothing.
type guard struct {
	special *ssrf.Guardian // public addresses and the allowed ones
	deny    []netip.Prefix
}

// deniedError says that the configuration forbids a request.
type deniedError struct{ reason string }

func (e *deniedError) Error() string { return e.reason }

func newGuard(allow, deny []netip.Prefix) *guard {
	var v4, v6 []netip.Prefix
	for _, p := range allow {
		if p = unmapPrefix(p); p.Addr().Is4() {
			v4 = append(v4, p)
		} else {
			v6 = append(v6, p)
		}
	}
	g := &guard{special: ssrf.New(ssrf.WithAnyPort(), ssrf.WithAllowedV4Prefixes(v4...), ssrf.WithAllowedV6Prefixes(v6...),
		ssrf.WithDeniedV4Prefixes(wireServer()))}
	for _, p := range deny {
		g.deny = append(g.deny, unmapPrefix(p))
	}
	return g
}

// wireServer is where Azure tells virtual machines about themselves, secrets included: a public address that only they can reach
// (https://learn.microsoft.com/azure/virtual-network/what-is-ip-address-168-63-129-16). The metadata services of other clouds have special ones.
func wireServer() netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{168, 63, 129, 16}), 32)
}

// unmapPrefix turns ::ffff:10.0.0.0/104 into 10.0.0.0/8, the form in which addresses are compared.
func unmapPrefix(p netip.Prefix) netip.Prefix {
	const mappedBits = 96
	if p.Addr().Is4In6() && p.Bits() >= mappedBits {
		return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-mappedBits)
	}
	return p
}

// control is a net.Dialer.ControlContext.
func (g *guard) control(_ context.Context, _, address string, _ syscall.RawConn) error {
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return &deniedError{reason: "the host did not resolve to an address"}
	}
	return g.check(ap.Addr())
}

// check returns a *deniedError unless addr may be connected to. An IPv4 address inside IPv6 counts as what it is, and a zone does not
// hide an address from the lists, since a netip.Prefix matches no address with a zone.
//
// Who has no IPv4 but NAT64 allows its prefix, and so every address that the gateway can make: the IPv4 address has to be allowed as well.
func (g *guard) check(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	if err := g.checkOne(addr); err != nil || !ssrf.IPv6NAT64Prefix.Contains(addr) {
		return err
	}
	b := addr.As16()
	return g.checkOne(netip.AddrFrom4([4]byte(b[12:])))
}

// checkOne looks at addr as it is. The library lets what is allowed pass before it looks at what is denied, so the operator's own denials are looked at
// first.
func (g *guard) checkOne(addr netip.Addr) error {
	if slices.ContainsFunc(g.deny, func(p netip.Prefix) bool { return p.Contains(addr) }) {
		return &deniedError{reason: fmt.Sprintf("address %s is denied by network.deny", addr)}
	}
	if g.special.SafeAddr(addr) != nil {
		return &deniedError{reason: fmt.Sprintf("address %s is not public and not listed in network.allow", addr)}
	}
	return nil
}
