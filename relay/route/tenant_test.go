package route

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// id returns a UUID that sorts by n.
func id(n int) outbox.UUID { return outbox.UUID{13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)} }

func defaults() delivery.Defaults {
	return delivery.Defaults{Timeout: 30 * time.Second, MaxRetries: 5, Backoff: delivery.Backoff{First: 30 * time.Second, Max: time.Hour, Multiplier: 2}}
}

func newTenant() *Tenant { return NewTenant("tenant_a", defaults()) }

func endpointRow(n int) delivery.EndpointRow {
	return delivery.EndpointRow{
		ID: id(n), URL: fmt.Sprintf("https://receiver.example/%d", n), Method: "POST", SecretToken: "secret",
		CustomHeaders: []byte("{}"), VerifySSL: true, Active: true, Verified: true,
	}
}

func subscriptionRow(n, endpoint int, eventType string) SubscriptionRow {
	return SubscriptionRow{ID: id(n), EndpointID: id(endpoint), EventType: eventType, Filters: []byte("{}"), Active: true}
}

func olderRow(n, endpoint, eventType int) SubscriptionRow {
	return SubscriptionRow{Source: Older, ID: id(n), EndpointID: id(endpoint), EventTypeID: id(eventType), Filters: []byte("{}"), Active: true}
}

// setup returns a table with the endpoints 1 to 3.
func setup(t *testing.T) *Tenant {
	t.Helper()
	table := newTenant()
	for n := 1; n <= 3; n++ {
		require.NoError(t, table.SetEndpoint(endpointRow(n)))
	}
	return table
}

func set(t *testing.T, table *Tenant, rows ...SubscriptionRow) {
	t.Helper()
	for _, row := range rows {
		require.NoError(t, table.SetSubscription(row))
	}
}

// matches returns the targets as pairs of endpoint and subscription, in order of the endpoint.
func matches(table *Tenant, e *outbox.Event) [][2]int {
	var all [][2]int
	last := func(u outbox.UUID) int { return int(u[13])<<16 | int(u[14])<<8 | int(u[15]) }
	for _, target := range table.Match(e, nil) {
		all = append(all, [2]int{last(target.Endpoint.ID), last(target.Subscription)})
	}
	slices.SortFunc(all, func(a, b [2]int) int { return a[0] - b[0] })
	return all
}

func created() *outbox.Event {
	return &outbox.Event{Type: "order.created", Data: []byte(`{"total": 20}`), Metadata: []byte(`{}`)}
}

func TestMatchTypesAndPatterns(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, subscriptionRow(10, 1, "order.created"), subscriptionRow(11, 2, "order.*"), subscriptionRow(12, 3, "**"))
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}, {3, 12}}, matches(table, created()))
	assert.Equal(t, [][2]int{{2, 11}, {3, 12}}, matches(table, &outbox.Event{Type: "order.deleted"}))
	assert.Equal(t, [][2]int{{3, 12}}, matches(table, &outbox.Event{Type: "order.item.added"}))
	assert.Equal(t, [][2]int{{2, 11}, {3, 12}}, matches(table, &outbox.Event{Type: "order.*"}))

	table.DeleteSubscription(id(11), Current)
	set(t, table, subscriptionRow(13, 1, "*.deleted"))
	assert.Equal(t, [][2]int{{1, 13}, {3, 12}}, matches(table, &outbox.Event{Type: "order.deleted"}))
}

func TestMatchAppends(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, subscriptionRow(10, 1, "order.created"), subscriptionRow(9, 1, "order.*"))
	targets := table.Match(created(), nil)
	targets = table.Match(created(), targets)
	require.Len(t, targets, 2)
	assert.Equal(t, targets[0], targets[1])
	assert.Equal(t, id(9), targets[0].Subscription)
}

func TestMatchOneTargetPerEndpoint(t *testing.T) {
	t.Parallel()
	table := setup(t)
	_ = table.SetEventType(EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true})
	filtered := subscriptionRow(9, 1, "order.*")
	filtered.Filters = []byte(`{"total": 21}`)
	set(t, table, subscriptionRow(12, 1, "order.created"), subscriptionRow(11, 1, "**"), olderRow(10, 1, 100), filtered, subscriptionRow(13, 1, "order.created"))
	assert.Equal(t, [][2]int{{1, 10}}, matches(table, created()))
}

