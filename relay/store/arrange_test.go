package store

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/neo-commons/outbox-relay/outbox"
)

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
