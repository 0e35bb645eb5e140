package desk

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// The overview is what an operator asks of a database first. Every statement reads a bounded number of rows, whatever has piled up, and ends after
// OverviewPatience all the same, or where a lock is in its way: what it would have told is a gap then, and the rest is there.

const (
	// OverviewPatience is what a person has for a statement.
	OverviewPatience     = 2 * time.Second
	overviewLockPatience = 200 * time.Millisecond
	// flowTenants and troubledTenants are how many tenants are looked into: their tables cost the server's planner half a millisecond each, and one that
	// is in trouble counts more than one that may be.
	flowTenants     = 500
	troubledTenants = 200
	// overviewShown is how many of what is worst are named.
	overviewShown = 5
)

// Names of the parts that a Gap is of.
const (
	PartSlots      = "slots"
	PartRelays     = "relays"
	PartCommits    = "commit_wait"
	PartDeliveries = "deliveries"
	PartQueue      = "retry_queue"
	PartEndpoints  = "endpoints"
	PartRecoveries = "recoveries"
)

// Overview is the state of a database's deliveries. Its JSON is what scripts can rely on: fields are added, not renamed.
type Overview struct {
	At         Time         `json:"at"` // by the server's clock, as all times
	Server     string       `json:"server_version"`
	Database   string       `json:"database"`
	Standby    bool         `json:"standby,omitempty"` // of slots and relays nothing is known then
	Slots      []Slot       `json:"slots"`             // one for each shard
	Relays     []Connected  `json:"relays"`
	Commits    *CommitWait  `json:"commit_wait"` // null: none that this role may know of waits
	Deliveries Flow         `json:"deliveries"`
	Queue      Queue        `json:"retry_queue"`
	Endpoints  Troubles     `json:"endpoints"`
	Letters    Letters      `json:"dead_letters"`
	Recoveries []Recovering `json:"recoveries"` // under way
	Gaps       []Gap        `json:"gaps"`       // what is not known, and why
}

// Gap is a part that could not be looked at, or not for all tenants.
type Gap struct {
	Part string `json:"part"`
	Why  string `json:"why"`
}

// Gap returns why a part is not known; empty: it is.
func (o *Overview) Gap(part string) string {
	var list []string
	for _, g := range o.Gaps {
		if g.Part == part {
			list = append(list, g.Why)
		}
	}
	return strings.Join(list, "; ")
}

func (o *Overview) gap(part, format string, args ...any) {
	o.Gaps = append(o.Gaps, Gap{part, fmt.Sprintf(format, args...)})
}

// first cuts a list of tenants, and says so.
func (o *Overview) first(part string, tenants []string, n int) []string {
	if len(tenants) <= n {
		return tenants
	}
	o.gap(part, "only %d of %d tenants were looked into", n, len(tenants))
	return tenants[:n]
}

// Count is a number that was not counted to its end: More says that there may be more.
type Count struct {
	N    int64 `json:"n"`
	More bool  `json:"or_more,omitempty"`
}

func (c *Count) add(n int64, more bool) {
	c.N += n
	c.More = c.More || more
}

const surveySQL = settings + `('statement_timeout', $1::text), ('lock_timeout', $2::text)) AS w (name, value)`

// Survey looks at a database: at its slots, in the order of the shards, and into the tenants. No statement takes longer than patience, nor are
// tenants looked into for longer. The connection stays the caller's, and its session as it is.
func Survey(ctx context.Context, conn *pgx.Conn, slots, tenants []string, patience time.Duration) (*Overview, error) {
	d := newDesk(conn, "", surveySQL, strconv.FormatInt(patience.Milliseconds(), 10), strconv.FormatInt(overviewLockPatience.Milliseconds(), 10))
	d.patience = patience
	o := &Overview{}
	const op = "look at the database"
	err := d.conn.QueryRow(ctx, `SELECT clock_timestamp(), current_setting('server_version'), current_database()::text, pg_is_in_recovery()`).
		Scan(&o.At, &o.Server, &o.Database, &o.Standby)
	if err != nil {
		return nil, d.fault(op, err)
	}
	d.now = o.At.Time
	if o.Standby {
		o.gap(PartSlots, onStandby)
	} else if err := d.surveySlots(ctx, o, slots); err != nil {
		return nil, d.fault(op, err)
	}
	for _, part := range []struct {
		name string
		look func(ctx context.Context) error
	}{
		{PartRelays, func(ctx context.Context) error { return d.surveyRelays(ctx, o) }},
		{PartCommits, func(ctx context.Context) error { return d.surveyCommits(ctx, o) }},
		{PartDeliveries, func(ctx context.Context) error { return d.surveyFlow(ctx, o, tenants) }},
		{PartQueue, func(ctx context.Context) error { return d.surveyQueue(ctx, o) }},
		{PartEndpoints, func(ctx context.Context) error { return d.surveyEndpoints(ctx, o, tenants) }},
		{PartRecoveries, func(ctx context.Context) error { return d.surveyRecoveries(ctx, o) }},
	} {
		if err := part.look(ctx); err != nil {
			if conn.IsClosed() || ctx.Err() != nil {
				return nil, d.fault(op, err)
			}
			o.gap(part.name, "%s", reasonOf(err))
		}
	}
	o.fill()
	return o, nil
}

