package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// faultReport adds up results by scenario.
type faultReport struct {
	mu    sync.Mutex
	order []string
	sums  map[string]*faultSum
}

type faultSum struct {
	row   string
	seeds []uint64
	faultResult
}

func (f *faultReport) add(sc *scenario, r *faultResult) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sums == nil {
		f.sums = make(map[string]*faultSum)
	}
	s := f.sums[sc.name]
	if s == nil {
		s = &faultSum{row: sc.row}
		f.sums[sc.name] = s
		f.order = append(f.order, sc.name)
	}
	s.seeds = append(s.seeds, r.seed)
	s.faults += r.faults
	s.events += r.events
	s.pairs += r.pairs
	s.unclear += r.unclear
	s.lost += r.lost
	s.ghosts += r.ghosts
	s.phantoms += r.phantoms
	s.duplicates += r.duplicates
	s.allowed += r.allowed
	s.inverted += r.inverted
	s.samples += r.samples
	s.ahead += r.ahead
	s.recoveries = append(s.recoveries, r.recoveries...)
	s.takeovers = append(s.takeovers, r.takeovers...)
	s.walPeak, s.rssPeak = max(s.walPeak, r.walPeak), max(s.rssPeak, r.rssPeak)
	s.took += r.took
	if len(r.violations) > 0 {
		s.failed = append(s.failed, r.seed)
	}
}

// print writes the report that the fault plan asks for.
func (f *faultReport) print(out io.Writer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(w, strings.Join([]string{
		"scenario", "seeds", "faults", "events", "pairs", "unclear", "lost", "ghosts", "phantoms", "duplicates", "bound", "inverted", "samples", "against I4",
		"recovery p50", "max", "takeover p50", "max", "WAL MiB", "RSS MiB", "a run", "failed", "",
	}, "\t"))
	var all faultSum
	slices.Sort(f.order)
	for _, name := range f.order {
		s := f.sums[name]
		s.write(w, name)
		all.seeds = append(all.seeds, s.seeds...)
		all.faults, all.events, all.pairs, all.unclear = all.faults+s.faults, all.events+s.events, all.pairs+s.pairs, all.unclear+s.unclear
		all.lost, all.ghosts, all.duplicates, all.allowed = all.lost+s.lost, all.ghosts+s.ghosts, all.duplicates+s.duplicates, all.allowed+s.allowed
		all.phantoms += s.phantoms
		all.inverted, all.samples, all.ahead, all.took = all.inverted+s.inverted, all.samples+s.samples, all.ahead+s.ahead, all.took+s.took
		all.recoveries, all.takeovers = append(all.recoveries, s.recoveries...), append(all.takeovers, s.takeovers...)
		all.walPeak, all.rssPeak = max(all.walPeak, s.walPeak), max(all.rssPeak, s.rssPeak)
		all.failed = append(all.failed, s.failed...)
	}
	all.write(w, "all")
	_ = w.Flush()
}

func (s *faultSum) write(w io.Writer, name string) {
	_, _ = fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t%s\t%s\t%s\t%s\t%d\t%d\t%s\t%v\t\n", name, len(s.seeds), s.faults, s.events, s.pairs, s.unclear,
		s.lost, s.ghosts, s.phantoms, s.duplicates, s.allowed, s.inverted, s.samples, s.ahead, middle(s.recoveries), longest(s.recoveries), middle(s.takeovers), longest(s.takeovers),
		s.walPeak>>20, s.rssPeak>>20, (s.took / time.Duration(max(len(s.seeds), 1))).Round(100*time.Millisecond), s.failed)
}

func middle(list []time.Duration) string {
	if len(list) == 0 {
		return "-"
	}
	slices.Sort(list)
	return list[len(list)/2].Round(time.Millisecond).String()
}

func longest(list []time.Duration) string {
	if len(list) == 0 {
		return "-"
	}
	return slices.Max(list).Round(time.Millisecond).String()
}
