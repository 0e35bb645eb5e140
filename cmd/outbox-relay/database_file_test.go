package main

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// TestDatabasePasswordRotates: the password of the relay's role changes while it runs, in the database and in database.url_file, and all connections break.
// The relay goes on, pool and stream, and does not follow the file to another database.
func TestDatabasePasswordRotates(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, server.Close()) })
	s := newSiteOn(t, server.URL("postgres"), "queue:\n  poll: 100ms\n", always(http.StatusOK), "acme")
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	s.exec(t, `CREATE ROLE relay LOGIN REPLICATION PASSWORD 's3cret-one' IN ROLE outbox_relay_runner`)
	hba := filepath.Join(server.Dir(), "data", "pg_hba.conf")
	rules, err := os.ReadFile(hba)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(hba, append([]byte("host all relay 127.0.0.1/32 scram-sha-256\n"), rules...), 0o600))
	s.exec(t, `SELECT pg_reload_conf()`)

	file := filepath.Join(t.TempDir(), "dsn")
	write := func(password, database string) {
		t.Helper()
		u, err := url.Parse(server.URL(database))
		require.NoError(t, err)
		u.User = url.UserPassword("relay", password)
		require.NoError(t, os.WriteFile(file+".new", []byte(u.String()+"\n"), 0o600))
		require.NoError(t, os.Rename(file+".new", file)) // no reader sees half of it
	}
	write("s3cret-one", "postgres")
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(s.config, []byte(strings.Replace(string(text), fmt.Sprintf("url: %q", s.dsn), "url_file: "+file, 1)), 0o600))
	id := s.endpoint(t, "acme", 3)
	s.subscribe(t, "acme", id, "order.created", "{}")
	p := startRelay(t, s.config)
	s.leading(ctx, t)
	arrived := 0
	goesOn := func(what string) {
		t.Helper()
		s.insertMany(t, "acme", "order.created", 10)
		arrived += 10
		s.receiver.await(ctx, t, what, func() bool { return s.arrivedAt(id) == arrived })
		s.receiver.await(ctx, t, what+", recorded", func() bool {
			var n int
			require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_deliveries WHERE delivery_status = 'success'`).Scan(&n))
			return n == arrived
		})
	}
	breakAll := func() {
		t.Helper()
		s.exec(t, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'relay'`)
	}
	goesOn("the first password")

	s.exec(t, `ALTER ROLE relay PASSWORD 's3cret-two'`)
	goesOn("connections that are open stay so")
	write("s3cret-two", "postgres")
	breakAll()
	goesOn("the second password")

	refusals := func() int { return strings.Count(p.said(t), "password authentication failed") } // there may be some of connections that were new before the file was
	before := refusals()
	s.exec(t, `ALTER ROLE relay PASSWORD 's3cret-three'`)
	breakAll()
	s.receiver.await(ctx, t, "a file that is late", func() bool { return refusals() > before })
	write("s3cret-three", "postgres")
	goesOn("the third password")

	s.exec(t, `CREATE DATABASE another`)
	write("s3cret-three", "another")
	breakAll()
	const refused = "leads to another server or database than at the start: restart the relay if that is meant"
	s.receiver.await(ctx, t, "a file that leads elsewhere", func() bool { return strings.Contains(p.said(t), refused) })
	write("s3cret-three", "postgres")
	goesOn("the file as it was")
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.NotContains(t, p.said(t), "s3cret")
}
