package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// demoView tells a person how it goes: on a terminal in lines that it writes anew, anywhere else in one line a second. It is for one goroutine at a
// time.
type demoView struct {
	out      io.Writer
	rewrites bool
	painter
	drawn  int // lines of the frame that is on the screen
	began  time.Time
	next   time.Time // when the next plain line is due
	frames []demoFrameAt
}

// demoFrameAt is what a rate is taken from.
type demoFrameAt struct {
	at       time.Time
	received int
}

func newDemoView(out io.Writer) *demoView {
	return &demoView{out: out, rewrites: rewritable(out), painter: painterFor(out)}
}

// step says what happens next, or what there is.
func (v *demoView) step(format string, args ...any) {
	v.drawn = 0
	say(v.out, "%s %s\n", v.paint(colorDim, "…"), fmt.Sprintf(format, args...))
}

// show draws a sample.
func (v *demoView) show(now time.Time, s demoSample) {
	if v.began.IsZero() {
		v.began, v.next = now, now
	}
	rate := v.rate(now, s.received)
	if !v.rewrites {
		if now.Before(v.next) {
			return
		}
		v.next = v.next.Add(time.Second)
		say(v.out, "%3.0fs  committed %s  received %s  in flight %d  retrying %d  dead letters %d  %s/s  p50 %s  p99 %s\n",
			now.Sub(v.began).Seconds(), thousands(s.committed), thousands(s.received), s.inFlight(), s.waiting, s.dead,
			thousands(rate), millis(s.median), millis(s.slowest))
		return
	}
	lines := []string{
		"",
		fmt.Sprintf("   committed %9s   rolled back %8s", thousands(s.committed), thousands(s.rolled)),
		fmt.Sprintf("   received  %9s   in flight   %8s   %s/s", thousands(s.received), thousands(s.inFlight()), thousands(rate)),
		fmt.Sprintf("   retrying  %9s   dead letters %7s", thousands(s.waiting), thousands(s.dead)),
		fmt.Sprintf("   from COMMIT to receipt       p50 %s   p99 %s", millis(s.median), millis(s.slowest)),
	}
	var b strings.Builder
	if v.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", v.drawn) // up
	}
	for _, line := range lines {
		b.WriteString("\r\x1b[2K" + line + "\n") // over what is there
	}
	v.drawn = len(lines)
	say(v.out, "%s", b.String())
}

// rate is how many deliveries a second have been received, over about the last second.
func (v *demoView) rate(now time.Time, received int) int {
	v.frames = append(v.frames, demoFrameAt{now, received})
	for len(v.frames) > 2 && now.Sub(v.frames[1].at) >= time.Second {
		v.frames = v.frames[1:]
	}
	took := now.Sub(v.frames[0].at).Seconds()
	if took <= 0 {
		return 0
	}
	return int(float64(received-v.frames[0].received) / took)
}

// report prints the table and what it means.
func (v *demoView) report(r *demoResult) {
	row := func(name, value, note string) { say(v.out, "%15s %12s   %s\n", name, value, v.paint(colorDim, note)) }
	count := func(name string, n int, note string) { row(name, thousands(n), note) }
	// A number that has to be zero.
	zero := func(name string, n int, note string) {
		color := colorGreen
		if n > 0 {
			color = colorRed
		}
		say(v.out, "%15s %s   %s\n", name, v.paint(color, fmt.Sprintf("%12s", thousands(n))), v.paint(colorDim, note))
	}
	latency := "-"
	if r.measured > 0 {
		latency = strings.TrimSuffix(millis(r.median), " ms") + " / " + millis(r.slowest)
	}
	say(v.out, "\n")
	count("committed", r.events, "events")
	count("rolled back", r.rolled, "events, with their transaction or to a savepoint")
	count("delivered", r.delivered, fmt.Sprintf("of %s due: a committed event, a subscription to it", thousands(r.expected)))
	count("retried", r.retried, "took more than one request")
	count("dead-lettered", r.dead, "given up, kept for a person to replay")
	zero("lost", r.lost, "neither received nor dead-lettered")
	zero("ghosts", r.ghosts, "sent though rolled back, or not subscribed to")
	count("duplicates", r.duplicates, "received more than once")
	zero("bad signatures", r.forgeries, "requests")
	zero("unrecorded", r.unrecorded, fmt.Sprintf("other than that in the database's %s deliveries", thousands(r.recorded)))
	count("events/s", int(r.perSecond), "until the healthy receiver had the last of them")
	row("p50 / p99", latency, "from COMMIT to receipt at the healthy receiver")
	say(v.out, "\n%s\n%s\n", r.verdict(), demoNext)
}

const demoNext = "Next: the README's five minutes to your own database, from: outbox-relay migrate --database-url postgres://…"

// verdict says what was to be seen.
func (r *demoResult) verdict() string {
	if r.err() != nil {
		return "The relay has not kept its promise: please report what you see here, with the log of --log-level debug."
	}
	return "You saw committed events arrive as signed webhooks, none lost and nothing of a rollback sent."
}

// thousands groups digits.
func thousands(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// millis is a duration in milliseconds, with a decimal where it matters.
func millis(d time.Duration) string {
	ms := float64(d) / float64(time.Millisecond)
	if ms < 9.95 {
		return fmt.Sprintf("%.1f ms", ms)
	}
	return thousands(int(ms+.5)) + " ms"
}
