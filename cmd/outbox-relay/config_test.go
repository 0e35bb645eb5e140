package main

import (
	"bytes"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

const examplePath = "../../config.example.yaml"

// loadText reads a file with this text.
func loadText(t *testing.T, text string, flags ...string) (config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	set := pflag.NewFlagSet("test", pflag.ContinueOnError)
	for name := range flagKeys() {
		set.String(name, "", "")
	}
	require.NoError(t, set.Parse(flags))
	return loadConfig(file, set)
}

const dsn = "postgres://relay@localhost/app"

func TestFileOverridesDefaultsAndFlagsOverrideFile(t *testing.T) {
	t.Parallel()
	c, err := loadText(t, `
database:
  url: postgres://file@localhost/app
delivery: {workers: 300, default_timeout: 1m30s, keep_response: 0B}
retry: {multiplier: 1.5}
window: {bytes: 1.5MiB}
tenants:
  include: [tenant_*, admin]
network: {allow: [10.0.0.0/8, "fd00::/8"], deny: 10.1.0.0/16}
breaker:
log: {level: warn}
`, "--database-url="+dsn, "--listen=")
	require.NoError(t, err)
	want := defaultConfig()
	want.Database.URL = dsn
	want.Delivery.Workers, want.Delivery.DefaultTimeout, want.Delivery.KeepResponse = 300, 90*time.Second, 0
	want.Retry.Multiplier = 1.5
	want.Window.Bytes = 3 << 19
	want.Tenants.Include = []string{"tenant_*", "admin"}
	want.Network.Allow = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}
	want.Network.Deny = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}
	want.Log.Level = "warn"
	want.Server.Listen = ""
	assert.Equal(t, want, c)
}

