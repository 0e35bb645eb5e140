package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
)

// report writes the tables in Markdown.
func report(w io.Writer, r results) error {
	var b strings.Builder
	if len(r.Drain) > 0 {
		drainTable(&b, r.Drain)
	}
	if len(r.Steady) > 0 {
		steadyTable(&b, r.Steady)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

func drainTable(b *strings.Builder, list []measured) {
	rates := make(map[string]map[int]float64) // by contender and round
	cpus := make(map[string][]float64)
	rounds := 0
	for _, m := range list {
		if rates[m.Contender] == nil {
			rates[m.Contender] = make(map[int]float64)
		}
		rates[m.Contender][m.Round] = m.Rate
		cpus[m.Contender] = append(cpus[m.Contender], m.CPU)
		rounds = max(rounds, m.Round)
	}
	fmt.Fprintf(b, "Drain of %d events, events/s, %d rounds; the ratios are the medians of those of each round:\n\n", list[0].Events, rounds)
	b.WriteString("| Contender | Median | Least | Most | ÷ post | ÷ relay | CPU s per 1,000 |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for _, c := range candidates() {
		own := rates[c.name]
		if len(own) == 0 {
			continue
		}
		var all []float64
		for _, rate := range own {
			all = append(all, rate)
		}
		fmt.Fprintf(b, "| %s: %s | %.0f | %.0f | %.0f | %s | %s | %s |\n", c.name, c.about, median(all), slices.Min(all), slices.Max(all),
			ratio(own, rates["post"]), ratio(own, rates["relay"]), known(median(cpus[c.name])))
	}
	b.WriteString("\n")
}

func steadyTable(b *strings.Builder, list []steadied) {
	rounds := 0
	for _, m := range list {
		rounds = max(rounds, m.Round)
	}
	fmt.Fprintf(b, "Steady load, milliseconds from COMMIT to receipt, medians of %d rounds:\n\n", rounds)
	b.WriteString("| Contender | Events/s | p50 | p90 | p99 | Max | CPU s per 1,000 | Duplicates |\n|---|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, c := range candidates() {
		of := func(value func(m *steadied) float64) float64 {
			var all []float64
			for i := range list {
				if list[i].Contender == c.name {
					all = append(all, value(&list[i]))
				}
			}
			return median(all)
		}
		if of(func(m *steadied) float64 { return m.Rate }) == 0 {
			continue
		}
		fmt.Fprintf(b, "| %s | %.0f | %.2f | %.2f | %.2f | %.2f | %s | %.0f |\n", c.name,
			of(func(m *steadied) float64 { return m.Rate }),
			of(func(m *steadied) float64 { return m.P50 }),
			of(func(m *steadied) float64 { return m.P90 }),
			of(func(m *steadied) float64 { return m.P99 }),
			of(func(m *steadied) float64 { return m.Max }),
			known(of(func(m *steadied) float64 { return m.CPU })),
			of(func(m *steadied) float64 { return float64(m.Duplicates) }))
	}
	b.WriteString("\n")
}

// ratio is the median of the ratios of the rounds that both have finished.
func ratio(own, other map[int]float64) string {
	var list []float64
	for round, rate := range own {
		if of := other[round]; of > 0 {
			list = append(list, rate/of)
		}
	}
	if len(list) == 0 {
		return "–"
	}
	return fmt.Sprintf("%.2f", median(list))
}

func known(v float64) string {
	if v == 0 {
		return "–"
	}
	return fmt.Sprintf("%.3f", v)
}

func median(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	list = slices.Sorted(slices.Values(list))
	n := len(list)
	return (list[(n-1)/2] + list[n/2]) / 2
}
