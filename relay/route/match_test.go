package route

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// bulky is an event of 16 MiB in front of the key z: a look for z takes a sixteenth of MatchBudget.
func bulky() *outbox.Event {
	return &outbox.Event{Type: "order.created", Metadata: []byte(`{}`), Data: []byte(`{"a": "` + strings.Repeat("x", MatchBudget/16) + `", "z": 1}`)}
}

// TestMatchBudget: filters that are not held against an event any more are known, and what needs none goes on.
func TestMatchBudget(t *testing.T) {
	t.Parallel()
	table := newTenant()
	const n = 40
	for i := range n {
		require.NoError(t, table.SetEndpoint(endpointRow(i)))
		row := subscriptionRow(100+i, i, "order.created")
		row.Filters = []byte(`{"z": 1}`)
		set(t, table, row)
	}
	split := func() (decided, undecided int) {
		for _, target := range table.Match(bulky(), nil) {
			if target.Undecided {
				undecided++
			} else {
				decided++
			}
		}
		return decided, undecided
	}
	decided, undecided := split()
	assert.Equal(t, 15, decided, "and the sixteenth is a little too much")
	assert.Equal(t, n-15, undecided)
	assert.Empty(t, table.Match(created(), nil), "each event has all of the budget")

	for i := range n {
		set(t, table, subscriptionRow(200+i, i, "order.*"), subscriptionRow(i+1, i, "order.**"))
	}
	decided, undecided = split()
	assert.Equal(t, n, decided)
	assert.Zero(t, undecided)
}

// TestMatchBudgetWithinAFilter: one filter alone has a bound, whatever it looks for.
func TestMatchBudgetWithinAFilter(t *testing.T) {
	t.Parallel()
	each := func(condition string) string {
		return `{"$not": {"$or": [` + strings.Repeat(condition+",", 99) + condition + `]}}`
	}
	const budget = 1 << 20
	long := `{"a": "` + strings.Repeat("x", budget/16) + `"}`
	numbers := `{"a": [` + strings.Repeat("[12, 3], ", 1<<13) + `4]}`
	for name, c := range map[string]struct{ filter, data string }{
		"key":      {each(`{"y": 1}`), long},
		"text":     {each(`{"a": {"$contains": "y"}}`), long},
		"elements": {each(`{"a": 5}`), numbers},
		"within":   {each(`{"a.b": 5}`), strings.ReplaceAll(numbers, "12", `{"c": 1}`)},
		"whole":    {each(`{"a": {"$eq": [[12, 3]]}}`), numbers},
	} {
		f, err := CompileFilter([]byte(c.filter))
		require.NoError(t, err, name)
		e := &outbox.Event{Data: []byte(c.data), Metadata: []byte(`{}`)}
		left := budget
		_, decided := f.match(e, &left)
		assert.False(t, decided, name)
		assert.LessOrEqual(t, left, 0, name)
		assert.Greater(t, left, -budget/4, name)
		left = len(c.data) * 1000
		matches, decided := f.match(e, &left)
		assert.True(t, matches && decided, name)
	}
}
