package route

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// outlinedMatch is Match of an event whose data is so large that its keys are looked for once.
func outlinedMatch(f *Filter, e *outbox.Event) bool {
	large, left := *e, math.MaxInt
	large.Data = append(bytes.Repeat([]byte(" "), outlineFrom), e.Data...)
	matches, _ := f.match(&large, &outline{}, &left)
	return matches
}

// bulky is an event of 16 MiB in front of n.z: a look for that takes a sixteenth of MatchBudget, one for z hardly anything.
func bulky() *outbox.Event {
	return &outbox.Event{Type: "order.created", Metadata: []byte(`{}`), Data: []byte(`{"n": {"a": "` + strings.Repeat("x", MatchBudget/16) + `", "z": 1}, "z": 1}`)}
}

// TestMatchBudget: filters that are not held against an event any more are known, and what needs none goes on.
func TestMatchBudget(t *testing.T) {
	t.Parallel()
	table := newTenant()
	const n = 40
	filter := func(text string) {
		for i := range n {
			require.NoError(t, table.SetEndpoint(endpointRow(i)))
			row := subscriptionRow(100+i, i, "order.created")
			row.Filters = []byte(text)
			set(t, table, row)
		}
	}
	e := bulky()
	split := func() (decided, undecided int) {
		for _, target := range table.Match(e, nil) {
			if target.Undecided {
				undecided++
			} else {
				decided++
			}
		}
		return decided, undecided
	}
	filter(`{"z": 1}`)
	decided, undecided := split()
	assert.Equal(t, n, decided, "what stands beside it is walked over once")
	assert.Zero(t, undecided)
	filter(`{"n.z": 1}`)
	decided, undecided = split()
	assert.Equal(t, 15, decided, "and the sixteenth is a little too much")
	assert.Equal(t, n-15, undecided)
	assert.Empty(t, table.Match(created(), nil), "each event has all of the budget")
	for i := range n {
		target, ok := table.MatchFor(e, id(i))
		require.True(t, ok, "one alone has all of it")
		require.Equal(t, id(100+i), target.Subscription)
		require.False(t, target.Undecided)
	}
	_, ok := table.MatchFor(created(), id(1))
	assert.False(t, ok)
	_, ok = table.MatchFor(e, id(n))
	assert.False(t, ok, "there is no such endpoint")

	for i := range n {
		set(t, table, subscriptionRow(200+i, i, "order.*"), subscriptionRow(i+1, i, "order.**"))
	}
	decided, undecided = split()
	assert.Equal(t, n, decided)
	assert.Zero(t, undecided)
}

// TestMatchBudgetOfOneEndpoint: what another subscription of the endpoint cannot decide either says nothing about the first.
func TestMatchBudgetOfOneEndpoint(t *testing.T) {
	t.Parallel()
	table := setup(t)
	for i := range 3 {
		row := subscriptionRow(10+i, 1, "order.created")
		row.Filters = []byte(`{"$or": [` + strings.Repeat(`{"n.y": 1}, `, 4) + `{"n.y": 1}]}`) // five quarters of what one filter may have
		set(t, table, row)
	}
	targets := table.Match(bulky(), nil)
	require.Len(t, targets, 1)
	assert.True(t, targets[0].Undecided)
	assert.Equal(t, id(10), targets[0].Subscription)
}

// TestMatchSurvivesAFilter: an event that makes a filter panic is undecided for that one, and held against the others.
func TestMatchSurvivesAFilter(t *testing.T) {
	t.Parallel()
	broken := &Filter{root: node{op: opNot}} // of nothing
	sound, err := CompileFilter([]byte(`{"n": 1}`))
	require.NoError(t, err)
	l := &list{}
	for i, f := range []*Filter{broken, sound, broken} {
		l.subscriptions = append(l.subscriptions, &subscription{endpoint: &endpoint{usable: &delivery.Endpoint{ID: id(i), Active: true}}, filter: f})
	}
	r := round{number: 1, event: &outbox.Event{Data: []byte(`{"n": 1}`)}, outline: &outline{}, left: MatchBudget}
	r.choose(l)
	require.Len(t, r.targets, 3)
	for i, target := range r.targets {
		assert.Equal(t, i != 1, target.Undecided)
		assert.Equal(t, i != 1, strings.Contains(target.Fault, "index out of range"), target.Fault)
	}
	assert.Greater(t, r.left, MatchBudget-1000)
}

