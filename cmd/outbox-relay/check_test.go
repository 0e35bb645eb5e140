package main

import (
	"context"
	binaryorder "encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// as gives the environment of a role of its own, made for this test.
func (d database) as(t *testing.T, attributes string) []string {
	t.Helper()
	role := d.name + "_role"
	d.exec(t, fmt.Sprintf("CREATE ROLE %s LOGIN %s", pgx.Identifier{role}.Sanitize(), attributes))
	return []string{"OUTBOX_RELAY_DATABASE_URL=" + strings.Replace(d.url, "postgres@", role+"@", 1), "OUTBOX_RELAY_DATABASE_SLOT=" + d.name}
}

// installed is a database with a tenant, acme.
func installed(t *testing.T) database {
	t.Helper()
	d := newDatabase(t)
	d.exec(t, "CREATE SCHEMA acme")
	d.succeed(t, "migrate")
	d.succeed(t, "tenants", "add", "acme")
	return d
}

// failures returns the lines of check that fail.
func failures(o outcome) []string { return regexp.MustCompile(`(?m)^FAIL.*$`).FindAllString(o.out, -1) }

func TestCheckWithTheLeastPrivileges(t *testing.T) {
	t.Parallel()
	d := installed(t)
	o := invoke(t, d.as(t, "REPLICATION IN ROLE outbox_relay_runner"), "check")
	assert.Equal(t, exitOK, o.code, "%s%s", o.out, o.err)
	for _, want := range []string{
		`ok    database: PostgreSQL \d+.*, database ` + d.name + `, role ` + d.name + `_role`,
		`ok    pooler: none`,
		`ok    wal_level: logical`,
		`ok    server_encoding: UTF8`,
		`ok    replication: database.url may stream, cluster \d+`,
		`ok    replication slots: \d+ of max_replication_slots = 100 in use`,
		`ok    WAL senders: \d+ of max_wal_senders = 100 in use`,
		`warn  durability: fsync is off → set fsync = on`,
		`warn  max_slot_wal_keep_size: no limit → set one`,
		`ok    clock: this host and the server differ by`,
		`ok    schema outbox_relay: version \d+`,
		`ok    publication outbox_relay_events: 1 tables`,
		`ok    publication outbox_relay_registry: 5 tables`,
		`ok    slot ` + d.name + `: .*, no relay reads it`,
		`ok    progress: belongs to this cluster and instance`,
		`ok    role: has the rights it needs`,
		`ok    tenants: 1 of 1 registered are served`,
		`ok    tenant acme: 0 endpoints \(0 active\), 0 subscriptions`,
	} {
		assert.Regexp(t, "(?m)^"+want, o.out)
	}
}

// TestRunWithoutTheRole: who may stream, but not use the schema, is told so at once.
func TestRunWithoutTheRole(t *testing.T) {
	t.Parallel()
	d := installed(t)
	o := invoke(t, append(d.as(t, "REPLICATION"), "OUTBOX_RELAY_SERVER_LISTEN=127.0.0.1:0"), "run")
	assert.Equal(t, exitFailure, o.code, o.err)
	assert.Contains(t, o.err, "the role is no member of outbox_relay_runner")
	assert.Contains(t, o.err, "hint: have an administrator run: GRANT outbox_relay_runner TO \""+d.name+"_role\"; outbox-relay check says what else is missing\n")
}

// TestCheckOfAutoAdoption: it takes a right that nothing else of the relay does.
func TestCheckOfAutoAdoption(t *testing.T) {
	t.Parallel()
	d := installed(t)
	env := append(d.as(t, "REPLICATION IN ROLE outbox_relay_runner"), "OUTBOX_RELAY_TENANTS_AUTO_ADOPT=cust_*")
	assert.Equal(t, []string{"FAIL  role: may not execute outbox_relay.add_tenant, as tenants.auto_adopt has it → " + adoptRemedy}, failures(invoke(t, env, "check")))
	d.exec(t, adoptRemedy)
	assert.Empty(t, failures(invoke(t, env, "check")))
}

// TestAuditOfNobody: what is not a tenant is not in order either.
func TestAuditOfNobody(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "UPDATE outbox_relay.progress SET snapshot = pg_current_snapshot()")
	o := invoke(t, d.env, "audit", "acme")
	assert.Equal(t, exitOK, o.code, o.err)
	o = invoke(t, d.env, "audit", "acme", "acmee")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, `schema "acmee" is not a tenant`)
}

