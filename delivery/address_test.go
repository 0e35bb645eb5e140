package delivery

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// forbidden is a way to write an address that nobody has allowed. PORT stands for that of the test's listeners.
type forbidden struct {
	url     string
	answers []string // of the name server, if it is asked; nil: 127.0.0.1, which it says of any name
	allow   string   // what an operator would have to allow, and then reaches a listener of the test; empty: it leads elsewhere, or nowhere
	odd     bool     // it may also be refused, or not be followed
}

const (
	loopback4 = "127.0.0.0/8"
	loopback6 = "::1/128"
)

// forbiddenTargets has the tricks by which addresses are got past filters. The C library reads numbers as addresses in every base and with parts left out,
// and the name server of the test answers such names as it would.
func forbiddenTargets() (list []forbidden) {
	add := func(allow string, answers []string, hosts ...string) {
		for _, host := range hosts {
			list = append(list, forbidden{"http://" + host + ":PORT/", answers, allow, false})
		}
	}
	add(loopback4, nil, // to 127.0.0.1
		"127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0x7F.0x0.0x0.0x1", "0x7f.1", "0177.0.0.01", "0177.1",
		"127.000.000.001", "0x7f.0.1", "00000177.0.0.1", "localhost", "LOCALHOST", "localhost.", "localhost.localdomain", "127.0.0.1.nip.test", "a.test",
		"[::ffff:127.0.0.1]", "[::FFFF:7f00:1]", "[::ffff:7f00:0001]", "[0:0:0:0:0:ffff:127.0.0.1]", "[0000:0000:0000:0000:0000:ffff:7f00:0001]",
		"127\u30020\u30020\u30021", "127\uff0e0\uff0e0\uff0e1", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "\uff11\uff12\uff17.\uff10.\uff10.\uff11", "\u24c1ocalhost",
		"user:secret@127.0.0.1", "public.test@127.0.0.1", "public.test:443@127.0.0.1", "public.test%2F@127.0.0.1", "127.0.0.1:80@a.test", "8.8.8.8@2130706433",
	)
	add(loopback4, []string{"::ffff:127.0.0.1"}, "mapped.test")
	add(loopback4, []string{"10.0.0.1", "127.0.0.1"}, "both.test")
	add(loopback4, []string{"localhost"}, "alias.test") // no name server answers with a name
	add(loopback6, []string{"::1"}, "[::1]", "[0:0:0:0:0:0:0:1]", "[0000::0001]", "[::0.0.0.1]", "ip6-localhost", "six.test", "user@six.test.")
	add("0.0.0.0/32", []string{"0.0.0.0"}, "0.0.0.0", "0", "0x0", "00.0.0.0", "0.0", "zero.test")
	add("0.0.0.0/32", nil, "[::ffff:0.0.0.0]")
	add("::/128", []string{"::"}, "[::]", "[0:0:0:0:0:0:0:0]", "any.test")

	// Elsewhere: metadata services, private and shared networks, and what is no host at all.
	add("", []string{"169.254.169.254"}, "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "metadata.google.internal",
		"[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "\uff11\uff16\uff19.254.169.254")
	add("", nil, "169.254.170.2", "169.254.0.1", "100.100.100.200", "192.0.0.192", "168.63.129.16", "[::ffff:168.63.129.16]", "[fd00:ec2::254]", "[fd20:ce::254]",
		"10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "100.127.255.254", "[::ffff:10.0.0.1]", "[::ffff:c0a8:1]",
		"0.0.0.1", "127.255.255.255", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1",
		"192.88.99.1", "[fe80::1]", "[fe80::1%25lo]", "[fe80::1%25eth0]", "[fec0::1]", "[fc00::1]", "[fdff::1]", "[ff01::1]", "[ff02::1]", "[ff0e::1]",
		"[::1%25lo]", "[::127.0.0.1]", "[::7f00:1]", "[::10.0.0.1]", "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::7f00:1]",
		"[2002:7f00:1::]", "[2002:a9fe:a9fe::1]", "[2001:0:7f00:1::]", "[2001::80ff:fffe]", "[2001:db8::1]", "[3fff::1]", "[5f00::1]", "[100::1]",
	)
	for _, answer := range []string{"10.0.0.1", "192.168.0.1", "fe80::1%lo", "fd00::1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "255.255.255.255", "::127.0.0.1"} {
		add("", []string{answer}, "to-"+strings.NewReplacer(".", "-", ":", "-", "%", "-").Replace(answer)+".test")
	}

	// No URL of a host, or one that readers of URLs disagree about: refused when it is stored, or denied like the rest.
	for _, url := range []string{
		`http://public.test\@127.0.0.1:PORT/`, `http://127.0.0.1:PORT\@public.test/`, "http://public.test#@127.0.0.1:PORT/", "http://public.test?@127.0.0.1:PORT/",
		"http://127.0.0.1%00.public.test:PORT/", "http://127.0.0.1%2epublic.test:PORT/", "http://127.0.0.1%0d%0a:PORT/", "http://127.0.0.1 :PORT/",
		"http:127.0.0.1:PORT", "http:/127.0.0.1:PORT/", "http:///127.0.0.1:PORT/", "//127.0.0.1:PORT/", "http://127.0.0.1:PORT:80/", "http://[127.0.0.1]:PORT/",
		"http://[::1:PORT/", "http://::1:PORT/", "http://127.0.0.1:0/", "http://127.0.0.1:65536/", "http://127.0.0.1:-1/", "http://127.0.0.1:+80/",
		"http://127.0.0.1:22/", "http://127.0.0.1:6379/", "http://127.0.0.1/", "http://127.0.0.1:/", "http://[::1]:/", "http://@127.0.0.1:PORT/",
		"http://user:p@ss@127.0.0.1:PORT/", "HTTP://127.0.0.1:PORT/", "hTtP://LocalHost:PORT/", "gopher://127.0.0.1:PORT/_", "file:///etc/passwd",
		"http+unix://%2Frun%2Fsocket/", "http://a.test:PORT/\u2025/..;@127.0.0.1/", "http://-127.0.0.1:PORT/", "http://127.0.0.1\u00ad:PORT/",
	} {
		list = append(list, forbidden{url: url, odd: true})
	}
	return list
}

// trap has listeners on the loopback addresses, at one port, which count their connections and answer none, and an allowed server on 127.0.0.3 at the
// same port: it redirects to where the query says, or accepts.
type trap struct {
	port  string
	count atomic.Int32
	six   bool // this machine has an ::1
}

const gatewayPrefix = "127.0.0.3/32"

func newTrap(t *testing.T) *trap {
	t.Helper()
	tr := new(trap)
	if l, err := net.Listen("tcp", "[::1]:0"); err == nil { //nolint:noctx // a test's own listener
		tr.six = true
		require.NoError(t, l.Close())
	}
	hosts := []string{"127.0.0.3", "127.0.0.1"}
	if tr.six {
		hosts = append(hosts, "::1")
	}
	listeners, err := tr.listen(hosts)
	for range 100 { // until one port is free on all of them
		if err == nil {
			break
		}
		listeners, err = tr.listen(hosts)
	}
	require.NoError(t, err)
	gateway := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		if to := r.URL.Query().Get("to"); to != "" {
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
	}))
	_ = gateway.Listener.Close()
	gateway.Listener = listeners[0]
	gateway.Start()
	t.Cleanup(gateway.Close)
	var accepting sync.WaitGroup
	t.Cleanup(accepting.Wait)
	for _, l := range listeners[1:] {
		accepting.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				tr.count.Add(1)
				_ = c.Close()
			}
		})
		t.Cleanup(func() { _ = l.Close() })
	}
	return tr
}

