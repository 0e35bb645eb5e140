package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
)

const (
	walLimit = 64 << 20  // that a slot may keep while events of a few hundred bytes flow
	rssLimit = 200 << 20 // of a relay
)

// sampleSlot reads the confirmed position first: what it covers has been recorded by then. While something is to be queued by a heal, or a heal is called
// for, positions say nothing of outcomes: a mark in the table of tenants does.
const sampleSlot = `SELECT r.confirmed_flush_lsn::text, (pg_current_wal_insert_lsn() - r.restart_lsn)::int8, r.confirmed_flush_lsn > p.lsn,
  EXISTS (SELECT FROM outbox_relay.tenants t WHERE t.state <> 'active' OR t.backfill IS NOT NULL AND t.backfill_done_at IS NULL),
  (SELECT min(t.reason) FROM outbox_relay.tenants t WHERE t.state = 'suspended')
FROM pg_replication_slots r JOIN outbox_relay.progress p ON p.slot = r.slot_name WHERE r.slot_name = $1 AND r.restart_lsn IS NOT NULL`

// sample holds the confirmed position against the outcomes until ctx is done (I4), and watches the log and the memory that are kept (I6).
func (r *faultRun) sample(ctx context.Context) {
	tick := time.NewTicker(15 * time.Millisecond)
	defer tick.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.look(ctx)
		if n%20 == 0 {
			r.judgeLogs()
		}
		for _, p := range r.alive() {
			rss := peakMemory(p.cmd.Process.Pid)
			r.mu.Lock()
			r.result.rssPeak = max(r.result.rssPeak, rss)
			r.mu.Unlock()
		}
	}
}

// look takes one sample. A server that is away gives none.
func (r *faultRun) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var text string
	var kept int64
	var ahead, marked bool
	var suspended *string
	if r.pool.QueryRow(ctx, sampleSlot, r.slot).Scan(&text, &kept, &ahead, &marked, &suspended) != nil {
		return
	}
	if suspended != nil && !r.sc.suspends {
		r.violate("suspended", "a sound tenant is suspended: %s", *suspended)
	}
	confirmed, err := pglogrepl.ParseLSN(text)
	if err != nil {
		return
	}
	r.mu.Lock()
	r.result.walPeak = max(r.result.walPeak, kept)
	skip := r.sc.heals && (ahead || marked) || r.sc.audits || r.unsampled
	r.mu.Unlock()
	if r.sc.moves {
		r.lookAtShards(ctx)
		return
	}
	if skip {
		return
	}
	for _, tenant := range r.schemas() {
		if !r.account(ctx, tenant, confirmed) {
			return
		}
	}
	r.mu.Lock()
	r.result.samples++
	r.mu.Unlock()
}

// account holds a confirmed position against a tenant's outcomes, and returns false if there is no telling.
func (r *faultRun) account(ctx context.Context, tenant string, confirmed pglogrepl.LSN) bool {
	covered := r.o.covered(tenant, confirmed)
	if len(covered) == 0 {
		return true
	}
	found, err := pairsOf(ctx, r.pool, `SELECT webhook_endpoint_id, webhook_event_id FROM `+pgx.Identifier{tenant, "webhook_deliveries"}.Sanitize()+
		` WHERE relayed AND webhook_event_id = ANY($1)`, uuids(covered))
	if err != nil {
		return false
	}
	for p, e := range covered {
		if !found[p] {
			r.mu.Lock()
			r.result.ahead++
			r.mu.Unlock()
			r.violate("I4", "%s is confirmed, but event %s, whose commit ended by %s, has no outcome at %s", confirmed, e.id, e.end, p.endpoint)
		}
	}
	r.o.accounted(tenant, covered)
	return true
}

// covered lists what is owed below a position.
func (o *oracle) covered(tenant string, confirmed pglogrepl.LSN) map[pair]*entry {
	o.mu.Lock()
	defer o.mu.Unlock()
	list := make(map[pair]*entry)
	for p, e := range o.owed[tenant] {
		if e.end <= confirmed {
			list[p] = e
		}
	}
	return list
}

// accounted forgets what need not be looked at again.
func (o *oracle) accounted(tenant string, list map[pair]*entry) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for p := range list {
		delete(o.owed[tenant], p)
	}
}

