package relay

import (
	"context"
	"time"
)

// While no synchronous standby confirms what it is sent, no commit ends: a relay that begins to lead waits for its first one, and one that leads records
// nothing. From here that looks like a server that has become slow, so the server is asked what it waits for.

// commitWatch tells of it; the zero value is that nothing has been seen.
type commitWatch struct {
	teller teller // of this wait
	clean  int    // looks in a row that have found nothing
}

// look asks, and has the log and the status say it. A wait is over after two looks that find none: the recorder gives a try up after a while, and the next one
// has only just begun.
func (w *commitWatch) look(ctx context.Context, e *engine) {
	wait, err := e.store.CommitWait(ctx)
	if err != nil {
		return // the recorder and the claimer tell that the database is away
	}
	if wait.Commits == 0 {
		if w.clean++; w.clean >= 2 {
			w.teller = teller{}
			e.status.besides.Store(nil)
		}
		return
	}
	w.clean = 0
	text := wait.String()
	e.status.besides.Store(&text)
	if w.teller.due(time.Now(), tellAgain) {
		e.log.Warn("commits wait for a synchronous standby", "commits", wait.Commits, "synchronous_standby_names", wait.Standbys, "hint", wait.Hint())
	}
}