func TestMatchContext(t *testing.T) {
	t.Parallel()
	table := setup(t)
	bound, other := subscriptionRow(10, 1, "order.created"), subscriptionRow(11, 2, "order.*")
	bound.ContextID, other.ContextID = id(50), id(51)
	set(t, table, bound, other, subscriptionRow(12, 3, "order.created"))

	e := created()
	assert.Equal(t, [][2]int{{3, 12}}, matches(table, e), "an event without a context")
	e.ContextID = id(50)
	assert.Equal(t, [][2]int{{1, 10}, {3, 12}}, matches(table, e))
	e.ContextID = id(51)
	assert.Equal(t, [][2]int{{2, 11}, {3, 12}}, matches(table, e))

	bound.ContextID = outbox.UUID{}
	set(t, table, bound)
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}, {3, 12}}, matches(table, e))
}

func TestMatchFilter(t *testing.T) {
	t.Parallel()
	table := setup(t)
	row := subscriptionRow(10, 1, "order.created")
	row.Filters = []byte(`{"total": {"$gte": 20}}`)
	set(t, table, row)
	assert.Len(t, matches(table, created()), 1)
	row.Filters = []byte(`{"total": {"$gt": 20}}`)
	set(t, table, row)
	assert.Empty(t, matches(table, created()))
}

// TestMatchLargeEvents: where the keys of one event are says nothing of the next one.
func TestMatchLargeEvents(t *testing.T) {
	t.Parallel()
	table := setup(t)
	row := subscriptionRow(10, 1, "order.created")
	row.Filters = []byte(`{"total": 20}`)
	set(t, table, row)
	for data, want := range map[string]int{`{"total": 20}`: 1, `{"id": 7, "total": 20}`: 1, `{"total": 21}`: 0} {
		e := created()
		e.Data = append(bytes.Repeat([]byte(" "), outlineFrom), data...)
		assert.Len(t, matches(table, e), want, data)
	}
}

func TestMatchInactive(t *testing.T) {
	t.Parallel()
	table := setup(t)
	row, receiver := subscriptionRow(10, 1, "order.created"), endpointRow(1)
	row.Active = false
	set(t, table, row)
	assert.Empty(t, matches(table, created()))

	row.Active = true
	set(t, table, row)
	assert.Len(t, matches(table, created()), 1)

	receiver.Active = false
	require.NoError(t, table.SetEndpoint(receiver))
	assert.Empty(t, matches(table, created()))
	assert.NotNil(t, table.Endpoint(id(1)), "inactive, but known")

	receiver.Active = true
	require.NoError(t, table.SetEndpoint(receiver))
	assert.Len(t, matches(table, created()), 1)
}

func TestMatchEventType(t *testing.T) {
	t.Parallel()
	table := setup(t)
	unverified := endpointRow(2)
	unverified.Verified = false
	require.NoError(t, table.SetEndpoint(unverified))
	set(t, table, subscriptionRow(10, 1, "order.created"), subscriptionRow(11, 2, "order.*"), olderRow(12, 3, 100))
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}}, matches(table, created()), "a type without a row is matched")

	row := EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true}
	_ = table.SetEventType(row)
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}, {3, 12}}, matches(table, created()))

	row.RequiresVerification = true
	_ = table.SetEventType(row)
	assert.Equal(t, [][2]int{{1, 10}, {3, 12}}, matches(table, created()))

	row.Enabled = false
	_ = table.SetEventType(row)
	assert.Empty(t, matches(table, created()))
	assert.Equal(t, [][2]int{{2, 11}}, matches(table, &outbox.Event{Type: "order.deleted"}), "only its own type")

	row = EventTypeRow{ID: id(100), EventType: "order.deleted", Enabled: true}
	_ = table.SetEventType(row)
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}}, matches(table, created()), "called otherwise now")
	assert.Equal(t, [][2]int{{2, 11}, {3, 12}}, matches(table, &outbox.Event{Type: "order.deleted"}))

	table.DeleteEventType(id(100))
	assert.Equal(t, [][2]int{{2, 11}}, matches(table, &outbox.Event{Type: "order.deleted"}))
	_, ok := table.EventTypeRow(id(100))
	assert.False(t, ok)
}

