package schema_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMigrateWithoutWhatTheSlotNeeds(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		config map[string]string
		before string
		want   string
	}{
		"wal_level": {map[string]string{"wal_level": "replica", "max_replication_slots": "0"}, "", "Set wal_level = logical"},
		"no slot left": {
			map[string]string{"max_replication_slots": "1"}, "SELECT pg_create_physical_replication_slot('theirs')", "raise max_replication_slots",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, err := pgtest.Start(t.Context(), pgtest.Options{Config: tt.config})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			_, err = connect(t, s.URL("postgres")).Exec(t.Context(), tt.before)
			require.NoError(t, err)
			err = schema.Migrate(t.Context(), s.URL("postgres"), schema.Options{})
			var hint *schema.Error
			require.ErrorAs(t, err, &hint)
			require.Contains(t, hint.Hint, tt.want)
		})
	}
}

// A DSN that names no database leads to the one that is called like the role.
func TestMigrateWithoutTheNameOfTheDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg := b.conn.Config()
	b.exec("CREATE ROLE " + cfg.Database + " LOGIN SUPERUSER")
	dsn := "postgres://" + cfg.Database + "@" + cfg.Host + ":" + portString(cfg.Port) + "?sslmode=disable"
	require.NoError(t, schema.Migrate(b.ctx, dsn, schema.Options{Slot: b.slot}))
}

// TestMigrateBesideAHeal: a slot that is being made has no position yet. It is waited for, whether a relay makes it anew or nobody knows of it so far.
func TestMigrateBesideAHeal(t *testing.T) {
	t.Parallel()
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("known %t", known), func(t *testing.T) {
			t.Parallel()
			s, err := pgtest.Start(t.Context(), pgtest.Options{}) // its open transaction would hold up the slots of others
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, s.Close()) })
			dsn := s.URL("postgres")
			conn, writer, maker := connect(t, dsn), connect(t, dsn), connect(t, dsn)
			require.NoError(t, schema.Migrate(t.Context(), dsn, schema.Options{}))
			_, err = conn.Exec(t.Context(), "SELECT pg_drop_replication_slot('outbox_relay')")
			require.NoError(t, err)
			if !known {
				_, err = conn.Exec(t.Context(), "DELETE FROM outbox_relay.progress")
				require.NoError(t, err)
			}
			_, err = writer.Exec(t.Context(), "BEGIN; SELECT pg_current_xact_id()")
			require.NoError(t, err)
			made := make(chan error, 1)
			go func() {
				_, err := maker.Exec(t.Context(), "SELECT pg_create_logical_replication_slot('outbox_relay', 'pgoutput')")
				made <- err
			}()
			require.Eventually(t, func() bool {
				var making bool
				err := conn.QueryRow(t.Context(), "SELECT count(*) > 0 FROM pg_replication_slots WHERE active AND confirmed_flush_lsn IS NULL").Scan(&making)
				return err == nil && making
			}, time.Minute, 10*time.Millisecond)

			var steps []string
			err = schema.Migrate(t.Context(), dsn, schema.Options{Progress: func(step string) {
				steps = append(steps, step)
				if strings.Contains(step, "which is making it") {
					_, err := writer.Exec(t.Context(), "COMMIT")
					require.NoError(t, err)
				}
			}})
			require.NoError(t, err)
			require.NoError(t, <-made)
			require.Contains(t, strings.Join(steps, "; "), fmt.Sprintf("waiting for server process %d, which is making it", maker.PgConn().PID()))
			var sound bool
			err = conn.QueryRow(t.Context(), `SELECT bool_and(p.lsn <= s.confirmed_flush_lsn) FROM outbox_relay.progress p JOIN pg_replication_slots s ON s.slot_name = p.slot`).Scan(&sound)
			require.NoError(t, err)
			require.True(t, sound)
		})
	}
}

func TestMigrateRefuses(t *testing.T) {
	t.Parallel()
	b := empty(t)
	err := schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: "Not a name"})
	require.ErrorIs(t, err, schema.ErrSlotUnusable)

	other := setup(t)
	err = schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: other.slot})
	require.ErrorIs(t, err, schema.ErrSlotUnusable)
	require.ErrorContains(t, err, "belongs to database")

	role, dsn := other.login("")
	err = schema.Migrate(b.ctx, dsn, schema.Options{Slot: other.slot})
	require.ErrorContains(t, err, "permission denied")
	require.ErrorContains(t, err, "migrate --print")

	// A role that may do all but create a slot.
	other.exec("ALTER DATABASE " + b.conn.Config().Database + " OWNER TO " + role)
	cfg := b.conn.Config()
	fresh := "postgres://" + role + "@" + cfg.Host + ":" + portString(cfg.Port) + "/" + cfg.Database + "?sslmode=disable"
	b.exec("DROP SCHEMA outbox_relay CASCADE; DROP PUBLICATION outbox_relay_events, outbox_relay_registry")
	err = schema.Migrate(b.ctx, fresh, schema.Options{Slot: b.slot})
	require.ErrorContains(t, err, "ALTER ROLE <this role> REPLICATION")
	b.exec("ALTER ROLE " + role + " REPLICATION")
	require.NoError(t, schema.Migrate(b.ctx, fresh, schema.Options{Slot: b.slot}), "what was missing is made up for")
	b.exec("ALTER DATABASE " + b.conn.Config().Database + " OWNER TO postgres; REASSIGN OWNED BY " + role + " TO postgres; DROP OWNED BY " + role)

	b.exec("DROP PUBLICATION outbox_relay_events")
	require.ErrorContains(t, schema.Migrate(b.ctx, b.dsn, schema.Options{Slot: b.slot}), `publication "outbox_relay_events" is gone`)
}
