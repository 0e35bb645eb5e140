package relay

import (
	"net/netip"
	"path"
	"strconv"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
)

// Config is everything the relay can be told. Start from [DefaultConfig]: the zero value does not pass [Config.Validate]. The mapstructure
// tags are the names of the keys in the configuration file; config.example.yaml says what each one does.
type Config struct {
	Database     Database     `mapstructure:"database"`
	Tenants      Tenants      `mapstructure:"tenants"`
	Delivery     Delivery     `mapstructure:"delivery"`
	Retry        Retry        `mapstructure:"retry"`
	Breaker      Breaker      `mapstructure:"breaker"`
	Window       Window       `mapstructure:"window"`
	Record       Record       `mapstructure:"record"`
	Queue        Queue        `mapstructure:"queue"`
	Health       Health       `mapstructure:"health"`
	Verification Verification `mapstructure:"verification"`
	Retention    Retention    `mapstructure:"retention"`
	Network      Network      `mapstructure:"network"`
	Validation   Validation   `mapstructure:"validation"`
	Secrets      Secrets      `mapstructure:"secrets"`
	Objective    Objective    `mapstructure:"objective"`
	Metrics      Metrics      `mapstructure:"metrics"`
	Shutdown     Shutdown     `mapstructure:"shutdown"`
}

// Database says where the outbox is and how to reach it.
type Database struct {
	// URL is the DSN of the relay's pool, as a URL or as keywords. Required.
	URL string `mapstructure:"url"`
	// URLFile is a file that holds it. It is read anew for each connection, so that a password may change meanwhile; URL is then what it said at the start.
	URLFile string `mapstructure:"url_file"`
	// ReplicationURL is the DSN of the replication stream, which a transaction pooler cannot carry. Empty means URL. ReplicationURLFile is to it what
	// URLFile is to URL.
	ReplicationURL     string `mapstructure:"replication_url"`
	ReplicationURLFile string `mapstructure:"replication_url_file"`
	// InstanceID tells this deployment from a copy of its database: the first one is stored there, and a later one must be the same. Empty is only
	// accepted where none is stored.
	InstanceID string `mapstructure:"instance_id"`
	// Slot names the replication slot. Slots are cluster-wide: two databases of one server need two names.
	Slot string `mapstructure:"slot"`
	// Shards is how many slots the tenants are spread over, each read by a leader of its own. The slots of the second and all that follow have _1, _2 … at
	// the end of their names. One means that Slot is the only one.
	Shards int `mapstructure:"shards"`
	// MaxConnections bounds the pool; the stream uses one connection more.
	MaxConnections int `mapstructure:"max_connections"`
	// ConnectTimeout bounds the opening of a connection to the database.
	ConnectTimeout time.Duration `mapstructure:"connect_timeout"`
	// WALBudget is how much of the log the server may keep for the slot before its disk is in danger, where the server itself has no limit. Zero: unknown.
	WALBudget ByteSize `mapstructure:"wal_budget"`
}

// StreamURL is the DSN the replication stream connects with.
func (d Database) StreamURL() string {
	if d.ReplicationURL != "" {
		return d.ReplicationURL
	}
	return d.URL
}

// ShardSlot is the name of a shard's slot.
func (d Database) ShardSlot(shard int) string {
	if shard == 0 {
		return d.Slot
	}
	return d.Slot + "_" + strconv.Itoa(shard)
}

// maxShards is more than any server's WAL senders are worth: each slot decodes the whole log.
const maxShards = 64

// maxName is how many bytes PostgreSQL lets a name have, of a slot or a schema.
const maxName = 63

// Tenants says which schemas this relay works for. Patterns are those of [path.Match], over the schema's name.
type Tenants struct {
	// Include narrows the registered tenants to those that match one of its patterns. Empty means all of them.
	Include []string `mapstructure:"include"`
	// AutoAdopt names the schemas that are registered without being asked for once they have the webhook tables. Empty means none.
	AutoAdopt []string `mapstructure:"auto_adopt"`
}

// Includes reports whether the relay serves the registered tenant.
func (t Tenants) Includes(schema string) bool {
	return len(t.Include) == 0 || matchAny(t.Include, schema)
}