// TestEventTypeWithAnotherID: the key of a row is updated, so that the log brings the new row before the old one goes.
func TestEventTypeWithAnotherID(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, olderRow(10, 1, 101))
	_ = table.SetEventType(EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true})
	_ = table.SetEventType(EventTypeRow{ID: id(101), EventType: "order.created", Enabled: true})
	table.DeleteEventType(id(100))
	assert.Equal(t, [][2]int{{1, 10}}, matches(table, created()))
	table.DeleteEventType(id(101))
	assert.Empty(t, matches(table, created()))
}

func TestRowsInAnyOrder(t *testing.T) {
	t.Parallel()
	table := newTenant()
	set(t, table, olderRow(10, 1, 100), subscriptionRow(11, 2, "order.created"))
	assert.Empty(t, matches(table, created()))
	assert.Nil(t, table.Endpoint(id(1)))
	_, ok := table.EndpointRow(id(1))
	assert.False(t, ok)

	_ = table.SetEventType(EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true})
	require.NoError(t, table.SetEndpoint(endpointRow(1)))
	require.NoError(t, table.SetEndpoint(endpointRow(2)))
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}}, matches(table, created()))

	table.DeleteEndpoint(id(2))
	assert.Equal(t, [][2]int{{1, 10}}, matches(table, created()))
	require.NoError(t, table.SetEndpoint(endpointRow(2)))
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}}, matches(table, created()))
}

func TestSubscriptionChangesItsEndpointAndType(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, subscriptionRow(10, 1, "order.created"), olderRow(10, 2, 100))
	set(t, table, subscriptionRow(10, 3, "order.*"))
	assert.Equal(t, [][2]int{{3, 10}}, matches(table, created()))
	table.DeleteSubscription(id(10), Older)
	assert.Equal(t, [][2]int{{3, 10}}, matches(table, created()), "the tables have ids of their own")
	table.DeleteSubscription(id(10), Current)
	table.DeleteSubscription(id(10), Current)
	assert.Empty(t, matches(table, created()))
}

func TestEndpointIsReplacedWhenItsRowChanges(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, subscriptionRow(10, 1, "order.created"))
	before := table.Match(created(), nil)[0].Endpoint
	row := endpointRow(1)
	row.URL = "https://receiver.example/new"
	require.NoError(t, table.SetEndpoint(row))
	after := table.Match(created(), nil)[0].Endpoint
	assert.Same(t, after, table.Endpoint(id(1)))
	assert.Equal(t, "https://receiver.example/new", after.URL)
	assert.Equal(t, "https://receiver.example/1", before.URL)
}