func TestCheckOfAnEmptyDatabase(t *testing.T) {
	t.Parallel()
	o := invoke(t, newDatabase(t).env, "check")
	assert.Equal(t, exitFailure, o.code)
	assert.Equal(t, []string{"FAIL  schema outbox_relay: missing → run outbox-relay migrate"}, failures(o))
	assert.Equal(t, "1 failed\n", o.err)
}

func TestCheckOfRoles(t *testing.T) {
	t.Parallel()
	d := installed(t)

	o := invoke(t, d.env, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, "warn  role: is a superuser → ")

	env := d.as(t, "IN ROLE outbox_relay_runner")
	o = invoke(t, env, "check")
	assert.Equal(t, exitFailure, o.code)
	require.Len(t, failures(o), 1, o.out)
	assert.Regexp(t, `^FAIL  replication: .* → ALTER ROLE … REPLICATION for the role of database.url`, failures(o)[0])

	// The stream may have a role of its own.
	o = invoke(t, append(env, "OUTBOX_RELAY_DATABASE_REPLICATION_URL="+d.url), "check")
	assert.Empty(t, failures(o))
	assert.Contains(t, o.out, "ok    replication: database.replication_url may stream")

	d.exec(t, fmt.Sprintf("REVOKE outbox_relay_runner FROM %q; ALTER ROLE %q REPLICATION", d.name+"_role", d.name+"_role"))
	o = invoke(t, env, "check")
	assert.Equal(t, []string{fmt.Sprintf("FAIL  schema outbox_relay: this role may not use it → GRANT outbox_relay_runner TO %q", d.name+"_role")}, failures(o)[:1])
}

func TestCheckOfReplicationURL(t *testing.T) {
	t.Parallel()
	d, other := installed(t), newDatabase(t)
	o := invoke(t, append(d.env, "OUTBOX_RELAY_DATABASE_REPLICATION_URL="+other.url), "check")
	assert.Equal(t, []string{fmt.Sprintf("FAIL  replication: database.replication_url leads to database %s, database.url to %s → name the same database in both",
		other.name, d.name)}, failures(o))
}

// TestCheckWithoutTheNameOfTheDatabase: a DSN that names none leads to the one that is called like the role.
func TestCheckWithoutTheNameOfTheDatabase(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "CREATE ROLE "+d.name+" LOGIN SUPERUSER")
	d.env[0] = strings.NewReplacer("postgres@", d.name+"@", "/"+d.name+"?", "?").Replace(d.env[0])
	assert.Contains(t, d.succeed(t, "check"), "database "+d.name+", role "+d.name)
	d.succeed(t, "migrate")
}

// fakePooler passes everything on and, like a pooler, makes up the number of the session in its greeting. In statement mode it takes no transactions.
func fakePooler(t *testing.T, server string, statements bool) (address string) {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var sessions sync.WaitGroup
	t.Cleanup(func() {
		assert.NoError(t, listener.Close())
		sessions.Wait()
	})
	sessions.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			sessions.Go(func() {
				defer func() { _ = client.Close() }()
				upstream, err := new(net.Dialer).DialContext(context.Background(), "tcp", server)
				if err != nil {
					return // the client notices
				}
				sessions.Go(func() {
					_, _ = io.Copy(upstream, client)
					_ = upstream.Close()
				})
				passOn(client, upstream, statements)
				_ = upstream.Close()
			})
		}
	})
	return listener.Addr().String()
}