// TestMatchBudgetIsOver: what comes after the budget costs nothing, however many there are.
func TestMatchBudgetIsOver(t *testing.T) {
	t.Parallel()
	l, e := &list{}, &outbox.Event{Data: []byte(`"` + strings.Repeat("x", 1<<20) + `"`)}
	f, err := CompileFilter([]byte(`{"$or": [` + strings.Repeat(`{"$contains": "y"},`, 400) + `{"$contains": "y"}]}`))
	require.NoError(t, err)
	for range 100_000 { // each of them takes half a second, were it not for the budget
		l.subscriptions = append(l.subscriptions, &subscription{endpoint: &endpoint{usable: &delivery.Endpoint{Active: true}}, filter: f})
	}
	r := round{number: 1, event: e, outline: &outline{}, left: MatchBudget}
	r.choose(l)
	assert.Greater(t, len(r.targets), 99_990)
	assert.LessOrEqual(t, r.left, 0)
}

// TestMatchBudgetWithinAFilter: one filter alone has a bound, whatever it looks for.
func TestMatchBudgetWithinAFilter(t *testing.T) {
	t.Parallel()
	each := func(condition string) string {
		return `{"$not": {"$or": [` + strings.Repeat(condition+",", 99) + condition + `]}}`
	}
	const budget = 1 << 20
	text := `"` + strings.Repeat("x", budget/16) + `"`
	numbers := `{"a": [` + strings.Repeat("[12, 3], ", 1<<13) + `4]}`
	long := numbers[:len(numbers)-1] + `, "y": ` + strings.Repeat("7", budget/16) + `}`
	for name, c := range map[string]struct{ filter, data string }{
		"key":       {each(`{"n.y": 1}`), `{"n": {"a": ` + text + `}}`},
		"long key":  {each(`{"n.y": 1}`), `{"n": {` + text + `: 1}}`},
		"text":      {each(`{"a": {"$contains": "y"}}`), `{"a": ` + text + `}`},
		"root":      {each(`{"$contains": "y"}`), text},
		"number":    {each(`{"y": 5}`), long},
		"elements":  {each(`{"a": 5}`), numbers},
		"within":    {each(`{"a.b": 5}`), strings.ReplaceAll(numbers, "12", `{"c": 1}`)},
		"deep path": {each(`{"a` + strings.Repeat(".b", 63) + `": 5}`), `{"a": [` + strings.Repeat("1, ", 1<<16) + `1]}`},
		"in":        {`{"$not": {"a": {"$in": [` + strings.Repeat("null, ", 900) + `null]}}}`, numbers},
		"whole":     {each(`{"a": {"$eq": [[12, 3]]}}`), numbers},
		"escaped":   {each(`{"zz": 1}`), `{"` + strings.Repeat(`\n`, budget/32) + `": 1}`},
		"keys":      {each(`{"zz": 1}`), `{"n": 1` + strings.Repeat(`, "k": 1`, 1<<13) + `}`},
	} {
		f, err := CompileFilter([]byte(c.filter))
		require.NoError(t, err, name)
		e := &outbox.Event{Data: []byte(c.data), Metadata: []byte(`{}`)}
		left := budget
		_, decided := f.match(e, &outline{}, &left)
		assert.False(t, decided, name)
		assert.LessOrEqual(t, left, 0, name)
		assert.Greater(t, left, -budget/4, name)
		left = math.MaxInt
		matches, decided := f.match(e, &outline{}, &left)
		assert.True(t, matches && decided, name)
		assert.Less(t, math.MaxInt-left, 1000*budget, name)
	}
}
