package desk

import (
	"cmp"
	"context"
	"math"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// Troubles are the endpoints that do not take deliveries as they should. Of a tenant, a hundred are looked at.
type Troubles struct {
	Failing  Count     `json:"failing"`       // every attempt has failed since some time
	Open     Count     `json:"breakers_open"` // of these and others, those that are left alone for a while
	Disabled Count     `json:"disabled"`      // by the relay
	Paused   Count     `json:"paused"`
	Worst    []Trouble `json:"worst"` // failing, those that have failed the longest first; then disabled, the latest first; then paused
}

// Trouble is an endpoint in trouble, or with dead letters.
type Trouble struct {
	Tenant string      `json:"tenant"`
	ID     outbox.UUID `json:"id"`
	Name   string      `json:"name,omitempty"`
	State  State       `json:"status"`
}

// Letters are the open dead letters: those of a hundred endpoints of each tenant, up to three hundred of each.
type Letters struct {
	Open     Count         `json:"open"`
	LastHour Count         `json:"last_hour"`
	LastAt   Time          `json:"last_at,omitzero"`
	Worst    []DeadLetters `json:"worst"` // endpoints with most of them
}

// DeadLetters are those of an endpoint.
type DeadLetters struct {
	Tenant     string      `json:"tenant"`
	EndpointID outbox.UUID `json:"endpoint_id"`
	Name       string      `json:"name,omitempty"`
	Open       Count       `json:"open"`
	LastHour   Count       `json:"last_hour"`
	LastAt     Time        `json:"last_at"`
	LastCode   string      `json:"last_error_code,omitempty"`
}

const (
	troublesPerTenant  = 100
	lettersPerEndpoint = 300
)

// The index of dead letters is on endpoint and time, so that the latest one of an endpoint costs a look. Only those in trouble have theirs counted.
const selectTroubles = `
SELECT {name}, x.id, x.name, x.state, x.since, x.reason, x.failing_since, x.open_until, x.last_error, x.tries, l.n, l.open, l.recent, l.last_at, coalesce(l.code, '')
FROM (SELECT y.* FROM (SELECT e.id, coalesce(e.name, '')::text, ` + stateColumns + `,
      (SELECT l.dead_at FROM {tenant}.webhook_dead_letters l WHERE l.webhook_endpoint_id = e.id ORDER BY l.dead_at DESC LIMIT 1)
    FROM {tenant}.webhook_endpoints e` + healthJoin + `{name}
  ) y (id, name, state, since, reason, failing_since, open_until, last_error, tries, last_dead)
  WHERE y.state IN ('disabled', 'paused') OR y.failing_since IS NOT NULL OR y.open_until > now() OR y.last_dead IS NOT NULL
  ORDER BY y.failing_since NULLS LAST, y.last_dead DESC NULLS LAST, y.id LIMIT $2::int4) x
CROSS JOIN LATERAL (SELECT count(*) AS n, count(*) FILTER (WHERE l.open) AS open, count(*) FILTER (WHERE l.open AND l.dead_at > now() - interval '1 hour') AS recent,
    max(l.dead_at) FILTER (WHERE l.open) AS last_at, (array_agg(l.code ORDER BY l.dead_at DESC) FILTER (WHERE l.open))[1] AS code
  FROM (SELECT ` + open + ` AS open, l.dead_at, l.last_error_code::text AS code FROM {tenant}.webhook_dead_letters l
    WHERE l.webhook_endpoint_id = x.id ORDER BY l.dead_at DESC LIMIT $3::int4) l) l`

func (d *Desk) surveyEndpoints(ctx context.Context, o *Overview, tenants []string) error {
	type row struct {
		Trouble
		looked int64
		dead   DeadLetters
	}
	tenants, err := d.troubledFirst(ctx, tenants)
	if err != nil {
		return err
	}
	tenants = o.first(PartEndpoints, tenants, troubledTenants)
	list, err := eachTenant(ctx, d, o, PartEndpoints, tenants, selectTroubles, func(r pgx.CollectableRow) (x row, err error) {
		err = r.Scan(slices.Concat([]any{&x.Tenant, &x.ID, &x.Name}, x.State.fields(),
			[]any{&x.looked, &x.dead.Open.N, &x.dead.LastHour.N, &x.dead.LastAt, &x.dead.LastCode})...)
		return x, err
	}, troublesPerTenant, lettersPerEndpoint)
	of := make(map[string]int)
	for i := range list {
		of[list[i].Tenant]++
	}
	t, l := &o.Endpoints, &o.Letters
	for i := range list {
		x := &list[i]
		more := of[x.Tenant] >= troublesPerTenant
		one := func(yes bool) (n int64) {
			if yes {
				n = 1
			}
			return n
		}
		s := &x.State
		failing, shut := s.State == "active" && !s.FailingSince.IsZero(), s.State == "active" && s.OpenUntil.After(d.now)
		t.Failing.add(one(failing), more)
		t.Open.add(one(shut), more)
		t.Disabled.add(one(s.State == "disabled"), more)
		t.Paused.add(one(s.State == "paused"), more)
		if failing || shut || s.State == "disabled" || s.State == "paused" {
			t.Worst = append(t.Worst, x.Trouble)
		}
		all := x.looked >= lettersPerEndpoint
		x.dead.Open.More, x.dead.LastHour.More = all, all && x.dead.LastHour.N == x.dead.Open.N
		l.Open.add(x.dead.Open.N, all || more)
		l.LastHour.add(x.dead.LastHour.N, x.dead.LastHour.More || more)
		if x.dead.Open.N > 0 {
			x.dead.Tenant, x.dead.EndpointID, x.dead.Name = x.Tenant, x.ID, x.Name
			l.Worst = append(l.Worst, x.dead)
			if x.dead.LastAt.After(l.LastAt.Time) {
				l.LastAt = x.dead.LastAt
			}
		}
	}
	t.Worst = worst(t.Worst, compareTroubles)
	l.Worst = worst(l.Worst, func(a, b *DeadLetters) int { return cmp.Compare(b.Open.N, a.Open.N) })
	return err
}

// troubledFirst puts the tenants with the most failing endpoints first, if not all can be looked into.
func (d *Desk) troubledFirst(ctx context.Context, tenants []string) ([]string, error) {
	if len(tenants) <= troubledTenants {
		return tenants, nil
	}
	rows, err := d.conn.Query(ctx, `
SELECT h.tenant FROM (SELECT h.tenant FROM outbox_relay.endpoint_health h LIMIT $2::int4) h WHERE h.tenant = ANY($1::text[]) GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT $3::int4`,
		tenants, store.QueueCountLimit, troubledTenants)
	if err != nil {
		return nil, err
	}
	troubled, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	rest := slices.DeleteFunc(slices.Clone(tenants), func(t string) bool { return slices.Contains(troubled, t) })
	return append(troubled, rest...), nil
}

// compareTroubles orders failing endpoints before disabled ones, and these before paused ones.
func compareTroubles(a, b *Trouble) int {
	rank := func(t *Trouble) int { return slices.Index([]string{"active", "disabled", "paused"}, t.State.State) }
	if order := cmp.Compare(rank(a), rank(b)); order != 0 {
		return order
	}
	if a.State.State == "active" {
		since := func(t *Trouble) int64 { // one that only has an open breaker stands behind
			if t.State.FailingSince.IsZero() {
				return math.MaxInt64
			}
			return t.State.FailingSince.UnixNano()
		}
		return cmp.Compare(since(a), since(b))
	}
	return b.State.Since.Compare(a.State.Since.Time)
}
