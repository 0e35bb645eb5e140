package main

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const twoDatabases = `
database: {instance_id: prod, max_connections: 5}
databases:
  - name: orders
    url: postgres://relay:s3cret@db1/orders
    slot: relay_orders
  - name: billing-eu
    url: postgres://relay:s3cret@db1/billing
    replication_url: postgres://relay:s3cret@direct/billing
    instance_id: other
    connect_timeout: 3s
`

func TestListOfDatabases(t *testing.T) {
	t.Parallel()
	c, err := loadText(t, twoDatabases)
	require.NoError(t, err)
	require.Equal(t, []string{"orders", "billing-eu"}, c.names())
	common := defaultConfig().Database
	common.InstanceID, common.MaxConnections = "prod", 5
	assert.Equal(t, common, c.Database)
	orders, billing := common, common
	orders.URL, orders.Slot = "postgres://relay:s3cret@db1/orders", "relay_orders"
	billing.URL, billing.ReplicationURL = "postgres://relay:s3cret@db1/billing", "postgres://relay:s3cret@direct/billing"
	billing.InstanceID, billing.ConnectTimeout = "other", 3e9
	assert.Equal(t, []databaseEntry{{"orders", orders}, {"billing-eu", billing}}, c.Databases)

	each := c.each()
	require.Len(t, each, 2)
	assert.Equal(t, orders, each[0].Database)
	assert.Equal(t, "databases.orders.url", each[0].key("url"))
	assert.Equal(t, billing, each[1].Database)

	var printed bytes.Buffer
	require.NoError(t, c.write(&printed))
	assert.NotContains(t, printed.String(), "s3cret")
	assert.Contains(t, printed.String(), "  - name: orders\n    url: postgres://relay:xxxxx@db1/orders\n")
	again, err := loadText(t, strings.ReplaceAll(printed.String(), "xxxxx", "s3cret"))
	require.NoError(t, err)
	assert.Equal(t, c, again)
}

// What belongs to the url of the section does not come with the url of an entry.
func TestReplicationURLGoesWithItsURL(t *testing.T) {
	t.Parallel()
	c, err := loadText(t, `
database: {url: postgres://a@pooler/a, replication_url: postgres://a@db/a}
databases:
  - name: common
  - {name: own, url: postgres://a@db/b, slot: b}
`)
	require.NoError(t, err)
	assert.Equal(t, "postgres://a@db/a", c.Databases[0].StreamURL())
	assert.Equal(t, "postgres://a@db/b", c.Databases[1].StreamURL())
}

func TestOneDatabaseHasNoName(t *testing.T) {
	t.Parallel()
	c, err := loadText(t, "databases: []", "--database-url="+dsn)
	require.NoError(t, err)
	assert.Nil(t, c.Databases)
	each := c.each()
	require.Len(t, each, 1)
	assert.Equal(t, dsn, each[0].Database.URL)
	assert.Equal(t, "database.url", each[0].key("url"))
}

