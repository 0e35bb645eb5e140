package relay

import "time"

// tellAgain is how soon something that lasts is told of again, where nothing else is said.
const tellAgain = 5 * time.Minute

// A teller has something said once in a while. Its zero value has said nothing yet; whoever sees the end of what is told of goes back to that.
type teller struct{ told time.Time }

// due tells whether it is to be said now, and takes it that it is.
func (t *teller) due(now time.Time, again time.Duration) bool {
	if now.Sub(t.told) < again {
		return false
	}
	t.told = now
	return true
}
