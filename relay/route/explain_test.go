package route

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

func TestExplainNamesWhatStandsInTheWay(t *testing.T) {
	t.Parallel()
	event := func(change func(*outbox.Event)) *outbox.Event {
		e := someEvent(t, shop)
		if change != nil {
			change(e)
		}
		return e
	}
	for name, tc := range map[string]struct {
		set   func(table *Tenant)
		event *outbox.Event
		fits  bool
		why   []string
	}{
		"it matches":        {set: func(*Tenant) {}, fits: true},
		"another type":      {event: event(func(e *outbox.Event) { e.Type = "order.paid" }), why: []string{"it is for order.created"}},
		"no such endpoint":  {set: func(table *Tenant) { table.DeleteEndpoint(id(1)) }, fits: true, why: []string{"its endpoint does not exist"}},
		"inactive endpoint": {set: func(table *Tenant) { row := endpointRow(1); row.Active = false; _ = table.SetEndpoint(row) }, fits: true, why: []string{"its endpoint is not active"}},
		"invalid endpoint": {
			set: func(table *Tenant) {
				row := endpointRow(1)
				row.URL = "ftp://x/?key=s3cret"
				_ = table.SetEndpoint(row)
			}, fits: true,
			why: []string{`its endpoint cannot be used: endpoint_url "ftp://x": the scheme must be http or https`},
		},
		"unverified": {
			set: func(table *Tenant) {
				row := endpointRow(1)
				row.Verified = false
				_ = table.SetEndpoint(row)
				_ = table.SetEventType(EventTypeRow{ID: id(20), EventType: "order.created", Enabled: true, RequiresVerification: true})
			},
			fits: true, why: []string{"its endpoint is not verified, which events of type order.created require"},
		},
		"disabled type": {
			set:  func(table *Tenant) { _ = table.SetEventType(EventTypeRow{ID: id(20), EventType: "order.created"}) },
			fits: true, why: []string{"events of type order.created are disabled"},
		},
		"another context": {
			set: func(table *Tenant) {
				row := subscriptionRow(10, 1, "order.created")
				row.ContextID = id(9)
				_ = table.SetSubscription(row)
			}, fits: true,
			why: []string{"it is for context " + id(9).String() + ", the event has " + someContext},
		},
		"no context": {
			set: func(table *Tenant) {
				row := subscriptionRow(10, 1, "order.created")
				row.ContextID = id(9)
				_ = table.SetSubscription(row)
			},
			event: event(func(e *outbox.Event) { e.ContextID = outbox.UUID{} }), fits: true,
			why: []string{"it is for context " + id(9).String() + ", the event has none"},
		},
		"several at once": {
			set: func(table *Tenant) {
				row := subscriptionRow(10, 1, "order.*")
				row.Active, row.Filters = false, []byte(`{"id": 8}`)
				_ = table.SetSubscription(row)
			},
			fits: true, why: []string{"the subscription is not active", "the filter wants id $eq 8, the event has a number there"},
		},
		"a bad pattern": {
			set:  func(table *Tenant) { _ = table.SetSubscription(subscriptionRow(10, 1, "**order")) },
			fits: true,
			why:  []string{`the subscription cannot be used: pattern "**order": a wildcard must be a segment of its own: * for one, ** for any number`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := setup(t)
			set(t, table, subscriptionRow(10, 1, "order.created"))
			if tc.set != nil {
				tc.set(table)
			}
			if tc.event == nil {
				tc.event = event(nil)
			}
			verdicts := table.Explain(tc.event, id(1))
			require.Len(t, verdicts, 1)
			assert.Equal(t, tc.why, verdicts[0].Why)
			assert.Equal(t, tc.fits, verdicts[0].Fits)
			assert.Equal(t, id(10), verdicts[0].Subscription)
			assert.Equal(t, len(tc.why) == 0, len(table.Match(tc.event, nil)) == 1)
		})
	}
}