func TestFaultsOfTheListNameTheEntry(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		yaml string
		want []string
	}{
		"no list": {"databases: {orders: {url: postgres://h/a}}", []string{
			"databases: must be a list in the file, each entry beginning with its name: - name: orders",
		}},
		"no entry": {"databases: [orders]", []string{"databases[0]: must be an entry with its keys below it, beginning with its name: - name: orders"}},
		"no name":  {"databases: [{url: postgres://h/a}]", []string{"databases[0].name: " + nameRemedy}},
		"bad name": {"databases: [{name: My DB}]", []string{`databases[0].name: "My DB": ` + nameRemedy}},
		"number":   {"databases: [{name: 7}]", []string{`databases[0].name: "7": ` + nameRemedy}},
		"same name": {"databases: [{name: a, url: postgres://h/a}, {name: a, url: postgres://h/b, slot: b}]", []string{
			"databases[1].name: a: is that of another entry as well: " + nameRemedy,
		}},
		"no url": {"databases: [{name: a-b, url: }]", []string{
			"databases.a-b.url: is required: give OUTBOX_RELAY_DATABASES_A_B_URL, or url in the entry, for example postgres://outbox_relay@db.internal:5432/app",
		}},
		"slip":       {"databases: [{name: a, url: postgres://h/a, slott: b}]", []string{"databases.a.slott: is no key of an entry: did you mean databases.a.slot?"}},
		"other key":  {"databases: [{name: a, url: postgres://h/a, tenants: b}]", []string{"databases.a.tenants: is no key of an entry"}},
		"wrong type": {"databases: [{name: a, url: postgres://h/a, max_connections: many}]", []string{`databases.a.max_connections: "many": must be a whole number`}},
		"no DSN": {"databases: [{name: a, url: 'postgres://u:s3cret@h:x/a'}]", []string{
			"databases.a.url: has no valid port: write postgres://user:password@host:5432/database?sslmode=verify-full, with special characters of the password " +
				"percent-encoded (@ is %40, / is %2F, : is %3A), or host=… user=… dbname=…",
		}},
		"bad slot": {"databases: [{name: a, url: postgres://h/a, slot: A}]", []string{
			`databases.a.slot: "A": must be 1 to 63 of a-z, 0-9 and _, as PostgreSQL demands of a slot's name`,
		}},
		"common fault is said once": {"database: {max_connections: 1}\ndatabases: [{name: a, url: postgres://h/a}, {name: b, url: postgres://i/a}]", []string{
			"database.max_connections: 1: must be at least 3",
		}},
		"same database": {"databases: [{name: a, url: 'postgres://u@H:5432/x'}, {name: b, url: 'host=h user=v dbname=x', slot: s}]", []string{
			"databases.b.url: leads to the same database as databases.a.url: drop one of the two entries",
		}},
		"same database past the pooler": {"databases: [{name: a, url: postgres://h/x}, {name: b, url: postgres://pooler/y, replication_url: postgres://h/x, slot: s}]", []string{
			"databases.b.url: leads to the same database as databases.a.url: drop one of the two entries",
		}},
		"same slot": {"databases: [{name: a, url: 'postgres://h1,h2/x'}, {name: b, url: postgres://h2/y}]", []string{
			"databases.b.slot: outbox_relay: is that of databases.a on the same server as well, and slots belong to the whole server: give each database its own",
		}},
		"slot of a shard": {"databases: [{name: a, url: postgres://h/x, shards: 3}, {name: b, url: postgres://h/y, slot: outbox_relay_2}]", []string{
			"databases.b.slot: outbox_relay_2: is that of databases.a on the same server as well, and slots belong to the whole server: give each database its own",
		}},
		"too many shards": {"window: {bytes: 128MiB}\ndatabases: [{name: a, url: postgres://h/x, shards: 65}]", []string{"databases.a.shards: 65: must be 1 to 64: each is one more slot that decodes the whole log"}},
		"too little to share between shards": {"delivery: {workers: 3}\ndatabases: [{name: a, url: postgres://h/a, shards: 3}, {name: b, url: postgres://i/a}]", []string{
			"delivery.workers: 3: is shared by 4 relays, one for each database and shard: must be at least 4",
		}},
		"two from the section": {"database: {url: postgres://h/x}\ndatabases: [{name: a}, {name: b, slot: b}]", []string{
			"databases.b.url: leads to the same database as databases.a.url: drop one of the two entries",
		}},
		"unused url": {"database: {url: postgres://h/x}\ndatabases: [{name: a, url: postgres://h/y}]", []string{
			"database.url: is used by no entry of databases, as each has its own: drop it, or make it an entry",
		}},
		"same variable": {"databases: [{name: a, url: postgres://h/a}, {name: a_replication, url: postgres://h/b, slot: b}]", []string{
			"databases.a_replication.url: has the variable OUTBOX_RELAY_DATABASES_A_REPLICATION_URL, as databases.a.replication_url has: name one of the two differently",
			"databases.a_replication.url_file: has the variable OUTBOX_RELAY_DATABASES_A_REPLICATION_URL_FILE, as databases.a.replication_url_file has: name one of the two differently",
		}},
		"too little to share": {"window: {bytes: 1MiB}\ndelivery: {workers: 1}\ndatabases: [{name: a, url: postgres://h/a}, {name: b, url: postgres://i/a}]", []string{
			"window.bytes: 1MiB: is shared by 2 relays, one for each database and shard: must be at least 2MiB", "delivery.workers: 1: is shared by 2 relays, one for each database and shard: must be at least 2",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := loadText(t, tc.yaml)
			var ce *configError
			require.ErrorAs(t, err, &ce)
			said := make([]string, len(ce.faults))
			for i, fault := range ce.faults {
				said[i] = fault.Error()
			}
			assert.Equal(t, tc.want, said)
			assert.NotContains(t, err.Error(), "s3cret")
		})
	}
}

// Neither two servers with the same names on them, nor two databases of a server with slots of their own, are a fault.
func TestDatabasesThatAreApart(t *testing.T) {
	t.Parallel()
	for _, list := range []string{
		"[{name: a, url: postgres://h1/x}, {name: b, url: postgres://h2/x}]",
		"[{name: a, url: 'postgres://h:5432/x'}, {name: b, url: 'postgres://h:5433/x'}]",
		"[{name: a, url: postgres://h/x}, {name: b, url: postgres://h/y, slot: b}]",
		"[{name: a, url: postgres://pooler/x, replication_url: postgres://h1/x}, {name: b, url: postgres://pooler/y, replication_url: postgres://h2/y}]",
	} {
		_, err := loadText(t, "databases: "+list)
		require.NoError(t, err, list)
	}
}

