package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema"
)

const (
	benchType  = "bench.event" // of all events
	benchHosts = 16            // at most
)

// benchReceiver takes every request and notes when it came.
type benchReceiver struct {
	server   *http.Server
	urls     []string // of its ports, each a host of its own to the relay
	caFile   string   // with its certificate; empty: it does not speak TLS
	expected int64
	answer   time.Duration
	complete chan struct{} // closed by the last request that is expected

	count       atomic.Int64
	first, last atomic.Int64 // nanoseconds of Unix time

	mu       sync.Mutex
	keep     bool // of a backlog only the rate counts
	arrivals []benchArrival
	served   chan error
}

type benchArrival struct {
	id outbox.UUID
	at time.Time
}

func newBenchReceiver(ctx context.Context, o benchOptions) (_ *benchReceiver, err error) {
	r := &benchReceiver{expected: int64(o.deliveries()), answer: o.answer, keep: o.rate > 0, complete: make(chan struct{}), served: make(chan error, benchHosts)}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second, ErrorLog: stdlog.New(io.Discard, "", 0)}
	scheme, serve := "http", r.server.Serve
	if o.tls {
		scheme, serve = "https", func(l net.Listener) error { return r.server.ServeTLS(l, "", "") }
		if err := r.certify(); err != nil {
			return nil, fmt.Errorf("make a certificate for the receiver: %w", err)
		}
	}
	for range min(o.tenants*o.endpoints, benchHosts) {
		listener, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, errors.Join(fmt.Errorf("listen for the receiver: %w", err), r.close())
		}
		r.urls = append(r.urls, scheme+"://"+listener.Addr().String())
		go func() { r.served <- serve(listener) }()
	}
	return r, nil
}

// certify gives the receiver a certificate, and the relay a file to know it by.
func (r *benchReceiver) certify() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(1, 0, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	r.server.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	file, err := os.CreateTemp("", "outbox-relay-bench-*.pem")
	if err != nil {
		return err
	}
	r.caFile = file.Name()
	return errors.Join(pem.Encode(file, &pem.Block{Type: "CERTIFICATE", Bytes: der}), file.Close())
}

func (r *benchReceiver) forget() error {
	if r.caFile == "" {
		return nil
	}
	return os.Remove(r.caFile)
}

// ServeHTTP takes one delivery.
func (r *benchReceiver) ServeHTTP(_ http.ResponseWriter, req *http.Request) {
	at := time.Now()
	_, _ = io.Copy(io.Discard, req.Body)
	if r.keep {
		if id, err := outbox.ParseUUID(req.Header.Get("webhook-id")); err == nil {
			r.mu.Lock()
			r.arrivals = append(r.arrivals, benchArrival{id, at})
			r.mu.Unlock()
		}
	}
	if r.answer > 0 {
		select {
		case <-time.After(r.answer):
		case <-req.Context().Done():
			return
		}
	}
	r.first.CompareAndSwap(0, at.UnixNano())
	if r.count.Add(1) == r.expected {
		r.last.Store(time.Now().UnixNano())
		close(r.complete)
	}
}

func (r *benchReceiver) close() error {
	err := r.server.Close()
	for range r.urls {
		if e := <-r.served; !errors.Is(e, http.ErrServerClosed) {
			err = errors.Join(err, e)
		}
	}
	return errors.Join(err, r.forget())
}

// benchCommits notes when the COMMIT of an event returned.
type benchCommits struct {
	mu sync.Mutex
	at map[outbox.UUID]time.Time
}

func (c *benchCommits) note(id outbox.UUID, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.at == nil {
		c.at = make(map[outbox.UUID]time.Time)
	}
	c.at[id] = at
}

func (c *benchCommits) n() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.at)
}

// latencies are the times from COMMIT to receipt, in order. A request may be there before COMMIT has returned to the application: that is zero.
func (b *bench) latencies() []time.Duration {
	b.receiver.mu.Lock()
	defer b.receiver.mu.Unlock()
	b.commits.mu.Lock()
	defer b.commits.mu.Unlock()
	list := make([]time.Duration, 0, len(b.receiver.arrivals))
	for _, a := range b.receiver.arrivals {
		if at, ok := b.commits.at[a.id]; ok {
			list = append(list, max(a.at.Sub(at), 0))
		}
	}
	slices.Sort(list)
	return list
}