func matchAny(patterns []string, name string) bool {
	for _, p := range patterns {
		if ok, err := path.Match(p, name); err == nil && ok {
			return true
		}
	}
	return false
}

// Delivery bounds and tunes the HTTP side.
type Delivery struct {
	// Workers is how many attempts are in flight at most, over all endpoints.
	Workers int `mapstructure:"workers"`
	// EndpointConcurrency is how many attempts to one endpoint are in flight at most, unless its row says otherwise.
	EndpointConcurrency int `mapstructure:"endpoint_concurrency"`
	// EndpointRate is how many attempts a second an endpoint gets at most, unless its row says otherwise. Zero means no limit.
	EndpointRate float64 `mapstructure:"endpoint_rate"`
	// HostConcurrency is how many attempts to one host and port are in flight at most, over all endpoints of all tenants.
	HostConcurrency int `mapstructure:"host_concurrency"`
	// ConnectTimeout bounds the look-up of a receiver's name and the connection to it, TLSHandshakeTimeout the handshake after that.
	ConnectTimeout      time.Duration `mapstructure:"connect_timeout"`
	TLSHandshakeTimeout time.Duration `mapstructure:"tls_handshake_timeout"`
	// DefaultTimeout bounds a whole attempt to an endpoint whose row has no timeout.
	DefaultTimeout time.Duration `mapstructure:"default_timeout"`
	// MaxConnections bounds the connections to all receivers, unused ones included; MaxConnectionsPerHost those to one host and port, for each of the
	// client's transports on its own.
	MaxConnections        int `mapstructure:"max_connections"`
	MaxConnectionsPerHost int `mapstructure:"max_connections_per_host"`
	// KeepAlive is how long an unused connection is kept.
	KeepAlive time.Duration `mapstructure:"keep_alive"`
	// DNSCache is how long a resolved address is reused. Zero means that every connection resolves anew.
	DNSCache time.Duration `mapstructure:"dns_cache"`
	// KeepResponse is how much of a failed attempt's answer is stored. Zero means nothing.
	KeepResponse ByteSize `mapstructure:"keep_response"`
	// Source is the CloudEvents source attribute, a URI reference.
	Source string `mapstructure:"source"`
	// AllowInsecureTLS lets an endpoint's row switch off certificate verification (verify_ssl = false).
	AllowInsecureTLS bool `mapstructure:"allow_insecure_tls"`
	// ReceiverDisable and ReceiverAbort let an answer's header webhook-delivery disable its endpoint, or give its delivery up.
	ReceiverDisable bool `mapstructure:"receiver_disable"`
	ReceiverAbort   bool `mapstructure:"receiver_abort"`
	// TLS says whom to trust and what certificate to show.
	TLS delivery.TLS `mapstructure:"tls"`
}

// Retry is the schedule of an endpoint whose row has none. MaxBackoff bounds every endpoint's schedule.
type Retry struct {
	// Attempts counts the retries after the first attempt. Zero means that the first failure is final.
	Attempts int `mapstructure:"attempts"`
	// Backoff is the greatest wait before the first retry, a millisecond or more. It grows by the factor Multiplier, 1 or more, with each that follows.
	Backoff    time.Duration `mapstructure:"backoff"`
	Multiplier float64       `mapstructure:"multiplier"`
	MaxBackoff time.Duration `mapstructure:"max_backoff"`
	// Schedule, unless empty, is the waits before each retry, for every endpoint. It replaces backoff and multiplier; the last one repeats
	// for endpoints that have more retries.
	Schedule []time.Duration `mapstructure:"schedule"`
}

// Breaker keeps an endpoint that only fails from being asked again and again.
type Breaker struct {
	// Failures in a row open the breaker.
	Failures int `mapstructure:"failures"`
	// FailureRatio of all attempts within Window opens it, too, once there were MinAttempts. Zero: only Failures does.
	FailureRatio float64       `mapstructure:"failure_ratio"`
	MinAttempts  int           `mapstructure:"min_attempts"`
	Window       time.Duration `mapstructure:"window"`
	// OpenFor is how long an open breaker defers everything.
	OpenFor time.Duration `mapstructure:"open_for"`
	// HalfOpen is how many attempts probe the endpoint after that.
	HalfOpen int `mapstructure:"half_open"`
}