func TestExplainNamesTheClause(t *testing.T) {
	t.Parallel()
	for filter, want := range map[string][]string{
		`{"status": "shipped", "total": {"$gte": 10, "$lt": 15}}`: {
			`status $eq "shipped", the event has a string there`, `total $lt 15, the event has a number there`,
		},
		`{"total": {"$gte": "100"}}`:                        {`total $gte "100", the event has a number there`},
		`{"customer": {"tier": "silver"}}`:                  {`customer.tier $eq "silver", the event has a string there`},
		`{"customer.vip": true}`:                            {`customer.vip $eq true, the event has nothing there`},
		`{"items.sku": {"$in": ["X", "Y"]}}`:                {`items.sku $in ["X","Y"], the event has a string there`},
		`{"items": {"parts.n": 3}}`:                         {`items.parts.n $eq 3, the event has a number there`},
		`{"tags": {"$ne": "eu"}}`:                           {`tags $ne "eu", the event has an array there`},
		`{"coupon": {"$exists": true}}`:                     {`coupon $exists true, the event has nothing there`},
		`{"$or": [{"id": 8}, {"note": "x", "paid": true}]}`: {`$or[0].id $eq 8, the event has a number there`, `$or[1].note $eq "x", the event has null there`},
		`{"$and": [{"id": 7}, {"paid": false}]}`:            {`$and[1].paid $eq false, the event has a boolean there`},
		`{"total": {"$or": [{"$lt": 1}, {"$gt": 99}]}}`:     {`total.$or[0] $lt 1, the event has a number there`, `total.$or[1] $gt 99, the event has a number there`},
		`{"$not": {"status": "open"}}`:                      {`$not {"status":"open"}`},
		`{"total": {"$not": {"$gt": 1}}}`:                   {`total $not {"$gt":1}`},
		`{"$type": {"$startsWith": "invoice."}}`:            {`$type $startsWith "invoice.", the event has a string there`},
		`{"$metadata.source": "web"}`:                       {`$metadata.source $eq "web", the event has a string there`},
		`{"$metadata": {"retry.count": {"$gt": 5}}}`:        {`$metadata.retry.count $gt 5, the event has a number there`},
		`{"$exists": false}`:                                {`$exists false, the event has an object there`},
	} {
		table := setup(t)
		row := subscriptionRow(10, 1, "order.created")
		row.Filters = []byte(filter)
		set(t, table, row)
		for i := range want {
			want[i] = "the filter wants " + want[i]
		}
		assert.Equal(t, want, table.Explain(someEvent(t, shop), id(1))[0].Why, filter)
	}
	// Each holds for some item, not both for the same.
	table := setup(t)
	row := subscriptionRow(10, 1, "order.created")
	row.Filters = []byte(`{"items": {"sku": "A", "qty": {"$gt": 2}}}`)
	set(t, table, row)
	assert.Equal(t, []string{`the filter wants one value of items that meets {"sku":"A","qty":{"$gt":2}}`}, table.Explain(someEvent(t, shop), id(1))[0].Why)
}

func TestExplainEndpointsWithoutSubscriptions(t *testing.T) {
	t.Parallel()
	table := setup(t)
	paused := endpointRow(2)
	paused.Paused = true
	require.NoError(t, table.SetEndpoint(paused))
	_ = table.SetEventType(EventTypeRow{ID: id(20), EventType: "order.created", Enabled: true})
	set(t, table, subscriptionRow(10, 1, "order.*"), olderRow(11, 2, 20), olderRow(12, 2, 21))
	verdicts := table.Explain(created(), outbox.UUID{})
	require.Len(t, verdicts, 4)
	assert.True(t, verdicts[0].Matches())
	assert.True(t, verdicts[1].Matches())
	assert.True(t, verdicts[1].Paused)
	assert.Equal(t, "order.created", verdicts[1].EventType)
	assert.Equal(t, []string{"it is for an event type that does not exist"}, verdicts[2].Why)
	assert.Equal(t, []string{"it has no subscription"}, verdicts[3].Why)
	assert.Equal(t, id(3), verdicts[3].Endpoint)
	assert.Empty(t, table.Explain(created(), id(4)))
}

// TestExplainAgreesWithMatch: there is a reason if and only if Match says no.
func TestExplainAgreesWithMatch(t *testing.T) {
	t.Parallel()
	g := generator{rand.New(rand.NewPCG(3, 4))} // the same cases each time
	refused := 0
	const cases = 3_000
	for range cases {
		filter, data := g.condition(3, true), g.object(3)
		table := setup(t)
		row := subscriptionRow(10, 1, "order.created")
		row.Filters = []byte(filter)
		set(t, table, row)
		e := someEvent(t, data)
		verdict := table.Explain(e, id(1))[0]
		require.Equal(t, len(table.Match(e, nil)) == 1, verdict.Matches(), "%s on %s: %q", filter, data, verdict.Why)
		if !verdict.Matches() {
			refused++
		}
	}
	require.Greater(t, refused, cases/10, "the cases are worth something")
}
