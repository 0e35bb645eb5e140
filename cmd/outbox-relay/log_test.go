package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// linesIn reads a log of JSON lines by message.
func linesIn(t *testing.T, text string) map[string][]map[string]any {
	t.Helper()
	list := make(map[string][]map[string]any)
	for line := range strings.Lines(text) {
		var m map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &m), line)
		msg := fmt.Sprint(m["msg"])
		list[msg] = append(list[msg], m)
	}
	return list
}

// lockedBuffer is written to by timers, too.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) take() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.buf.Reset()
	return b.buf.String()
}

func TestRepeatsAreLimited(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out lockedBuffer
		var level slog.LevelVar
		log, flush := newLogger(&out, logging{Level: "info", Format: "json"}, &level)
		take := func() map[string][]map[string]any { return linesIn(t, out.take()) }
		for range 1000 {
			log.Warn("it fails", "tenant", "acme")
		}
		log.Warn("it fails", "tenant", "other")
		log.With("tenant", "third").Warn("it fails")
		log.Error("another thing", "tenant", "acme")
		lines := take()
		require.Len(t, lines["it fails"], linesOfOne+2, "one tenant does not silence another")
		assert.Equal(t, "third", lines["it fails"][linesOfOne+1]["tenant"])
		assert.Len(t, lines["another thing"], 1)

		<-time.After(2 * logSpellTime)
		synctest.Wait()
		lines = take()
		require.Len(t, lines, 1)
		require.Len(t, lines[suppressedMsg], 1)
		said := lines[suppressedMsg][0]
		assert.Equal(t, "it fails", said["line"])
		assert.InDelta(t, 1000-linesOfOne, said["suppressed"], 0)
		assert.Equal(t, "WARN", said["level"])
		assert.Equal(t, "1m0s", said["within"])

		for i := range 1000 { // by everybody at once
			log.Info("it fails", "endpoint", i)
			log.Warn("it fails", "endpoint", i)
		}
		assert.Len(t, take()["it fails"], linesOfAll)
		flush()
		said = take()[suppressedMsg][0]
		assert.InDelta(t, 2000-linesOfAll, said["suppressed"], 0)
		log.Warn("it fails", "tenant", "acme")
		assert.Len(t, take()["it fails"], 1, "a spell has an end")

		level.Set(slog.LevelDebug)
		for range 1000 {
			log.Debug("it fails", "tenant", "acme")
		}
		assert.Len(t, take()["it fails"], 1000, "who asks for debug gets all of it")

		for range 4 { // few enough, at all times
			for range linesOfOne / 2 {
				log.Warn("seldom")
			}
			<-time.After(logSpellTime)
		}
		flush()
		lines = take()
		assert.Len(t, lines["seldom"], 4*linesOfOne/2)
		assert.Empty(t, lines[suppressedMsg])
	})
}

// TestFloodIsBounded: what receivers and tenants do to themselves by the hundred costs few lines, and these say how many there would have been.
func TestFloodIsBounded(t *testing.T) {
	t.Parallel()
	s := newSite(t, "queue:\n  poll: 50ms\nbreaker:\n  failures: 1\n  open_for: 100ms\nretry:\n  schedule: [10ms]\n", func(_ outbox.UUID, attempt string) int {
		if attempt == "1" {
			return http.StatusInternalServerError
		}
		return http.StatusOK
	}, "acme", "other")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	const endpoints = 150
	for range endpoints {
		s.subscribe(t, "acme", s.endpoint(t, "acme", 1), "order.created", "{}")
	}
	quiet := s.endpoint(t, "other", 1)
	s.subscribe(t, "other", quiet, "order.created", "{}")
	p, began := startBinary(t, binary(t), s.config), time.Now()
	s.receiver.await(ctx, t, "the leader to have read its tables", func() bool { return strings.Contains(p.said(t), `"leading"`) })
	for n := range 200 { // rows that cannot be used, one after the other
		s.exec(t, `UPDATE acme.webhook_endpoints SET signature_header = 'webhook-' || $1::int4 WHERE id = (SELECT min(id::text)::uuid FROM acme.webhook_endpoints)`, n)
	}
	s.insertMany(t, "acme", "order.created", 2)
	s.receiver.await(ctx, t, "the events at the endpoints that are left", func() bool { return s.receiver.pairs() >= 2*(endpoints-1) })
	s.insertMany(t, "other", "order.created", 1)
	s.receiver.await(ctx, t, "the other tenant's event", func() bool { return s.arrivedAt(quiet) == 1 })
	_, exit := p.stop(t)
	require.NoError(t, exit)

	lines := linesIn(t, p.said(t))
	suppressed := make(map[any]float64)
	for _, line := range lines[suppressedMsg] {
		n, _ := line["suppressed"].(float64)
		suppressed[line["line"]] += n
	}
	for what, least := range map[string]int{"a row of the routing table cannot be used": 200, "endpoint fails: it is left alone for a while": endpoints - 1, "endpoint answers again": endpoints - 1} {
		minutes := 1 + int(time.Since(began)/logSpellTime)
		assert.LessOrEqual(t, len(lines[what]), minutes*linesOfAll, what)
		assert.NotEmpty(t, lines[what], what)
		assert.GreaterOrEqual(t, len(lines[what])+int(suppressed[what]), least, "%s: none is forgotten", what)
	}
	assert.NotZero(t, suppressed["a row of the routing table cannot be used"])
	for _, line := range slices.Concat(lines["endpoint fails: it is left alone for a while"], lines["endpoint answers again"]) {
		assert.Equal(t, "WARN", line["level"])
	}
}