// Each case is one fault; the last test has them all in one file.
func faultCases() []struct{ name, yaml, want string } {
	return []struct{ name, yaml, want string }{
		{"slip in a key", "delivery: {worker: 3}", "delivery.worker: is no key of the configuration: did you mean delivery.workers?"},
		{"slip in a section", "delivry: {connect_timeout: 3s}", "delivry.connect_timeout: is no key of the configuration: did you mean delivery.connect_timeout?"},
		{"key in the wrong section", "retry: {lease: 10m}", "retry.lease: is no key of the configuration: did you mean queue.lease?"},
		{"key without a section", "workers: 4", "workers: is no key of the configuration: did you mean delivery.workers?"},
		{"unknown key", "shutdown: {zzzzzzzz: 4}", "shutdown.zzzzzzzz: is no key of the configuration"},
		{"value for a section", "queue: 30", "queue: is a section: indent its keys below it"},
		{"duration without unit", "delivery: {default_timeout: 30}", "delivery.default_timeout: 30: has no unit: write 30s for seconds, or use ms, m or h"},
		{"duration in days", "retry: {max_backoff: 1d}", "retry.max_backoff: 1d: must be a number and a unit of ms, s, m or h: 30s, 1m30s"},
		{"negative duration", "record: {timeout: -1s}", "record.timeout: -1s: must be at least 1s"},
		{"size without unit", "delivery: {keep_response: 4096}", "delivery.keep_response: 4096: write a number and a unit of B, KiB, MiB, GiB, KB, MB or GB, such as 64MiB"},
		{"negative size", "window: {bytes: -64MiB}", "window.bytes: -64MiB: must be at least 1MiB"},
		{"number expected", "database: {max_connections: many}", `database.max_connections: "many": must be a whole number`},
		{"fraction", "breaker: {failures: 1.5}", `breaker.failures: "1.5": must be a whole number`},
		{"text expected", "database: {instance_id: 0123}", "database.instance_id: 83: must be text: put it in quotes"},
		{"switch", "delivery: {allow_insecure_tls: sometimes}", `delivery.allow_insecure_tls: "sometimes": must be true or false`},
		{"not a list", "tenants: {auto_adopt: [1]}", "tenants.auto_adopt: [1]: must be a list of texts: [a, b] in the file, a,b in the environment"},
		{"pattern", "tenants: {include: ['[a-']}", `tenants.include: "[a-": is not a name or a pattern: * stands for any characters, ? for one, [a-z] for one of a set`},
		{"number that is too large", "queue: {batch: 600000000}", "queue.batch: 600000000: must be at most 100000000"},
		{"pattern twice", "tenants: {auto_adopt: [a*, b, ' a*']}", `tenants.auto_adopt: "a*": is in the list twice: drop one of the two, or let it be the name that was meant`},
		{"schema of the server", "tenants: {include: [acme, 'pg_*']}", `tenants.include: "pg_*": can match no tenant, as the server keeps pg_… and information_schema for itself, and the relay outbox_relay: name the schemas with the tables of webhooks`},
		{"schema of the relay", "tenants: {auto_adopt: [outbox_relay]}", `tenants.auto_adopt: "outbox_relay": can match no tenant, as the server keeps pg_… and information_schema for itself, and the relay outbox_relay: name the schemas with the tables of webhooks`},
		{
			"name that the server has cut", "tenants: {include: [" + strings.Repeat("é", 32) + "]}", `tenants.include: "` + strings.Repeat("é", 32) +
				`": can match no tenant, as it is longer than the 63 bytes that PostgreSQL keeps of a name: write what \dn shows in psql`,
		},
		{"address range", "network: {deny: [10.0.0.5]}", `network.deny: "10.0.0.5": must be an address range in CIDR form: 10.0.0.0/8, or 10.1.2.3/32 for one address`},
		{"range with host bits", "network: {deny: [10.0.0.5/8]}", "network.deny: 10.0.0.5/8: has address bits beyond its length: write 10.0.0.0/8, or 10.0.0.5/32 for one address"},
		{"port in words", "network: {ports: [443, https]}", `network.ports: "https": must be a list of whole numbers: [443, 8443] in the file, 443,8443 in the environment`},
		{"port", "network: {ports: 65536}", "network.ports: 65536: must be 1 to 65535"},
		{"no port", "network: {ports: ['']}", `network.ports: "": is an empty entry of the list: leave it out`},
		{"a port and none", "network: {ports: '443, '}", `network.ports: "": is an empty entry of the list: leave it out`},
		{"no host", "network: {allow_hosts: [a.example, ' ']}", `network.allow_hosts: "": is an empty entry of the list: leave it out`},
		{"no range", "network: {allow: ['']}", `network.allow: "": is an empty entry of the list: leave it out`},
		{"no tenant", "tenants: {include: ['']}", `tenants.include: "": is an empty entry of the list: leave it out`},
		{"no key", "secrets: {keys: [''], require_sealed: true}", `secrets.keys: "": is an empty entry of the list: leave it out`},
		{"no time", "verification: {schedule: [5s, '']}", `verification.schedule: "": is an empty entry of the list: leave it out`},
		{"host with a port", "network: {allow_hosts: ['example.com:443']}", `network.allow_hosts: "example.com:443": must be a host name such as hooks.example.com, or *.example.com for all below it: no scheme, port or path`},
		{"host as a URL", "network: {deny_hosts: ['https://example.com/']}", `network.deny_hosts: "https://example.com/": must be a host name such as hooks.example.com, or *.example.com for all below it: no scheme, port or path`},
		{"address among hosts", "network: {deny_hosts: [10.0.0.5]}", `network.deny_hosts: "10.0.0.5": is an address, which has many spellings and any number of names: write 10.0.0.5/32 into network.deny`},
		{"host allowed and denied", "network: {allow_hosts: [Hooks.example.com], deny_hosts: ['*.example.com']}", `network.allow_hosts: "Hooks.example.com": has no effect, as network.deny_hosts denies it: drop one of them`},
		{"source", "delivery: {source: 'my app'}", `delivery.source: "my app": use a URI or a path, such as outbox-relay, spaces and letters beyond ASCII percent-encoded`},
		{"no source", "delivery: {source: ''}", `delivery.source: "": use a URI or a path, such as outbox-relay, spaces and letters beyond ASCII percent-encoded`},
		{"connect timeout", "delivery: {connect_timeout: 0s}", "delivery.connect_timeout: 0s: use a time above 0, such as 5s"},
		{"handshake timeout", "delivery: {tls_handshake_timeout: -1s}", "delivery.tls_handshake_timeout: -1s: use a time above 0, such as 10s"},
		{"keep-alive", "delivery: {keep_alive: 0s}", "delivery.keep_alive: 0s: use a time above 0, such as 55s"},
		{"name cache", "delivery: {dns_cache: -1s}", "delivery.dns_cache: -1s: use a time such as 30s, or 0 for no cache"},
		{"kept response", "delivery: {keep_response: 17KiB}", "delivery.keep_response: 17408: use 0B up to 16KiB"},
		{"no connections", "delivery: {max_connections: 0}", "delivery.max_connections: 0: use 1 or more"},
		{"no connections of a host", "delivery: {max_connections_per_host: 0}", "delivery.max_connections_per_host: 0: use 1 up to max_connections"},
		{"proxy", "network: {proxy: 'socks5://relay:s3cret@proxy:1080'}", "network.proxy: (hidden): must be the URL of an HTTP proxy, http:// or https://, and nothing behind its port: http://user:password@proxy.internal:3128, special characters percent-encoded"},
		{"proxy twice", "network: {proxy: 'http://proxy:3128', proxy_file: /proxy}", "network.proxy_file: /proxy: is given besides network.proxy: drop one of the two"},
		{"no proxy file", "network: {proxy_file: /nonexistent/proxy}", "network.proxy_file: /nonexistent/proxy: cannot be read: open /nonexistent/proxy: no such file or directory"},
		{"TLS version", "delivery: {tls: {min_version: 1.1}}", `delivery.tls.min_version: "1.1": must be 1.2 or 1.3`},
		{"slip below a section", "delivery: {tls: {minversion: 1.2}}", "delivery.tls.minversion: is no key of the configuration: did you mean delivery.tls.min_version?"},
		{"value for an inner section", "delivery: {tls: 1.3}", "delivery.tls: is a section: indent its keys below it"},
		{"authorities missing", "delivery: {tls: {ca_file: /nonexistent.pem}}", `delivery.tls.ca_file: "/nonexistent.pem": cannot be read: no such file or directory`},
		{"no authorities", "delivery: {tls: {ca_file: /dev/null}}", `delivery.tls.ca_file: "/dev/null": holds no certificate in PEM form, or one that breaks off: -----BEGIN CERTIFICATE----- …`},
		{"no authority at all", "delivery: {tls: {ca_only: true}}", "delivery.tls.ca_only: true: needs ca_file: without it no receiver would be trusted"},
		{"certificate without key", "delivery: {tls: {cert_file: /c.pem}}", `delivery.tls.key_file: is missing: cert_file is of no use without its key`},
		{"key without certificate", "delivery: {tls: {key_file: /k.pem}}", `delivery.tls.cert_file: is missing: key_file is of no use without its certificate`},
		{"profiles as a mapping", "delivery: {tls: {profiles: acme}}", "delivery.tls.profiles: must be a list in the file, each entry beginning with its tenant: - tenant: acme"},
		{"profile without keys", "delivery: {tls: {profiles: [acme]}}", "delivery.tls.profiles[0]: must be an entry with its keys below it, beginning with its tenant: - tenant: acme"},
		{"slip in a profile", "delivery: {tls: {profiles: [{tenant: acme, cafile: x}]}}", "delivery.tls.profiles[0].cafile: is no key of an entry: did you mean delivery.tls.profiles[0].ca_file?"},
		{"profile without tenant", "delivery: {tls: {profiles: [{server_name: a.b}]}}", `delivery.tls.profiles[0].tenant: is missing: name the schema of the tenant`},
		{"endpoint of a profile", "delivery: {tls: {profiles: [{tenant: acme, endpoint: first}]}}", `delivery.tls.profiles[0].endpoint: "first": is no id of an endpoint: write one such as 0190a5b2-7c1d-7e3f-8a4b-5c6d7e8f9a0b, or leave it out for all of the tenant`},
		{"server name of a profile", "delivery: {tls: {profiles: [{tenant: acme, server_name: 'https://x'}]}}", `delivery.tls.profiles[0].server_name: "https://x": is no host name: write one such as hooks.example.com`},
		{"profile twice", "delivery: {tls: {profiles: [{tenant: a}, {tenant: b}, {tenant: a}]}}", "delivery.tls.profiles[2]: is for the same endpoints as delivery.tls.profiles[0]: drop one of the two"},
		{"file of a profile", "delivery: {tls: {profiles: [{tenant: a, ca_file: /nonexistent.pem}]}}", `delivery.tls.profiles[0].ca_file: "/nonexistent.pem": cannot be read: no such file or directory`},
		{"no shard", "database: {shards: 0}", "database.shards: 0: must be 1 to 64: each is one more slot that decodes the whole log"},
		{
			"slot too long for its shards", "database: {slot: " + strings.Repeat("s", 62) + ", shards: 2}", `database.slot: "` + strings.Repeat("s", 62) +
				`": must be shorter: the slot of the last shard is ` + strings.Repeat("s", 62) + "_1, and a slot's name has at most 63 characters",
		},
		{"verification", "verification: {method: ping}", `verification.method: "ping": must be none, head or challenge`},
		{"verification too often", "verification: {schedule: [1m, 10ms]}", "verification.schedule: 10ms: must be at least 1s"},
		{"slot", "database: {slot: My-Slot}", `database.slot: "My-Slot": must be 1 to 63 of a-z, 0-9 and _, as PostgreSQL demands of a slot's name`},
		{"objective", "objective: {latency: 0s}", "objective.latency: 0s: must be at least 1ms"},
		{"series of tenants", "metrics: {per_tenant: -1}", "metrics.per_tenant: -1: must be 0 to 10000: each of them has some forty series; 0 switches them off"},
		{"series of endpoints", "metrics: {per_endpoint: 1000000}", "metrics.per_endpoint: 1000000: must be 0 to 10000: each of them has some forty series; 0 switches them off"},
		{"level", "log: {level: loud}", `log.level: "loud": must be debug, info, warn or error`},
		{"format", "log: {format: xml}", `log.format: "xml": must be json, text, or auto: text on a terminal, json anywhere else`},
		{"listen", "server: {listen: 9464}", "server.listen: 9464: must be text: put it in quotes"},
		{"validation: profile", "validation: {profile: prod}", `validation.profile: "prod": must be development, staging or production`},
		{"validation: event types", "validation: {event_types: all}", `validation.event_types: "all": must be any or dotted`},
		{"validation: payload schema", "validation: {payload_schema: true}", `validation.payload_schema: "true": must be off, warn or enforce`},
		{"validation: URL", "validation: {max_url_length: 63B}", "validation.max_url_length: 63B: must be 64B to 64KiB"},
		{"validation: headers", "validation: {max_headers: -1}", "validation.max_headers: -1: must be 0 to 1000"},
		{"validation: size of headers", "validation: {max_headers_size: 65537B}", "validation.max_headers_size: 65537B: must be 0B to 64KiB"},
		{"validation: timeout", "validation: {max_timeout: 301s}", "validation.max_timeout: 5m1s: must be 1s to 5m0s"},
		{"validation: short timeout", "validation: {min_timeout: 999ms}", "validation.min_timeout: 999ms: must be at least 1s"},
		{"validation: retries", "validation: {max_retries: 101}", "validation.max_retries: 101: must be 0 to 100"},
		{"validation: backoff", "validation: {min_backoff: 0s}", "validation.min_backoff: 0s: must be at least 1s"},
		{"validation: type", "validation: {max_event_type_length: 31}", "validation.max_event_type_length: 31: must be at least 32"},
		{"validation: payload", "validation: {max_payload: 4095B}", "validation.max_payload: 4095B: must be at least 4KiB, or 0B for no bound"},
		{"validation: depth", "validation: {max_depth: -1}", "validation.max_depth: -1: must be at least 0"},
		{"pair: least over greatest", "validation: {min_backoff: 2h}", "validation.min_backoff: 2h0m0s: must not be more than validation.max_backoff, which is 1h0m0s: lower the one or raise the other"},
		{"pair: concurrency over workers", "delivery: {endpoint_concurrency: 1300}", "delivery.endpoint_concurrency: 1300: must not be more than delivery.workers, which is 1024: lower the one or raise the other"},
		{"pair: workers over connections", "delivery: {workers: 3000}", "delivery.workers: 3000: must not be more than delivery.max_connections, which is 2048: lower the one or raise the other"},
		{"pair: connections of a host", "delivery: {max_connections_per_host: 3000}", "delivery.max_connections_per_host: 3000: must not be more than delivery.max_connections, which is 2048: lower the one or raise the other"},
		{"pair: backoff over its cap", "retry: {backoff: 2h}", "retry.backoff: 2h0m0s: must not be more than retry.max_backoff, which is 1h0m0s: lower the one or raise the other"},
	}
}

