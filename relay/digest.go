package relay

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"math/rand/v2"

	"github.com/neo-commons/outbox-relay/relay/store"
)

// version is a state of a routing table.
type version struct {
	changes uint64 // by the log or another configuration since the table was loaded
	digest  digest
}

// A digest tells whether a routing table is as it was in another session: equal ones have equal rows. It is the sum of a hash of each row, so that a change
// costs no more than its row, and the order in which they come does not matter. What cannot be told makes it one that nothing equals, which is the safe
// side: the audit then leaves out what the tenant's events matched before.
type digest int64

func (d *digest) add(row any)    { *d += hashRow(row) }
func (d *digest) remove(row any) { *d -= hashRow(row) }
func (d *digest) spoil()         { *d = digest(rand.Uint64()) } //nolint:gosec // nobody gains by guessing it

// digestOf is that of a table that was made of rows and not changed since.
func digestOf(rows *store.TenantRows) (d digest) {
	for i := range rows.Endpoints {
		d.add(rows.Endpoints[i])
	}
	for i := range rows.EventTypes {
		d.add(rows.EventTypes[i])
	}
	for i := range rows.Subscriptions {
		d.add(rows.Subscriptions[i])
	}
	return d
}

func hashRow(row any) digest {
	b, err := json.Marshal(row)
	if err != nil { // a number that JSON does not have
		return digest(rand.Uint64()) //nolint:gosec // as above
	}
	sum := sha256.Sum256(b)
	return digest(binary.BigEndian.Uint64(sum[:])) //nolint:gosec // all bits count
}
