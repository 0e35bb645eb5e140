package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
)

// curve is a line as it was measured.
type curve struct {
	line   *line
	points []point
}

// point holds what all rounds of it have in common, and each of them.
type point struct {
	x, deliveries             int
	micros                    map[int]float64 // by round
	cpu, peak, slower, starts []float64
}

// curves sorts the runs of an axis. A line that was not measured is not among them.
func curves(a *axis, list []grown) (all []curve) {
	for i := range a.lines {
		c := curve{line: &a.lines[i]}
		for _, x := range c.line.xs {
			p := point{x: x, micros: make(map[int]float64)}
			for _, g := range list {
				if g.Axis != a.name || g.Line != c.line.name || g.X != x {
					continue
				}
				p.deliveries, p.micros[g.Round] = g.Deliveries, g.Micros
				p.cpu, p.peak, p.slower, p.starts = append(p.cpu, g.CPU), append(p.peak, g.Peak), append(p.slower, g.Slower), append(p.starts, g.Start)
			}
			if len(p.micros) > 0 {
				c.points = append(c.points, p)
			}
		}
		if len(c.points) > 0 {
			all = append(all, c)
		}
	}
	return all
}

// costs lists those of all rounds.
func (p *point) costs() (list []float64) {
	for _, micros := range p.micros {
		list = append(list, micros)
	}
	return list
}

// growthReport writes a table in Markdown for each axis.
func growthReport(w io.Writer, list []grown) error {
	var b strings.Builder
	for _, a := range axes(0) {
		all := curves(&a, list)
		if len(all) == 0 {
			continue
		}
		fmt.Fprintf(&b, "%s: %s\n\n", a.name, a.about)
		b.WriteString("| | Deliveries | Rounds | µs each | ÷ first | CPU s per 1,000 | Peak MiB | Last tenth ÷ first | First after s |\n")
		b.WriteString("|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
		for _, c := range all {
			if c.line.name != "" {
				fmt.Fprintf(&b, "| *%s* | | | | | | | | |\n", c.line.name)
			}
			for _, p := range c.points {
				fmt.Fprintf(&b, "| %s | %s | %d | %.1f | %s | %s | %.0f | %.2f | %.2f |\n", grouped(p.x), grouped(p.deliveries), len(p.micros),
					median(p.costs()), ratio(p.micros, c.points[0].micros), known(median(p.cpu)), median(p.peak), median(p.slower), median(p.starts))
			}
		}
		b.WriteString("\n")
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// grouped writes 1,000 for a thousand.
func grouped(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