func TestEachFaultNamesKeyValueAndRemedy(t *testing.T) {
	t.Parallel()
	for _, tc := range faultCases() {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			_, err := loadText(t, tc.yaml, "--database-url="+dsn)
			var ce *configError
			require.ErrorAs(t, err, &ce)
			require.Len(t, ce.faults, 1, "%v", err)
			assert.EqualError(t, ce.faults[0], tc.want)
		})
	}
}

// What can match a tenant is no fault, and blanks around an entry are none of it.
func TestPatternsOfTenants(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 61)
	c, err := loadText(t, `tenants: {include: [' acme ', '*', Acme, 'pgx_*', '`+long+`[a-z]\*', '*`+long+`**??', 'odd "one', a/b], auto_adopt: [acme]}`, "--database-url="+dsn)
	require.NoError(t, err)
	assert.Equal(t, []string{"acme", "*", "Acme", "pgx_*", long + `[a-z]\*`, "*" + long + "**??", `odd "one`, "a/b"}, c.Tenants.Include)
}

func TestAllFaultsAtOnce(t *testing.T) {
	t.Parallel()
	_, err := loadText(t, `
delivery: {default_timeout: 30, worker: 3, endpoint_concurrency: 4000, connect_timeout: -1s}
window: {bytes: -1B}
network: {allow: [10.0.0.0/8, nonsense], deny: [10.0.0.0/33]}
retry: {backoff: 2h, attempts: -1, multiplier: 0.5}
log: {level: loud}
server: {listen: nowhere}
`)
	require.Error(t, err)
	for _, key := range []string{
		"database.url: is required", "delivery.default_timeout: 30", "delivery.worker: ", "delivery.endpoint_concurrency: 4000", "delivery.connect_timeout: -1s",
		"window.bytes: -1B", `network.allow: "nonsense"`, `network.deny: "10.0.0.0/33"`, "retry.backoff: 2h", "retry.attempts: -1", "retry.multiplier: 0.5",
		`log.level: "loud"`, `server.listen: "nowhere"`,
	} {
		require.ErrorContains(t, err, key)
	}
	assert.ErrorContains(t, err, "13 faults")
}

