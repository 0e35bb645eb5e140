package relay

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

const (
	// verifyAtOnce is how many receivers are asked at once, verifyOfTenant how many of them of one tenant, and verifyRate how many a second. One that does not
	// answer takes its timeout: a tenant whose receivers are all dead leaves most of the room to the others.
	verifyAtOnce   = 64
	verifyOfTenant = 4
	verifyRate     = 20
	// verifySettles is how long a verification may take to come back by the log.
	verifySettles = 10 * time.Second
	// verifyPutOff is for what could not be asked or written for want of something of our own or of the tenant's tables.
	verifyPutOff = time.Minute
)

// attest notes which URL is_verified is about: that which an endpoint had when it was set. before is the row before, zero if there was none.
func attest(before, now *delivery.EndpointRow) {
	switch {
	case !now.Verified:
		now.VerifiedFor = nil
	case !before.Verified:
		now.VerifiedFor = delivery.HashURL(now.URL)
	}
}

// attestLoaded notes it for the rows that a session begins with. Where nothing is known of one, somebody else has verified it, with the URL that it has.
func attestLoaded(rows []delivery.EndpointRow) {
	for i := range rows {
		if r := &rows[i]; r.VerifiedFor == nil {
			attest(&delivery.EndpointRow{}, r)
		}
	}
}

// A verifier asks the receivers of endpoints that are not verified whether they want what is sent there. Only the leader has one, beside its stream.
//
// It goes by the routing tables. An endpoint whose URL has changed is not verified there from that place of the log on, whatever its row says; the verifier
// makes the row say so, too, and asks at the new URL.
//
//	routing tables ──scan──► checks ──start──► workers ──► HEAD or challenge ──► webhook_endpoints, endpoint_verification
type verifier struct {
	s       *session
	group   sync.WaitGroup
	writing chan struct{} // who has it may write: several waiting for locks would be as many connections that others lack

	mu      sync.Mutex // of what follows, between look and the workers
	parties map[string]*verifyParty
	running int
	second  time.Time
	begun   int    // since then
	teller  teller // of what was put off
}

// verifyParty is a tenant with endpoints to be verified.
type verifyParty struct {
	tenant  *tenant
	scanned bool
	seen    version // of the routing table, at the scan
	known   map[outbox.UUID]*attestation
	checks  []*check
	wake    time.Time // none of checks is due before
	running int
	last    time.Time // that one was begun
}

// attestation is what is known of the verification of an endpoint.
type attestation struct {
	verifiedFor, triedFor []byte
	tries                 int
	again                 bool
	due                   time.Time // of the next try, if there is one
	hold                  time.Time // nothing is done before
	running               bool
}

// check is an endpoint that something is to be done about.
type check struct {
	ep    *delivery.Endpoint // nil: its row is invalid
	id    outbox.UUID
	url   string
	hash  []byte
	anew  bool // what is known is about another URL, or somebody has taken it back
	ask   bool // it takes deliveries
	party *verifyParty
	of    *attestation
}

func newVerifier(s *session) *verifier {
	return &verifier{s: s, writing: make(chan struct{}, 1), parties: make(map[string]*verifyParty)}
}

// look follows the routing tables and starts what is due.
func (v *verifier) look(ctx context.Context) error {
	if err := v.meet(ctx); err != nil {
		return err
	}
	var faults error
	for name, p := range v.parties {
		now := p.tenant.version()
		if p.scanned && p.seen == now {
			continue
		}
		if err := v.scan(ctx, name, p); err != nil {
			faults = errors.Join(faults, err)
			continue
		}
		p.scanned, p.seen = true, now
	}
	v.start(ctx)
	return faults
}