// Window bounds what the relay holds in memory. What does not fit becomes rows of the retry queue.
type Window struct {
	// Deliveries in memory at most; reserveFactor times as many more of those that have their share while others have nothing to do.
	Deliveries int `mapstructure:"deliveries"`
	// Bytes of the bodies and jobOverhead for each delivery.
	Bytes ByteSize `mapstructure:"bytes"`
	// Hold is how long an unfinished delivery may hold back the confirmed LSN before it is handed to the retry queue.
	Hold time.Duration `mapstructure:"hold"`
}

// Record says how outcomes are batched. A batch is written when it is full or when Interval has passed, whichever is first.
type Record struct {
	// Batch is how many outcomes make it full. With many tenants it is 16 for each, and half of Window.Deliveries at most, where that is more.
	Batch int `mapstructure:"batch"`
	// Interval is the least time between two batches that are not full. Under load, where a batch would have few of each of many tenants, it is 8 times as long.
	Interval time.Duration `mapstructure:"interval"`
	// Timeout bounds the last flush at shutdown.
	Timeout time.Duration `mapstructure:"timeout"`
}

// Queue says how the retry queue is worked.
type Queue struct {
	// Poll is the time between two looks for due deliveries.
	Poll time.Duration `mapstructure:"poll"`
	// Batch is how many deliveries one look claims at most.
	Batch int `mapstructure:"batch"`
	// Lease is how long a claimed delivery belongs to its claimer, who renews it while the delivery is in memory: so long does it take until
	// another replica attempts what a killed one had claimed.
	Lease time.Duration `mapstructure:"lease"`
}

// Health says when an endpoint that only fails is given up.
type Health struct {
	// WarnAfter is how long every attempt has failed when the warning event is sent, DisableAfter when the endpoint is disabled. Zero: never.
	WarnAfter    time.Duration `mapstructure:"warn_after"`
	DisableAfter time.Duration `mapstructure:"disable_after"`
}

// Retention says how long rows are kept that only record what has happened. Zero: for ever.
type Retention struct {
	// Deliveries is for deliveries that have ended well, were cancelled, or failed and lost their endpoint since, Attempts for failed attempts,
	// DeadLetters for dead letters that were replayed or discarded; others are kept. Stats is for daily statistics. Deliveries is for ended recoveries as well.
	Deliveries  time.Duration `mapstructure:"deliveries"`
	Attempts    time.Duration `mapstructure:"attempts"`
	DeadLetters time.Duration `mapstructure:"dead_letters"`
	Stats       time.Duration `mapstructure:"stats"`
}

// Network lists addresses as CIDR prefixes. Public addresses are allowed, all others only when listed in Allow; Deny wins over both.
type Network struct {
	Allow []netip.Prefix `mapstructure:"allow"`
	Deny  []netip.Prefix `mapstructure:"deny"`
	// AllowHosts, unless empty, lists the hosts that a URL may name, DenyHosts those it must not: names, or *.name for all below one. They come before the
	// addresses and allow none of these.
	AllowHosts []string `mapstructure:"allow_hosts"`
	DenyHosts  []string `mapstructure:"deny_hosts"`
	// Ports lists those a URL may have. Empty means any.
	Ports []int `mapstructure:"ports"`
	// HTTPSOnly denies http://.
	HTTPSOnly bool `mapstructure:"https_only"`
	// Proxy is the URL of the HTTP proxy that all connections to receivers go through, ProxyFile a file that holds it. Empty means none.
	Proxy     string `mapstructure:"proxy"`
	ProxyFile string `mapstructure:"proxy_file"`
}

// Shutdown says how the relay ends.
type Shutdown struct {
	// Drain bounds how long attempts in flight may finish. Zero means do not wait: what is left is deferred.
	Drain time.Duration `mapstructure:"drain"`
}

const day = 24 * time.Hour

