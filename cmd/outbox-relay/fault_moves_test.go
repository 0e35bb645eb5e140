package main

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// moveFaults are the scenarios of tenants that change their shard.
func moveFaults() []*scenario {
	return []*scenario{{name: "tenant-moves", row: "tenants moved between shards", server: map[string]string{}, moves: true, prepare: twoShards, run: tenantMoves}}
}

// twoShards gives each tenant a shard of its own.
func twoShards(r *faultRun) {
	r.shard(r.t, 2)
	r.command(r.t, "tenants", "move", r.tenants[1], "--shard", "1")
	r.asRunner(r.t)
}

// tenantMoves has two relays share two shards, between which tenants are moved to and fro, and kills one or the other at any time of a move. Moves by
// themselves repeat nothing: what comes twice is what a relay that was killed had not recorded.
func tenantMoves(r *faultRun) {
	relays := []*relayProcess{r.start(), r.start()}
	r.await("leaders of both shards", func() bool { return r.saidOf(`"msg":"leading"`) >= 2 })
	for range 2 + r.rnd.IntN(3) {
		r.more(10 + r.rnd.IntN(60))
		for range 1 + r.rnd.IntN(3) {
			r.move(r.tenants[r.rnd.IntN(len(r.tenants))])
			r.more(r.rnd.IntN(20))
		}
		if r.rnd.IntN(2) == 0 { // in the middle of a move, which the other relay, or the next one, has to finish
			r.move(r.tenants[r.rnd.IntN(len(r.tenants))])
		}
		victim := r.rnd.IntN(len(relays))
		require.NoError(r.t, relays[victim].cmd.Process.Signal(syscall.SIGSTOP)) // it records nothing more while we look
		end := r.interrupting()
		_ = relays[victim].cmd.Process.Kill()
		<-relays[victim].done
		r.over()
		if r.rnd.IntN(2) == 0 {
			r.move(r.tenants[r.rnd.IntN(len(r.tenants))])
		}
		relays[victim] = r.start()
		r.recovery(&r.result.recoveries, 10*time.Second)
		end()
		r.await("the end of the moves", r.settled)
	}
	r.more(20)
}

// move brings a tenant to the other shard, as soon as the move before is over and no writer stands in the way.
func (r *faultRun) move(tenant string) {
	to := 1 - r.shardOf(r.ctx, r.t, tenant)
	r.await(fmt.Sprintf("tenant %s to be moved to shard %d", tenant, to), func() bool { return r.moveTo(r.ctx, r.t, tenant, to) })
}

// settled tells whether no move is under way.
func (r *faultRun) settled() bool {
	var moving bool
	err := r.pool.QueryRow(r.ctx, `SELECT EXISTS (SELECT FROM outbox_relay.tenants WHERE backfill IS NOT NULL AND backfill_done_at IS NULL)`).Scan(&moving)
	return err == nil && !moving
}

// home is where a tenant is, since a place in the log, and how far the slot of that shard is confirmed.
type home struct {
	shard     int
	since     string
	confirmed pglogrepl.LSN
}

// homes lists the tenants that are not being moved. What is confirmed is read after where they are.
func (r *faultRun) homes(ctx context.Context) (map[string]home, error) {
	rows, err := r.pool.Query(ctx, `SELECT t.schema, t.shard, coalesce(t.backfill_place::text, ''), r.confirmed_flush_lsn::text
		FROM outbox_relay.tenants t JOIN outbox_relay.progress p USING (shard) JOIN pg_replication_slots r ON r.slot_name = p.slot
		WHERE t.state = 'active' AND (t.backfill IS NULL OR t.backfill_done_at IS NOT NULL)`)
	if err != nil {
		return nil, err
	}
	list := make(map[string]home)
	var tenant, confirmed string
	var h home
	_, err = pgx.ForEachRow(rows, []any{&tenant, &h.shard, &h.since, &confirmed}, func() (err error) {
		h.confirmed, err = pglogrepl.ParseLSN(confirmed)
		list[tenant] = h
		return err
	})
	return list, err
}

// lookAtShards holds what the slot of each tenant's shard is confirmed to against its outcomes. A tenant that was moved meanwhile is left for the next time: the
// slot that it has left goes on without it.
func (r *faultRun) lookAtShards(ctx context.Context) {
	before, err := r.homes(ctx)
	if err != nil {
		return
	}
	after, err := r.homes(ctx)
	if err != nil {
		return
	}
	for tenant, h := range before {
		if a, there := after[tenant]; there && a.shard == h.shard && a.since == h.since && !r.account(ctx, tenant, h.confirmed) {
			return
		}
	}
	r.mu.Lock()
	r.result.samples++
	r.mu.Unlock()
}
