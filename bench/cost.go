package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

const aboutCost = `Usage, in the folder bench: go run . cost [flags]

Measures what the relay costs the application: how fast and how long its transactions are that insert one event
each, alone and with a relay that delivers them, and how much write-ahead log an event comes to. Each run has a
new PostgreSQL with fsync on and a receiver of its own; in each round every set-up runs once, in rotating order.

busy    4 connections commit as fast as they can. With few processors the relay, the receiver and PostgreSQL share
        them with the application, which is most of what is seen here.
steady  4 connections commit at a rate. What is left is what the application waits longer for a COMMIT.

Set-ups:
  table   the table of events as an application has it, which nobody reads
  schema  the same with what the relay adds to it: a column, its index, a publication; no relay runs
  relay   the same with a relay that delivers each event

The log is that of the steady load, until every outcome is recorded.

Flags:
`

// inserters is the number of the application's connections.
const inserters = 4

// costOptions say what to measure.
type costOptions struct {
	rounds int
	length time.Duration // of each load
	rate   float64       // of the steady one, in events a second
}

// cost is one run of one set-up.
type cost struct {
	Setup     string  `json:"setup"`
	Round     int     `json:"round"`
	BusyRate  float64 `json:"busy_per_s"`
	BusyP50   float64 `json:"busy_p50_ms"`
	BusyP99   float64 `json:"busy_p99_ms"`
	Rate      float64 `json:"steady_per_s"`
	P50       float64 `json:"steady_p50_ms"`
	P99       float64 `json:"steady_p99_ms"`
	WAL       float64 `json:"wal_bytes_per_event"`
	TableSize float64 `json:"table_bytes_per_event"` // of the table of events with its indexes
}

// setups are what is compared.
var setups = []string{"table", "schema", "relay"} //nolint:gochecknoglobals // a constant, if slices could be

func runCost(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench cost", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o costOptions
	flags.IntVar(&o.rounds, "rounds", 5, "`number` of rounds")
	flags.DurationVar(&o.length, "length", 10*time.Second, "`time` of each load")
	flags.Float64Var(&o.rate, "rate", 1000, "`events` a second of the steady load")
	file := flags.String("json", "", "`file` for the raw numbers")
	flags.Usage = func() {
		_, _ = io.WriteString(stderr, aboutCost)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case o.rounds < 1:
		return fmt.Errorf("-rounds %d: 1 or more", o.rounds)
	case o.length <= 0:
		return fmt.Errorf("-length %s: more than 0", o.length)
	case o.rate <= 0:
		return fmt.Errorf("-rate %g: more than 0", o.rate)
	}
	list, err := measureCosts(ctx, o, stderr)
	err = errors.Join(err, costReport(stdout, list))
	if *file != "" {
		err = errors.Join(err, writeJSON(*file, list))
	}
	return err
}

// measureCosts measures. What could be measured is in the list even if there is an error.
func measureCosts(ctx context.Context, o costOptions, progress io.Writer) (list []cost, err error) {
	dir, err := os.MkdirTemp("", "outbox-relay-bench-")
	if err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fmt.Fprintln(progress, "building the relay")
	binary, err := buildRelay(ctx, dir)
	if err != nil {
		return nil, err
	}
	for round := 1; round <= o.rounds; round++ {
		for i := range setups {
			setup := setups[(i+round-1)%len(setups)]
			c, err := measureCost(ctx, setup, binary, dir, o)
			if err != nil {
				return list, fmt.Errorf("round %d: %s: %w", round, setup, err)
			}
			c.Round = round
			list = append(list, c)
			fmt.Fprintf(progress, "round %d of %d: %-6s %.0f commits/s, p99 %.2f ms at %.0f/s\n", round, o.rounds, setup, c.BusyRate, c.P99, c.Rate)
		}
	}
	return list, nil
}

func measureCost(ctx context.Context, setup, binary, dir string, o costOptions) (c cost, err error) {
	s, err := newStage(ctx, binary, dir)
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, s.close()) }() //nolint:contextcheck // it ends in order even if ctx is done
	in, err := newRelay(ctx, s)
	if err != nil {
		return c, err
	}
	var p *process
	switch setup {
	case "table":
		err = s.exec(ctx, "DROP PUBLICATION outbox_relay_events", "ALTER TABLE bench.webhook_events DROP COLUMN xid")
	case "relay":
		d, ok := in.(deliverer)
		if !ok {
			return c, errors.New("the relay delivers nothing")
		}
		if p, err = d.start(ctx); err == nil {
			defer func() { err = errors.Join(err, p.stop()) }()
		}
	}
	if err != nil {
		return c, err
	}
	c.Setup = setup
	return c, c.measure(ctx, s, p, o)
}

