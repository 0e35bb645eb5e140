package store

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestBatchesAreInOneOrder: two transactions that write the same rows must meet in the same order, or they deadlock. Those of one delivery keep theirs.
func TestBatchesAreInOneOrder(t *testing.T) {
	t.Parallel()
	var forth, back []Outcome
	for i := range byte(8) {
		d := &Delivery{Tenant: string('a' + rune(i&1)), EventID: outbox.UUID{i >> 1 & 1}, EndpointID: outbox.UUID{i >> 2 & 1}}
		forth = append(forth, Outcome{Delivery: d, Status: Leased}, Outcome{Delivery: d, Status: Success})
		back = append([]Outcome{{Delivery: d, Status: Leased}, {Delivery: d, Status: Success}}, back...)
	}
	assert.Equal(t, split(forth), split(back))
	for _, batch := range split(back) {
		for i, o := range batch.outcomes {
			assert.Equal(t, []Status{Leased, Success}[i%2], o.Status)
		}
	}
}

// TestLeasesArrangeNothing: what is leased while it runs is in flight, so that no row of its key is to be parked or woken, and nothing is sent for that.
func TestLeasesArrangeNothing(t *testing.T) {
	t.Parallel()
	outcome := func(status Status, key byte) *Outcome {
		return &Outcome{Status: status, Delivery: &Delivery{ID: outbox.NewUUID(), Order: Place{Key: outbox.UUID{key}}}}
	}
	leased, deferred := outcome(Leased, 1), outcome(Pending, 1)
	assert.Empty(t, arrange("a", []*Outcome{leased}, nil, nil))
	list := arrange("a", []*Outcome{leased, deferred}, nil, nil)
	assert.Equal(t, []statement{{sql: parkRows, args: []any{[]outbox.UUID{deferred.Delivery.ID}, []outbox.UUID{deferred.Delivery.ID}}}}, list, "but for what waits behind it")
}
