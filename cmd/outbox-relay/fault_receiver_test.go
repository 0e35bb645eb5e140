package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/neo-commons/outbox-relay/outbox"
)

// hit is one request at the front. begun and ended are moments of one clock that counts what happens there; ended is zero until it is answered.
type hit struct {
	pair
	begun, ended int
	at           time.Time
	accepted     bool
}

// mischief answers a request in a way that a handler usually does not.
type mischief func(w http.ResponseWriter, req *http.Request)

// A front is the receivers of a fault run: it logs each request before it is answered, and checks its signature.
type front struct {
	server  *httptest.Server
	secrets *sync.Map
	mood    func(rnd *rand.Rand, p pair) (status int, wait time.Duration, m mischief)

	mu       sync.Mutex
	rnd      *rand.Rand
	log      []*hit
	clock    int
	open     int // connections
	seen     map[pair]bool
	bad      []string
	arrived  func(n int)          // told of each request, before it is answered
	accepted func(p pair, at hit) // told of each that is accepted
	grown    chan struct{}
}

func newFront(t testing.TB, secrets *sync.Map, seed uint64) *front {
	t.Helper()
	f := &front{
		secrets: secrets, rnd: rand.New(rand.NewPCG(seed, 77)), seen: make(map[pair]bool), grown: make(chan struct{}, 1),
		arrived: func(int) {}, accepted: func(pair, hit) {},
		mood: func(rnd *rand.Rand, _ pair) (int, time.Duration, mischief) {
			return http.StatusOK, time.Duration(rnd.IntN(8)) * time.Millisecond, nil
		},
	}
	f.server = httptest.NewUnstartedServer(f)
	f.server.Config.ConnState = f.connState
	f.server.Start()
	t.Cleanup(f.server.Close)
	return f
}

func (f *front) connState(_ net.Conn, state http.ConnState) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch state {
	case http.StateNew:
		f.open++
	case http.StateClosed, http.StateHijacked:
		f.open--
	default:
	}
}

func (f *front) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	endpoint, idErr := outbox.ParseUUID(strings.TrimPrefix(req.URL.Path, "/"))
	event, eventErr := outbox.ParseUUID(req.Header.Get("webhook-id"))
	verify, known := f.secrets.Load(endpoint)
	if err != nil { // the relay was killed while it sent
		return
	}
	var fault string
	if idErr != nil || eventErr != nil || !known {
		fault = fmt.Sprintf("unusable request %s: %v %v", req.URL.Path, idErr, eventErr)
	} else if err := verify.(*standardwebhooks.Webhook).Verify(body, req.Header); err != nil {
		fault = fmt.Sprintf("signature of %s: %v", event, err)
	}
	h := &hit{pair: pair{endpoint, event}, at: time.Now()}
	f.mu.Lock()
	if fault != "" {
		f.bad = append(f.bad, fault)
	}
	f.clock++
	h.begun = f.clock
	f.log = append(f.log, h)
	n, arrived := len(f.log), f.arrived
	status, wait, trick := f.mood(f.rnd, h.pair)
	f.mu.Unlock()
	arrived(n)
	if wait > 0 {
		<-time.After(wait)
	}
	if trick != nil {
		trick(w, req)
		return
	}
	f.mu.Lock()
	f.clock++
	h.ended, h.accepted = f.clock, status < 300
	if h.accepted {
		f.seen[h.pair] = true
		f.accepted(h.pair, *h)
	}
	f.mu.Unlock()
	select {
	case f.grown <- struct{}{}:
	default:
	}
	w.WriteHeader(status)
}

// pairs counts the deliveries that have been accepted.
func (f *front) pairs() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.seen)
}

func (f *front) requests() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.log)
}

func (f *front) connections() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.open
}

func (f *front) now() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.clock++
	return f.clock
}