func (tr *trap) listen(hosts []string) (list []net.Listener, err error) {
	port := "0"
	for _, host := range hosts {
		l, err := net.Listen("tcp", net.JoinHostPort(host, port)) //nolint:noctx // a test's own listener
		if err != nil {
			for _, l := range list {
				_ = l.Close()
			}
			return nil, err
		}
		list = append(list, l)
		_, port, _ = net.SplitHostPort(l.Addr().String())
	}
	tr.port = port
	return list, nil
}

// roads are the ways to an address: in the row of an endpoint, with and without TLS, and in the answer of an allowed host. They return the class of the
// attempt, or nothing if the row is refused.
func (tr *trap) roads(b *bundle, target string) map[string]func() Class {
	target = strings.ReplaceAll(target, "PORT", tr.port)
	direct := func(url string, follow bool) func() Class {
		return func() Class {
			d := testDefaults()
			d.Timeout = 5 * time.Second
			ep, err := NewEndpoint(EndpointRow{URL: url, SecretToken: testSecret, VerifySSL: true, FollowRedirects: follow}, d)
			if err != nil {
				return ""
			}
			return b.attempt(ep).Class
		}
	}
	return map[string]func() Class{
		"http":     direct(target, false),
		"https":    direct(strings.Replace(target, "http://", "https://", 1), false),
		"redirect": direct("http://127.0.0.3:"+tr.port+"/?to="+url.QueryEscape(target), true),
	}
}