// passOn copies messages of the server: a type, the length of the rest with itself, the rest.
func passOn(client io.Writer, server io.Reader, statements bool) {
	for {
		head := make([]byte, 5)
		if _, err := io.ReadFull(server, head); err != nil {
			return
		}
		body := make([]byte, binaryorder.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(server, body); err != nil {
			return
		}
		if head[0] == 'K' { // BackendKeyData begins with the process id
			body[0] ^= 0x40
		}
		if statements && head[0] == 'Z' && body[0] != 'I' { // ReadyForQuery says whether a transaction is open
			refusal := pgproto3.ErrorResponse{Severity: "FATAL", Code: "08P01", Message: "transaction blocks not allowed in statement pooling mode"}
			if text, err := refusal.Encode(nil); err == nil {
				_, _ = client.Write(text)
			}
			return
		}
		if _, err := client.Write(append(head, body...)); err != nil {
			return
		}
	}
}

// TestCheckHoldsVersions: a schema that is older than the relay is to be migrated, whatever else is missing for that.
func TestCheckHoldsVersions(t *testing.T) {
	t.Parallel()
	d := installed(t)
	env := []string{"OUTBOX_RELAY_DATABASE_URL=" + d.url, "OUTBOX_RELAY_DATABASE_SLOT=" + d.name}
	d.exec(t, "INSERT INTO outbox_relay.schema_migrations (version_id, is_applied) VALUES (9999, true)")
	o := invoke(t, env, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, "warn  schema outbox_relay: version 9999, and this relay knows ")
	d.exec(t, "DELETE FROM outbox_relay.schema_migrations WHERE version_id > 5")
	o = invoke(t, env, "check")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.out, "FAIL  schema outbox_relay: version 5, and this relay needs ")
	assert.Contains(t, o.out, "outbox-relay migrate")
}

func TestCheckSeesAPooler(t *testing.T) {
	t.Parallel()
	d := installed(t)
	cfg, err := pgx.ParseConfig(d.url)
	require.NoError(t, err)
	server := net.JoinHostPort(cfg.Host, strconv.Itoa(int(cfg.Port)))
	pooled := "postgres://postgres@" + fakePooler(t, server, false) + "/" + d.name + "?sslmode=disable"
	slot := "OUTBOX_RELAY_DATABASE_SLOT=" + d.name
	o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + pooled, slot}, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, "warn  pooler: database.url leads through one → ")
	assert.Contains(t, o.out, "warn  replication: database.url leads through a pooler → ")
	o = invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + pooled, "OUTBOX_RELAY_DATABASE_REPLICATION_URL=" + d.url, slot}, "check")
	assert.Contains(t, o.out, "ok    pooler: database.url leads through one, and the stream past it")
	assert.Contains(t, o.out, "ok    replication: database.replication_url may stream")
}

// TestPoolInStatementMode: the relay and check say what is in the way. The error is that of PgBouncer 1.18.
func TestPoolInStatementMode(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s := newSite(t, "", always(http.StatusOK), "acme")
	u, err := url.Parse(s.dsn)
	require.NoError(t, err)
	u.Host = fakePooler(t, u.Host, true)
	const hint = "database.url leads through a pool in statement mode, which takes no transactions: let it lead to the server itself, or to a pool in session or transaction mode"
	p := startBinary(t, binary(t), s.config, "OUTBOX_RELAY_DATABASE_URL="+u.String(), "OUTBOX_RELAY_DATABASE_REPLICATION_URL="+s.dsn)
	s.receiver.await(ctx, t, "the log", func() bool { return strings.Contains(p.said(t), `"hint":"`+hint) })
	out, _, code := s.desk(t, "check", "--database-url", u.String())
	assert.Equal(t, exitFailure, code)
	assert.Contains(t, out, "(SQLSTATE 08P01) → "+hint+"\n")
}