// measure has the application commit as fast as it can, and then at a rate.
func (c *cost) measure(ctx context.Context, s *stage, p *process, o costOptions) error {
	delivered := func(n int) error {
		if p == nil {
			return nil
		}
		if _, err := s.await(ctx, p, n); err != nil {
			return err
		}
		return s.awaitRecorded(ctx, n)
	}
	if _, _, err := s.insertFor(ctx, 1, time.Nanosecond, 0); err != nil { // the relay is up once it has delivered
		return err
	}
	if err := delivered(1); err != nil {
		return err
	}
	waits, took, err := s.insertFor(ctx, inserters, o.length, 0)
	if err != nil {
		return err
	}
	events := 1 + len(waits)
	c.BusyRate, c.BusyP50, c.BusyP99 = float64(len(waits))/took.Seconds(), quantile(waits, 0.5), quantile(waits, 0.99)
	if err := delivered(events); err != nil {
		return err
	}
	var before, after int64
	const position = "SELECT (pg_current_wal_insert_lsn() - '0/0')::int8"
	// Else the first change of each page is logged with all of the page in one set-up and not in another.
	if err := s.exec(ctx, "CHECKPOINT"); err != nil {
		return err
	}
	if err := s.pool.QueryRow(ctx, position).Scan(&before); err != nil {
		return fmt.Errorf("read the position of the log: %w", err)
	}
	gap := time.Duration(float64(inserters) * float64(time.Second) / o.rate)
	if waits, took, err = s.insertFor(ctx, inserters, o.length, gap); err != nil {
		return err
	}
	c.Rate, c.P50, c.P99 = float64(len(waits))/took.Seconds(), quantile(waits, 0.5), quantile(waits, 0.99)
	if err := delivered(events + len(waits)); err != nil {
		return err
	}
	if err := s.pool.QueryRow(ctx, position).Scan(&after); err != nil {
		return fmt.Errorf("read the position of the log: %w", err)
	}
	c.WAL = float64(after-before) / float64(len(waits))
	err = s.pool.QueryRow(ctx, "SELECT pg_total_relation_size('bench.webhook_events')::float8 / $1::int8", events+len(waits)).Scan(&c.TableSize)
	if err != nil {
		return fmt.Errorf("read the size of the table: %w", err)
	}
	return nil
}

// insertFor commits one event a transaction from several connections for a while: each every gap, or as fast as it can if that is zero. It returns how
// long each transaction took, from BEGIN to the answer of COMMIT, sorted.
func (s *stage) insertFor(ctx context.Context, connections int, length, gap time.Duration) ([]time.Duration, time.Duration, error) {
	parts := make([][]time.Duration, connections)
	began := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	for i := range connections {
		group.Go(func() (err error) {
			parts[i], err = s.insertOn(ctx, began.Add(time.Duration(i)*gap/time.Duration(connections)), began.Add(length), gap)
			return err
		})
	}
	err := group.Wait()
	took := time.Since(began)
	return slices.Sorted(slices.Values(slices.Concat(parts...))), took, err
}

func (s *stage) insertOn(ctx context.Context, from, to time.Time, gap time.Duration) (waits []time.Duration, err error) {
	conn, err := pgx.Connect(ctx, s.dsn)
	if err != nil {
		return nil, fmt.Errorf("connect writer: %w", err)
	}
	defer func() { err = errors.Join(err, conn.Close(context.WithoutCancel(ctx))) }()
	timer := time.NewTimer(time.Until(from))
	defer timer.Stop()
	sql := strings.ReplaceAll(eventSQL, "i::text", "$1::int::text")
	sql = strings.ReplaceAll(sql, "'n', i,", "'n', $1::int,")
	for at := from; at.Before(to); at = at.Add(gap) {
		if gap > 0 {
			timer.Reset(time.Until(at))
			select {
			case <-timer.C:
			case <-ctx.Done():
				return waits, ctx.Err()
			}
		} else {
			at = time.Now()
		}
		began := time.Now()
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, sql, len(waits))
			return err
		})
		if err != nil {
			return waits, fmt.Errorf("insert event: %w", err)
		}
		waits = append(waits, time.Since(began))
	}
	return waits, nil
}

// awaitRecorded waits until the outcomes of n events are durable.
func (s *stage) awaitRecorded(ctx context.Context, n int) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(patience); ; {
		var got int
		if err := s.pool.QueryRow(ctx, "SELECT count(*) FROM bench.webhook_deliveries WHERE delivery_status = 'success'").Scan(&got); err != nil {
			return fmt.Errorf("count outcomes: %w", err)
		}
		if got >= n {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("%d outcomes are recorded for %d events", got, n)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// costReport writes the table in Markdown.
func costReport(w io.Writer, list []cost) error {
	if len(list) == 0 {
		return nil
	}
	var b strings.Builder
	rounds := 0
	busy, steady := make(map[string]map[int]float64), make(map[string]map[int]float64)
	for _, c := range list {
		rounds = max(rounds, c.Round)
		if busy[c.Setup] == nil {
			busy[c.Setup], steady[c.Setup] = make(map[int]float64), make(map[int]float64)
		}
		busy[c.Setup][c.Round], steady[c.Setup][c.Round] = c.BusyRate, c.P50
	}
	fmt.Fprintf(&b, "Transactions of one event each, medians of %d rounds; the ratios are the medians of those of each round:\n\n", rounds)
	b.WriteString("| Set-up | Busy: commits/s | ÷ table | p50 ms | p99 ms | Steady: commits/s | p50 ms | ÷ table | p99 ms | WAL bytes per event | Table bytes per event |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, setup := range setups {
		of := func(value func(c *cost) float64) float64 {
			var all []float64
			for i := range list {
				if list[i].Setup == setup {
					all = append(all, value(&list[i]))
				}
			}
			return median(all)
		}
		fmt.Fprintf(&b, "| %s | %.0f | %s | %.2f | %.2f | %.0f | %.2f | %s | %.2f | %.0f | %.0f |\n", setup,
			of(func(c *cost) float64 { return c.BusyRate }), ratio(busy[setup], busy["table"]),
			of(func(c *cost) float64 { return c.BusyP50 }), of(func(c *cost) float64 { return c.BusyP99 }),
			of(func(c *cost) float64 { return c.Rate }), of(func(c *cost) float64 { return c.P50 }), ratio(steady[setup], steady["table"]),
			of(func(c *cost) float64 { return c.P99 }), of(func(c *cost) float64 { return c.WAL }), of(func(c *cost) float64 { return c.TableSize }))
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}
