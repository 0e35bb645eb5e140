package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

const aboutGrowth = `Usage, in the folder bench: go run . growth [flags]

Measures what a delivery costs when one thing grows and all else stays, with the relay's defaults. Draws a
plot for each axis (SVG), and prints a table in Markdown. Each point has a new PostgreSQL with fsync on and a
receiver, a process of its own, which answers at once; the points of an axis run once in each round, in
rotating order, and what is drawn are the medians, with the least and the most of the rounds.

The cost is the time between the first and the last receipt ÷ deliveries. Before that a relay has read the
log of how tenants and endpoints were made, so that it is not among the costs. Deliveries are of events that
are committed one a transaction before the relay starts, or, where the axis says due, of rows of the retry
queue that have failed once and become due together.

Axes:
`

// growthOptions say what to measure.
type growthOptions struct {
	axis       *regexp.Regexp
	scale      float64 // of deliveries, and of the greatest x of each axis
	rounds     int
	deliveries int
	out        string // folder for the plots
}

// grown is one run of a point.
type grown struct {
	Axis       string  `json:"axis"`
	Line       string  `json:"line,omitempty"`
	X          int     `json:"x"`
	Round      int     `json:"round"`
	Deliveries int     `json:"deliveries"`
	Micros     float64 `json:"us_per_delivery"`
	CPU        float64 `json:"cpu_s_per_1000"`        // of all relays; zero where it is not known
	Peak       float64 `json:"peak_mib"`              // of the largest relay
	Slower     float64 `json:"last_tenth_to_first"`   // time of the last tenth of the deliveries ÷ time of the first
	Start      float64 `json:"s_until_first_receipt"` // from the start of the relay, or from when the deliveries became due
}

func runGrowth(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("bench growth", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o growthOptions
	axis := flags.String("axis", "", "`regexp` of the axes to measure, all if empty")
	flags.Float64Var(&o.scale, "scale", 1, "`share` of the deliveries and of the greatest size of each axis, for a quick look")
	flags.IntVar(&o.rounds, "rounds", 3, "`number` of rounds")
	flags.IntVar(&o.deliveries, "deliveries", 30_000, "`number` of deliveries of a point; some axes have others, see the table")
	flags.StringVar(&o.out, "out", "growth", "`folder` for the plots")
	file := flags.String("json", "", "`file` for the raw numbers")
	flags.Usage = func() {
		_, _ = io.WriteString(stderr, aboutGrowth)
		for _, a := range axes(0) {
			fmt.Fprintf(stderr, "  %-14s %s\n", a.name, a.about)
		}
		_, _ = io.WriteString(stderr, "\nFlags:\n")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if o.axis, err = regexp.Compile(*axis); err != nil {
		return fmt.Errorf("-axis: %w", err)
	}
	if err := o.validate(); err != nil {
		return err
	}
	list, err := grow(ctx, o, stderr)
	err = errors.Join(err, growthReport(stdout, list), plots(o.out, list))
	if *file != "" {
		err = errors.Join(err, writeJSON(*file, list))
	}
	return err
}

func (o *growthOptions) validate() error {
	var faults []error
	if o.scale <= 0 || o.scale > 1 {
		faults = append(faults, fmt.Errorf("-scale %g: more than 0, and 1 at most", o.scale))
	}
	if o.rounds < 1 {
		faults = append(faults, fmt.Errorf("-rounds %d: 1 or more", o.rounds))
	}
	if o.deliveries < fewest {
		faults = append(faults, fmt.Errorf("-deliveries %d: %d or more", o.deliveries, fewest))
	}
	return errors.Join(faults...)
}

// grow measures. What could be measured is in the list even if there is an error.
func grow(ctx context.Context, o growthOptions, progress io.Writer) (list []grown, err error) {
	dir, err := os.MkdirTemp("", "outbox-relay-bench-")
	if err != nil {
		return nil, fmt.Errorf("make folder: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	n := max(fewest, int(float64(o.deliveries)*o.scale))
	var chosen []axis
	for _, a := range axes(n) {
		if o.axis == nil || o.axis.MatchString(a.name) {
			chosen = append(chosen, a)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no axis matches %q", o.axis)
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // for everybody to read
		return nil, fmt.Errorf("-out: %w", err)
	}
	fmt.Fprintln(progress, "building the relay")
	binary, err := buildRelay(ctx, dir)
	if err != nil {
		return nil, err
	}
	var faults []error
	for i := range chosen {
		v := venue{binary: binary, dir: dir, most: make(map[string]int), progress: progress}
		runs := v.points(&chosen[i], n, o.scale)
		err := v.each(ctx, chosen[i].name, o.rounds, func(ctx context.Context, round int, name string, _ *stage, in contender) (string, error) {
			g := runs[name]
			g.Round = round
			if err := g.measure(ctx, in); err != nil {
				return "", err
			}
			list = append(list, g)
			return fmt.Sprintf("%.1f µs a delivery, peak %.0f MiB", g.Micros, g.Peak), nil
		})
		if ctx.Err() != nil {
			return list, ctx.Err()
		}
		faults = append(faults, err)
	}
	return list, errors.Join(faults...)
}

// points puts every point of an axis on the list of the venue. It returns what is known of each before it runs, by its name there.
func (v *venue) points(a *axis, n int, scale float64) map[string]grown {
	runs := make(map[string]grown)
	for i := range a.lines {
		l := &a.lines[i]
		for _, x := range l.short(scale) {
			name := strings.TrimPrefix(l.name+", "+grouped(x), ", ")
			at := l.load(n, x)
			runs[name] = grown{Axis: a.name, Line: l.name, X: x, Deliveries: at.deliveries}
			if l.once > 0 && x >= l.once {
				v.most[name] = 1
			}
			v.list = append(v.list, candidate{name: name, enter: func(ctx context.Context, s *stage) (contender, error) {
				g := &growing{stage: s, load: at, progress: v.progress}
				if err := g.found(ctx); err != nil || at.due {
					return g, err
				}
				return g, g.settle(ctx)
			}})
		}
	}
	return runs
}

// measure runs the point once.
func (g *grown) measure(ctx context.Context, in contender) error {
	if err := in.fill(ctx, g.Deliveries); err != nil {
		return err
	}
	d, err := in.drain(ctx, g.Deliveries)
	if err != nil {
		return err
	}
	g.Micros, g.CPU = d.took.Seconds()*1e6/float64(g.Deliveries), per1000(d.cpu, g.Deliveries)
	g.Peak, g.Slower, g.Start = float64(d.peak)/(1<<20), d.slower, d.start.Seconds()
	return nil
}

// plots draws one plot for each axis into the folder.
func plots(folder string, list []grown) error {
	var faults []error
	for _, a := range axes(0) {
		if c := curves(&a, list); len(c) > 0 {
			faults = append(faults, drawPlot(filepath.Join(folder, a.name+".svg"), &a, c))
		}
	}
	return errors.Join(faults...)
}