func TestVariablesOfTheList(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte("databases: [{name: orders, slot: a}, {name: billing-eu, url: postgres://h/file}]"), 0o600))
	o := invoke(t, []string{
		"OUTBOX_RELAY_DATABASES_ORDERS_URL=postgres://u:s3cret@h/orders", "OUTBOX_RELAY_DATABASES_BILLING_EU_URL=postgres://u:s3cret@h/billing",
		"OUTBOX_RELAY_DATABASES_BILLING_EU_MAX_CONNECTIONS=3",
	}, "config", "--config", file)
	require.Equal(t, exitOK, o.code, o.err)
	assert.Contains(t, o.out, "    url: postgres://u:xxxxx@h/orders\n")
	assert.Contains(t, o.out, "    url: postgres://u:xxxxx@h/billing\n")
	assert.Contains(t, o.out, "    max_connections: 3\n")

	o = invoke(t, []string{"OUTBOX_RELAY_DATABASES_ORDRS_URL=postgres://h/x"}, "config", "--config", file)
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.err, "OUTBOX_RELAY_DATABASES_ORDRS_URL: is no variable of the configuration: did you mean OUTBOX_RELAY_DATABASES_ORDERS_URL?")
	o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_DATABASES_ORDERS_URL=postgres://h/x"}, "config")
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.err, "OUTBOX_RELAY_DATABASES_ORDERS_URL: is no variable of the configuration")
}

func TestWhichDatabase(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte(
		"databases: [{name: orders, url: 'postgres://u@127.0.0.1:1/a', slot: slot_a}, {name: billing, url: 'postgres://u@127.0.0.1:1/b', slot: slot_b}]"), 0o600))
	for args, want := range map[string]struct {
		code int
		err  string
	}{
		"tenants list":                        {exitUsage, "error: there are several databases: name one with --database: orders, billing\n"},
		"deliveries list -t x":                {exitUsage, "name one with --database: orders, billing"},
		"audit acme":                          {exitUsage, "name one with --database: orders, billing"},
		"migrate --print":                     {exitUsage, "name one with --database: orders, billing"},
		"tenants list --database order":       {exitUsage, `error: --database "order": is none of the databases: orders, billing`},
		"tenants list --database billing":     {exitFailure, "hint: check host, port and sslmode of databases.billing.url"},
		"migrate --database-url " + dsn:       {exitUsage, "--database-url: is for one database: name it with --database"},
		"run --listen= --database-url " + dsn: {exitUsage, "--database-url: is for one database: name it with --database"},
		"run --database orders":               {exitUsage, "unknown flag: --database"},
		"endpoints list --database orders --database-url postgres://u@127.0.0.1:2/a": {exitFailure, "127.0.0.1:2"},
	} {
		o := invoke(t, nil, append(strings.Fields(args), "--config", file)...)
		assert.Equal(t, want.code, o.code, "%s: %s", args, o.err)
		assert.Contains(t, o.err, want.err, args)
	}
	o := invoke(t, nil, "migrate", "--print", "--database", "billing", "--config", file)
	require.Equal(t, exitOK, o.code, o.err)
	assert.Contains(t, o.out, "pg_create_logical_replication_slot(''slot_b'', ''pgoutput''")
	o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn}, "check", "--database", "orders")
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.err, "the configuration has no list of databases")

	// All of them have their turn, though the first one fails.
	for _, command := range []string{"migrate", "check", "audit"} {
		o := invoke(t, nil, command, "--config", file)
		assert.Equal(t, exitFailure, o.code, command)
		assert.Regexp(t, `(?s)^database orders\n.*database billing\n`, o.out)
		assert.Contains(t, o.out+o.err, "databases.orders.url", command)
		assert.Contains(t, o.out+o.err, "databases.billing.url", command)
	}
}

// The example of a list in config.example.yaml is one.
func TestExampleOfAList(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(examplePath)
	require.NoError(t, err)
	example := regexp.MustCompile(`(?m)^#(databases:\n(?:#  .*\n)+)`).FindStringSubmatch(string(text))
	require.NotNil(t, example)
	c, err := loadText(t, strings.ReplaceAll(example[1], "\n#", "\n"))
	require.NoError(t, err)
	assert.Equal(t, []string{"orders", "billing"}, c.names())
}

// Each shard of each database has a relay of its own; what there is one of has no name.
func TestRelaysAreCalledByDatabaseAndShard(t *testing.T) {
	t.Parallel()
	for yaml, want := range map[string]string{
		"database: {url: postgres://h/x}":                                                        "starting",
		"database: {url: postgres://h/x, shards: 2}":                                             "shard 0: starting\nshard 1: starting",
		"databases: [{name: a, url: postgres://h/x}, {name: b, url: postgres://i/x, shards: 2}]": "a: starting\nb shard 0: starting\nb shard 1: starting",
	} {
		c, err := loadText(t, yaml)
		require.NoError(t, err)
		_, why := newRelays(&c, false, slog.New(slog.DiscardHandler)).Ready()
		assert.Equal(t, want, why)
	}
}
