package relay

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// site is a session in a database with the tenant acme. It leads, and does nothing by itself.
type site struct {
	*session

	t    *testing.T
	pool *pgxpool.Pool
}

func newSite(t *testing.T) *site {
	t.Helper()
	ctx, dsn := t.Context(), pgtest.Database(t)
	there, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	o := Options{Config: DefaultConfig(), Version: "test", Log: slog.New(slog.DiscardHandler), Registry: prometheus.NewRegistry()}
	o.Config.Database.URL, o.Config.Database.Slot = dsn, "site_"+there.Database
	require.NoError(t, schema.Migrate(ctx, dsn, schema.Options{Slot: o.Config.Database.Slot}))
	s := &site{t: t}
	s.pool, err = pgxpool.New(ctx, dsn)
	require.NoError(t, err)
	t.Cleanup(s.pool.Close)
	s.exec(`CREATE SCHEMA acme`)
	require.NoError(t, schema.AddTenant(ctx, dsn, "acme", schema.AddOptions{}))

	e, err := newEngine(ctx, &o)
	require.NoError(t, err)
	t.Cleanup(e.store.Close)
	s.session = &session{engine: e, tenants: make(map[string]*tenant), relations: make(map[uint32]*relation), gates: make(map[store.Backfill]wal.LSN)}
	s.stream, err = wal.Open(ctx, e.streamOptions())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, s.close(context.WithoutCancel(ctx))) })
	progress, err := e.store.Lead(ctx, store.LeadOptions{SystemID: s.stream.SystemID()})
	require.NoError(t, err)
	s.epoch, s.start, s.startHigh, s.ledger = progress.Epoch, progress.LSN, progress.High, newLedger(progress.LSN, progress.High)
	s.confirmed.Store(uint64(progress.LSN))
	require.NoError(t, s.loadTenants(ctx))
	return s
}

func (s *site) exec(sql string, args ...any) {
	s.t.Helper()
	_, err := s.pool.Exec(s.t.Context(), sql, args...)
	require.NoError(s.t, err, sql)
}

func (s *site) count(from string) (n int) {
	s.t.Helper()
	require.NoError(s.t, s.pool.QueryRow(s.t.Context(), `SELECT count(*) FROM `+from).Scan(&n), from)
	return n
}

// job makes a delivery of the stream, of a commit that has been read.
func (s *site) job() *job {
	event := outbox.NewUUID()
	j := &job{
		Delivery: store.Delivery{
			ID: outbox.NewUUID(), Tenant: "acme", EventID: event, EndpointID: outbox.NewUUID(), URL: "http://127.0.0.1:9", Method: "POST",
			Message: &delivery.Message{ID: event, Body: []byte("{}"), ContentType: "application/json"},
		},
		endpoint: &delivery.Endpoint{Concurrency: 1}, ledger: s.ledger, commit: s.ledger.begin(s.start+100, time.Now()), bytes: 1,
	}
	s.ledger.add(j.commit)
	s.ledger.end(j.commit, s.start+200)
	return j
}

// TestFinishWaitsForNothingThatHasNotBegun: a session that ends while the relay goes on leaves to the next one what waits in lanes, and what is held back.
func TestFinishWaitsForNothingThatHasNotBegun(t *testing.T) {
	t.Parallel()
	for name, wait := range map[string]func(s *site, j *job){
		"in a lane": func(s *site, j *job) { s.dispatcher.admit(t.Context(), j) },
		"held back": func(s *site, j *job) { s.repeated = append(s.repeated, j) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			wait(s, s.job())
			giveUp := time.AfterFunc(30*time.Second, func() { close(s.quit) })
			require.NoError(t, s.finish(t.Context()))
			require.True(t, giveUp.Stop(), "nobody would have recorded it")
			require.Nil(t, s.dispatcher.nextJob(), "the next session may send it already")
			covered, _ := s.ledger.position()
			require.Equal(t, s.start, covered, "the log keeps it")
		})
	}
}

