package main

import (
	"fmt"
	"text/tabwriter"
	"time"
)

// benchReport is what was measured.
type benchReport struct {
	Events     int     `json:"events"`
	Tenants    int     `json:"tenants"`
	Endpoints  int     `json:"endpoints_per_event"`
	Size       int     `json:"event_data_bytes"`
	AnswerMS   float64 `json:"answer_ms"`
	TargetRate float64 `json:"committed_per_second"` // zero: a backlog

	Deliveries int           `json:"deliveries"`
	Repeated   int           `json:"requests_beyond_them"`
	Seconds    float64       `json:"seconds"` // from the first request to the last
	Rate       float64       `json:"deliveries_per_second"`
	Latency    *benchLatency `json:"commit_to_receipt_ms,omitempty"`

	CPU      float64 `json:"relay_cpu_seconds_per_1000_deliveries"`
	Memory   int64   `json:"relay_peak_memory_bytes,omitempty"`
	WAL      float64 `json:"wal_bytes_per_event"` // while the relay worked: with a rate, the application's are among them
	Writes   float64 `json:"row_writes_per_event"`
	WithOwns bool    `json:"wal_includes_the_application"`
}

// benchLatency is in milliseconds.
type benchLatency struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

func (b *bench) report(before, after benchCounters) *benchReport {
	took := time.Duration(b.receiver.last.Load() - b.receiver.first.Load())
	events := float64(b.events)
	writes := float64(after.writes - before.writes)
	r := &benchReport{
		Events: b.events, Tenants: b.tenants, Endpoints: b.endpoints, Size: b.size, AnswerMS: ms(b.answer), TargetRate: b.rate,
		Deliveries: b.deliveries(), Repeated: int(b.receiver.count.Load()) - b.deliveries(), Seconds: took.Seconds(),
		Rate:   float64(b.deliveries()-1) / max(took.Seconds(), 1e-9),
		CPU:    b.relay.cpu.Seconds() * 1000 / float64(b.deliveries()),
		Memory: b.relay.peak,
		WAL:    float64(after.wal-before.wal) / events,
	}
	if b.rate > 0 {
		writes -= events
		r.WithOwns = true
		if list := b.latencies(); len(list) > 0 {
			at := func(p float64) float64 { return ms(percentile(list, p)) }
			r.Latency = &benchLatency{P50: at(50), P90: at(90), P99: at(99), Max: ms(list[len(list)-1])}
		}
	}
	r.Writes = writes / events
	return r
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// table writes it for people.
func (r *benchReport) table(w *tabwriter.Writer) {
	line := func(what, format string, args ...any) { say(w, "%s\t%s\n", what, fmt.Sprintf(format, args...)) }
	load := "a backlog"
	if r.TargetRate > 0 {
		load = fmt.Sprintf("%g a second", r.TargetRate)
	}
	line("events", "%s, %s, of %s bytes, in %s, to %s", thousands(r.Events), load, thousands(r.Size),
		plural(int64(r.Tenants), "tenant", "tenants"), plural(int64(r.Endpoints), "endpoint each", "endpoints each"))
	if r.AnswerMS > 0 {
		line("answered after", "%g ms", r.AnswerMS)
	}
	line("deliveries", "%s in %.2f s, all recorded; %s requests more", thousands(r.Deliveries), r.Seconds, thousands(r.Repeated))
	line("rate", "%s deliveries/s", thousands(int(r.Rate)))
	if l := r.Latency; l != nil {
		line("COMMIT to receipt", "p50 %.2f ms, p90 %.2f ms, p99 %.2f ms, max %.1f ms", l.P50, l.P90, l.P99, l.Max)
	}
	line("CPU of the relay", "%.3f s per 1,000 deliveries", r.CPU)
	if r.Memory > 0 {
		line("memory of the relay", "%.0f MB at most", float64(r.Memory)/1e6)
	}
	if r.WithOwns {
		line("WAL", "%s bytes per event, with the application's own", thousands(int(r.WAL)))
	} else {
		line("WAL", "%s bytes per event, without the application's own", thousands(int(r.WAL)))
	}
	line("rows written", "%.2f per event beside the event", r.Writes)
}
