package relay

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestFencedAfterAFailure has a flush fail until another replica leads. Until then its deliveries are outstanding; afterwards neither they nor the
// failure are left: a later session of this replica would take it for its own and end at once, for ever. However often it has been tried, that is said once.
func TestFencedAfterAFailure(t *testing.T) {
	t.Parallel()
	ctx, dsn, slot := t.Context(), pgtest.Database(t), "recorder_"+strings.ReplaceAll(outbox.NewUUID().String(), "-", "")
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: slot}))
	conn, err := pgx.Connect(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	exec := func(sql string) {
		t.Helper()
		_, err := conn.Exec(ctx, sql)
		require.NoError(t, err, sql)
	}
	t.Cleanup(func() { _, _ = conn.Exec(context.Background(), `SELECT pg_drop_replication_slot($1)`, slot) })
	exec(`CREATE SCHEMA acme`)
	require.NoError(t, schema.AddTenant(ctx, dsn, "acme", schema.AddOptions{}))

	db, err := store.New(ctx, store.Config{URL: dsn, Slot: slot, Log: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(db.Close)
	b := newBench(10)
	var log bytes.Buffer
	r := newRecorder(b.cfg, db, outbox.NewUUID(), b.dispatcher, newMetrics(prometheus.NewRegistry(), b.cfg), slog.New(slog.NewTextHandler(&log, nil)))
	progress, err := db.Lead(ctx, store.LeadOptions{SystemID: "1"})
	require.NoError(t, err)
	lost := make(chan error, 1)
	s := &session{epoch: progress.Epoch, ledger: b.ledger, end: func(err error) { lost <- err }}
	r.lead(s)
	running, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() { done <- r.run(running) }()

	exec(`ALTER FUNCTION outbox_relay.advance(text, bigint, pg_lsn, pg_lsn) RENAME TO away`)
	j := b.job("a", 1)
	j.Tenant = "acme"
	j.commit = b.ledger.begin(100, time.Time{})
	b.ledger.add(j.commit)
	b.ledger.end(j.commit, 110)
	b.admit(ctx, j)
	require.Same(t, j, b.take())
	sealed := b.ledger.seal()
	j.Message = new(delivery.Message)
	r.add(j, store.Outcome{Delivery: &j.Delivery, Status: store.Success})
	require.Eventually(t, func() bool { return testutil.ToFloat64(r.metrics.recordErrors) >= 3 }, 10*time.Second, time.Millisecond)
	require.Error(t, r.err())
	select {
	case <-sealed:
		t.Fatal("sealed with an outcome that is not durable")
	default:
	}

	_, err = db.Lead(ctx, store.LeadOptions{SystemID: "1"})
	require.NoError(t, err)
	exec(`ALTER FUNCTION outbox_relay.away(text, bigint, pg_lsn, pg_lsn) RENAME TO advance`)
	<-sealed
	require.ErrorIs(t, <-lost, store.ErrFenced)
	require.NoError(t, r.err())
	stop()
	require.NoError(t, <-done)
	require.Equal(t, 1, strings.Count(log.String(), "recording outcomes does not succeed"), log.String())
}

// TestSuccessOfWhatWasHandedOver: a slow delivery is leased in the retry queue while it runs. Its success takes the row out again, and counts for its commit no
// more: another delivery of that has no outcome yet.
func TestSuccessOfWhatWasHandedOver(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	j := s.job()
	s.ledger.add(j.commit)
	s.dispatcher.admit(t.Context(), j)
	require.Same(t, j, s.dispatcher.nextJob())
	j.admitted = j.admitted.Add(-time.Minute)
	s.dispatcher.sweep(s.cfg().Window.Hold)
	_, err := s.recorder.flush(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, s.count(`outbox_relay.retry_queue WHERE leased_by IS NOT NULL`))

	s.dispatcher.finish(j, verdict{attempted: true}, decide(j, delivery.Result{Class: delivery.ClassSuccess, Status: 200, Started: time.Now()}))
	_, err = s.recorder.flush(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, s.count(`acme.webhook_deliveries WHERE delivery_status = 'success'`))
	require.Zero(t, s.count(`outbox_relay.retry_queue`))
	covered, _ := s.ledger.position()
	require.Equal(t, s.start, covered)
}

// TestWhatWasNotWrittenIsNotTold: outcomes of a tenant that is suspended by them are attempted again, and nobody has heard of them till then.
func TestWhatWasNotWrittenIsNotTold(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.exec(`CREATE SCHEMA other`)
	s.exec(`SELECT outbox_relay.add_tenant('other')`)
	var told []string
	s.recorder.durable = func(out []store.Outcome) {
		for i := range out {
			told = append(told, out[i].Delivery.Tenant)
		}
	}
	spans := tracetest.NewSpanRecorder()
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans)).Tracer("test")
	s.exec(`ALTER TABLE acme.webhook_dead_letters RENAME TO away`)
	for _, tenant := range []string{"acme", "other", "acme"} {
		j := s.job()
		j.Tenant = tenant
		_, j.span = tracer.Start(t.Context(), tenant)
		s.dispatcher.admit(t.Context(), j)
		require.Same(t, j, s.dispatcher.nextJob())
		s.dispatcher.finish(j, verdict{attempted: true}, decide(j, delivery.Result{Class: delivery.ClassGone, Status: 410, Started: time.Now()}))
	}
	_, err := s.recorder.flush(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, s.count(`outbox_relay.tenants WHERE state = 'suspended'`))
	require.Equal(t, []string{"other"}, told)
	require.Len(t, spans.Ended(), 3, "each has been attempted")
	require.InDelta(t, 1, testutil.ToFloat64(s.metrics.outcomes[store.Failed]), 0)
}

