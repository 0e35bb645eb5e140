package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/neo-commons/outbox-relay/relay/desk"
)

const (
	// bulkBatch is how many dead letters go into one transaction: few enough to hold its locks for a moment only.
	bulkBatch = 500
	// bulkPace is how long a batch of a slow replay lasts at most.
	bulkPace = 10 * time.Second
	// defaultRate is that of a replay, in deliveries a second. The limits of the endpoints count besides.
	defaultRate = 500.0
	// bulkTimeout bounds one batch, which an interrupt does not break off.
	bulkTimeout = time.Minute
)

// plan is what a bulk command is about to do.
type plan struct {
	Tenant string      `json:"tenant"`
	N      int64       `json:"dead_letters"`
	Left   int64       `json:"without_endpoint,omitempty"` // that cannot be replayed
	Piles  []desk.Pile `json:"endpoints"`
	Rate   float64     `json:"rate,omitempty"`
	Done   int64       `json:"done"`
}

// soFar leaves out what dies from now on: nobody has been shown it, and what dies again while it is replayed would have no end.
func (b *bulk) soFar(now time.Time) desk.LetterFilter {
	filter := b.at(now)
	if filter.Until.IsZero() || filter.Until.After(now) {
		filter.Until = now
	}
	return filter
}

func (a *app) replayMany(ctx context.Context, d *desk.Desk, b *bulk) error {
	filter := b.soFar(d.Now())
	p, err := newPlan(ctx, d, filter)
	if err != nil {
		return err
	}
	p.Rate = b.rate
	for _, pile := range p.Piles {
		if pile.EndpointGone {
			p.Left += pile.N
		}
	}
	p.N -= p.Left
	what := "will be sent again"
	if b.rate > 0 {
		what += fmt.Sprintf(", at most %v a second (about %s)", b.rate, span(time.Duration(float64(p.N)/b.rate*float64(time.Second))))
	}
	if ok, err := a.goAhead(ctx, b, p, what); !ok {
		return err
	}
	size := bulkBatch
	if b.rate > 0 {
		size = max(1, min(size, int(b.rate*bulkPace.Seconds())))
	}
	err = a.inBatches(ctx, p, "queued", func(ctx context.Context) (int64, time.Duration, error) {
		var within time.Duration
		if b.rate > 0 {
			within = time.Duration(float64(size) / b.rate * float64(time.Second))
		}
		n, err := d.Replay(ctx, filter, size, within)
		if b.rate > 0 {
			within = time.Duration(float64(n) / b.rate * float64(time.Second))
		}
		return n, within, err
	})
	if err != nil {
		return err
	}
	return a.print(&b.inquiry, p, func(w *tabwriter.Writer) {
		say(w, "%s queued: outbox-relay deliveries list -t %s shows what becomes of them\n", plural(p.Done, "dead letter is", "dead letters are"), p.Tenant)
		p.writeTaken(w)
	})
}

func (a *app) discardMany(ctx context.Context, d *desk.Desk, b *bulk) error {
	filter := b.soFar(d.Now())
	p, err := newPlan(ctx, d, filter)
	if err != nil {
		return err
	}
	if ok, err := a.goAhead(ctx, b, p, "will be discarded"); !ok {
		return err
	}
	err = a.inBatches(ctx, p, "discarded", func(ctx context.Context) (int64, time.Duration, error) {
		n, err := d.DiscardMany(ctx, filter, bulkBatch)
		return n, 0, err
	})
	if err != nil {
		return err
	}
	return a.print(&b.inquiry, p, func(w *tabwriter.Writer) {
		say(w, "%s discarded\n", plural(p.Done, "dead letter is", "dead letters are"))
		p.writeTaken(w)
	})
}

func newPlan(ctx context.Context, d *desk.Desk, f desk.LetterFilter) (*plan, error) {
	piles, err := d.Piles(ctx, f)
	if err != nil {
		return nil, err
	}
	p := &plan{Tenant: d.Tenant(), Piles: piles}
	for _, pile := range piles {
		p.N += pile.N
	}
	return p, nil
}