// Each case breaks a sound database in one way.
func TestCheckFindsWhatIsBroken(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ sql, want string }{
		"slot dropped":          {"SELECT pg_drop_replication_slot(current_database())", `FAIL  slot \S+: missing → run outbox-relay migrate`},
		"publication dropped":   {"DROP PUBLICATION outbox_relay_registry", `FAIL  publication outbox_relay_registry: missing → run outbox-relay migrate`},
		"publication changed":   {"ALTER PUBLICATION outbox_relay_events SET (publish = 'delete')", `FAIL  publication outbox_relay_events: somebody changed what it publishes → ALTER`},
		"other cluster":         {"UPDATE outbox_relay.progress SET system_identifier = '42'", `FAIL  progress: was made on another cluster, 42: this database is a copy`},
		"slot used by somebody": {"UPDATE outbox_relay.progress SET lsn = '0/1'", `warn  progress: the slot is ahead of what was recorded`},
		"no primary key":        {"ALTER TABLE acme.webhook_events DROP CONSTRAINT webhook_events_pkey", `FAIL  tenant acme: webhook_events has no primary key that can identify its rows → mend the tables`},
		"no column":             {"ALTER TABLE acme.webhook_events DROP COLUMN event_data", `FAIL  tenant acme: webhook_events lacks column event_data → mend the tables`},
		"no table":              {"DROP TABLE acme.webhook_dead_letters", `FAIL  tenant acme: lacks webhook_dead_letters → run outbox-relay tenants add acme`},
		"not published":         {"ALTER PUBLICATION outbox_relay_events DROP TABLE acme.webhook_events", `FAIL  tenant acme: not published: webhook_events → run outbox-relay tenants add acme, with --since`},
		"schema gone":           {"DROP SCHEMA acme CASCADE", `FAIL  tenant acme: the schema is gone → run outbox-relay tenants remove acme`},
		"suspended":             {"UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a column is gone'", `FAIL  tenant acme: suspended: a column is gone → mend it`},
		"suspended and paused":  {"UPDATE outbox_relay.tenants SET state = 'suspended', reason = 'a column is gone', pause = ''", `FAIL  tenant acme: suspended: a column is gone → mend it; it is paused then, .* resume acme`},
		"paused":                {"SELECT outbox_relay.pause_tenant('acme')", `warn  tenant acme: paused → run outbox-relay tenants resume acme`},
		"forgotten schema":      {"CREATE SCHEMA zebra; CREATE TABLE zebra.webhook_events (id uuid)", `ok    tenants: 1 of 1 registered are served; with a webhook_events table but not registered: zebra`},
		"hidden rows": {
			"ALTER TABLE acme.webhook_endpoints ENABLE ROW LEVEL SECURITY; CREATE POLICY ctx ON acme.webhook_endpoints USING (context_id IS NULL)",
			`FAIL  tenant acme: webhook_endpoints has row-level security and no policy for the relay: CREATE POLICY outbox_relay ON acme.webhook_endpoints TO outbox_relay_runner USING \(true\) → mend`,
		},
		"no number": {"ALTER TABLE acme.webhook_events ALTER xid DROP DEFAULT", `warn  tenant acme: xid has no default in acme.webhook_events → run ALTER TABLE`},
		"partition without number": {
			`ALTER TABLE acme.webhook_events RENAME TO old; CREATE TABLE acme.webhook_events (LIKE acme.old INCLUDING DEFAULTS, PRIMARY KEY (id, occurred_at)) PARTITION BY RANGE (occurred_at);
			CREATE INDEX ON acme.webhook_events (xid); GRANT SELECT, INSERT ON acme.webhook_events TO outbox_relay_runner; ALTER PUBLICATION outbox_relay_events SET TABLE acme.webhook_events;
			CREATE TABLE acme.may PARTITION OF acme.webhook_events FOR VALUES FROM ('2026-05-01') TO ('2026-06-01');
			CREATE TABLE acme."June" (LIKE acme.old); ALTER TABLE acme.webhook_events ATTACH PARTITION acme."June" FOR VALUES FROM ('2026-06-01') TO ('2026-07-01')`,
			`warn  tenant acme: xid has no default in acme."June" → run ALTER TABLE`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := installed(t)
			d.exec(t, tc.sql)
			o := invoke(t, d.env, "check")
			assert.Regexp(t, "(?m)^"+tc.want, o.out)
			if strings.HasPrefix(tc.want, "FAIL") {
				assert.Equal(t, exitFailure, o.code)
				assert.Len(t, failures(o), 1, o.out)
			} else {
				assert.Equal(t, exitOK, o.code, o.out)
			}
		})
	}
}

func TestCheckOfAnotherInstance(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "UPDATE outbox_relay.progress SET instance_id = 'production'")
	o := invoke(t, append(d.env, "OUTBOX_RELAY_DATABASE_INSTANCE_ID=staging"), "check")
	require.Len(t, failures(o), 1)
	assert.Contains(t, failures(o)[0], `progress: belongs to instance "production", database.instance_id is "staging"`)
}

func TestCheckAfterARestore(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, "UPDATE outbox_relay.progress SET system_identifier = '42', instance_id = 'production'")
	o := invoke(t, append(d.env, "OUTBOX_RELAY_DATABASE_INSTANCE_ID=production"), "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, "warn  progress: was made on another cluster, 42, by this instance: the database was restored or moved → start a relay")
}