// TestDeniedIsNeverConnected tries every spelling of a forbidden address on every road. Those that lead to loopback addresses have somebody there who
// would notice, and does once the address is allowed.
func TestDeniedIsNeverConnected(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			tr := newTrap(t)
			client := func(f forbidden, allow ...string) *bundle {
				return setupLookup(t, func(context.Context, string) ([]string, error) {
					if f.answers == nil {
						return []string{"127.0.0.1"}, nil
					}
					return f.answers, nil
				}, change, func(c *Config) {
					c.Allow = nil
					for _, prefix := range append(allow, gatewayPrefix) {
						c.Allow = append(c.Allow, netip.MustParsePrefix(prefix))
					}
				})
			}
			spellings, denied, refused, reached := 0, 0, 0, 0
			for _, f := range forbiddenTargets() {
				spellings++
				b := client(f)
				for road, try := range tr.roads(b, f.url) {
					switch class := try(); {
					case class == ClassDenied && road != "redirect", class == Class3xx && road == "redirect" && !f.odd:
						denied++
					case f.odd && class == "", f.odd && road == "redirect" && (class == Class3xx || class == ClassConnect):
						refused++
					default:
						assert.Fail(t, "neither refused nor denied", "%s by %s: %q", f.url, road, class)
					}
				}
				require.Zero(t, tr.count.Load(), "%s was connected to", f.url)
				require.False(t, t.Failed())
			}
			for _, f := range forbiddenTargets() {
				if f.allow == "" || !tr.six && (f.allow == loopback6 || f.allow == "::/128") {
					continue
				}
				b := client(f, f.allow)
				for road, try := range tr.roads(b, f.url) {
					before := tr.count.Load()
					class := try()
					assert.Greater(t, tr.count.Load(), before, "%s by %s is allowed and not reached: %s", f.url, road, class)
				}
				reached++
			}
			t.Logf("%d spellings: %d attempts denied, %d refused; %d spellings reached once allowed", spellings, denied, refused, reached)
			assert.GreaterOrEqual(t, spellings, 60)
		})
	}
}

// TestNamesThatChange has a name server that says another address every time: the one that is connected to is the one that was looked at.
func TestNamesThatChange(t *testing.T) {
	t.Parallel()
	const attempts = 20
	for transport, change := range transports() {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			tr := newTrap(t)
			classes := func(cache time.Duration, allow string) (n map[Class]int, asked int32) {
				var lookups atomic.Int32
				b := setupLookup(t, func(context.Context, string) ([]string, error) {
					if lookups.Add(1)%2 == 1 {
						return []string{"127.0.0.3"}, nil
					}
					return []string{"127.0.0.1"}, nil
				}, change, func(c *Config) {
					c.Allow, c.DNSCacheTime = []netip.Prefix{netip.MustParsePrefix(allow)}, cache
				})
				n = make(map[Class]int)
				for range attempts {
					n[b.attempt(b.endpoint("http://rebound.test:"+tr.port)).Class]++
				}
				return n, lookups.Load()
			}
			n, asked := classes(0, gatewayPrefix)
			assert.Equal(t, map[Class]int{ClassSuccess: attempts / 2, ClassDenied: attempts / 2}, n)
			assert.EqualValues(t, attempts, asked, "one look for each connection")
			n, asked = classes(time.Hour, gatewayPrefix)
			assert.Equal(t, map[Class]int{ClassSuccess: attempts}, n)
			assert.EqualValues(t, 1, asked)
			assert.Zero(t, tr.count.Load(), "something was connected to")
			n, _ = classes(0, loopback4)
			assert.Equal(t, map[Class]int{ClassSuccess: attempts / 2, ClassReset: attempts / 2}, n)
			assert.EqualValues(t, attempts/2, tr.count.Load())
		})
	}
}
