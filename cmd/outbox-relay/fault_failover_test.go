package main

import (
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// failovers are the scenarios of a standby that becomes the primary. The slot goes with it from version 17 on.
func failovers() []*scenario {
	primary := func(more map[string]string) map[string]string {
		more["hot_standby_feedback"] = "on"
		return more
	}
	return []*scenario{
		{
			name: "failover", row: "failover", least: 17, heals: true, promotes: true, server: primary(map[string]string{"synchronized_standby_slots": "standby"}),
			prepare: standby, run: func(r *faultRun) { r.failover() },
		},
		{
			name: "failover-asynchronous", row: "failover", least: 17, heals: true, promotes: true, phantoms: true, server: primary(map[string]string{}),
			prepare: standby, run: func(r *faultRun) { r.failover() },
		},
	}
}

// pair of servers of a failover.
type failoverSite struct {
	second *pgtest.Server
	proxy  *toxiproxy.Proxy
}

// standby makes a cold copy of the primary that follows it, and has everybody reach the primary by way of a proxy.
func standby(r *faultRun) {
	t := r.t
	r.exec(t, "SELECT pg_create_physical_replication_slot('standby', true)")
	second, err := pgtest.Start(r.ctx, pgtest.Options{Config: map[string]string{
		"synchronous_commit": "on", "max_connections": "60", "shared_buffers": "16MB", "max_wal_senders": "10", "max_replication_slots": "10",
		"primary_conninfo": fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres", r.server.Port()), "primary_slot_name": "standby",
		"hot_standby_feedback": "on", "sync_replication_slots": "on", "wal_receiver_status_interval": "1s", "wal_retrieve_retry_interval": "100ms",
	}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, second.Close()) })
	require.NoError(t, second.Stop(r.ctx, "immediate"))
	require.NoError(t, r.server.Stop(r.ctx, "fast"))
	from, to := filepath.Join(r.server.Dir(), "data"), filepath.Join(second.Dir(), "data")
	script := `set -e; cp -p "$2/postgresql.conf" "$2.conf"; rm -rf "$2"; cp -a "$1" "$2"; mv "$2.conf" "$2/postgresql.conf"; rm -rf "$2/postmaster.pid" "$2"/pg_replslot/* # slots are not copied, but carried over
		cp -p "$2/PG_VERSION" "$2/standby.signal"`
	out, err := exec.CommandContext(r.ctx, "sh", "-c", script, "sh", from, to).CombinedOutput()
	require.NoError(t, err, string(out))
	require.NoError(t, r.server.Restart(r.ctx))
	require.NoError(t, second.Restart(r.ctx))
	r.other = &failoverSite{second: second, proxy: r.proxy()}
	r.config = r.behind(r.other.proxy.Listen)
	r.pool.Reset()
	r.awaitSynced()

	u, err := url.Parse(r.dsn)
	require.NoError(t, err)
	u.Host = r.other.proxy.Listen
	cfg, err := pgxpool.ParseConfig(u.String())
	require.NoError(t, err)
	cfg.MaxConns = 16
	r.pool, err = pgxpool.NewWithConfig(r.ctx, cfg)
	require.NoError(t, err)
	t.Cleanup(r.pool.Close)
}

// awaitSynced waits until the standby has the slot, too.
func (r *faultRun) awaitSynced() {
	pool, err := pgxpool.New(r.ctx, r.other.second.URL("postgres"))
	require.NoError(r.t, err)
	defer pool.Close()
	for {
		var synced bool
		err := pool.QueryRow(r.ctx, `SELECT synced AND NOT temporary FROM pg_replication_slots WHERE slot_name = $1`, r.slot).Scan(&synced)
		if err == nil && synced {
			return
		}
		// A slot is carried over once the primary's has moved past what the standby has.
		_, _ = r.site.pool.Exec(r.ctx, "SELECT pg_log_standby_snapshot(), pg_logical_emit_message(true, 'e2e', '')")
		_, _ = r.site.pool.Exec(r.ctx, "SELECT pg_replication_slot_advance($1, pg_current_wal_flush_lsn())", r.slot)
		select {
		case <-r.ctx.Done():
			log, _ := os.ReadFile(filepath.Join(r.other.second.Dir(), "log"))
			require.FailNow(r.t, "the slot is not carried over", "%v\n%s", err, tailOf(log, 2000))
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// failover kills the primary and promotes the standby. What only the old primary had is gone: that it was sent is told, and forbidden where the slot
// waits for the standby.
func (r *faultRun) failover() {
	p := r.lead()
	r.more(50 + r.rnd.IntN(150))
	r.mu.Lock()
	r.result.faults++
	r.unsampled = true // positions of the new primary are of another history
	r.mu.Unlock()
	require.NoError(r.t, r.server.Kill(r.ctx))
	killed := r.rnd.IntN(2) == 0
	if killed {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	conn, err := pgx.Connect(r.ctx, r.other.second.URL("postgres"))
	require.NoError(r.t, err)
	_, err = conn.Exec(r.ctx, "SELECT pg_promote(true, 30)")
	require.NoError(r.t, err)
	require.NoError(r.t, conn.Close(r.ctx))
	require.NoError(r.t, r.other.proxy.Update(&toxiproxy.Proxy{Listen: r.other.proxy.Listen, Upstream: fmt.Sprintf("127.0.0.1:%d", r.other.second.Port()), Enabled: true}))
	r.pool.Reset()
	if killed {
		r.start() // a relay that finds no server at its start ends
	}
	var recorded map[pair]bool
	r.await("the new primary", func() bool {
		recorded, err = r.successes()
		return err == nil
	})
	r.mu.Lock()
	r.interruptions = append(r.interruptions, interruption{r.front.now(), recorded})
	r.mu.Unlock()
	r.recover(20 * time.Second)
	r.more(50)
	r.await("the slot to be sound", r.backfilled)
}

// revoke takes back what the new primary does not have.
func (r *faultRun) revoke() {
	for _, tenant := range r.schemas() {
		rows, err := r.pool.Query(r.ctx, `SELECT id FROM `+pgx.Identifier{tenant, "webhook_events"}.Sanitize())
		require.NoError(r.t, err)
		ids, err := pgx.CollectRows(rows, pgx.RowTo[outbox.UUID])
		require.NoError(r.t, err)
		there := make(map[outbox.UUID]bool, len(ids))
		for _, id := range ids {
			there[id] = true
		}
		r.o.mu.Lock()
		for _, e := range r.o.entries {
			if e.tenant == tenant && e.committed && !there[e.id] {
				e.committed, e.phantom = false, true
			}
		}
		for p, e := range r.o.expected {
			if e.phantom {
				delete(r.o.expected, p)
			}
		}
		r.o.mu.Unlock()
	}
}