func TestInvalidRowsMatchNothingUntilMended(t *testing.T) {
	t.Parallel()
	table := setup(t)
	badEndpoint := endpointRow(1)
	badEndpoint.URL = "ftp://receiver.example"
	badFilter, badPattern, noType := subscriptionRow(10, 2, "order.created"), subscriptionRow(11, 2, "ord*"), subscriptionRow(12, 2, "")
	badFilter.Filters = []byte(`{"total": {"$near": 1}}`)
	noFilter, badOlder := subscriptionRow(13, 2, "order.created"), olderRow(14, 2, 100)
	noFilter.Filters = nil
	badOlder.Filters = []byte(`null`)
	_ = table.SetEventType(EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true})

	set(t, table, subscriptionRow(20, 1, "order.created"))
	require.Error(t, table.SetEndpoint(badEndpoint))
	require.Error(t, table.SetEndpoint(badEndpoint), "the same row again")
	for _, row := range []SubscriptionRow{badFilter, badPattern, noType, noFilter, badOlder} {
		require.Error(t, table.SetSubscription(row))
		require.Error(t, table.SetSubscription(row), "the same row again")
		kept, ok := table.SubscriptionRow(row.ID, row.Source)
		assert.True(t, ok)
		assert.Equal(t, row, kept)
	}
	assert.Empty(t, matches(table, created()))
	assert.Nil(t, table.Endpoint(id(1)))
	kept, ok := table.EndpointRow(id(1))
	assert.True(t, ok)
	assert.Equal(t, badEndpoint.URL, kept.URL)

	var listed []string
	for _, invalid := range table.Invalid() {
		listed = append(listed, fmt.Sprint(invalid.Table, " ", invalid.ID[15], " ", invalid.Err))
	}
	require.Len(t, listed, 6)
	assert.Contains(t, listed[0], "webhook_endpoints 1 ")
	assert.Contains(t, listed[1], "webhook_event_subscriptions 14 filter: at the top: want an object, got null")
	assert.Contains(t, listed[2], "webhook_subscriptions 10 filter: total.$near: is no operator")
	assert.Contains(t, listed[3], `webhook_subscriptions 11 pattern "ord*"`)
	assert.Contains(t, listed[4], "webhook_subscriptions 12 event type is empty")
	assert.Contains(t, listed[5], "webhook_subscriptions 13 filter: is not valid JSON")

	require.NoError(t, table.SetEndpoint(endpointRow(1)))
	set(t, table, subscriptionRow(10, 2, "order.created"))
	assert.Equal(t, [][2]int{{1, 20}, {2, 10}}, matches(table, created()))
	for n := 11; n <= 13; n++ {
		table.DeleteSubscription(id(n), Current)
	}
	table.DeleteSubscription(id(14), Older)
	assert.Empty(t, table.Invalid())
}

func TestTruncate(t *testing.T) {
	t.Parallel()
	table := setup(t)
	_ = table.SetEventType(EventTypeRow{ID: id(100), EventType: "order.created", Enabled: true})
	set(t, table, subscriptionRow(10, 1, "order.created"), olderRow(11, 2, 100), subscriptionRow(12, 3, "order.*"))

	table.Truncate("webhook_events")
	assert.Equal(t, [][2]int{{1, 10}, {2, 11}, {3, 12}}, matches(table, created()))
	table.Truncate("webhook_subscriptions")
	assert.Equal(t, [][2]int{{2, 11}}, matches(table, created()))
	table.Truncate("webhook_event_types")
	assert.Empty(t, matches(table, created()))
	table.Truncate("webhook_endpoints")
	assert.Nil(t, table.Endpoint(id(2)))
	table.Truncate("webhook_event_subscriptions")

	assert.Empty(t, table.endpoints, "nothing is left")
	assert.Empty(t, table.subscriptions)
	assert.Empty(t, table.index.buckets)
	assert.Empty(t, table.index.patterns)
	assert.Empty(t, table.index.types)
	assert.Empty(t, table.index.typeIDs)
}

func TestPlansAreBounded(t *testing.T) {
	t.Parallel()
	table := setup(t)
	set(t, table, subscriptionRow(10, 1, "**"))
	for n := range 2*maxPlans + 1 {
		require.Len(t, table.Match(&outbox.Event{Type: fmt.Sprint("type.", n)}, nil), 1)
	}
	assert.LessOrEqual(t, len(table.index.plans), maxPlans)
}