// meet brings the parties into line with the tenants, whose tables may have been loaded anew.
func (v *verifier) meet(ctx context.Context) error {
	now := time.Now()
	tenants := make(map[string]*tenant)
	var fresh []string
	for _, t := range v.s.served() {
		tenants[t.schema] = t
		if p := v.parties[t.schema]; p == nil || p.tenant != t {
			fresh = append(fresh, t.schema)
		}
	}
	var list []store.Verification
	if len(fresh) > 0 {
		var err error
		if list, err = v.s.store.Verifications(ctx, fresh); err != nil {
			return err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for name := range v.parties {
		if tenants[name] == nil {
			delete(v.parties, name)
		}
	}
	for _, name := range fresh {
		v.parties[name] = &verifyParty{tenant: tenants[name], known: make(map[outbox.UUID]*attestation)}
	}
	for i := range list {
		x := &list[i]
		v.parties[x.Tenant].known[x.ID] = &attestation{
			verifiedFor: x.VerifiedFor, triedFor: x.TriedFor, tries: x.Tries, again: x.Again, due: now.Add(x.Next),
		}
	}
	return nil
}

// scan finds out what is to be done about a tenant's endpoints, and notes which URLs others have verified.
func (v *verifier) scan(ctx context.Context, name string, p *verifyParty) error {
	var checks []*check
	var vouched, gone []outbox.UUID
	var hashes [][]byte
	there := make(map[outbox.UUID]bool)

	p.tenant.mu.Lock()
	v.mu.Lock()
	for row, ep := range p.tenant.table.Endpoints() {
		there[row.ID] = true
		c := &check{ep: ep, id: row.ID, url: row.URL, hash: delivery.HashURL(row.URL), party: p, of: p.known[row.ID]}
		if c.of == nil {
			c.of = &attestation{}
		}
		switch {
		case row.Verified && bytes.Equal(row.VerifiedFor, c.hash):
			if !bytes.Equal(c.of.verifiedFor, c.hash) {
				vouched, hashes = append(vouched, row.ID), append(hashes, c.hash)
			}
			continue
		case row.Verified:
			c.anew = true
		case c.of.verifiedFor != nil:
			c.anew = true
		}
		if c.ask = ep != nil && row.Active && !row.Paused; c.ask || c.anew {
			p.known[row.ID] = c.of
			checks = append(checks, c)
		}
	}
	for id, a := range p.known {
		if !there[id] && !a.running {
			gone = append(gone, id)
		}
	}
	v.mu.Unlock()
	p.tenant.mu.Unlock()

	if len(vouched) > 0 {
		if err := v.s.store.NoteVerified(ctx, name, vouched, hashes); err != nil {
			return err
		}
	}
	if len(gone) > 0 {
		if err := v.s.store.ForgetVerifications(ctx, name, gone); err != nil {
			return err
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, id := range vouched {
		p.known[id] = &attestation{verifiedFor: hashes[i]}
	}
	for _, id := range gone {
		delete(p.known, id)
	}
	p.checks, p.wake = checks, time.Time{}
	return nil
}

// start has workers do what is due, those of the tenants first that have waited the longest.
func (v *verifier) start(ctx context.Context) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	if now.Sub(v.second) >= time.Second {
		v.second, v.begun = now, 0
	}
	due := make(map[*verifyParty][]*check)
	for _, p := range v.parties {
		if now.Before(p.wake) || !p.tenant.is(store.StateActive) {
			continue
		}
		if list := p.sort(now); len(list) > 0 {
			due[p] = list
		}
	}
	for v.begun < verifyRate && v.running < verifyAtOnce {
		var next *verifyParty
		for p := range due {
			if p.running < verifyOfTenant && (next == nil || p.last.Before(next.last)) {
				next = p
			}
		}
		if next == nil {
			return
		}
		c := due[next][0]
		if due[next] = due[next][1:]; len(due[next]) == 0 {
			delete(due, next)
		}
		next.last, c.of.running = time.Now(), true
		next.running++
		v.running++
		v.begun++
		v.group.Go(func() { v.work(ctx, c) })
	}
}

// sort drops the checks of which nothing is left to do and returns those that are due.
func (p *verifyParty) sort(now time.Time) (due []*check) {
	left := p.checks[:0]
	p.wake = now.Add(time.Hour)
	for _, c := range p.checks {
		at := c.of.hold
		switch tried := bytes.Equal(c.of.triedFor, c.hash); {
		case c.of.running:
			at = now.Add(time.Second)
		case c.anew:
		case !c.ask:
			continue
		case !tried:
		case !c.of.again:
			continue
		case c.of.due.After(at):
			at = c.of.due
		}
		left = append(left, c)
		if at.After(now) {
			if at.Before(p.wake) {
				p.wake = at
			}
			continue
		}
		due = append(due, c)
	}
	clear(p.checks[len(left):])
	p.checks = left
	if len(due) > 0 { // there may be no room for all of them
		p.wake = time.Time{}
	}
	return due
}

// work does one check, and has the next one begun.
func (v *verifier) work(ctx context.Context, c *check) {
	known, err := v.do(ctx, c)
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		now := time.Now()
		known.hold = now.Add(verifyPutOff)
		if v.teller.due(now, verifyPutOff) { // it may be the same for many
			v.s.log.Warn("endpoints cannot be verified now, trying again", "tenant", c.party.tenant.schema, "endpoint", c.id, "again_in", verifyPutOff, "error", err)
		}
	}
	*c.of = known // the copies of running are false
	c.party.running--
	c.party.wake = time.Time{}
	v.running--
	signal(v.s.verify)
}

// do makes the endpoint's row say that it is not verified, if that is to be said, asks its receiver, and writes down what came of it. It returns what is
// known then.
func (v *verifier) do(ctx context.Context, c *check) (known attestation, err error) {
	s := v.s
	e := store.Endpoint{Tenant: c.party.tenant.schema, ID: c.id}
	v.mu.Lock()
	known = *c.of
	v.mu.Unlock()
	known.running = false
	if c.anew {
		if err := v.write(ctx, func() error { return s.store.Unverify(ctx, e, c.url) }); err != nil {
			return known, err
		}
		known = attestation{hold: time.Now().Add(verifySettles)}
		v.mu.Lock()
		c.anew = false
		v.mu.Unlock()
	}
	if !c.ask {
		return known, nil
	}
	if !bytes.Equal(known.triedFor, c.hash) {
		known.tries = 0
	}
	got := s.client.Verify(ctx, c.ep, s.cfg().Verification.Method, s.cfg().Delivery.Source)
	switch {
	case ctx.Err() != nil, got.Result.Class == delivery.ClassCanceled:
		return known, ctx.Err()
	case got.Result.Class == delivery.ClassLocal:
		return known, errors.New(got.Reason)
	case got.OK:
		return v.verified(ctx, c, e, known)
	}
	return v.refused(ctx, c, e, known, &got)
}

func (v *verifier) verified(ctx context.Context, c *check, e store.Endpoint, known attestation) (attestation, error) {
	var done bool
	err := v.write(ctx, func() (err error) {
		done, err = v.s.store.Verified(ctx, e, c.url)
		return err
	})
	if err != nil {
		return known, err
	}
	v.s.metrics.verified.Inc()
	hold := time.Now().Add(verifySettles)
	if !done { // it has another URL by now, which is on its way to us
		return attestation{hold: hold}, nil
	}
	v.s.log.Info("endpoint verified", "tenant", e.Tenant, "endpoint", e.ID, "method", v.s.cfg().Verification.Method)
	return attestation{verifiedFor: c.hash, triedFor: c.hash, hold: hold}, nil
}

func (v *verifier) refused(ctx context.Context, c *check, e store.Endpoint, known attestation, got *delivery.Verification) (attestation, error) {
	s := v.s
	known.triedFor, known.verifiedFor = c.hash, nil
	known.tries++
	next := time.Duration(-1)
	if waits := s.cfg().Verification.Schedule; known.tries <= len(waits) && got.Result.Class != delivery.ClassGone {
		next = max(spread(waits[known.tries-1]), min(got.Result.RetryAfter, s.cfg().Retry.MaxBackoff))
	}
	known.again, known.due, known.hold = next >= 0, time.Now().Add(next), time.Time{}
	if err := v.write(ctx, func() error { return s.store.NotVerified(ctx, e, c.url, known.tries, next, got.Reason) }); err != nil {
		known.tries--
		known.triedFor = nil
		return known, err
	}
	s.metrics.unverified.Inc()
	if known.again {
		s.log.Debug("an endpoint is not verified, trying again", "tenant", e.Tenant, "endpoint", e.ID, "tries", known.tries, "again_in", next, "error", got.Reason)
		return known, nil
	}
	s.log.Warn("an endpoint is not verified", "tenant", e.Tenant, "endpoint", e.ID, "tries", known.tries, "error", got.Reason,
		"hint", "once it is mended: outbox-relay endpoints verify, then endpoints recover --since")
	s.keeper.announce(newsOfEndpoint(newsUnverified, laneKey{e.Tenant, e.ID}, map[string]any{"tries": known.tries, "error": got.Reason}))
	return known, nil
}

// write runs one write at a time.
func (v *verifier) write(ctx context.Context, f func() error) error {
	select {
	case v.writing <- struct{}{}:
		defer func() { <-v.writing }()
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}
