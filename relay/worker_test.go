package relay

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/store"
)

func attempted() *job {
	return &job{Delivery: store.Delivery{
		ID: outbox.UUID{1}, Tenant: "acme", EventID: outbox.UUID{2}, EndpointID: outbox.UUID{3}, URL: "https://host/planted", Attempts: 2,
		Message: &delivery.Message{Body: []byte("planted")},
	}}
}

func TestLineOfAnAttempt(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	e := &engine{log: slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	e.logAttempt(t.Context(), attempted(), &delivery.Result{
		Class: delivery.Class5xx, Status: 502, Err: "answered 502", Duration: time.Millisecond, Body: []byte("planted"), Signature: "planted",
	})
	assert.NotContains(t, out.String(), "planted")
	var line map[string]any
	require.NoError(t, json.Unmarshal(out.Bytes(), &line))
	delete(line, "time")
	assert.Equal(t, map[string]any{
		"level": "DEBUG", "msg": "attempt", "tenant": "acme", "endpoint": outbox.UUID{3}.String(), "event": outbox.UUID{2}.String(),
		"delivery": outbox.UUID{1}.String(), "attempt": 3.0, "class": "http_5xx", "status": 502.0, "took": 1e6, "error": "answered 502",
	}, line)

	out.Reset()
	e.logAttempt(t.Context(), attempted(), &delivery.Result{Class: delivery.ClassSuccess, Status: 200})
	assert.Contains(t, out.String(), `"level":"DEBUG","msg":"attempt"`)
	assert.NotContains(t, out.String(), "error")
}

func TestLineOfAnAttemptCostsNothing(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	e := &engine{log: slog.New(slog.NewJSONHandler(nil, nil))}
	j, res := attempted(), &delivery.Result{Class: delivery.Class5xx, Err: "answered 502"}
	assert.Zero(t, testing.AllocsPerRun(100, func() { e.logAttempt(t.Context(), j, res) }))
}