// judge compares what has arrived with what was committed, once all is over.
func (r *faultRun) judge() {
	r.front.mu.Lock()
	log, bad := make([]*hit, 0, len(r.front.log)), r.front.bad
	for _, h := range r.front.log {
		as := *h // what a relay was killed over may end still
		log = append(log, &as)
	}
	r.front.mu.Unlock()
	r.o.mu.Lock()
	res := &r.result
	res.events, res.pairs, res.unclear = r.o.events, len(r.o.expected), r.o.unclear
	accepted, first := make(map[pair]int), make(map[pair]int)
	var lost pair
	for _, h := range log {
		_, due := r.o.expected[h.pair]
		e := r.o.entries[h.event]
		switch {
		case e != nil && e.phantom:
			if res.phantoms++; res.phantoms == 1 && !r.sc.phantoms {
				r.violate("I2", "event %s was sent, and is lost with the old primary", h.event)
			}
		case e == nil || !e.committed:
			if res.ghosts++; res.ghosts == 1 {
				r.violate("I2", "event %s was sent, but not committed", h.event)
			}
		case !due && !e.excused && !r.o.ignored[h.endpoint]:
			r.violate("I2", "event %s was sent to %s, which it does not match", h.event, h.endpoint)
		}
		if h.accepted && due {
			if accepted[h.pair]++; accepted[h.pair] == 1 {
				first[h.pair] = h.begun
			} else {
				first[h.pair] = min(first[h.pair], h.begun)
			}
		}
	}
	for p := range r.o.expected {
		if accepted[p] == 0 && r.complete {
			if res.lost++; res.lost == 1 {
				lost = p
			}
		}
	}
	r.o.mu.Unlock()
	if res.lost > 0 {
		r.violate("I1", "event %s never reached %s: %s", lost.event, lost.endpoint, r.whatIsKnown(lost))
	}
	excess := 0
	for p, n := range accepted {
		allowed := 0
		for _, i := range r.interruptions {
			if first[p] < i.moment && !i.recorded[p] {
				allowed++
			}
		}
		res.duplicates += n - 1
		res.allowed += allowed
		excess += max(n-1-allowed, 0)
	}
	if excess > r.slack {
		r.violate("I3", "%d deliveries were repeated that had been recorded, %d may be", excess, r.slack)
	}
	r.judgeLogs()
	var what string
	if res.inverted, what = r.o.inversions(log); res.inverted > 0 && !r.audited {
		r.violate("I5", "%d inversions, the first %s", res.inverted, what)
	}
	if len(bad) > 0 {
		r.violate("wire", "%s", bad[0])
	}
	if res.walPeak > walLimit && r.sc.wal == 0 || r.sc.wal > 0 && res.walPeak > r.sc.wal {
		r.violate("I6", "%d MiB of the log were kept", res.walPeak>>20)
	}
	if res.rssPeak > rssLimit {
		r.violate("I6", "a relay occupied %d MiB", res.rssPeak>>20)
	}
}

// whatIsKnown is what the database says of a delivery.
func (r *faultRun) whatIsKnown(p pair) (known string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), 5*time.Second)
	defer cancel()
	known = "nothing is recorded"
	for _, tenant := range r.schemas() {
		_ = r.pool.QueryRow(ctx, `SELECT concat_ws(' ', d.delivery_status, 'after', d.attempt_number, 'attempts:', d.error_message, '; in the queue:', q.due_at, q.leased_by, q.order_lsn)
			FROM `+pgx.Identifier{tenant, "webhook_deliveries"}.Sanitize()+` d LEFT JOIN outbox_relay.retry_queue q ON q.delivery_id = d.id
			WHERE d.webhook_event_id = $1 AND d.webhook_endpoint_id = $2`, p.event, p.endpoint).Scan(&known)
	}
	return known
}

// judgeLogs looks for what a relay says only when its nets had to catch something.
func (r *faultRun) judgeLogs() {
	heals := 0
	r.mu.Lock()
	relays, limit := slices.Clone(r.relays), 2*r.result.faults+3
	r.mu.Unlock()
	for _, p := range relays {
		said := p.said(r.t)
		for line := range strings.SplitSeq(said, "\n") {
			switch {
			case strings.Contains(line, `"msg":"audit: committed events had no delivery`) && r.sc.audits:
				r.mu.Lock()
				r.audited = true
				r.mu.Unlock()
			case strings.Contains(line, `"msg":"audit: committed events had no delivery`):
				r.violate("audit", "the audit had to find what the log had brought: %s", line)
			case strings.Contains(line, `"msg":"healing: events may have been missed"`):
				heals++
				if !r.sc.heals {
					r.violate("heal", "a sound slot was healed: %s", line)
				}
			case strings.Contains(line, "panic:"), strings.Contains(line, "DATA RACE"):
				r.violate("panic", "%s", line)
			}
		}
	}
	if heals > limit {
		r.violate("heal", "%d heals, more than %d", heals, limit)
	}
}

// String names the violations of a run.
func (f *faultResult) String() string {
	var b strings.Builder
	for _, v := range f.violations {
		fmt.Fprintf(&b, "\n  %s: %s", v.rule, v.text)
	}
	return fmt.Sprintf("%s, seed %d: %d faults, %d events, %d pairs, %d duplicates%s", f.scenario, f.seed, f.faults, f.events, f.pairs, f.duplicates, b.String())
}