// fill makes empty lists of those that are missing, as of parts that could not be looked at: scripts go through either.
func (o *Overview) fill() {
	o.Slots, o.Relays, o.Recoveries, o.Gaps = orEmpty(o.Slots), orEmpty(o.Relays), orEmpty(o.Recoveries), orEmpty(o.Gaps)
	o.Queue.Worst, o.Queue.Blocked = orEmpty(o.Queue.Worst), orEmpty(o.Queue.Blocked)
	o.Endpoints.Worst, o.Letters.Worst = orEmpty(o.Endpoints.Worst), orEmpty(o.Letters.Worst)
	if o.Deliveries.PerMinute == nil {
		o.Deliveries.PerMinute = make(map[string]Count)
	}
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

var errTooLong = errors.New("it took too long")

// reasonOf is an error of the server in few words.
func reasonOf(err error) string {
	server, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case !ok:
		return err.Error()
	case server.Code == "57014":
		return errTooLong.Error()
	case server.Code == "55P03":
		return "somebody has locked it"
	}
	return server.Message
}

// tenantsAtOnce is how many tenants a statement asks about.
const tenantsAtOnce = 100

// eachTenant runs a SELECT for each of the tenants, many in one statement. In its text {tenant} is the tenant's schema, and {name} its name as a
// value, of parameter $1. A tenant whose tables cannot be read becomes a gap. So do those that are left after as long as a statement may take: one that is
// locked is waited for in every batch that has it, until it is alone.
func eachTenant[T any](ctx context.Context, d *Desk, o *Overview, part string, tenants []string, sql string, scan pgx.RowToFunc[T], args ...any) ([]T, error) {
	var found []T
	left, until := 0, time.Now().Add(d.patience)
	var look func(batch []string) error
	look = func(batch []string) error {
		if time.Now().After(until) {
			left += len(batch)
			return nil
		}
		selects := make([]string, len(batch))
		for i, tenant := range batch {
			selects[i] = "(" + strings.NewReplacer("{tenant}", pgx.Identifier{tenant}.Sanitize(), "{name}", fmt.Sprintf("($1::text[])[%d]", i+1)).Replace(sql) + ")"
		}
		rows, err := d.conn.Query(ctx, strings.Join(selects, " UNION ALL "), append([]any{batch}, args...)...)
		if err == nil {
			var list []T
			if list, err = pgx.CollectRows(rows, scan); err == nil {
				found = append(found, list...)
				return nil
			}
		}
		server, ok := errors.AsType[*pgconn.PgError](err)
		switch {
		case !ok || server.Code == "57014":
			return err
		case len(batch) == 1:
			o.gap(part, "tenant %s: %s", batch[0], reasonOf(server))
			return nil
		}
		half := len(batch) / 2
		return errors.Join(look(batch[:half]), look(batch[half:]))
	}
	for batch := range slices.Chunk(tenants, tenantsAtOnce) {
		if err := look(batch); err != nil {
			return found, err
		}
	}
	if left > 0 {
		o.gap(part, "%d of %d tenants were left out: it took too long", left, len(tenants))
	}
	return found, nil
}