func TestCheckFindsMissingRights(t *testing.T) {
	t.Parallel()
	d := installed(t)
	env := d.as(t, "REPLICATION IN ROLE outbox_relay_runner")
	d.exec(t, `REVOKE INSERT ON acme.webhook_events FROM outbox_relay_runner; REVOKE DELETE ON acme.webhook_dead_letters FROM outbox_relay_runner;
		REVOKE UPDATE (paused_at) ON acme.webhook_endpoints FROM outbox_relay_runner; REVOKE UPDATE ON outbox_relay.recoveries FROM outbox_relay_runner`)
	o := invoke(t, env, "check")
	require.Len(t, failures(o), 2, o.out)
	assert.Contains(t, failures(o)[0], "role: lacks UPDATE on outbox_relay.recoveries")
	for _, right := range []string{"INSERT on webhook_events", "DELETE on webhook_dead_letters", "UPDATE (paused_at) on webhook_endpoints"} {
		assert.Contains(t, failures(o)[1], right)
	}
}

func TestCheckNamesInvalidRows(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, `
		ALTER TABLE acme.webhook_endpoints DROP CONSTRAINT webhook_endpoints_http_method_check;
		INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, http_method, secret_token, custom_headers, created_by_user_id) VALUES
		  ('00000000-0000-0000-0000-000000000001', 'good', 'https://example.com/hook', 'POST', 'a-secret-of-16-or-more', '{}', gen_random_uuid()),
		  ('00000000-0000-0000-0000-000000000002', 'ftp', 'ftp://example.com/hook?key=s3cret', 'GET', 'a-secret-of-16-or-more', '{}', gen_random_uuid()),
		  ('00000000-0000-0000-0000-000000000003', 'header', 'https://example.com/hook', 'POST', 'a-secret-of-16-or-more', '{"Host": "s3cret"}', gen_random_uuid());
		INSERT INTO acme.webhook_event_types (id, event_type, category, display_name) VALUES
		  ('00000000-0000-0000-0000-00000000000a', 'order.created', 'order', 'Order created');
		INSERT INTO acme.webhook_subscriptions (id, endpoint_id, event_type_id, event_type, event_filters) VALUES
		  ('00000000-0000-0000-0000-00000000000b', '00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-00000000000a', 'order.created', '{"total": {"$gt": 5}}'),
		  ('00000000-0000-0000-0000-00000000000c', '00000000-0000-0000-0000-000000000001', '00000000-0000-0000-0000-00000000000a', 'order.created', '{"total": {"$above": 5}}');`)
	o := invoke(t, d.env, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, "ok    tenant acme: 3 endpoints (3 active), 2 subscriptions\n")
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_endpoints 00000000-0000-0000-0000-000000000002: .*http_method.*; .*endpoint_url.* → it is left out until`, o.out)
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_endpoints 00000000-0000-0000-0000-000000000003: .*Host`, o.out)
	assert.Regexp(t, `(?m)^warn  tenant acme, webhook_subscriptions 00000000-0000-0000-0000-00000000000c: .*\$above`, o.out)
	assert.NotContains(t, o.out, "s3cret")
}

