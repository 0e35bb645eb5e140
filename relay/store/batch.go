package store

import (
	"bytes"
	"slices"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// chunkBytes is about how much of bodies goes into one statement: PostgreSQL refuses parameters of more than 1 GiB.
const chunkBytes = 32 << 20

// Lengths of columns, in characters.
const (
	maxSignature = 255
	maxMethod    = 10
	maxClass     = 32
	maxCode      = 100
)

// What error_code says of outcomes without an attempt; the reason is in error_message.
const (
	codeDeferred  = "deferred"
	codeCancelled = "cancelled"
)

// statement is one statement of a batch.
type statement struct {
	sql   string
	often string // of those that many batches have: what is prepared, and takes the place of sql from then on
	args  []any
}

// tenantBatch is the part of a batch that belongs to one tenant.
type tenantBatch struct {
	tenant   string
	outcomes []*Outcome // by (event, endpoint), those of one delivery in the order in which they came
}

// split sorts a batch into tenants by name. Outcomes of the same delivery keep their order.
func split(outcomes []Outcome) []tenantBatch {
	all := make([]*Outcome, len(outcomes))
	for i := range outcomes {
		all[i] = &outcomes[i]
	}
	slices.SortStableFunc(all, func(a, b *Outcome) int {
		if a.Delivery.Tenant != b.Delivery.Tenant {
			return strings.Compare(a.Delivery.Tenant, b.Delivery.Tenant)
		}
		if c := bytes.Compare(a.Delivery.EventID[:], b.Delivery.EventID[:]); c != 0 {
			return c
		}
		return bytes.Compare(a.Delivery.EndpointID[:], b.Delivery.EndpointID[:])
	})
	var batches []tenantBatch
	for len(all) > 0 {
		n := slices.IndexFunc(all, func(o *Outcome) bool { return o.Delivery.Tenant != all[0].Delivery.Tenant })
		if n < 0 {
			n = len(all)
		}
		batches = append(batches, tenantBatch{tenant: all[0].Delivery.Tenant, outcomes: all[:n]})
		all = all[n:]
	}
	return batches
}

// statements returns what writes the batch: inserts before updates, since a delivery may be handed to the queue and end in one batch. again: some of
// it may have been written before.
func (t *tenantBatch) statements(owner outbox.UUID, again bool) []statement {
	var delivered, first, won, later []*Outcome
	for i, o := range t.outcomes {
		follows := i > 0 && t.outcomes[i-1].Delivery.ID == o.Delivery.ID
		last := i+1 == len(t.outcomes) || t.outcomes[i+1].Delivery.ID != o.Delivery.ID
		switch hasRow := follows || o.Delivery.Queued && o.Status != Leased; {
		case !hasRow && o.Status == Success:
			delivered = append(delivered, o)
		case !hasRow:
			first = append(first, o)
		case !last:
			// The one after it has the last word.
		case o.Status == Success:
			won = append(won, o)
		default:
			later = append(later, o)
		}
	}

	var list []statement
	add := func(sql, often string, outcomes []*Outcome, full bool, more ...any) {
		if failpoint.Planted(failpoint.NoOnConflict) {
			sql = strings.Replace(sql, unlessThere, "", 1)
		}
		for chunk := range chunks(outcomes, full) {
			list = append(list, statement{forTenant(sql, t.tenant), forTenant(often, t.tenant), append(arguments(chunk, full), more...)})
		}
	}
	unlooked := insertDelivered
	if again {
		unlooked = ""
	}
	add(insertDelivered+unlessThere, unlooked, delivered, false)
	add(insertOutcomes, "", first, true, owner, t.tenant)
	add(updateDelivered, updateDelivered, won, false, t.tenant)
	add(updateOutcomes, "", later, true, owner, t.tenant)
	list = append(list, t.takeUps(first)...)
	list = append(list, arrange(t.tenant, first, won, later)...)
	if ids, reasons := t.disabled(); len(ids) > 0 {
		list = append(list, statement{sql: forTenant(disableEndpoints, t.tenant), args: []any{ids, reasons}})
	}
	return list
}

// disabled lists the endpoints to disable, each once, and why.
func (t *tenantBatch) disabled() (ids []outbox.UUID, reasons []string) {
	for _, o := range t.outcomes {
		if !o.Disable || slices.Contains(ids, o.Delivery.EndpointID) {
			continue
		}
		reason := o.Reason
		if reason == "" {
			reason = string(o.Result.Class)
		}
		ids, reasons = append(ids, o.Delivery.EndpointID), append(reasons, text(reason))
	}
	return ids, reasons
}

// chunks yields outcomes in parts whose bodies go into one statement.
func chunks(outcomes []*Outcome, bodies bool) func(yield func([]*Outcome) bool) {
	return func(yield func([]*Outcome) bool) {
		from, size := 0, 0
		for i, o := range outcomes {
			if bodies {
				size += len(o.Delivery.Message.Body)
			}
			if size > chunkBytes && i > from {
				if !yield(outcomes[from:i]) {
					return
				}
				from, size = i, len(o.Delivery.Message.Body)
			}
		}
		if from < len(outcomes) {
			yield(outcomes[from:])
		}
	}
}

// rows is a chunk of outcomes by columns.
type rows struct {
	ids, events, endpoints                            []outbox.UUID
	attempts, statuses                                []int32
	urls, methods, signatures                         []string
	headers                                           []jsonb
	ages, ends                                        []time.Duration // since the attempt began, and since it ended
	tooks                                             []int32         // milliseconds
	states, bodies, classes, codes, messages, answers []string
	dues                                              []*time.Duration
	leased, parks                                     []bool
	replays, ns                                       []int32
	keys                                              []outbox.UUID // null where no order is kept
	lsns                                              []string
}

// arguments returns the parameters for attemptRows, or with full those for outcomeRows.
func arguments(outcomes []*Outcome, full bool) []any {
	var (
		r       rows
		now     = time.Now()
		message *delivery.Message // with these headers: most events have none of their own
		headers jsonb
	)
	r.grow(len(outcomes), full)
	for _, o := range outcomes {
		d := o.Delivery
		if message == nil || !message.SameHeader(d.Message) {
			message, headers = d.Message, jsonb(text(string(d.Message.HeaderJSON())))
		}
		r.ids, r.events, r.endpoints = append(r.ids, d.ID), append(r.events, d.EventID), append(r.endpoints, d.EndpointID)
		r.attempts = append(r.attempts, int32(max(d.Attempts, 1))) //nolint:gosec // a handful
		r.urls, r.methods = append(r.urls, text(d.URL)), append(r.methods, short(d.Method, maxMethod))
		r.headers = append(r.headers, headers)
		r.addResult(o, now)
		if full {
			r.addOutcome(o)
		}
	}
	args := []any{r.ids, given(r.events), once(r.endpoints), once(r.attempts), once(r.urls), once(r.methods), once(r.headers), once(r.statuses), r.signatures, r.ages, r.ends, r.tooks}
	if full {
		args = append(args, r.states, r.bodies, r.classes, r.codes, r.messages, r.answers, r.dues, r.leased,
			r.replays, r.keys, r.lsns, r.ns, r.parks)
	}
	return args
}

// once returns the first value of a column that has only that, and any other column as it is.
func once[T comparable](column []T) []T {
	for _, v := range column {
		if v != column[0] {
			return column
		}
	}
	return column[:min(1, len(column))]
}

func (r *rows) grow(n int, full bool) {
	for _, column := range []*[]outbox.UUID{&r.ids, &r.events, &r.endpoints} {
		*column = make([]outbox.UUID, 0, n)
	}
	for _, column := range []*[]int32{&r.attempts, &r.statuses, &r.tooks} {
		*column = make([]int32, 0, n)
	}
	for _, column := range []*[]string{&r.urls, &r.methods, &r.signatures} {
		*column = make([]string, 0, n)
	}
	r.headers = make([]jsonb, 0, n)
	r.ages, r.ends = make([]time.Duration, 0, n), make([]time.Duration, 0, n)
	if !full {
		return
	}
	for _, column := range []*[]string{&r.states, &r.bodies, &r.classes, &r.codes, &r.messages, &r.answers} {
		*column = make([]string, 0, n)
	}
	r.dues, r.leased, r.parks = make([]*time.Duration, 0, n), make([]bool, 0, n), make([]bool, 0, n)
	r.replays, r.ns = make([]int32, 0, n), make([]int32, 0, n)
	r.keys, r.lsns = make([]outbox.UUID, 0, n), make([]string, 0, n)
}

// addResult adds what the attempt led to, or nothing of the kind if there was none.
func (r *rows) addResult(o *Outcome, now time.Time) {
	var age time.Duration
	if o.Attempted {
		age = now.Sub(o.Result.Started)
	}
	r.signatures = append(r.signatures, short(o.Result.Signature, maxSignature))
	r.statuses = append(r.statuses, int32(o.Result.Status)) //nolint:gosec // three digits
	r.ages, r.ends = append(r.ages, age), append(r.ends, age-o.Result.Duration)
	r.tooks = append(r.tooks, int32(o.Result.Duration.Milliseconds())) //nolint:gosec // some weeks
}

// addOutcome adds what is kept of an outcome other than a success at once.
func (r *rows) addOutcome(o *Outcome) {
	state, due := "", &o.Due
	class, code, message := "", codeDeferred, o.Reason
	switch o.Status {
	case Pending, Leased:
		state = "pending"
		if o.Delivery.Attempts > 0 {
			state = "retrying"
		}
	case Retrying:
		state = "retrying"
	case Failed:
		state, code, due = "failed", o.Code, nil
	case Cancelled:
		state, code, due = "cancelled", codeCancelled, nil
	case Success:
		// Has statements of its own.
	}
	if o.Attempted {
		class, message = string(o.Result.Class), o.Result.Err
		code = class
	}
	r.states, r.dues, r.leased = append(r.states, state), append(r.dues, due), append(r.leased, o.Status == Leased)
	r.bodies = append(r.bodies, text(string(o.Delivery.Message.Body)))
	r.classes, r.codes = append(r.classes, short(class, maxClass)), append(r.codes, short(code, maxCode))
	r.messages, r.answers = append(r.messages, text(message)), append(r.answers, text(string(o.Result.Body)))
	place := &o.Delivery.Order
	r.keys, r.lsns, r.ns = append(r.keys, place.Key), append(r.lsns, place.LSN.String()), append(r.ns, place.N)
	r.replays, r.parks = append(r.replays, o.Delivery.Replay), append(r.parks, o.Park)
}

// text makes of whatever came over the network something that PostgreSQL can keep as text.
func text(s string) string {
	if strings.IndexByte(s, 0) >= 0 {
		s = strings.ReplaceAll(s, "\x00", "\uFFFD")
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// short is text cut to a column's length.
func short(s string, limit int) string {
	s = text(s)
	if len(s) <= limit {
		return s
	}
	n := 0
	for i := range s {
		if n++; n > limit {
			return s[:i]
		}
	}
	return s
}