// TestMatchAgainstReference changes rows at random and asks each time what a search through all rows would say.
func TestMatchAgainstReference(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(3, 4)) // the same cases each time
	types := []string{"order.created", "order.deleted", "order.item.added", "user.created", "user.deleted"}
	patterns := append([]string{"order.*", "order.**", "**", "*.created", "*.**.added", "bad*"}, types...)
	filters := []string{`{}`, `{}`, `{"total": 20}`, `{"total": {"$gt": 20}}`, `{"$type": {"$startsWith": "order"}}`, `{"total": {"$bad": 1}}`}
	table := newTenant()
	m := model{map[outbox.UUID]delivery.EndpointRow{}, map[subscriptionKey]SubscriptionRow{}, map[outbox.UUID]EventTypeRow{}}

	for range 3_000 {
		switch n := r.IntN(20); {
		case n < 3:
			row := endpointRow(1 + r.IntN(6))
			row.Active, row.Verified = r.IntN(4) > 0, r.IntN(2) > 0
			row.Method = []string{"POST", "PUT", "GET"}[r.IntN(3)]
			m.endpoints[row.ID] = row
			_ = table.SetEndpoint(row)
		case n < 4:
			endpoint := id(1 + r.IntN(6))
			delete(m.endpoints, endpoint)
			table.DeleteEndpoint(endpoint)
		case n < 12:
			row := subscriptionRow(10+r.IntN(12), 1+r.IntN(6), patterns[r.IntN(len(patterns))])
			row.Source, row.EventTypeID = Source(r.IntN(2)), id(100+r.IntN(4))
			row.Active, row.Filters = r.IntN(4) > 0, []byte(filters[r.IntN(len(filters))])
			if row.Source == Current && r.IntN(3) == 0 {
				row.ContextID = id(50 + r.IntN(2))
			}
			m.subscriptions[subscriptionKey{row.Source, row.ID}] = row
			_ = table.SetSubscription(row)
		case n < 15:
			key := subscriptionKey{Source(r.IntN(2)), id(10 + r.IntN(12))}
			delete(m.subscriptions, key)
			table.DeleteSubscription(key.id, key.source)
		case n < 18:
			row := EventTypeRow{id(100 + r.IntN(4)), types[r.IntN(len(types))], r.IntN(4) > 0, r.IntN(3) == 0, ""}
			if m.typeNamed(row.EventType) == nil { // the column is unique
				m.types[row.ID] = row
				_ = table.SetEventType(row)
			}
		default:
			eventType := id(100 + r.IntN(4))
			delete(m.types, eventType)
			table.DeleteEventType(eventType)
		}
		e := &outbox.Event{Type: types[r.IntN(len(types))], Data: []byte(`{"total": 20}`)}
		if r.IntN(2) == 0 {
			e.ContextID = id(50 + r.IntN(2))
		}
		require.Equal(t, m.match(e), targets(table.Match(e, nil)), "%+v", e)
	}
}

func targets(list []Target) map[outbox.UUID]outbox.UUID {
	all := make(map[outbox.UUID]outbox.UUID)
	for _, target := range list {
		all[target.Endpoint.ID] = target.Subscription
	}
	return all
}

// model holds the rows and nothing else.
type model struct {
	endpoints     map[outbox.UUID]delivery.EndpointRow
	subscriptions map[subscriptionKey]SubscriptionRow
	types         map[outbox.UUID]EventTypeRow
}

func (m model) typeNamed(name string) *EventTypeRow {
	for _, row := range m.types {
		if row.EventType == name {
			return &row
		}
	}
	return nil
}

func (m model) match(e *outbox.Event) map[outbox.UUID]outbox.UUID {
	all := make(map[outbox.UUID]outbox.UUID)
	eventType := m.typeNamed(e.Type)
	if eventType != nil && !eventType.Enabled {
		return all
	}
	for _, s := range m.subscriptions {
		endpoint, err := delivery.NewEndpoint(m.endpoints[s.EndpointID], defaults())
		if err != nil || !endpoint.Active || !s.Active || eventType != nil && eventType.RequiresVerification && !endpoint.Verified {
			continue
		}
		fits := false
		if s.Source == Older {
			fits = eventType != nil && eventType.ID == s.EventTypeID
		} else if !strings.Contains(s.EventType, "bad") {
			fits = patternRegexp(s.EventType).MatchString("." + e.Type)
		}
		filter, err := CompileFilter(s.Filters)
		if !fits || err != nil || !filter.Match(e) || !s.ContextID.IsZero() && s.ContextID != e.ContextID {
			continue
		}
		if first, ok := all[s.EndpointID]; !ok || bytes.Compare(s.ID[:], first[:]) < 0 {
			all[s.EndpointID] = s.ID
		}
	}
	return all
}

