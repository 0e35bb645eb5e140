package main

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// lines hands on what is logged, a line each.
type lines chan string

// Write implements io.Writer.
func (l lines) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// TestAutoAdopt: schemas that match are adopted, and one that cannot be is told of once for as long as that lasts.
func TestAutoAdopt(t *testing.T) {
	t.Parallel()
	d := newDatabase(t)
	d.succeed(t, "migrate")
	c := defaultConfig()
	c.Database.URL, c.Tenants.AutoAdopt = d.url, []string{"tenant_*"}
	logged, done := make(lines, 100), make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() { done <- autoAdopt(ctx, &c, slog.New(slog.NewTextHandler(logged, nil))) }()
	next := func() string {
		select {
		case line := <-logged:
			return line
		case <-ctx.Done():
			return "nothing"
		}
	}

	const unfit = "CREATE SCHEMA tenant_a CREATE TABLE webhook_events (id uuid PRIMARY KEY)"
	adoptable := func(name string) string {
		return "CREATE SCHEMA " + name + "; DO $$ BEGIN EXECUTE (SELECT format(ddl, '" + name + "') FROM outbox_relay.tenant_tables() WHERE name = 'webhook_events'); END $$;"
	}
	d.exec(t, unfit)
	assert.Regexp(t, `"schema not adopted" schema=tenant_a .*webhook_events lacks column aggregate_id`, next())
	d.exec(t, adoptable("tenant_b")+adoptable("other"))
	assert.Regexp(t, `"schema adopted" schema=tenant_b`, next(), "the other one has been told of")
	d.exec(t, "DROP SCHEMA tenant_a CASCADE; "+adoptable("tenant_c"))
	assert.Regexp(t, `"schema adopted" schema=tenant_c`, next())
	d.exec(t, unfit)
	assert.Regexp(t, `"schema not adopted" schema=tenant_a`, next(), "it is another one by now")
	cancel()
	require.NoError(t, <-done)
	assert.Empty(t, logged)
}