func TestProfilerIsOnLoopbackOnly(t *testing.T) {
	t.Parallel()
	for address, ok := range map[string]bool{
		"": true, "127.0.0.1:6060": true, "127.1.2.3:0": true, "[::1]:6060": true,
		":6060": false, "0.0.0.0:6060": false, "[::]:6060": false, "10.0.0.1:6060": false, "localhost:6060": false, "127.0.0.1": false, "nowhere": false,
	} {
		_, err := loadText(t, "server: {pprof: '"+address+"'}", "--database-url="+dsn)
		if ok {
			require.NoError(t, err, address)
			continue
		}
		require.ErrorContains(t, err, `server.pprof: "`+address+`": must be an address of loopback and a port`, address)
	}
}

// A value that is given alone is no fault because a default is above it.
func TestDefaultsFitWhatIsGiven(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]func(*config){
		"delivery: {workers: 7}": func(c *config) {
			c.Delivery.Workers, c.Delivery.EndpointConcurrency = 7, 7
		},
		"delivery: {max_connections: 50}": func(c *config) {
			d := &c.Delivery
			d.MaxConnections, d.MaxConnectionsPerHost, d.HostConcurrency, d.Workers, d.EndpointConcurrency = 50, 50, 50, 50, 50
		},
		"delivery: {max_connections_per_host: 9}": func(c *config) {
			c.Delivery.MaxConnectionsPerHost, c.Delivery.HostConcurrency = 9, 9
		},
		"delivery: {default_timeout: 3s}": func(c *config) {
			d := &c.Delivery
			d.DefaultTimeout, d.ConnectTimeout, d.TLSHandshakeTimeout = 3*time.Second, 3*time.Second, 3*time.Second
		},
		"window: {deliveries: 100}": func(c *config) {
			c.Window.Deliveries, c.Record.Batch, c.Delivery.Workers = 100, 100, 100
		},
		"retry: {max_backoff: 10s}":   func(c *config) { c.Retry.MaxBackoff, c.Retry.Backoff = 10*time.Second, 10*time.Second },
		"health: {disable_after: 1h}": func(c *config) { c.Health.DisableAfter, c.Health.WarnAfter = time.Hour, time.Hour },
		"health: {disable_after: 0s}": func(c *config) { c.Health.DisableAfter = 0 },
	} {
		c, err := loadText(t, given, "--database-url="+dsn)
		require.NoError(t, err, given)
		expected := defaultConfig()
		expected.Database.URL = dsn
		want(&expected)
		assert.Equal(t, expected, c, given)
	}
}

