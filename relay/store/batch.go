package store

import (
	"bytes"
	"encoding/json"
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
		for len(outcomes) > 0 {
			args, n := arguments(outcomes, full)
			outcomes = outcomes[n:]
			list = append(list, statement{forTenant(sql, t.tenant), forTenant(often, t.tenant), append(args, more...)})
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

// rows is a chunk of outcomes by columns.
type rows struct {
	commons []common

	ids, events                              []outbox.UUID
	common                                   []int32 // which of commons each row has, from one
	signatures                               []string
	ages, ends                               []time.Duration   // since the attempt began and since it ended
	tooks                                    []int32           // milliseconds
	headers                                  []json.RawMessage // null, as what the slice is too short for: those of the content type alone
	states, bodies, classes, codes, messages []string
	answers                                  []string
	dues                                     []*time.Duration
	leased, parks                            []bool
	replays, ns                              []int32
	keys                                     []outbox.UUID // null where no order is kept
	lsns                                     []string
}

// common is what rows have in common with others.
type common struct {
	endpoint         outbox.UUID
	url, method      string
	contentType      string
	attempts, status int32
}

// maxCommons bounds them in a statement: to take one of the middle is to walk over those before it.
const maxCommons = 128

// arguments returns the parameters for attemptRows, or with full those for outcomeRows, and of how many outcomes: those that come first and fit into one statement.
func arguments(outcomes []*Outcome, full bool) (args []any, n int) {
	var (
		r       rows
		now     = time.Now()
		size    int
		message *delivery.Message // the one that brought headers last
		headers json.RawMessage
	)
	r.grow(len(outcomes), full)
	for _, o := range outcomes {
		d := o.Delivery
		if size += len(d.Message.Body); full && size > chunkBytes && n > 0 {
			break
		}
		if !r.note(o) {
			break
		}
		n++
		r.ids, r.events = append(r.ids, d.ID), append(r.events, d.EventID)
		if len(d.Message.Header) > 0 {
			if message != d.Message {
				message, headers = d.Message, headerJSON(d.Message)
			}
			r.headers = append(append(r.headers, make([]json.RawMessage, n-1-len(r.headers))...), headers)
		}
		r.addResult(o, now)
		if full {
			r.addOutcome(o)
		}
	}
	args = append(r.commonArguments(), r.ids, r.events, r.common, r.headers, r.signatures, r.ages, r.ends, r.tooks)
	if full {
		args = append(args, r.states, r.bodies, r.classes, r.codes, r.messages, r.answers, r.dues, r.leased,
			r.replays, r.keys, r.lsns, r.ns, r.parks)
	}
	return args, n
}

// note keeps what the row of an outcome has in common with others, and is false if there is no room for it. It begins to look at what the last row had and
// goes on to what was noted after that: outcomes come by (event, endpoint), and most events go to the same endpoints.
func (r *rows) note(o *Outcome) bool {
	d := o.Delivery
	c := common{
		endpoint: d.EndpointID, url: d.URL, method: d.Method, contentType: d.Message.ContentType,
		attempts: int32(max(d.Attempts, 1)), status: int32(o.Result.Status), //nolint:gosec // a handful; three digits
	}
	at := 0
	if n := len(r.common); n > 0 {
		at = int(r.common[n-1]) - 1
	}
	for range r.commons {
		if r.commons[at] == c {
			r.common = append(r.common, int32(at+1))
			return true
		}
		if at++; at == len(r.commons) {
			at = 0
		}
	}
	if len(r.commons) == maxCommons {
		return false
	}
	r.commons = append(r.commons, c)
	r.common = append(r.common, int32(len(r.commons))) //nolint:gosec // at most maxCommons
	return true
}

// commonArguments returns the parameters for commonColumns.
func (r *rows) commonArguments() []any {
	n := len(r.commons)
	endpoints, attempts, statuses := make([]outbox.UUID, n), make([]int32, n), make([]int32, n)
	urls, methods, headers := make([]string, n), make([]string, n), make([]json.RawMessage, n)
	for i := range r.commons {
		c := &r.commons[i]
		endpoints[i], attempts[i], statuses[i] = c.endpoint, c.attempts, c.status
		urls[i], methods[i], headers[i] = text(c.url), short(c.method, maxMethod), headerJSON(&delivery.Message{ContentType: c.contentType})
	}
	return []any{endpoints, attempts, urls, methods, headers, statuses}
}

func headerJSON(m *delivery.Message) json.RawMessage {
	return json.RawMessage(text(string(m.HeaderJSON())))
}

func (r *rows) grow(n int, full bool) {
	r.ids, r.events = make([]outbox.UUID, 0, n), make([]outbox.UUID, 0, n)
	r.common, r.tooks, r.signatures = make([]int32, 0, n), make([]int32, 0, n), make([]string, 0, n)
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