// TestBatchesOfManyTenantsWaitForMore: under load, so that a statement has more than a few rows; otherwise, or with few tenants, outcomes wait an interval.
func TestBatchesOfManyTenantsWaitForMore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		cfg := DefaultConfig()
		r := newRecorder(&cfg, nil, outbox.UUID{}, nil, nil, nil)
		// wait tells how long so many outcomes wait that have come at once, after a batch.
		wait := func(n, tenants int) time.Duration {
			began := time.Now()
			for i := range n {
				d := &store.Delivery{Tenant: fmt.Sprint(i % tenants), Message: new(delivery.Message)}
				r.add(new(job), store.Outcome{Status: store.Success, Delivery: d})
			}
			require.NoError(t, r.linger(t.Context(), began))
			_, out, _, _ := r.take()
			require.Len(t, out, n)
			return time.Since(began)
		}
		interval := cfg.Record.Interval
		require.Zero(t, wait(cfg.Record.Batch, 200), "a batch")
		require.Equal(t, scatteredIntervals*interval, wait(3199, 200))
		require.Zero(t, wait(3200, 200), "16 of each")
		require.Equal(t, scatteredIntervals*interval, wait(100, 50), "the load was there until now")
		require.Equal(t, interval, wait(100, 50))
		require.Zero(t, wait(cfg.Record.Batch, 10))
		require.Equal(t, interval, wait(cfg.Record.Batch-1, 10), "a statement has many rows as it is")
	})
}

// TestBatchOfMoreTenantsThanItMayHave: those that have waited longest go first, with all they have, and nothing is lost of the others or out of its order.
func TestBatchOfMoreTenantsThanItMayHave(t *testing.T) {
	t.Parallel()
	cfg := DefaultConfig()
	cfg.Record.Batch = 2 * maxBatchTenants
	r := newRecorder(&cfg, nil, outbox.UUID{}, nil, nil, nil)
	var first, others []*job
	for i := range 2 * (maxBatchTenants + 2) {
		tenant := i % (maxBatchTenants + 2)
		j := &job{Delivery: store.Delivery{ID: outbox.NewUUID(), Tenant: fmt.Sprint(tenant)}}
		r.add(j, store.Outcome{Status: store.Success, Delivery: &j.Delivery})
		if tenant < maxBatchTenants {
			first = append(first, j)
		} else {
			others = append(others, j)
		}
	}
	taken := func(want []*job) ([]*job, []store.Outcome) {
		jobs, out, _, _ := r.take()
		require.Equal(t, idsOf(want), idsOf(jobs))
		for i := range out {
			require.Same(t, &jobs[i].Delivery, out[i].Delivery)
		}
		return jobs, out
	}
	jobs, out := taken(first)
	r.putBack(jobs, out) // it could not be written
	taken(first)
	taken(others)
	require.Zero(t, r.pending())
}