// fill makes a tenant with that many subscriptions, ten to an event type: some for a context, with a filter or of the older kind, and
// a pattern for every fifth type.
func fill(tb testing.TB, subscriptions int) *Tenant {
	tb.Helper()
	table := newTenant()
	types := max(subscriptions/10, 1)
	endpoints := max(subscriptions/20, 1)
	for n := range endpoints {
		require.NoError(tb, table.SetEndpoint(endpointRow(n)))
	}
	for n := range types {
		_ = table.SetEventType(EventTypeRow{ID: id(n), EventType: benchType(n), Enabled: true})
	}
	for n := range subscriptions {
		eventType, nth := n%types, n/types
		endpoint := (eventType + nth) % endpoints
		row := subscriptionRow(n, endpoint, benchType(eventType))
		switch {
		case nth == 5 && eventType%5 == 0:
			row.EventType = fmt.Sprintf("shop-%d.**", eventType)
		case nth == 6 || nth == 7:
			row.ContextID = id(nth)
		case nth == 8:
			row.Filters = []byte(`{"status": "open", "total": {"$gte": 10}}`)
		case nth == 9:
			row = olderRow(n, endpoint, eventType)
		}
		require.NoError(tb, table.SetSubscription(row))
	}
	return table
}

func benchType(n int) string { return fmt.Sprintf("shop-%d.order.created", n) }

// BenchmarkMatch matches one event against tenants of more and more subscriptions.
func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 100, 10_000, 100_000} {
		table := fill(b, n)
		e := &outbox.Event{
			Type: benchType(0), ContextID: id(7), Metadata: []byte(`{}`),
			Data: []byte(`{"id": 7, "status": "open", "total": 19.90, "customer": {"name": "Zoë", "tier": "gold"}}`),
		}
		dst := make([]Target, 0, 100)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				dst = table.Match(e, dst[:0])
			}
			b.ReportMetric(float64(len(dst)), "targets")
		})
	}
}

// BenchmarkMatchContexts has all subscriptions on one type, each for a context of its own.
func BenchmarkMatchContexts(b *testing.B) {
	table := newTenant()
	require.NoError(b, table.SetEndpoint(endpointRow(1)))
	for n := range 10_000 {
		row := subscriptionRow(n, 1, "order.created")
		row.ContextID = id(n + 1)
		require.NoError(b, table.SetSubscription(row))
	}
	e := created()
	e.ContextID = id(5000)
	dst := make([]Target, 0, 1)
	b.ReportAllocs()
	for b.Loop() {
		dst = table.Match(e, dst[:0])
	}
}

// BenchmarkMatchNewType pays for the first event of a type: a try of each of 200 patterns.
func BenchmarkMatchNewType(b *testing.B) {
	table := fill(b, 10_000)
	e := &outbox.Event{Type: benchType(0)}
	for b.Loop() {
		clear(table.index.plans)
		table.Match(e, nil)
	}
}

func TestOtherDefaults(t *testing.T) {
	t.Parallel()
	d := defaults()
	d.Rate, d.Timeout = 5, 3*time.Second
	table := NewTenant("tenant_a", d)
	own := endpointRow(1)
	own.RatePerSecond = 7
	require.NoError(t, table.SetEndpoint(own))
	require.NoError(t, table.SetEndpoint(endpointRow(2)))
	set(t, table, subscriptionRow(10, 1, "order.created"), subscriptionRow(11, 2, "order.created"), subscriptionRow(12, 3, "order.created"))
	rates := func() map[outbox.UUID]float64 {
		got := make(map[outbox.UUID]float64)
		for _, target := range table.Match(created(), nil) {
			got[target.Endpoint.ID] = target.Endpoint.Rate
		}
		return got
	}
	require.Equal(t, map[outbox.UUID]float64{id(1): 7, id(2): 5}, rates())
	d.Rate = 2
	require.Empty(t, table.SetDefaults(d))
	require.Equal(t, map[outbox.UUID]float64{id(1): 7, id(2): 2}, rates())
	require.NoError(t, table.SetEndpoint(endpointRow(3)))
	require.Equal(t, map[outbox.UUID]float64{id(1): 7, id(2): 2, id(3): 2}, rates(), "rows that come later have them as well")

	d.RequireSealed = true
	invalid := table.SetDefaults(d)
	require.Len(t, invalid, 3)
	require.ErrorContains(t, invalid[0].Err, "seal")
	require.Empty(t, rates())
	require.Empty(t, table.SetDefaults(d), "that is known")
	d.RequireSealed = false
	require.Empty(t, table.SetDefaults(d))
	require.Len(t, rates(), 3)
}