func (b *bench) tenant(i int) string { return fmt.Sprintf("bench_%d", i%b.tenants) }

// install does what "outbox-relay migrate" and "outbox-relay tenants add" do, and makes endpoints and subscriptions.
func (b *bench) install(ctx context.Context) error {
	if err := schema.Migrate(ctx, b.db.dsn, schema.Options{Slot: b.db.slot}); err != nil {
		return err
	}
	b.view.step("%s with %s", plural(int64(b.tenants), "tenant", "tenants"), plural(int64(b.endpoints), "endpoint each", "endpoints each"))
	for i := range b.tenants {
		name := b.tenant(i)
		if _, err := b.db.pool.Exec(ctx, "CREATE SCHEMA "+name); err != nil {
			return fmt.Errorf("create schema %q: %w", name, err)
		}
		if err := schema.AddTenant(ctx, b.db.dsn, name, schema.AddOptions{}); err != nil {
			return err
		}
		_, err := b.db.pool.Exec(ctx, `WITH type AS (
				INSERT INTO `+table(name, "webhook_event_types")+` (event_type, category, display_name) VALUES ($1, 'bench', $1) RETURNING id
			), endpoint AS (
				INSERT INTO `+table(name, "webhook_endpoints")+` (name, endpoint_url, secret_token, created_by_user_id)
				SELECT 'bench', ($2::text[])[1 + ($4 + i) % cardinality($2)] || '/' || i, 'whsec_' || encode(decode(md5(random()::text), 'hex'), 'base64'), gen_random_uuid()
				FROM generate_series(1, $3) i RETURNING id
			)
			INSERT INTO `+table(name, "webhook_subscriptions")+` (endpoint_id, event_type_id, event_type)
			SELECT endpoint.id, type.id, $1 FROM endpoint, type`, benchType, b.receiver.urls, b.endpoints, i*b.endpoints)
		if err != nil {
			return fmt.Errorf("insert endpoints of %q: %w", name, err)
		}
	}
	return nil
}

// write is the application: each event is a transaction of its own.
func (b *bench) write(ctx context.Context) error {
	pace := &demoPace{left: b.events, rate: b.rate, began: time.Now()}
	group, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range benchWriters {
		group.Go(func() error {
			if err := b.writer(ctx, pace, &next); err != nil {
				return fmt.Errorf("insert events: %w", err)
			}
			return nil
		})
	}
	return group.Wait()
}

func (b *bench) writer(ctx context.Context, pace *demoPace, next *atomic.Int64) error {
	conn, err := b.db.pool.Acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	if b.rate == 0 { // the backlog has to be there, its making is not measured
		if _, err := conn.Exec(ctx, "SET synchronous_commit = off"); err != nil {
			return err
		}
	}
	data := slices.Concat([]byte(`{"text": "`), bytes.Repeat([]byte("x"), max(b.size-len(`{"text": ""}`), 0)), []byte(`"}`))
	for {
		if n, err := pace.take(ctx, 1); n == 0 || err != nil {
			return err
		}
		e := outbox.Event{ID: outbox.NewUUID(), Type: benchType, AggregateID: outbox.NewUUID(), AggregateType: "bench", Data: data}
		if _, err := outbox.Insert(ctx, conn, b.tenant(int(next.Add(1))), e); err != nil {
			return err
		}
		b.commits.note(e.ID, time.Now())
	}
}

// verify holds what is recorded against what was committed.
func (b *bench) verify(ctx context.Context) error {
	recorded := make(map[string]int)
	for i := range b.tenants {
		rows, err := b.db.pool.Query(ctx, "SELECT delivery_status, count(*) FROM "+table(b.tenant(i), "webhook_deliveries")+" GROUP BY 1")
		if err != nil {
			return fmt.Errorf("count deliveries: %w", err)
		}
		for rows.Next() {
			var status string
			var n int
			if err := rows.Scan(&status, &n); err != nil {
				rows.Close()
				return fmt.Errorf("count deliveries: %w", err)
			}
			recorded[status] += n
		}
		if err := rows.Err(); err != nil {
			return fmt.Errorf("count deliveries: %w", err)
		}
	}
	if recorded["success"] != b.deliveries() || len(recorded) != 1 {
		return fmt.Errorf("%d deliveries are to be recorded as success, but recorded are %v", b.deliveries(), recorded)
	}
	return nil
}
