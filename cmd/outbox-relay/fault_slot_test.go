package main

import (
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"
)

// slotFaults are the scenarios in which what the relay streams from comes to harm.
func slotFaults() []*scenario {
	// A transaction that wrote before the publication was made anew, and commits after it, may be missing from the log without a word. The leader notices within
	// a second, and heals; one that is killed before leaves it to the audit.
	remade := &scenario{name: "publication-remade", row: "publication dropped or recreated", heals: true, audits: true, run: func(r *faultRun) {
		r.calamities(func() {
			healed := r.saidOf(`"msg":"healed`)
			r.insist(`DROP PUBLICATION outbox_relay_events; CREATE PUBLICATION outbox_relay_events FOR TABLE ` + strings.Join(r.tenants, ".webhook_events, ") +
				`.webhook_events WITH (publish = 'insert', publish_via_partition_root = true)`)
			if r.rnd.IntN(2) == 0 {
				r.await("the leader to notice", func() bool { return r.saidOf(`"msg":"healed`) > healed })
			}
		})
	}}
	return []*scenario{
		remade,
		{name: "slot-dropped", row: "slot dropped", heals: true, quick: true, run: func(r *faultRun) { r.calamities(r.dropSlot) }},
		{name: "slot-remade", row: "slot dropped", heals: true, run: func(r *faultRun) {
			r.calamities(func() {
				r.dropSlot()
				_, _ = r.pool.Exec(r.ctx, "SELECT pg_create_logical_replication_slot($1, 'pgoutput')", r.slot) // a relay may be faster
			})
		}},
		{
			name: "slot-invalidated", row: "slot invalidated", heals: true, wal: 256 << 20,
			server: map[string]string{"max_slot_wal_keep_size": "16MB", "max_wal_size": "64MB"}, run: func(r *faultRun) { r.calamities(r.invalidateSlot) },
		},
		{name: "publication-dropped", row: "publication dropped or recreated", heals: true, run: func(r *faultRun) {
			r.calamities(func() {
				r.insist("DROP PUBLICATION " + []string{"outbox_relay_events", "outbox_relay_registry"}[r.rnd.IntN(2)])
			})
		}},
	}
}

// calamities does something to the slot, with one or two relays at work, one of which is killed now and then.
func (r *faultRun) calamities(calamity func()) {
	relays := []*relayProcess{r.lead()}
	if r.rnd.IntN(2) == 0 {
		relays = append(relays, r.start())
	}
	for range 1 + r.rnd.IntN(2) {
		r.more(20 + r.rnd.IntN(100))
		end := r.interrupting()
		calamity()
		if victim := r.rnd.IntN(2 * len(relays)); victim < len(relays) {
			_ = relays[victim].cmd.Process.Kill()
			<-relays[victim].done
			relays[victim] = r.start()
		}
		r.over()
		r.recovery(&r.result.recoveries, 15*time.Second)
		r.await("the slot to be sound", r.backfilled)
		end()
	}
	r.more(20)
}

// insist says SQL again until no writer stands in its way.
func (r *faultRun) insist(statements string) {
	r.await(statements, func() bool {
		_, err := r.pool.Exec(r.ctx, statements)
		if err != nil && !isCode(err, "40P01") && !isCode(err, "42704") && !isCode(err, "42710") { // a deadlock; or a relay is at it, too
			r.violate("harness", "%s: %v", statements, err)
		}
		return err == nil
	})
}