// TestCheckNamesForeignTriggers: who may put a trigger on a table that the relay writes has the rights of the relay. The owner of the table has them anyway.
func TestCheckNamesForeignTriggers(t *testing.T) {
	t.Parallel()
	d := installed(t)
	env := d.as(t, "REPLICATION IN ROLE outbox_relay_runner")
	const function = " RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
	owner, member, app := d.name+"_owner", d.name+"_member", d.name+"_app"
	d.exec(t, fmt.Sprintf(`CREATE ROLE %[1]s; CREATE ROLE %[2]s IN ROLE %[1]s; CREATE ROLE %[3]s; GRANT USAGE, CREATE ON SCHEMA acme TO %[1]s, %[2]s, %[3]s;
		ALTER TABLE acme.webhook_deliveries OWNER TO %[1]s;
		GRANT ALL ON ALL TABLES IN SCHEMA acme TO %[3]s;
		CREATE FUNCTION acme.supers()`+function+`CREATE TRIGGER supers BEFORE UPDATE ON acme.webhook_deliveries FOR EACH ROW EXECUTE FUNCTION acme.supers();
		SET ROLE %[1]s; CREATE FUNCTION acme.owners()`+function+`CREATE TRIGGER owners BEFORE UPDATE ON acme.webhook_deliveries FOR EACH ROW EXECUTE FUNCTION acme.owners(); RESET ROLE;
		SET ROLE %[2]s; CREATE FUNCTION acme.members()`+function+`CREATE TRIGGER members BEFORE UPDATE ON acme.webhook_deliveries FOR EACH ROW EXECUTE FUNCTION acme.members(); RESET ROLE;`,
		owner, member, app))
	o := invoke(t, env, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.NotContains(t, o.out, "trigger")
	d.exec(t, fmt.Sprintf(`SET ROLE %s; CREATE FUNCTION acme.note()`+function+`
		CREATE TRIGGER note BEFORE UPDATE ON acme.webhook_deliveries FOR EACH ROW EXECUTE FUNCTION acme.note();
		CREATE TRIGGER note BEFORE INSERT ON acme.webhook_event_types FOR EACH ROW EXECUTE FUNCTION acme.note(); -- which the relay only reads
		CREATE TRIGGER note BEFORE UPDATE ON acme.webhook_endpoints FOR EACH ROW EXECUTE FUNCTION acme.note(); RESET ROLE`, app))
	o = invoke(t, env, "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.Contains(t, o.out, fmt.Sprintf("warn  tenant acme: triggers with functions of others than the owner of the table: note on webhook_deliveries (%[1]s), note on webhook_endpoints (%[1]s) → ", app))
}

func TestCheckNamesDeniedEndpoints(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_endpoints (id, name, endpoint_url, secret_token, verify_ssl, created_by_user_id)
		SELECT ('00000000-0000-0000-0000-00000000000' || n)::uuid, 'x', url, 'a-secret-of-16-or-more', verified, gen_random_uuid()
		  FROM (VALUES (1, 'https://good.example.com', true), (2, 'https://bad.example.com/?key=s3cret', true), (3, 'https://good.example.com', false),
		    (4, 'http://127.0.0.1:8080/hooks', true), (5, 'https://localhost', true), (6, 'https://192.0.2.1', true), (7, 'https://1.1.1.1', true)) w (n, url, verified)`)
	o := invoke(t, append(d.env, "OUTBOX_RELAY_NETWORK_DENY_HOSTS=bad.example.com,*.worse.example.com"), "check")
	assert.Equal(t, exitOK, o.code, o.out)
	assert.NotContains(t, o.out, "000000000001")
	assert.Contains(t, o.out, "warn  tenant acme, webhook_endpoints 00000000-0000-0000-0000-000000000002: the host is denied by network.deny_hosts → ")
	assert.Contains(t, o.out, "warn  tenant acme, webhook_endpoints 00000000-0000-0000-0000-000000000003: verify_ssl=false needs delivery.allow_insecure_tls → ")
	assert.Contains(t, o.out, "000000000004: address 127.0.0.1 is not public and not listed in network.allow → ")
	assert.Contains(t, o.out, "000000000005: address 127.0.0.1 is not public and not listed in network.allow → ")
	assert.Contains(t, o.out, "000000000006: address 192.0.2.1 is not public and not listed in network.allow → ")
	assert.NotContains(t, o.out, "000000000007")
	assert.NotContains(t, o.out, "s3cret")

	o = invoke(t, append(d.env, "OUTBOX_RELAY_DELIVERY_TLS_CA_FILE=/nonexistent.pem"), "check")
	assert.Equal(t, exitUsage, o.code)
	assert.Contains(t, o.err, `delivery.tls.ca_file: "/nonexistent.pem": cannot be read: no such file or directory`)
}

func TestServerWithoutLogicalReplication(t *testing.T) {
	t.Parallel()
	server, err := pgtest.Start(t.Context(), pgtest.Options{Config: map[string]string{"wal_level": "replica", "max_replication_slots": "1"}})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	env := []string{"OUTBOX_RELAY_DATABASE_URL=" + server.URL("postgres")}

	o := invoke(t, env, "migrate")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.err, "Set wal_level = logical in postgresql.conf and restart the server")
	o = invoke(t, env, "run", "--listen", "")
	assert.Equal(t, exitFailure, o.code, o.err)
	assert.Contains(t, o.err, "wal_level = logical")

	execOn(t, server.URL("postgres"), "SELECT pg_create_physical_replication_slot('theirs')")
	o = invoke(t, env, "check")
	assert.Equal(t, exitFailure, o.code)
	assert.Contains(t, o.out, "FAIL  wal_level: replica → set wal_level = logical and restart the server")
	assert.Contains(t, o.out, "FAIL  replication slots: 1 of max_replication_slots = 1 in use → drop one that nobody uses")
}
