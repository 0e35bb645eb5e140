package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
)

func TestPlainViewHasALineASecond(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	v := newDemoView(&out)
	v.step("an application inserts %d events", 7)
	began := time.Now()
	for i := range 12 {
		v.show(began.Add(time.Duration(i)*200*time.Millisecond), demoSample{
			committed: 1000 * i, received: 1200 * i, expected: 1200*i + 9, waiting: 3, dead: 4, median: 400 * time.Microsecond, slowest: 12 * time.Millisecond,
		})
	}
	assert.Equal(t, `… an application inserts 7 events
  0s  committed 0  received 0  in flight 2  retrying 3  dead letters 4  0/s  p50 0.4 ms  p99 12 ms
  1s  committed 5,000  received 6,000  in flight 2  retrying 3  dead letters 4  6,000/s  p50 0.4 ms  p99 12 ms
  2s  committed 10,000  received 12,000  in flight 2  retrying 3  dead letters 4  6,000/s  p50 0.4 ms  p99 12 ms
`, out.String())
}

func TestTerminalViewRewritesItsLines(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	v := &demoView{out: &out, rewrites: true}
	now := time.Now()
	v.show(now, demoSample{committed: 1})
	first := out.String()
	assert.NotContains(t, first, "A\r", "nothing to go up over")
	out.Reset()
	v.show(now.Add(time.Second), demoSample{committed: 2})
	assert.True(t, strings.HasPrefix(out.String(), "\x1b[5A\r\x1b[2K"), "%q", out.String())
	assert.Equal(t, 5, strings.Count(first, "\n"))
	assert.NotRegexp(t, `\x1b\[\d+m`, out.String(), "colours were not asked for")
	out.Reset()
	v.step("waiting")
	v.show(now.Add(2*time.Second), demoSample{})
	assert.NotContains(t, out.String(), "\x1b[5A", "the step stays")
	for line := range strings.Lines(first) {
		assert.LessOrEqual(t, len(strings.TrimPrefix(line, "\r\x1b[2K")), 80)
	}
}

func TestReport(t *testing.T) {
	t.Parallel()
	r := &demoResult{
		events: 13_270, rolled: 1730, expected: 14_700, delivered: 14_576, retried: 766, dead: 124, recorded: 14_700,
		perSecond: 999.6, measured: 9000, median: 612 * time.Microsecond, slowest: 14 * time.Millisecond,
	}
	var out strings.Builder
	v := &demoView{out: &out}
	v.report(r)
	assert.Equal(t, `
      committed       13,270   events
    rolled back        1,730   events, with their transaction or to a savepoint
      delivered       14,576   of 14,700 due: a committed event, a subscription to it
        retried          766   took more than one request
  dead-lettered          124   given up, kept for a person to replay
           lost            0   neither received nor dead-lettered
         ghosts            0   sent though rolled back, or not subscribed to
     duplicates            0   received more than once
 bad signatures            0   requests
     unrecorded            0   other than that in the database's 14,700 deliveries
       events/s          999   until the healthy receiver had the last of them
      p50 / p99  0.6 / 14 ms   from COMMIT to receipt at the healthy receiver

You saw committed events arrive as signed webhooks, none lost and nothing of a rollback sent.
Next: the README's five minutes to your own database, from: outbox-relay migrate --database-url postgres://…
`, out.String())

	out.Reset()
	r.lost = 2
	v.colors = true
	v.report(r)
	assert.Contains(t, out.String(), "lost \x1b[31m           2\x1b[0m")
	assert.Contains(t, out.String(), "ghosts \x1b[32m           0\x1b[0m")
	assert.Contains(t, out.String(), "has not kept its promise")
}

func TestNumbersForPeople(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1000: "-1,000", -100: "-100"} {
		assert.Equal(t, want, thousands(n))
	}
	for d, want := range map[time.Duration]string{
		0: "0.0 ms", 640 * time.Microsecond: "0.6 ms", 9960 * time.Microsecond: "10 ms", 14_600 * time.Microsecond: "15 ms", 61 * time.Second: "61,000 ms",
	} {
		assert.Equal(t, want, millis(d))
	}
}