// invalidateSlot has the server give the slot up, since it keeps too much of the log.
func (r *faultRun) invalidateSlot() {
	r.insist("CREATE TABLE IF NOT EXISTS filler (x text)")
	stopped := r.alive()
	for _, p := range stopped {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	r.await("the slot to be given up", func() bool {
		for _, sql := range []string{"INSERT INTO filler SELECT repeat('x', 500) FROM generate_series(1, 20000)", "SELECT pg_switch_wal()", "CHECKPOINT"} {
			if _, err := r.pool.Exec(r.ctx, sql); err != nil {
				r.violate("harness", "%s: %v", sql, err)
			}
		}
		var usable bool
		err := r.pool.QueryRow(r.ctx, `SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = $1 AND wal_status <> 'lost')`, r.slot).Scan(&usable)
		return err == nil && !usable
	})
	_, _ = r.pool.Exec(r.ctx, "TRUNCATE filler")
	for range stopped {
		r.start()
	}
}

// writerFaults are the scenarios of what applications do.
func writerFaults() []*scenario {
	return []*scenario{
		{name: "tenant-joins", row: "new tenant, writer in flight", heals: true, run: tenantJoins},
		{
			name: "transactions", row: "huge and long transactions, 2PC, savepoints", wal: 256 << 20,
			server: map[string]string{"max_prepared_transactions": "20", "logical_decoding_work_mem": "64kB"},
			writer: func(_ *faultRun, w *faultWriter) { w.twoFold, w.open = "twofold", 4*w.open }, run: transactions,
		},
	}
}

// tenantJoins makes a schema a tenant while a transaction that writes to it is open. What it commits after that is delivered; what was committed before
// may be, or not.
func tenantJoins(r *faultRun) {
	p := r.lead()
	r.more(20)
	for n := range 1 + r.rnd.IntN(2) {
		name := []string{"tenant_three", "tenant_four"}[n]
		r.exec(r.t, "CREATE SCHEMA "+pgx.Identifier{name}.Sanitize())
		r.exec(r.t, "SELECT outbox_relay.add_tenant($1)", name)
		id := r.endpoint(r.t, name, 10)
		r.subscribe(r.t, name, id, "order.**", "{}")
		r.exec(r.t, "SELECT outbox_relay.remove_tenant($1)", name) // its tables stay
		w := newFaultWriter(r.o, r.pool, r.result.seed, 10+n, []string{name})
		blocks := r.rnd.IntN(2) == 0
		conn, err := r.pool.Acquire(r.ctx)
		require.NoError(r.t, err)
		defer conn.Release() // a second time does nothing
		_, err = conn.Exec(r.ctx, "BEGIN; SELECT pg_current_xact_id()")
		var list []*entry
		insert := func() {
			for range 3 {
				e := w.event(name, time.Now())
				w.o.begin(e)
				kept, fault := w.insert(r.ctx, conn, e)
				if err = errors.Join(err, fault); kept {
					list = append(list, e)
				}
			}
		}
		if blocks { // the tenant joins when the transaction is over
			insert()
			r.o.excuse(list)
		}
		added := make(chan error, 1)
		go func() {
			_, err := r.site.pool.Exec(r.ctx, "SELECT outbox_relay.add_tenant($1)", name)
			added <- err
		}()
		if !blocks {
			err = errors.Join(err, <-added)
			r.o.addRule(name, id, func(kind string, _ int) bool { return strings.HasPrefix(kind, "order.") })
			insert()
		} else {
			r.more(10)
		}
		r.fault()
		_, fault := conn.Exec(r.ctx, "COMMIT")
		conn.Release()
		end, unread := w.position(r.ctx)
		r.o.commit(list, end)
		if blocks {
			err = errors.Join(err, <-added)
			r.o.addRule(name, id, func(kind string, _ int) bool { return strings.HasPrefix(kind, "order.") })
		}
		if err = errors.Join(err, fault, unread); err != nil {
			r.violate("harness", "add tenant %s: %v", name, err)
			return
		}
		r.mu.Lock()
		r.tenants = append(slices.Clone(r.tenants), name)
		r.mu.Unlock()
		r.writers.Go(func() error { return r.write(r.ctx, w) })
		if r.rnd.IntN(2) == 0 {
			r.kill(p)
			p = r.start()
		}
		r.recover(10 * time.Second)
	}
	r.more(20)
}

// transactions commits one that is too large for the window, while all others commit in two phases.
func transactions(r *faultRun) {
	p := r.lead()
	r.more(20)
	w := newFaultWriter(r.o, r.pool, r.result.seed, 10, r.tenants[1:])
	w.least, w.size = 1000, 2000
	for {
		before := r.o.due()
		if err := w.transaction(r.ctx, r.stop); err != nil {
			r.violate("harness", "a huge transaction: %v", err)
		}
		if r.o.due() > before+500 {
			break // else it was rolled back
		}
	}
	r.more(r.rnd.IntN(300))
	if r.rnd.IntN(2) == 0 {
		r.kill(p)
		r.start()
	}
	r.recover(10 * time.Second)
	r.more(20)
}
