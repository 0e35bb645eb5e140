package seal_test

import (
	"fmt"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// An application that makes an endpoint seals its secret for the row that has this id, in the schema of this tenant.
func ExampleRing_Seal() {
	key, err := seal.ParseKey("2026", seal.NewKey()) // the relay's own: what secrets.keys calls 2026
	if err != nil {
		panic(err)
	}
	ring, err := seal.NewRing(key)
	if err != nil {
		panic(err)
	}
	token, err := ring.Seal("acme", outbox.NewUUID(), "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	fmt.Println(seal.KeyOf(token), err)
	// Output: 2026 <nil>
}