// TestRelationsGoWithTheirTenant: of a tenant that is removed nothing stays but what the stream itself knows of its tables.
func TestRelationsGoWithTheirTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- s.stream.Run(ctx, s, func() wal.LSN { return 0 }) }()
	s.exec(`INSERT INTO acme.webhook_events (event_type, event_name, aggregate_id, aggregate_type, event_data) VALUES ('a.b', 'a.b', gen_random_uuid(), 'a', '{}')`)
	s.exec(`SELECT outbox_relay.remove_tenant('acme')`)
	require.Eventually(t, func() bool { return s.tenant("acme") == nil }, 30*time.Second, time.Millisecond)
	stop()
	require.ErrorIs(t, <-ended, context.Canceled)
	require.Equal(t, uint64(1), s.read.Load(), "the event was its, so its table was known")
	for _, rel := range s.relations {
		require.Equal(t, ownSchema, rel.wal.Schema)
	}
	require.NotEmpty(t, s.relations)
}

// TestMovedTenantKeepsWhatIsHeldBack: what was read of a tenant before it went to another shard, and waits for a look into the deliveries, is ours to send.
func TestMovedTenantKeepsWhatIsHeldBack(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	recorded, missing, later, last := s.job(), s.job(), s.job(), s.job()
	broken, err := s.store.Record(t.Context(), s.owner, nil, []store.Outcome{{Delivery: &recorded.Delivery, Status: store.Success}})
	require.NoError(t, err)
	require.Empty(t, broken)
	s.repeated = []*job{recorded, missing}
	s.tx.begin = wal.Begin{CommitLSN: s.tenant("acme").loaded}
	require.NoError(t, s.movedAway(t.Context(), "acme"))
	require.Nil(t, s.tenant("acme"))
	require.NoError(t, s.lookUp(t.Context()))
	require.Same(t, missing, s.dispatcher.nextJob())
	require.Nil(t, s.dispatcher.nextJob(), "an earlier session has recorded the other one")

	s.repeated = []*job{later}
	require.NoError(t, s.Begin(t.Context(), wal.Begin{CommitLSN: s.startHigh}))
	require.Len(t, s.repeated, 1, "more may have to be looked up with it")
	require.NoError(t, s.Begin(t.Context(), wal.Begin{CommitLSN: s.startHigh + 1}))
	require.Empty(t, s.repeated)
	s.repeated = []*job{last}
	require.NoError(t, s.Keepalive(t.Context(), s.startHigh, false))
	require.Len(t, s.repeated, 1)
	require.NoError(t, s.Keepalive(t.Context(), s.startHigh+1, false))
	require.Empty(t, s.repeated, "a quiet log has no other transaction to tell")
}

// TestFinishRecordsThePosition: what has been read and led to nothing is not read again by the next session.
func TestFinishRecordsThePosition(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.tenure = newTenure(time.Now(), time.Minute)
	recording, end := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.recorder.run(recording) }()
	s.recorder.lead(s.session)
	end = sync.OnceFunc(end)
	defer end()

	s.ledger.idle(s.start + 500)
	stopped, stop := context.WithCancel(t.Context())
	stop()
	require.NoError(t, s.finish(stopped))
	require.Equal(t, s.start+500, wal.LSN(s.confirmed.Load()))
	require.Equal(t, 1, s.count(`outbox_relay.progress WHERE lsn = '`+(s.start+500).String()+`'`))
	end()
	require.NoError(t, <-done)
}

// TestHealOfADatabaseThatCannotBeAsked: what a slot that is missing means, only the database knows. Until it can be asked the relay goes on trying.
func TestHealOfADatabaseThatCannotBeAsked(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	ctx := t.Context()
	conn, err := pgx.Connect(ctx, pgtest.Shared(t).URL("postgres"))
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.WithoutCancel(ctx))) }()
	name := s.pool.Config().ConnConfig.Database
	allow := func(whether bool) {
		_, err := conn.Exec(ctx, fmt.Sprintf("ALTER DATABASE %s ALLOW_CONNECTIONS %t", name, whether))
		require.NoError(t, err)
	}
	allow(false)
	_, err = conn.Exec(ctx, "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = $1 AND backend_type = 'client backend'", name)
	require.NoError(t, err)
	missing := &wal.StreamError{Op: "check slot", Kind: wal.ErrSlotMissing}
	require.True(t, isFinal(missing))
	err = s.heal(ctx, missing)
	require.ErrorContains(t, err, "read the state of the slot")
	require.ErrorContains(t, err, missing.Error())
	require.False(t, isFinal(err), err)
	allow(true)
	require.ErrorIs(t, s.heal(ctx, missing), wal.ErrSlotActive, "it is there, after all")

	s.pool.Reset()
	s.exec("DELETE FROM outbox_relay.progress")
	require.ErrorIs(t, s.heal(ctx, missing), wal.ErrSlotMissing, "it was never made")
}
