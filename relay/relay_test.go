package relay_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// Two relays share a process, its client and its registry. One has no database to work with, which stops it from nothing but working.
func TestRelaysOfOneProcess(t *testing.T) {
	t.Parallel()
	dsn := pgtest.Database(t)
	there, err := pgx.ParseConfig(dsn)
	require.NoError(t, err)
	slot := "relay_" + there.Database
	require.NoError(t, schema.Migrate(t.Context(), dsn, schema.Options{Slot: slot}))
	log := slog.New(slog.DiscardHandler)
	whole := relay.DefaultConfig()
	registry := prometheus.NewRegistry()
	client, err := delivery.NewClient(whole.ClientConfig("test"), delivery.NewMetrics(registry), log)
	require.NoError(t, err)
	defer client.Close()

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 2)
	statuses := make(map[string]*relay.Status)
	for name, url := range map[string]string{"there": dsn, "away": "postgres://u@127.0.0.1:1/app"} {
		cfg := whole.Share(2)
		cfg.Database.URL, cfg.Database.Slot = url, slot
		o := relay.Options{
			Config: cfg, Version: "test", Log: log, Registry: prometheus.WrapRegistererWith(prometheus.Labels{"database": name}, registry), Client: client, Patient: true,
			Status: new(relay.Status),
		}
		statuses[name] = o.Status
		go func() { done <- relay.Run(ctx, o) }()
	}
	require.Eventually(t, func() bool {
		leads, _ := statuses["there"].Ready()
		works, why := statuses["away"].Ready()
		return leads && !works && why != "starting"
	}, 30*time.Second, 10*time.Millisecond)
	_, why := statuses["away"].Ready()
	assert.Contains(t, why, "no stream: ")
	stop()
	require.NoError(t, <-done)
	require.NoError(t, <-done)

	cfg := whole
	cfg.Database.URL = "postgres://u@127.0.0.1:1/app"
	err = relay.Run(t.Context(), relay.Options{Config: cfg, Version: "test", Log: log, Registry: prometheus.NewRegistry()})
	require.ErrorContains(t, err, "connect to database", "the only one")
}

func TestShareIsNoMoreThanTheWhole(t *testing.T) {
	t.Parallel()
	c := relay.DefaultConfig()
	c.Database.URL = "postgres://relay@localhost/app"
	assert.Equal(t, c, c.Share(1))
	for n := 2; n <= 64; n++ {
		one := c.Share(n)
		require.NoError(t, one.Validate(), n)
		assert.LessOrEqual(t, one.Window.Deliveries*n, c.Window.Deliveries)
		assert.LessOrEqual(t, one.Window.Bytes*relay.ByteSize(n), c.Window.Bytes)
		assert.LessOrEqual(t, one.Delivery.Workers*n, c.Delivery.Workers)
		assert.Greater(t, (one.Window.Deliveries+1)*n, c.Window.Deliveries, "nor much less")
		assert.Greater(t, (one.Window.Bytes+1)*relay.ByteSize(n), c.Window.Bytes)
		assert.Greater(t, (one.Delivery.Workers+1)*n, c.Delivery.Workers)
		assert.LessOrEqual(t, one.Delivery.HostConcurrency*n, c.Delivery.HostConcurrency)
		assert.Equal(t, c.Delivery.MaxConnections, one.Delivery.MaxConnections)
	}
}