func TestAllowUnderDenyIsRefused(t *testing.T) {
	t.Parallel()
	_, err := loadText(t, "network: {allow: [10.1.0.0/16], deny: [10.0.0.0/8]}", "--database-url="+dsn)
	assert.ErrorContains(t, err, "network.allow: 10.1.0.0/16: has no effect, as network.deny has 10.0.0.0/8")
}

func TestFaultyDSNIsNotRepeated(t *testing.T) {
	t.Parallel()
	const notOne, at = "is not a PostgreSQL DSN: write postgres://", "has an @ in what comes out as its host or database: percent-encode the password"
	for bad, want := range map[string]string{
		"postgres://relay:s3cret/word@:x/app":               "has no valid port: write postgres://",
		"postgres://relay:s3cret@h:70000/app":               "has no valid port: write postgres://",
		"host=localhost port=s3cret":                        "has no valid port",
		"postgres://a:s3cret@h/d?sslmode=maybe":             "has no valid sslmode: use disable, allow, prefer, require, verify-ca or verify-full",
		"postgres://a:s3cret@h/d?target_session_attrs=some": "has no valid target_session_attrs",
		"postgres://a:s3cret@h/d?connect_timeout=soon":      "has no valid connect_timeout",
		"mysql://a:s3cret@localhost/app":                    notOne,
		"mysql://a:s3cret@localhost/app?sslmode=disable":    notOne,
		"postgres://relay:12%zs3cret@h/app":                 notOne,
		"host=h password='s3cret":                           notOne,
		"postgres://relay:p@s3cret@h/app":                   at,
		"postgres://relay:p@s3cret@h:5432,h2:5432/app":      at,
		"postgresql://relay:12/3s3cret@h/app":               at,
		"host=relay:s3cret@h dbname=app":                    at,
		"host=h1,relay:s3cret@h2 dbname=app":                at,
	} {
		_, err := loadText(t, "", "--database-url="+bad)
		require.ErrorContains(t, err, "database.url: "+want, bad)
		assert.NotContains(t, err.Error(), "s3cret")
		c := defaultConfig()
		c.Database.ReplicationURL = bad
		var printed bytes.Buffer
		require.NoError(t, c.write(&printed))
		assert.Contains(t, printed.String(), "replication_url: '(hidden: not a DSN)'", bad)
		assert.NotContains(t, printed.String(), "s3cret", bad)
	}
	for _, good := range []string{"postgres://a:p%40ss@h/d?application_name=a@b", "postgres://h/d?user=a&password=p@ss", "postgres://a@h1,h2:5433/d", "host=h password=p@ss"} {
		_, err := loadText(t, "", "--database-url="+good)
		require.NoError(t, err, good)
	}
	_, err := loadText(t, "", "--database-url=postgres://relay@h/d?sslmode=verify-full&sslrootcert=/nonexistent.pem")
	assert.ErrorContains(t, err, "database.url: names a file that cannot be read: open /nonexistent.pem")
}

