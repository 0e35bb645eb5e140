package delivery

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// book is a name server that counts.
type book struct {
	mu      sync.Mutex
	asked   map[string]int
	answers map[string][]string
}

func (b *book) lookup(_ context.Context, host string) ([]string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.asked[host]++
	addrs, ok := b.answers[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	return addrs, nil
}

func (b *book) set(host string, addrs ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answers[host] = addrs
}

func (b *book) times(host string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.asked[host]
}

func newBook() *book { return &book{asked: map[string]int{}, answers: map[string][]string{}} }

func TestDNSCache(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b, m := newBook(), NewMetrics(nil)
		n := newNames(b.lookup, time.Minute, m)
		lookup := func(want ...string) {
			t.Helper()
			got, err := n.addresses(t.Context(), "cached.test")
			require.NoError(t, err)
			assert.Equal(t, want, got)
		}
		count := (&bundle{t: t}).count

		_, err := n.addresses(t.Context(), "cached.test")
		require.Error(t, err)
		b.set("cached.test", "192.0.2.1")
		lookup("192.0.2.1") // the error was not kept
		assert.Equal(t, 0, count(m.dnsHits))

		b.set("cached.test", "192.0.2.2")
		time.Sleep(59 * time.Second) // synctest: no time passes
		lookup("192.0.2.1")
		time.Sleep(time.Second)
		lookup("192.0.2.2")
		lookup("192.0.2.2")
		assert.Equal(t, 2, count(m.dnsHits))
		assert.Equal(t, 3, count(m.dnsLookups))
		assert.Equal(t, 1, count(m.dnsLookupsFailed))

		time.Sleep(2 * time.Minute)
		b.set("other.test", "192.0.2.3")
		_, err = n.addresses(t.Context(), "other.test")
		require.NoError(t, err)
		assert.Len(t, n.kept, 1, "an unused name is dropped")
	})
}

// TestDNSOfSlowNames has names whose servers do not answer: the address of another name is as fresh as ever.
func TestDNSOfSlowNames(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const slow, timeout = 100, 5 * time.Second
		b := newBook()
		hang := false
		n := newNames(func(ctx context.Context, host string) ([]string, error) {
			if hang && strings.HasPrefix(host, "slow") {
				<-time.After(timeout)
				return nil, &net.DNSError{IsTimeout: true}
			}
			return b.lookup(ctx, host)
		}, time.Minute, NewMetrics(nil))
		var all sync.WaitGroup
		ask := func() {
			for i := range slow {
				host := fmt.Sprintf("slow%d.test", i)
				b.set(host, "192.0.2.1")
				all.Go(func() { _, _ = n.addresses(t.Context(), host) })
			}
			synctest.Wait()
		}
		b.set("quick.test", "192.0.2.1")
		_, err := n.addresses(t.Context(), "quick.test")
		require.NoError(t, err)
		ask()
		hang = true
		b.set("quick.test", "192.0.2.2")
		time.Sleep(time.Minute)
		ask()
		start := time.Now()
		addrs, err := n.addresses(t.Context(), "quick.test")
		require.NoError(t, err)
		assert.Equal(t, []string{"192.0.2.2"}, addrs)
		assert.Zero(t, time.Since(start))
		all.Wait()
	})
}

// TestDNSAsksOnce has many ask for a name at once, and the first of them give up.
func TestDNSAsksOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b, release := newBook(), make(chan struct{})
		b.set("busy.test", "192.0.2.1")
		n := newNames(func(ctx context.Context, host string) ([]string, error) {
			<-release
			require.NoError(t, ctx.Err(), "it is not the first one's alone")
			return b.lookup(ctx, host)
		}, time.Minute, NewMetrics(nil))
		first, giveUp := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			_, err := n.addresses(first, "busy.test")
			assert.ErrorIs(t, err, context.Canceled)
		})
		synctest.Wait()
		for range 10 {
			all.Go(func() {
				addrs, err := n.addresses(t.Context(), "busy.test")
				assert.NoError(t, err)
				assert.Equal(t, []string{"192.0.2.1"}, addrs)
			})
		}
		synctest.Wait()
		giveUp()
		synctest.Wait()
		close(release)
		all.Wait()
		assert.Equal(t, 1, b.times("busy.test"))
	})
}

