package schema_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
)

// TestInstallLockIsATransactions: one of a session would stay behind in a pooler's. What has to wait for it says for whom.
func TestInstallLockIsATransactions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec("CREATE SCHEMA acme")
	held, release := make(chan struct{}), make(chan struct{})
	done := make(chan error, 2)
	go func() {
		first := true
		done <- schema.AddTenant(b.ctx, b.dsn, "acme", schema.AddOptions{Progress: func(string) {
			if first {
				first = false
				close(held)
				<-release
			}
		}})
	}()
	<-held
	holder := get[int64](b, `SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	// Nothing that a build of an index or the making of a slot would wait for.
	assert.Equal(t, "idle in transaction", get[string](b, "SELECT state FROM pg_stat_activity WHERE pid = $1 AND backend_xid IS NULL AND backend_xmin IS NULL", holder))
	steps := make(chan string, 10)
	go func() {
		done <- schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot, Progress: func(step string) { steps <- step }})
	}()
	said := <-steps
	assert.Contains(t, said, fmt.Sprintf("waiting for another process that is changing this database: its server process is %d (hint: ", holder))
	assert.Contains(t, said, fmt.Sprintf("SELECT pg_terminate_backend(%d)", holder))
	close(release)
	require.NoError(t, <-done)
	require.NoError(t, <-done)
}