// DefaultConfig is the configuration of a relay that was told nothing; only Database.URL is missing from it.
func DefaultConfig() Config {
	return Config{
		Database: Database{Slot: "outbox_relay", Shards: 1, MaxConnections: 8, ConnectTimeout: 10 * time.Second},
		Delivery: Delivery{
			Workers: 1024, EndpointConcurrency: 64, HostConcurrency: 256,
			ConnectTimeout: 5 * time.Second, TLSHandshakeTimeout: 5 * time.Second, DefaultTimeout: 30 * time.Second,
			MaxConnections: 2048, MaxConnectionsPerHost: 256, KeepAlive: 55 * time.Second, DNSCache: time.Minute,
			KeepResponse: KiB, Source: "/outbox-relay", ReceiverDisable: true, ReceiverAbort: true,
			TLS: delivery.TLS{TLSSettings: delivery.TLSSettings{MinVersion: "1.2"}},
		},
		Retry:   Retry{Attempts: 5, Backoff: 30 * time.Second, Multiplier: 2, MaxBackoff: time.Hour},
		Breaker: Breaker{Failures: 5, FailureRatio: 0.9, MinAttempts: 20, Window: time.Minute, OpenFor: time.Minute, HalfOpen: 1},
		Window:  Window{Deliveries: 10_000, Bytes: 64 * MiB, Hold: 3 * time.Second},
		Record:  Record{Batch: 1000, Interval: 25 * time.Millisecond, Timeout: 10 * time.Second},
		Queue:   Queue{Poll: time.Second, Batch: 500, Lease: time.Minute},
		Health:  Health{WarnAfter: day, DisableAfter: 5 * day},
		Verification: Verification{
			Method: delivery.VerifyNone, Schedule: []time.Duration{time.Minute, 5 * time.Minute, 30 * time.Minute, 2 * time.Hour, 12 * time.Hour},
		},
		Retention:  Retention{Deliveries: 90 * day, Attempts: 90 * day, DeadLetters: 90 * day, Stats: 730 * day},
		Objective:  Objective{Latency: 5 * time.Second},
		Validation: defaultValidation(),
		Shutdown:   Shutdown{Drain: 20 * time.Second},
	}
}

// ClientConfig is the part of the configuration that the HTTP client needs.
func (c *Config) ClientConfig(version string) delivery.Config {
	d := c.Delivery
	return delivery.Config{
		ConnectTimeout:      d.ConnectTimeout,
		TLSHandshakeTimeout: d.TLSHandshakeTimeout,
		MaxConns:            d.MaxConnections,
		MaxConnsPerHost:     d.MaxConnectionsPerHost,
		IdleTimeout:         d.KeepAlive,
		DNSCacheTime:        d.DNSCache,
		KeepResponseBytes:   int(d.KeepResponse),
		Version:             version,
		Source:              d.Source,
		Allow:               c.Network.Allow,
		Deny:                c.Network.Deny,
		AllowInsecureTLS:    d.AllowInsecureTLS,
		ReceiverDisable:     d.ReceiverDisable,
		ReceiverAbort:       d.ReceiverAbort,
		TLS:                 d.TLS,
		AllowHosts:          c.Network.AllowHosts,
		DenyHosts:           c.Network.DenyHosts,
		Ports:               c.Network.Ports,
		HTTPSOnly:           c.Network.HTTPSOnly,
		Proxy:               c.Network.Proxy,
		ProxyFile:           c.Network.ProxyFile,
	}
}

// EndpointDefaults is what an endpoint gets whose row leaves a column open, and the keys of its secrets.
func (c *Config) EndpointDefaults() delivery.Defaults {
	keys, _ := c.Secrets.Ring() // Validate has said what is wrong with one; an endpoint that needs it says so again
	return delivery.Defaults{
		Timeout:     c.Delivery.DefaultTimeout,
		MaxRetries:  c.Retry.Attempts,
		Backoff:     delivery.Backoff{First: c.Retry.Backoff, Max: c.Retry.MaxBackoff, Multiplier: c.Retry.Multiplier},
		Schedule:    c.Retry.Schedule,
		Concurrency: c.Delivery.EndpointConcurrency,
		Rate:        c.Delivery.EndpointRate,
		Bounds:      c.Validation.bounds(),
		OneURL:      c.Verification.on(),

		Keys:          keys,
		RequireSealed: c.Secrets.RequireSealed,
	}
}
