package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/neo-commons/outbox-relay/outbox"
)

// demoReceiver is an HTTP server with endpoints of several tenants. It checks every signature with a library that is not ours.
type demoReceiver struct {
	name, about string
	healthy     bool
	retries     int        // max_retry_attempts of its endpoints
	answer      func() int // status; 0 drops the connection
	oracle      *demoOracle
	keys        map[outbox.UUID]*standardwebhooks.Webhook // by endpoint; complete before serve
	listener    net.Listener
	server      *http.Server
}

func newDemoReceivers(seed uint64, oracle *demoOracle) []*demoReceiver {
	receivers := []*demoReceiver{
		{name: "healthy", about: "takes everything", healthy: true, retries: 3, answer: func() int { return http.StatusOK }},
		{name: "flaky", about: "fails one request in five: 500, 503, a dropped connection, now and then 429", retries: 10, answer: flakyAnswer(seed)},
		{name: "dead", about: "answers 500 to everything", retries: 2, answer: func() int { return http.StatusInternalServerError }},
	}
	for _, r := range receivers {
		r.oracle, r.keys = oracle, make(map[outbox.UUID]*standardwebhooks.Webhook)
	}
	return receivers
}

// flakyAnswer fails for one request in five. It asks for a pause (429) only now and then: the relay heeds that for the whole endpoint.
func flakyAnswer(seed uint64) func() int {
	var mu sync.Mutex
	rnd := mathrand.New(mathrand.NewPCG(seed, 0)) //nolint:gosec // a show that can be repeated, not a secret
	failures := []int{http.StatusInternalServerError, http.StatusServiceUnavailable, 0}
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		switch n := rnd.IntN(600); {
		case n == 0:
			return http.StatusTooManyRequests
		case n < 120:
			return failures[n%len(failures)]
		default:
			return http.StatusNoContent
		}
	}
}

// listen takes a port; close gives it back.
func (r *demoReceiver) listen(ctx context.Context) (err error) {
	if r.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
		return fmt.Errorf("listen for receiver %s: %w", r.name, err)
	}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second, ErrorLog: stdlog.New(io.Discard, "", 0)}
	return nil
}

// serve answers until close.
func (r *demoReceiver) serve() error {
	if err := r.server.Serve(r.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("receiver %s: %w", r.name, err)
	}
	return nil
}

// close may be called at any time, and again.
func (r *demoReceiver) close() error {
	if r.listener == nil {
		return nil
	}
	err := r.server.Close()
	// Before serve has begun, the server does not know the listener.
	if e := r.listener.Close(); !errors.Is(e, net.ErrClosed) {
		err = errors.Join(err, e)
	}
	return err
}

// register makes an endpoint known and returns its secret.
func (r *demoReceiver) register(endpoint outbox.UUID) (secret string, err error) {
	key := make([]byte, 24)
	_, _ = rand.Read(key) // never fails: crypto/rand ends the process instead
	secret = "whsec_" + base64.StdEncoding.EncodeToString(key)
	r.keys[endpoint], err = standardwebhooks.NewWebhook(secret)
	return secret, err
}

// ServeHTTP takes one delivery.
func (r *demoReceiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	at := time.Now()
	body, err := io.ReadAll(req.Body)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest) // the relay has gone away
		return
	}
	p, ok := r.verify(req, body)
	if !ok {
		r.oracle.forged()
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	status := r.answer()
	taken := status >= 200 && status <= 299
	r.oracle.received(p, at, taken, r.healthy)
	switch status {
	case 0:
		panic(http.ErrAbortHandler) // what net/http offers to drop a connection
	case http.StatusTooManyRequests:
		w.Header().Set("Retry-After", "1")
	}
	w.WriteHeader(status)
}

// verify tells which delivery a request is, if it is signed by whom it should.
func (r *demoReceiver) verify(req *http.Request, body []byte) (p demoPair, ok bool) {
	endpoint, err := outbox.ParseUUID(strings.TrimPrefix(req.URL.Path, "/"))
	key := r.keys[endpoint]
	if err != nil || key == nil || key.Verify(body, req.Header) != nil {
		return demoPair{}, false
	}
	event, err := outbox.ParseUUID(req.Header.Get(standardwebhooks.HeaderWebhookID))
	return demoPair{endpoint, event}, err == nil
}
