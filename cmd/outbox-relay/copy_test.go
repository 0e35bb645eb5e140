package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// copied makes a copy of the database, with a relay that has a slot of its own and is another instance. Nobody may be connected to the original.
func (s *site) copied(t *testing.T, instance string) *site {
	t.Helper()
	c := &site{dsn: pgtest.Database(t), slot: s.slot + "_copy", receiver: s.receiver, config: filepath.Join(t.TempDir(), "copy.yaml")}
	from, err := pgx.ParseConfig(s.dsn)
	require.NoError(t, err)
	to, err := pgx.ParseConfig(c.dsn)
	require.NoError(t, err)
	maintenance := strings.Replace(c.dsn, to.Database, "postgres", 1)
	execOn(t, maintenance, "DROP DATABASE "+to.Database)
	execOn(t, maintenance, fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", to.Database, from.Database))
	yaml, err := os.ReadFile(s.config)
	require.NoError(t, err)
	replace := strings.NewReplacer(s.dsn, c.dsn, "slot: "+s.slot, "slot: "+c.slot+"\n  instance_id: "+instance)
	require.NoError(t, os.WriteFile(c.config, []byte(replace.Replace(string(yaml))), 0o600))
	c.pool, err = pgxpool.New(t.Context(), c.dsn)
	require.NoError(t, err)
	t.Cleanup(c.pool.Close)
	return c
}

// TestCopyWithASlotOfItsOwn: a copy of the database calls nobody, though nothing is known of the slot that its relay has, until somebody says that it shall.
func TestCopyWithASlotOfItsOwn(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	var healthy atomic.Bool
	s := newSite(t, "breaker: {failures: 1000}\n", func(outbox.UUID, string) int {
		if healthy.Load() {
			return http.StatusOK
		}
		return http.StatusServiceUnavailable
	}, "acme")
	ep := s.route(t)
	original := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_DATABASE_INSTANCE_ID=production")
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 5)
	s.receiver.await(ctx, t, "deliveries that wait", func() bool {
		var n int
		require.NoError(t, s.pool.QueryRow(ctx, "SELECT count(*) FROM outbox_relay.retry_queue").Scan(&n))
		return n == 5
	})
	_, exit := original.stop(t)
	require.NoError(t, exit)
	healthy.Store(true)
	s.exec(t, "UPDATE outbox_relay.retry_queue SET due_at = now(), leased_by = NULL")
	s.pool.Close()
	attempts := s.receiver.count()

	c := s.copied(t, "staging")
	const refused = `the progress belongs to another instance: slot "%s" was served by instance "production" on cluster`
	statement := fmt.Sprintf("UPDATE outbox_relay.progress SET instance_id = 'staging' WHERE slot = '%s'", c.slot)
	o := invoke(t, nil, "check", "--config", c.config)
	require.NotEmpty(t, failures(o))
	assert.Contains(t, failures(o)[0], "FAIL  progress: "+fmt.Sprintf(refused, s.slot))
	o = invoke(t, nil, "run", "--config", c.config)
	assert.Equal(t, exitFailure, o.code, o.err)
	assert.Contains(t, o.err, "take over, run outbox-relay migrate, and then: "+statement)

	c.command(t, "migrate")
	o = invoke(t, nil, "check", "--config", c.config)
	require.Len(t, failures(o), 1)
	assert.Contains(t, failures(o)[0], "FAIL  progress: "+fmt.Sprintf(refused, s.slot))
	assert.Contains(t, failures(o)[0], "take over, run: "+statement)
	o = invoke(t, nil, "run", "--config", c.config)
	assert.Equal(t, exitFailure, o.code, o.err)
	assert.Contains(t, o.err, "take over, run: "+statement)

	p := startProcess(t, exec.Command(binary(t), "run", "--patient", "--config", c.config)) //nolint:noctx // ended by its signals
	c.receiver.await(ctx, t, "a stream and a claim that were refused", func() bool {
		said := p.said(t)
		return strings.Contains(said, "there is no stream until somebody mends this") &&
			regexp.MustCompile(`claiming due deliveries does not succeed.*another instance`).MatchString(said)
	})
	assert.Equal(t, attempts, c.receiver.count(), "a copy has called somebody")
	c.exec(t, statement)
	c.receiver.await(ctx, t, "the queue of what is no copy any more", func() bool { return c.arrivedAt(ep) == 5 })
	_, exit = p.stop(t)
	require.NoError(t, exit)
}
