package schema_test

import (
	"testing"

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