// Flow is the rate at which deliveries have come into being within the last ten seconds, and what has become by now of those of the last minute.
type Flow struct {
	PerSecond float64 `json:"per_second"`
	// Looked is how many of the last minute's were looked at: if there may be more, these are the latest of their tenants.
	Looked Count `json:"looked_at"`
	// PerMinute has the statuses of webhook_deliveries: success, retrying, pending, failed (dead letters), cancelled. They are of those looked at.
	PerMinute map[string]Count `json:"per_minute"`
	// Success is the share that was delivered, of those looked at and attempted. Nil: none was.
	Success *float64 `json:"success_share"`
}

const (
	flowWindow = time.Minute
	flowRecent = 10 * time.Second
	// flowRows is how many deliveries are looked at, over all tenants: where there are more, their rate is that of the latest.
	flowRows = 20_000
	// flowSkew is how far the clocks of relays, which the ids of deliveries are made of, may be from the server's.
	flowSkew = time.Hour
)

// The ids of deliveries rise with the time; those of a table that was adopted may be random.
const selectFlow = `SELECT {name}, s.delivery_status::text, count(*), count(*) FILTER (WHERE s.created_at >= $6::timestamptz), count(*) FILTER (WHERE s.tried), min(s.created_at)::timestamptz
FROM (SELECT d.delivery_status, d.created_at, ` + attempted + ` AS tried FROM {tenant}.webhook_deliveries d WHERE d.id >= $2::uuid AND d.id < $3::uuid ORDER BY d.id DESC LIMIT $4::int4) s
WHERE s.created_at >= $5::timestamptz GROUP BY 2`

func (d *Desk) surveyFlow(ctx context.Context, o *Overview, tenants []string) error {
	type part struct {
		Tenant, Status string
		N, Recent      int64
		Tried          int64
		Oldest         Time
	}
	tenants = o.first(PartDeliveries, tenants, flowTenants)
	most := int64(max(flowRows/max(len(tenants), 1), 50))
	list, err := eachTenant(ctx, d, o, PartDeliveries, tenants, selectFlow, pgx.RowToStructByPos[part],
		store.FirstID(d.now.Add(-flowSkew)), store.FirstID(d.now.Add(flowSkew)), most, d.now.Add(-flowWindow), d.now.Add(-flowRecent))
	if err != nil {
		return err
	}
	rows, span := make(map[string]int64), make(map[string]time.Duration)
	for _, p := range list {
		rows[p.Tenant] += p.N
		span[p.Tenant] = max(span[p.Tenant], d.now.Sub(p.Oldest.Time), 50*time.Millisecond)
	}
	sums, tried, all, looked := make(map[string]int64), int64(0), 0., Count{}
	for _, p := range list {
		recent, more := flowRecent, rows[p.Tenant] >= most
		if more { // these are the latest
			recent = min(recent, span[p.Tenant])
		}
		all += float64(p.Recent) / recent.Seconds()
		sums[p.Status] += p.N
		tried += p.Tried
		looked.add(p.N, more)
	}
	o.Deliveries = Flow{PerSecond: all, Looked: looked, PerMinute: make(map[string]Count)}
	for status, n := range sums {
		o.Deliveries.PerMinute[status] = Count{n, looked.More}
	}
	if tried > 0 {
		share := float64(sums["success"]) / float64(tried)
		o.Deliveries.Success = &share
	}
	return nil
}

// Recovering is a recovery that is under way, see Recover.
type Recovering struct {
	Tenant string `json:"tenant"`
	Recovery
}

// The latest are looked at: what was asked for before has ended, or is not worth a screen.
func (d *Desk) surveyRecoveries(ctx context.Context, o *Overview) (err error) {
	rows, err := d.conn.Query(ctx, `SELECT r.tenant, `+recoveryColumns+`
FROM (SELECT * FROM outbox_relay.recoveries r ORDER BY r.id DESC LIMIT 100) r WHERE r.done_at IS NULL AND r.error IS NULL ORDER BY r.id DESC LIMIT $1::int4`, overviewShown)
	if err != nil {
		return err
	}
	o.Recoveries, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Recovering])
	return err
}

// worst keeps the first few of what is in an order.
func worst[T any](list []T, order func(a, b *T) int) []T {
	slices.SortStableFunc(list, func(a, b T) int { return order(&a, &b) })
	return list[:min(len(list), overviewShown)]
}