func TestBrokenFile(t *testing.T) {
	t.Parallel()
	_, err := loadText(t, "delivery:\n  workers: 1\n  workers: 2\n")
	require.ErrorContains(t, err, "already defined")
	_, err = loadText(t, "delivery: [\n")
	require.ErrorContains(t, err, "yaml")
	_, err = loadConfig("/nonexistent/config.yaml", pflag.NewFlagSet("test", pflag.ContinueOnError))
	require.ErrorContains(t, err, "no such file")
}

func TestPrintedConfigurationIsReadAgain(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	c.Database.URL = "postgres://relay@localhost/app"
	c.Tenants.Include = []string{"a*", "b, c"}
	c.Network.Allow = []netip.Prefix{netip.MustParsePrefix("fd00::/8")}
	c.Retry.MaxBackoff = 90 * time.Minute
	c.Window.Bytes = 1_500_001
	c.Server.Listen = ""
	c.Network.Ports, c.Network.AllowHosts = []int{443, 8443}, []string{"*.example.com"}
	c.Delivery.TLS.MinVersion = "1.3"
	c.Delivery.TLS.Profiles = []delivery.TLSProfile{
		{Tenant: "acme", ServerName: "hooks.internal"},
		{Tenant: "a: b", Endpoint: "0190a5b2-7c1d-7e3f-8a4b-5c6d7e8f9a0b", TLSSettings: delivery.TLSSettings{MinVersion: "1.2"}},
	}
	var printed bytes.Buffer
	require.NoError(t, c.write(&printed))
	again, err := loadText(t, printed.String())
	require.NoError(t, err)
	assert.Equal(t, c, again)
}

