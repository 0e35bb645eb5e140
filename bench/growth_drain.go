package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// drain starts the relays, has them work off what fill made, and measures it.
func (g *growing) drain(ctx context.Context, n int) (d drained, err error) {
	began := time.Now()
	relays, err := g.start(ctx)
	defer func() {
		for _, p := range relays {
			err = errors.Join(err, p.stop())
		}
		if err == nil {
			err = g.recorded(ctx, n)
		}
	}()
	if err != nil {
		return d, err
	}
	if g.load.due {
		began = time.Now()
		if err := g.exec(ctx, fmt.Sprintf(queueSQL, "interval '0'", "e0")); err != nil {
			return d, err
		}
	}
	first, err := g.await(ctx, relays[0], 1)
	if err != nil {
		return d, err
	}
	cpu := used(relays)
	now, err := g.await(ctx, relays[0], n)
	if err != nil {
		return d, err
	}
	cpu = used(relays) - cpu
	at, err := g.receiver.tenths(ctx)
	if err != nil {
		return d, err
	}
	d = drained{took: now.span, start: now.begin.Sub(began), slower: at[10].Sub(at[9]).Seconds() / max(at[1].Sub(at[0]).Seconds(), 1e-9)}
	if counted := n - first.events; counted > 0 { // what it takes to start is not for the deliveries to pay
		d.cpu = time.Duration(float64(cpu) * float64(n) / float64(counted))
	}
	for _, p := range relays {
		d.peak = max(d.peak, p.peak())
	}
	return d, nil
}

func used(relays []*process) (cpu time.Duration) {
	for _, p := range relays {
		cpu += p.cpu()
	}
	return cpu
}

// start starts the relays. If deliveries are to become due, it waits until all of them are up and have nothing else to do. It returns what it has started
// even if there is an error.
func (g *growing) start(ctx context.Context) (relays []*process, err error) {
	for range g.load.relays {
		p, err := g.launchRelay(ctx, "info")
		if err != nil {
			return relays, err
		}
		relays = append(relays, p)
	}
	if !g.load.due {
		return relays, nil
	}
	for _, p := range relays {
		err := g.until(ctx, p, func() (bool, error) {
			said := p.stderr.String()
			return strings.Contains(said, "leading") || strings.Contains(said, "standing by"), nil
		})
		if err != nil {
			return relays, err
		}
	}
	return relays, g.caughtUp(ctx, relays[0])
}

// settle has a relay read the log of how the load was made, and ends it: what it costs to read that is not a cost of deliveries.
func (g *growing) settle(ctx context.Context) error {
	p, err := g.launchRelay(ctx, "warn")
	if err != nil {
		return err
	}
	return errors.Join(g.caughtUp(ctx, p), p.stop())
}

// caughtUp waits until a relay has confirmed all that is in the log now. The checkpoint is for the slot, which is read from the last one before what is
// confirmed, and for the disk, which has nothing left to write of how the load was made.
func (g *growing) caughtUp(ctx context.Context, p *process) error {
	if err := g.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	var end string
	if err := g.pool.QueryRow(ctx, "SELECT pg_current_wal_lsn()::text").Scan(&end); err != nil {
		return fmt.Errorf("ask for the end of the log: %w", err)
	}
	return g.until(ctx, p, func() (confirmed bool, err error) {
		err = g.pool.QueryRow(ctx, "SELECT confirmed_flush_lsn >= $1::text::pg_lsn FROM pg_replication_slots", end).Scan(&confirmed)
		return confirmed, err
	})
}

// settled is how long a relay may take to read the log of how the greatest load was made.
const settled = 5 * time.Minute

// until waits until something is done. It gives up when the process ends.
func (g *growing) until(ctx context.Context, p *process, done func() (bool, error)) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(settled)
	defer limit.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return fmt.Errorf("%s is not up", p.name) // stop tells how it ended
		case <-limit.C:
			return fmt.Errorf("%s is not up after %s\n%s", p.name, settled, p.stderr.String())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// recorded makes sure that every delivery has its outcome, after the relays have ended in order.
func (g *growing) recorded(ctx context.Context, n int) error {
	got, err := g.delivered(ctx)
	if err == nil && got != n {
		err = fmt.Errorf("%d outcomes are recorded for %d deliveries", got, n)
	}
	return err
}
