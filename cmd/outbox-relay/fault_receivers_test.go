package main

import (
	"bytes"
	"compress/gzip"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
)

// receiverFaults are the scenarios of receivers that misbehave.
func receiverFaults() []*scenario {
	return []*scenario{{name: "receivers", row: "receiver faults", quick: true, prepare: victims, run: receiversMisbehave}}
}

// victims are endpoints that take nothing, and to which nothing is promised.
func victims(r *faultRun) {
	for _, url := range []string{"", "https" + strings.TrimPrefix(r.front.server.URL, "http"), "http://127.0.0.1:1"} {
		id := r.endpoint(r.t, r.tenants[1], 2)
		r.subscribe(r.t, r.tenants[1], id, "invoice.sent", `{"amount": {"$gte": 90}}`)
		r.o.ignored[id] = true
		if url != "" {
			r.exec(r.t, "UPDATE "+r.tenants[1]+".webhook_endpoints SET endpoint_url = $2 WHERE id = $1", id, url+"/"+id.String())
		}
	}
}

// receiversMisbehave has every fourth request of a tenant's fail in one of many ways. The other tenant's events arrive as if nothing were wrong.
func receiversMisbehave(r *faultRun) {
	bomb := gzipBomb()
	sound := make(map[outbox.UUID]bool)
	for _, rule := range r.o.rules[r.tenants[0]] {
		sound[rule.endpoint] = true
	}
	r.calm(func(rnd *rand.Rand, p pair) (int, time.Duration, mischief) {
		switch {
		case sound[p.endpoint]:
			return http.StatusOK, 0, nil
		case r.o.ignored[p.endpoint]:
			return http.StatusGone, 0, nil
		case rnd.IntN(4) > 0:
			return http.StatusOK, time.Duration(rnd.IntN(5)) * time.Millisecond, nil
		}
		status := []int{http.StatusInternalServerError, http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusFound, http.StatusNotFound}
		tricks := []mischief{hang, drip, reset, bomb, nil, nil, nil}
		return status[rnd.IntN(len(status))], 0, tricks[rnd.IntN(len(tricks))]
	})
	p := r.lead()
	leading := time.Now()
	r.fault()
	r.more(150 + r.rnd.IntN(100))
	r.fairness(sound, leading)
	if r.rnd.IntN(2) == 0 {
		r.kill(p)
		r.start()
	}
	r.slack += held // an answer that comes too late is none, and what hangs outlives its lease
	r.calm(unsteady(0, 5*time.Millisecond))
	r.recover(10 * time.Second)
	r.more(20)
}

// fairness holds the time from COMMIT to arrival at the sound endpoints against a second, for what was begun since (I7).
func (r *faultRun) fairness(sound map[outbox.UUID]bool, since time.Time) {
	r.front.mu.Lock()
	log := slices.Clone(r.front.log)
	r.front.mu.Unlock()
	var waits []time.Duration
	seen := make(map[pair]bool)
	for _, h := range log {
		r.o.mu.Lock()
		e := r.o.entries[h.event]
		r.o.mu.Unlock()
		if _, ordered := r.o.ordered[h.endpoint]; ordered || e == nil || seen[h.pair] || !sound[h.endpoint] || e.committedAt.IsZero() || e.begun.Before(since) {
			continue
		}
		seen[h.pair] = true
		waits = append(waits, h.at.Sub(e.committedAt))
	}
	slices.Sort(waits)
	if n := len(waits); n > 0 {
		if late := waits[n*99/100]; late > bound(time.Second) {
			r.violate("I7", "of %d events of the other tenant one in a hundred took more than %v", n, late.Round(time.Millisecond))
		}
	}
}

// hang gives no answer, for longer than the relay waits or not.
func hang(_ http.ResponseWriter, req *http.Request) {
	select {
	case <-req.Context().Done():
	case <-time.After(3 * time.Second):
	}
	panic(http.ErrAbortHandler)
}

// drip sends the head at once and the body ever so slowly, without end.
func drip(w http.ResponseWriter, req *http.Request) {
	w.WriteHeader(http.StatusInternalServerError)
	for range 100 {
		if _, err := w.Write([]byte("x")); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
		select {
		case <-req.Context().Done():
			return
		case <-time.After(30 * time.Millisecond):
		}
	}
}

// reset breaks the connection without an answer.
func reset(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

func gzipBomb() mischief {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(make([]byte, 10<<20))
	_ = z.Close()
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write(b.Bytes())
	}
}