func TestPasswordsAreHidden(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{
		"postgres://relay:s3cret@db:5432/app?sslmode=require": "postgres://relay:xxxxx@db:5432/app?sslmode=require",
		"postgres://db/app?user=relay&password=s3cret":        "postgres://db/app?user=relay&password=xxxxx",
		"postgres://relay@db/app":                             "postgres://relay@db/app",
		"host=db user=relay password=s3cret dbname=app":       "host=db user=relay password=xxxxx dbname=app",
		`host=db password = 's3\'cret s3' dbname=app`:         "host=db password=xxxxx dbname=app",
		`host=db password='s3 cret`:                           "(hidden: not a DSN)",
		"":                                                    "",
	} {
		assert.Equal(t, want, hidePassword(given))
	}
	c := defaultConfig()
	c.Database.URL = "postgres://relay:s3cret@db/app"
	c.Database.ReplicationURL = "postgres://replica:s3cret@db/app"
	c.Network.Proxy = "http://relay:s3cret@proxy:3128"
	var printed bytes.Buffer
	require.NoError(t, c.write(&printed))
	assert.NotContains(t, printed.String(), "s3cret")
	assert.Contains(t, printed.String(), "http://relay:xxxxx@proxy:3128")
}

// The example is documentation: it must have every key, with its default, and say of what.
func TestExampleFile(t *testing.T) {
	t.Parallel()
	c, err := loadConfig(examplePath, func() *pflag.FlagSet {
		set := pflag.NewFlagSet("test", pflag.ContinueOnError)
		set.String("database-url", "", "")
		require.NoError(t, set.Parse([]string{"--database-url=" + dsn}))
		return set
	}())
	require.NoError(t, err)
	want := defaultConfig()
	want.Database.URL = dsn
	assert.Equal(t, want, c)

	text, err := os.ReadFile(examplePath)
	require.NoError(t, err)
	var file yaml.Node
	require.NoError(t, yaml.Unmarshal(text, &file))
	comments := map[string]string{}
	for section, node := range pairs(file.Content[0]) {
		if section.Value == databasesKey {
			assert.Contains(t, section.HeadComment, "List of databases")
			continue
		}
		commentsOf(t, section.Value+".", node, comments)
	}
	// What each kind of value has to be explained with.
	units := map[string]*regexp.Regexp{
		"int":              regexp.MustCompile(`(?i)number`),
		"float64":          regexp.MustCompile(`(?i)factor|number|share`),
		"bool":             regexp.MustCompile(`true or false`),
		"time.Duration":    regexp.MustCompile(`(?i)time|wait`),
		"relay.ByteSize":   regexp.MustCompile(`(?i)size`),
		"[]string":         regexp.MustCompile(`(?i)list`),
		"[]time.Duration":  regexp.MustCompile(`(?i)list of waits`),
		"[]netip.Prefix":   regexp.MustCompile(`CIDR`),
		"[]int":            regexp.MustCompile(`(?i)list`),
		"string":           regexp.MustCompile(`.`),
		"relay.SchemaMode": regexp.MustCompile(`(?s)off.*warn.*enforce`),

		"delivery.TLSVersion":   regexp.MustCompile(`version`),
		"[]delivery.TLSProfile": regexp.MustCompile(`List`),
	}
	for _, l := range leavesOf(&c) {
		assert.Contains(t, comments, l.key, "config.example.yaml lacks it")
		assert.Regexp(t, units[l.value.Type().String()], comments[l.key], l.key)
		delete(comments, l.key)
	}
	assert.Empty(t, comments, "no such keys")
}

