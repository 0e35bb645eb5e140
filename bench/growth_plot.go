package main

import (
	"bytes"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// drawPlot draws what a delivery costs, and beside it what memory the relay has taken, over the same x.
func drawPlot(file string, a *axis, curves []curve) error {
	cost, memory := newPanel("µs a delivery", a.name), newPanel("peak memory of the relay, MiB", a.name)
	for i := range curves {
		c := &curves[i]
		if err := errors.Join(cost.add(i, c, (*point).costs), memory.add(i, c, func(p *point) []float64 { return p.peak }), cost.expect(i, c)); err != nil {
			return fmt.Errorf("plot %s: %w", file, err)
		}
	}
	row := []*plot.Plot{cost.finish(), memory.finish()}
	canvas := vgsvg.New(9*vg.Inch, 3.6*vg.Inch)
	all := draw.New(canvas)
	all.SetColor(color.White)
	all.Fill(all.Path())
	all.FillText(heading(), vg.Point{X: all.Center().X, Y: all.Max.Y - 4*vg.Millimeter}, a.about)
	tiles := draw.Tiles{
		Rows: 1, Cols: 2, PadX: 6 * vg.Millimeter,
		PadTop: 10 * vg.Millimeter, PadBottom: 2 * vg.Millimeter, PadLeft: 2 * vg.Millimeter, PadRight: 4 * vg.Millimeter,
	}
	for i, at := range plot.Align([][]*plot.Plot{row}, tiles, all)[0] {
		row[i].Draw(at)
	}
	var text bytes.Buffer
	if _, err := canvas.WriteTo(&text); err != nil {
		return fmt.Errorf("plot %s: %w", file, err)
	}
	svg := bytes.ReplaceAll(text.Bytes(), []byte(":Liberation Sans;"), []byte(":Liberation Sans,Arial,Helvetica,sans-serif;")) // which not everybody has
	if err := os.WriteFile(file, svg, 0o644); err != nil {                                                                     //nolint:gosec // for everybody to read
		return fmt.Errorf("write plot: %w", err)
	}
	return nil
}

// heading is the style of what stands over both panels.
func heading() draw.TextStyle {
	style := plot.New().Title.TextStyle
	style.Font.Variant, style.Font.Size, style.XAlign, style.YAlign = "Sans", 13, draw.XCenter, draw.YTop
	return style
}

// panel is one plot, with what it is to show.
type panel struct {
	*plot.Plot

	xs, ys []float64
}

func newPanel(title, x string) *panel {
	p := &panel{Plot: plot.New()}
	p.Title.Text, p.X.Label.Text = title, x
	p.X.Scale = plot.LogScale{}
	for _, style := range []*draw.TextStyle{&p.Title.TextStyle, &p.X.Label.TextStyle, &p.X.Tick.Label, &p.Y.Tick.Label, &p.Legend.TextStyle} {
		style.Font.Variant, style.Font.Size = "Sans", 10
	}
	p.Title.Padding = 2 * vg.Millimeter
	p.Legend.Top, p.Legend.Left = true, true
	p.Legend.XOffs, p.Legend.Padding = 2*vg.Millimeter, vg.Millimeter/2
	return p
}

// bars are the medians with the least and the most of the rounds.
type bars struct {
	plotter.XYs
	plotter.YErrors
}

// add draws a curve, the i-th of the panel.
func (p *panel) add(i int, c *curve, values func(*point) []float64) error {
	var b bars
	for j := range c.points {
		list := values(&c.points[j])
		x, y := float64(c.points[j].x), median(list)
		b.XYs = append(b.XYs, plotter.XY{X: x, Y: y})
		b.YErrors = append(b.YErrors, struct{ Low, High float64 }{y - slices.Min(list), slices.Max(list) - y})
		p.xs, p.ys = append(p.xs, x), append(p.ys, slices.Min(list), slices.Max(list))
	}
	path, dots, err := plotter.NewLinePoints(b.XYs)
	if err != nil {
		return err
	}
	spread, err := plotter.NewYErrorBars(b)
	if err != nil {
		return err
	}
	path.Color, path.Width = ink(i), vg.Points(1.5)
	dots.Color, dots.Shape = ink(i), draw.CircleGlyph{}
	spread.Color = ink(i)
	p.Add(path, dots, spread)
	if c.line.name != "" {
		p.Legend.Add(c.line.name, path, dots)
	}
	return nil
}

// expect draws the shape that the i-th curve should have, from what it is at its first point.
func (p *panel) expect(i int, c *curve) error {
	const steps = 100
	from, to := &c.points[0], &c.points[len(c.points)-1]
	x, end := float64(from.x), float64(to.x)
	path := make(plotter.XYs, steps+1)
	for j := range path {
		at := x * math.Pow(end/x, float64(j)/steps) // even steps, as the scale is a logarithm
		path[j] = plotter.XY{X: at, Y: c.line.shape.at(at, x, end, median(from.costs()), median(to.costs()))}
	}
	l, err := plotter.NewLine(path)
	if err != nil {
		return err
	}
	l.Color, l.Dashes = ink(i), []vg.Length{vg.Points(2), vg.Points(3)}
	p.Add(l)
	p.Legend.Add("expected: "+string(c.line.shape), l)
	return nil
}

// finish sets the scales. What grows more than tenfold has a logarithmic one, all else begins at zero, so that flat looks flat.
func (p *panel) finish() *plot.Plot {
	p.Add(plotter.NewGrid())
	least, most := slices.Min(p.ys), slices.Max(p.ys)
	p.X.Min, p.X.Max = slices.Min(p.xs)/1.2, slices.Max(p.xs)*1.2
	p.X.Tick.Marker = marks(p.xs)
	if least > 0 && most > 10*least {
		p.Y.Scale, p.Y.Min, p.Y.Max = plot.LogScale{}, least/2, most*4
		p.Y.Tick.Marker = plot.TickerFunc(func(low, high float64) []plot.Tick {
			list := plot.LogTicks{}.Ticks(low, high)
			for i := range list {
				if list[i].Label != "" {
					list[i].Label = brief(list[i].Value)
				}
			}
			return list
		})
		return p.Plot
	}
	p.Y.Min, p.Y.Max = 0, max(most, 1e-9)*1.5 // with room for the legend
	return p.Plot
}

// marks are ticks where there are points.
func marks(xs []float64) (list plot.ConstantTicks) {
	for _, x := range slices.Compact(slices.Sorted(slices.Values(xs))) {
		list = append(list, plot.Tick{Value: x, Label: brief(x)})
	}
	return list
}

// brief writes 10k for ten thousand.
func brief(v float64) string {
	for _, unit := range []struct {
		of   float64
		name string
	}{{1e6, "M"}, {1e3, "k"}} {
		if v >= unit.of {
			return strconv.FormatFloat(v/unit.of, 'g', 3, 64) + unit.name
		}
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// ink is the colour of the i-th curve; colour-blind people tell the two apart.
func ink(i int) color.Color {
	return []color.Color{color.RGBA{R: 0x00, G: 0x72, B: 0xb2, A: 0xff}, color.RGBA{R: 0xd5, G: 0x5e, B: 0x00, A: 0xff}}[i%2]
}
