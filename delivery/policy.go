package delivery

import (
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// Policy says which URLs may be asked at all, whatever their hosts resolve to: that is for the guard. It is safe for concurrent use.
type Policy struct {
	open          bool // it denies nothing
	allow, deny   []string
	ports         []int
	httpsOnly     bool
	allowInsecure bool

	allowed, refused []netip.Prefix
}

// Policy returns that of the configuration.
func (c *Config) Policy() *Policy {
	p := &Policy{ports: c.Ports, httpsOnly: c.HTTPSOnly, allowInsecure: c.AllowInsecureTLS, allowed: c.Allow, refused: c.Deny}
	for _, h := range c.AllowHosts {
		p.allow = append(p.allow, hostPattern(h))
	}
	for _, h := range c.DenyHosts {
		p.deny = append(p.deny, hostPattern(h))
	}
	p.open = len(p.allow)+len(p.deny)+len(p.ports) == 0 && !p.httpsOnly
	return p
}

// Denied says why no request to the endpoint is ever made; empty: one is, if its address may be connected to.
func (p *Policy) Denied(ep *Endpoint) string {
	if !ep.verifyTLS && !p.allowInsecure {
		return "verify_ssl=false needs delivery.allow_insecure_tls"
	}
	return p.denied(ep.url)
}

// DeniedAddress says why no connection to the endpoint is ever made, where its URL has an address, or localhost, for a host; empty: one is, or there is no
// telling before the name is looked up.
func (p *Policy) DeniedAddress(ep *Endpoint) string {
	host := canonicalHost(ep.url.Hostname())
	if host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return ""
	}
	if err := newGuard(p.allowed, p.refused).check(addr); err != nil {
		return err.Error()
	}
	return ""
}

// denied does not name the host: that of a redirect is what a receiver has written.
func (p *Policy) denied(u *url.URL) string {
	if p.open {
		return ""
	}
	if p.httpsOnly && u.Scheme != "https" {
		return "http:// is denied by network.https_only"
	}
	if port, err := strconv.Atoi(portOf(u)); len(p.ports) > 0 && (err != nil || !slices.Contains(p.ports, port)) {
		return "port " + strconv.Itoa(port) + " is not listed in network.ports"
	}
	host := canonicalHost(u.Hostname())
	if matchHost(p.deny, host) {
		return "the host is denied by network.deny_hosts"
	}
	if len(p.allow) > 0 && !matchHost(p.allow, host) {
		return "the host is not listed in network.allow_hosts"
	}
	return ""
}

// matchHost tells whether a pattern means the host: a name itself, *.name whatever ends in .name.
func matchHost(patterns []string, host string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool {
		if suffix, ok := strings.CutPrefix(p, "*"); ok {
			return len(host) > len(suffix) && strings.HasSuffix(host, suffix)
		}
		return host == p
	})
}

// canonicalHost is the form in which hosts are compared. One with letters beyond ASCII has been converted before, see hostToASCII.
func canonicalHost(host string) string {
	host = strings.TrimRight(strings.ToLower(host), ".")
	if strings.Contains(host, ":") || host != "" && isDigit(host[len(host)-1]) { // else it is no address, and the error would be made for nothing
		if addr, err := netip.ParseAddr(host); err == nil {
			return addr.Unmap().WithZone("").String()
		}
	}
	return host
}

// hostPattern is a pattern of the configuration in the form in which it is compared.
func hostPattern(pattern string) string {
	name, wildcard := strings.CutPrefix(pattern, "*.")
	if ascii, err := toASCII(name); err == nil {
		name = ascii
	}
	if name = canonicalHost(name); wildcard {
		return "*." + name
	}
	return name
}

// validHostPattern tells whether a pattern is a host name or an address, or *. and a name.
func validHostPattern(pattern string) bool {
	name, wildcard := strings.CutPrefix(pattern, "*.")
	if _, err := netip.ParseAddr(name); err == nil {
		return !wildcard
	}
	ascii, err := toASCII(strings.TrimSuffix(name, "."))
	return err == nil && ascii != "" && strings.Trim(ascii, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == "" &&
		!strings.HasPrefix(ascii, ".") && !strings.Contains(ascii, "..")
}

const hostRemedy = "must be a host name such as hooks.example.com, or *.example.com for all below it: no scheme, port or path"

func (c *Config) validateHosts(f *faults) {
	for _, h := range c.AllowHosts {
		f.check(validHostPattern(h), "network.allow_hosts", strconv.Quote(h), hostRemedy)
		if validHostPattern(h) && slices.ContainsFunc(c.DenyHosts, func(d string) bool {
			return matchHost([]string{hostPattern(d)}, hostPattern(h))
		}) {
			f.add("network.allow_hosts", strconv.Quote(h), "has no effect, as network.deny_hosts denies it: drop one of them")
		}
	}
	for _, h := range c.DenyHosts {
		if addr, err := netip.ParseAddr(h); err == nil {
			addr = addr.Unmap().WithZone("")
			f.add("network.deny_hosts", strconv.Quote(h), "is an address, which has many spellings and any number of names: write "+
				netip.PrefixFrom(addr, addr.BitLen()).String()+" into network.deny")
			continue
		}
		f.check(validHostPattern(h), "network.deny_hosts", strconv.Quote(h), hostRemedy)
	}
	for _, p := range c.Ports {
		f.check(p > 0 && p <= 65535, "network.ports", p, "must be 1 to 65535")
	}
}