// commentsOf collects what stands above each key of a section, and of the sections in it.
func commentsOf(t *testing.T, prefix string, section *yaml.Node, comments map[string]string) {
	t.Helper()
	for key, value := range pairs(section) {
		if value.Kind == yaml.MappingNode {
			assert.NotEmpty(t, key.HeadComment, "%s%s", prefix, key.Value)
			commentsOf(t, prefix+key.Value+".", value, comments)
			continue
		}
		comments[prefix+key.Value] = key.HeadComment
		assert.Empty(t, value.LineComment, "%s: comments stand above", key.Value)
	}
}

// pairs iterates over a mapping of YAML.
func pairs(node *yaml.Node) func(yield func(key, value *yaml.Node) bool) {
	return func(yield func(key, value *yaml.Node) bool) {
		for i := 0; i+1 < len(node.Content); i += 2 {
			if !yield(node.Content[i], node.Content[i+1]) {
				return
			}
		}
	}
}

func TestDefaultsSuitTheClient(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	client := c.ClientConfig(version())
	assert.NoError(t, client.Validate())
}

func TestUnknownVariables(t *testing.T) {
	t.Parallel()
	c := defaultConfig()
	var e configError
	e.unknownEnv([]string{
		"HOME=/", "OUTBOX_RELAY_DATABASE_URL=x", "OUTBOX_RELAY_LOG_LEVEL=debug",
		"OUTBOX_RELAY_SERVICE_HOST=10.0.0.1", "OUTBOX_RELAY_PORT_9464_TCP_ADDR=x", "OUTBOX_RELAY_SERVER_SERVICE_PORT=1", "OUTBOX_RELAY_HOME=/x",
		"OUTBOX_RELAY_DATABSE_URL=x", "OUTBOX_RELAY_RETRY_MAX=3",
	}, leavesOf(&c))
	require.Len(t, e.faults, 2)
	require.EqualError(t, e.faults[0], "OUTBOX_RELAY_DATABSE_URL: is no variable of the configuration: did you mean OUTBOX_RELAY_DATABASE_URL?")
	assert.True(t, strings.HasPrefix(e.faults[1].Error(), "OUTBOX_RELAY_RETRY_MAX: "), e.faults[1])
}

func TestByteSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]relay.ByteSize{"0B": 0, "512B": 512, "64MiB": 64 << 20, "1.5KiB": 1536, "10 MB": 10_000_000, "2GiB": 2 << 30, "-1KiB": -1024} {
		got, err := relay.ParseByteSize(text)
		require.NoError(t, err, text)
		assert.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "5", "MiB", "5mib", "5MiBB", "5iB", "NaNB", "InfGiB", "99999999999GiB", "0x10B5"} {
		_, err := relay.ParseByteSize(text)
		require.Error(t, err, text)
	}
	assert.Equal(t, "1536B 3KiB 5MiB 0B 1GiB", strings.Join([]string{
		relay.ByteSize(1536).String(), relay.ByteSize(3072).String(), relay.ByteSize(5 << 20).String(), relay.ByteSize(0).String(), relay.GiB.String(),
	}, " "))
}

func TestFaultsOfYAMLCiteNothing(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"postgres://u:planted@h/db":                   "yaml: unmarshal errors: line 1: cannot unmarshal !!str (hidden) into map[string]interface {}",
		"database: {url: *planted}":                   "yaml: unknown anchor (hidden) referenced",
		"a: !!int planted":                            "yaml: cannot decode !!str (hidden) as a !!int",
		"a:\n  ? {planted: 2}\n  : 1":                 "yaml: ",
		"database:\n  url: postgres://planted\n x: {": "yaml: line 2: did not find expected key",
		"delivery: [planted\n":                        "did not find expected ',' or ']'",
	} {
		_, err := loadText(t, text)
		var ce *configError
		require.ErrorAs(t, err, &ce)
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "plant")
		require.NotContains(t, strings.TrimPrefix(err.Error(), "configuration:\n"), "\n")
	}
}
