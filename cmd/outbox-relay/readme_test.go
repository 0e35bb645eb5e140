package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestReadmeQueries runs the queries that the README gives to support people, each of which has something to find here: a dead letter, and a
// delivery that waits for a paused endpoint.
func TestReadmeQueries(t *testing.T) {
	t.Parallel()
	s := newSite(t, "", always(http.StatusBadRequest), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ep := s.endpoint(t, "acme", 0)
	s.subscribe(t, "acme", ep, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 1)
	count := func(sql string, args ...any) (n int) {
		require.NoError(t, s.pool.QueryRow(ctx, sql, args...).Scan(&n), sql)
		return n
	}
	s.receiver.await(ctx, t, "a dead letter", func() bool { return count(`SELECT count(*) FROM acme.webhook_dead_letters`) == 1 })
	s.exec(t, `SELECT outbox_relay.pause_endpoint('acme', $1)`, ep)
	s.receiver.await(ctx, t, "a delivery that waits", func() bool {
		s.insertMany(t, "acme", "order.created", 1)
		return count(`SELECT count(*) FROM outbox_relay.retry_queue`) > 0
	})
	var event, delivery outbox.UUID
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT webhook_event_id, delivery_id FROM acme.webhook_dead_letters ORDER BY dead_at LIMIT 1`).Scan(&event, &delivery))
	_, exit := p.stop(t)
	require.NoError(t, exit)
	s.exec(t, `UPDATE acme.webhook_delivery_stats SET failed_deliveries = 0, timeout_deliveries = total_attempts`)

	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(readme), "\n### The support desk\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	blocks := regexp.MustCompile("(?s)```sql\n(.*?)```").FindAllStringSubmatch(section, -1)
	require.Len(t, blocks, 5)
	ids := strings.NewReplacer(":'event'", fmt.Sprintf("'%s'", event), ":'delivery'", fmt.Sprintf("'%s'", delivery), ":'endpoint'", fmt.Sprintf("'%s'", ep))
	for _, block := range blocks {
		sql := ids.Replace(strings.TrimSpace(block[1]))
		rows, err := s.pool.Query(ctx, sql)
		require.NoError(t, err, sql)
		list, err := pgx.CollectRows(rows, pgx.RowToMap)
		require.NoError(t, err, sql)
		require.Len(t, list, 1, sql)
		if failed, has := list[0]["failed_percent"]; has {
			percent, err := failed.(pgtype.Numeric).Float64Value()
			require.NoError(t, err)
			require.Equal(t, pgtype.Float8{Float64: 100, Valid: true}, percent, "what ran into its timeout has failed")
		}
	}
}