func TestDNSWithoutCache(t *testing.T) {
	t.Parallel()
	b := newBook()
	b.set("plain.dns.test", "192.0.2.1")
	n := newNames(b.lookup, 0, NewMetrics(nil))
	for range 2 {
		_, err := n.addresses(t.Context(), "plain.dns.test")
		require.NoError(t, err)
	}
	assert.Equal(t, 2, b.times("plain.dns.test"))
}

func TestAttemptByName(t *testing.T) {
	t.Parallel()
	s := serve(t, func(http.ResponseWriter, *http.Request) {})
	_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
	book := newBook()
	book.set("several.attempt.test", "127.0.0.9", "127.0.0.1") // nobody listens on the first
	book.set("none.attempt.test")
	b := setupLookup(t, book.lookup)

	res := b.attempt(b.endpoint("http://several.attempt.test:" + port))
	assert.True(t, res.OK(), "the second address: %s", res.Err)

	res = b.attempt(b.endpoint("http://none.attempt.test:" + port))
	assert.Equal(t, ClassDNS, res.Class)

	res = b.attempt(b.endpoint("http://missing.attempt.test:" + port + "/planted-secret-value"))
	assert.Equal(t, ClassDNS, res.Class)
	assert.Equal(t, "the host name does not exist", res.Err)
	assert.Equal(t, 2, b.count(b.m.connErrors[stageDNS]))
}

// TestAttemptByForeignName has a host with letters beyond ASCII, which has to be looked up and sent as punycode.
func TestAttemptByForeignName(t *testing.T) {
	t.Parallel()
	for transport, change := range transports() {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			hosts := make(chan string, 2)
			s := serve(t, func(w http.ResponseWriter, r *http.Request) {
				hosts <- r.Host
				if r.URL.Path == "/away" {
					w.Header().Set("Location", strings.Replace(r.Header.Get("X-To"), "PORT", r.Host[strings.Index(r.Host, ":"):], 1))
					w.WriteHeader(http.StatusTemporaryRedirect)
				}
			})
			_, port, _ := strings.Cut(strings.TrimPrefix(s.URL, "http://"), ":")
			book := newBook()
			book.set("xn--bcher-kva.attempt.test", "127.0.0.1")
			b := setupLookup(t, book.lookup, change)
			res := b.attempt(b.endpoint("http://B\u00fccher.attempt.test:" + port + "/\u00fc"))
			require.True(t, res.OK(), "%s: %s", res.Class, res.Err)
			assert.Equal(t, "xn--bcher-kva.attempt.test:"+port, <-hosts)

			away := func(to string) Result {
				return b.attempt(b.endpoint(s.URL+"/away", func(r *EndpointRow) {
					r.FollowRedirects, r.CustomHeaders = true, []byte(`{"X-To": "http://`+to+`PORT/"}`)
				}))
			}
			res = away("b\u00fccher.attempt.test")
			require.True(t, res.OK(), "%s: %s", res.Class, res.Err)
			<-hosts
			assert.Equal(t, "xn--bcher-kva.attempt.test:"+port, <-hosts)
			res = away("\u0300a.test")
			assert.Equal(t, Class3xx, res.Class)
		})
	}
}

func TestDNSFailuresDescribed(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want string
	}{
		{&net.DNSError{IsTimeout: true}, "the name server did not answer in time"},
		{context.DeadlineExceeded, "the name server did not answer in time"},
		{errors.New("planted-secret-value"), "the host name could not be resolved"},
	} {
		class, text := classifyDial(&dialError{stageDNS, c.err})
		assert.Equal(t, ClassDNS, class)
		assert.Equal(t, c.want, text)
	}
}

// TestCloseEndsLookups has a name server that never answers: neither an attempt nor Close waits for it.
func TestCloseEndsLookups(t *testing.T) {
	t.Parallel()
	started := make(chan struct{}, 1)
	b := setupLookup(t, func(ctx context.Context, _ string) ([]string, error) {
		started <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}, func(c *Config) { c.ConnectTimeout = time.Hour })
	res := b.attempt(b.endpointWithin(limit, "http://silent.close.test"))
	assert.Equal(t, ClassTimeout, res.Class)
	<-started
	b.client.Close() // goleak finds what it leaves
}