// pilesShown is how many endpoints a plan names.
const pilesShown = 10

func (p *plan) write(w io.Writer, what string) {
	say(w, "%s of tenant %s %s:\n", plural(p.N, "dead letter", "dead letters"), p.Tenant, what)
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	for i, pile := range p.Piles {
		if i == pilesShown {
			break
		}
		note := ""
		switch {
		case pile.EndpointGone && p.Left > 0:
			note = ", which is gone: these cannot be sent"
		case pile.Holds:
			note = ", which does not take deliveries now: they will wait"
		}
		say(table, "%d\t  %s%s\n", pile.N, named(pile.EndpointName, pile.EndpointID), note)
	}
	_ = table.Flush() // the one who has closed the pipe does not want to know
	if more := len(p.Piles) - pilesShown; more > 0 {
		say(w, "   and others of %s\n", plural(int64(more), "endpoint", "endpoints"))
	}
}

// writeTaken says how many fewer were done than had been counted.
func (p *plan) writeTaken(w io.Writer) {
	if p.Done < p.N {
		say(w, "%d of those counted were queued, discarded or taken by somebody else meanwhile\n", p.N-p.Done)
	}
}

// goAhead says what is about to be done and asks whether it shall.
func (a *app) goAhead(ctx context.Context, b *bulk, p *plan, what string) (bool, error) {
	if b.dryRun || p.N == 0 {
		return false, a.print(&b.inquiry, p, func(w *tabwriter.Writer) {
			switch {
			case p.N > 0:
				p.write(w, what)
			case p.Left > 0:
				p.write(w, "can be sent")
			default:
				say(w, "No open dead letters of tenant %s match: there is nothing to do.\n", p.Tenant)
			}
		})
	}
	p.write(a.err, what)
	if b.yes {
		return true, nil
	}
	err := a.ask(ctx, "Go on? [y/N] ", ", or --dry-run to see only how many there are")
	return err == nil, err
}

// inBatches does one batch after the other until none finds anything. A batch says how many it took and how long the next one has to wait. An interrupt
// waits for the batch under way, so that it is known how many were taken.
func (a *app) inBatches(ctx context.Context, p *plan, done string, batch func(ctx context.Context) (int64, time.Duration, error)) error {
	shown := progressLine{app: a}
	defer shown.end()
	stopped := func() error {
		shown.end()
		return hinted{fmt.Errorf("interrupted: %d of %d are %s", p.Done, p.N, done), "run the same command again: it goes on with the rest"}
	}
	for ctx.Err() == nil {
		began := time.Now()
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), bulkTimeout)
		n, pause, err := batch(bounded)
		cancel()
		if err != nil {
			shown.end()
			return hinted{fmt.Errorf("%w; %d of %d are %s", err, p.Done, p.N, done), cmp.Or(hintOf(err), "run the same command again: it goes on with the rest")}
		}
		if n == 0 {
			return nil
		}
		p.Done += n
		shown.show("%d of %d %s", p.Done, p.N, done)
		if p.Done >= p.N { // the next one would find nothing
			return nil
		}
		select {
		case <-time.After(pause - time.Since(began)):
		case <-ctx.Done():
		}
	}
	return stopped()
}

// progressLine shows on standard error how far something is: on a terminal in one line that changes, elsewhere now and then in a line of its own.
type progressLine struct {
	app  *app
	last time.Time
	text string // of a line that is still open
}

const progressEvery = 5 * time.Second

func (l *progressLine) show(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	switch {
	case terminal(l.app.err):
		if text != l.text {
			say(l.app.err, "\r%-*s", len(l.text), text)
			l.text = text
		}
	case time.Since(l.last) >= progressEvery:
		say(l.app.err, "%s\n", text)
		l.last = time.Now()
	}
}

// end closes the line.
func (l *progressLine) end() {
	if l.text != "" {
		say(l.app.err, "\n")
		l.text = ""
	}
}
