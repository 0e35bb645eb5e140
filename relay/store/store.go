// Package store is everything the relay writes and reads in PostgreSQL outside the replication stream: outcomes, the retry queue, dead
// letters, progress, the routing rows of the initial load, backfills and statistics.
//
// All times are the database's: a caller gives durations, and every replica reads the same clock. All names are qualified, the search
// path is empty, and a tenant's schema name reaches a statement only as a quoted identifier.
//
// The error of Query is left alone where pgx.CollectRows or pgx.ForEachRow comes next: the rows have it as well.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/neo-commons/outbox-relay/outbox"
)

// Config says how to reach the database.
type Config struct {
	// URL is the DSN of the database, as a URL or in keyword form. Parameters such as pool_max_conns in it have no effect.
	URL string
	// Refresh returns the DSN for each new connection, as a password may have changed since New. Nil: it is URL for ever. Either is parsed anew each
	// time, and with it .pgpass and certificates are read anew.
	Refresh func() (string, error)
	// MaxConns bounds the connections, of which one is for Record alone and is opened by New. Zero means 4, and less than 3 means 3.
	MaxConns int32
	// ConnectTimeout bounds the opening of each connection, and the look whether one that has been idle still lives. Zero means what the DSN says, else no
	// bound for the one and 10 s for the other.
	ConnectTimeout time.Duration
	// Lazy has New open the pool without a look whether the database answers.
	Lazy bool
	// Slot names the row of outbox_relay.progress, and Shard is the number of the shard whose tenants it is for.
	Slot  string
	Shard int
	// PayloadSchemas has LoadShard read the payload_schema of event types.
	PayloadSchemas bool
	// Log is told of deliveries that Claim could not load; required.
	Log *slog.Logger
}

// Store reads and writes through a pool of connections. It is safe for concurrent use.
type Store struct {
	pool *pgxpool.Pool
	// recording is the one connection of Record: what the server has learnt behind it of a thousand tenants' tables, every connection of the
	// pool would have to learn in turn.
	recording *pgxpool.Pool
	slot      string
	shard     int
	schemas   bool // of payloads are read
	log       *slog.Logger
	crowded   atomic.Int64 // when a claim waited in vain for its turn, in milliseconds of Unix time
	unclear   atomic.Bool  // the last batch of Record may have been written all the same
	most      atomic.Int32 // tenants that the server has locks for in one transaction, as it has shown; 0: it has not
	short     atomic.Int64 // when it had too few last, in milliseconds of Unix time
}

// What advisory locks are about: each is taken for an endpoint or a slot, hashed with its number. 8245937120485516401 as it is, without anything hashed,
// is that of the SQL functions that add, move and remove tenants.
const (
	lockEndpoint = "8245937120485516401" // also taken in schema/sql
	lockHeal     = "8245937120485516402"
	lockClaim    = "8245937120485516403"
)

// sessionSQL makes every session alike, whatever role, database or server configuration say: names must be qualified, a commit that
// was reported is durable, no timeout of an administrator's ends a statement half-way, and a lock is waited for only so long, since
// all tenants wait with us. pg_settings leaves out what this server's version does not know.
const sessionSQL = `SELECT set_config(s.name, w.value, false)` + settingsSQL

const settingsSQL = ` FROM pg_catalog.pg_settings s JOIN (VALUES
  ('application_name', 'outbox-relay'), ('search_path', ''), ('synchronous_commit', 'on'), ('lock_timeout', '5s'), ('statement_timeout', '0'),
  ('idle_in_transaction_session_timeout', '0'), ('idle_session_timeout', '0'), ('transaction_timeout', '0'), ('jit', 'off'),
  ('default_transaction_isolation', 'read committed'), ('default_transaction_read_only', 'off'),
  ('client_encoding', 'UTF8'), ('DateStyle', 'ISO'), ('bytea_output', 'hex'), ('standard_conforming_strings', 'on')) AS w (name, value) ON lower(s.name) = lower(w.name)`

// New opens the pool and, unless it is lazy, makes sure that the database answers.
func New(ctx context.Context, cfg Config) (*Store, error) {
	pc, err := cfg.parse(cfg.URL)
	if err != nil {
		return nil, err
	}
	pc.MaxConns = cfg.MaxConns - 1
	if cfg.MaxConns <= 0 {
		pc.MaxConns = 3
	}
	pc.MaxConns = max(pc.MaxConns, 2) // LockHeal holds one
	pc.MinConns, pc.MinIdleConns = 0, 0
	pc.PingTimeout = cmp.Or(pc.ConnConfig.ConnectTimeout, 10*time.Second)
	pc.BeforeConnect = func(_ context.Context, conn *pgx.ConnConfig) error {
		fresh, err := cfg.fresh()
		if err == nil {
			*conn = *fresh.ConnConfig
		}
		return err
	}
	pc.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		registerTypes(conn)
		if _, err := conn.Exec(ctx, sessionSQL); err != nil {
			return fmt.Errorf("set up session: %w", err)
		}
		return nil
	}
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, fmt.Errorf("open connection pool: %w", err)
	}
	if !cfg.Lazy {
		if err := pool.Ping(ctx); err != nil {
			pool.Close()
			return nil, fmt.Errorf("connect to database: %w", err)
		}
	}
	pc = pc.Copy()
	// It is opened at once and kept: whoever has to record that there are no descriptors left, since receivers hold them all, must not need one for that.
	pc.MinConns, pc.MaxConns = 1, 1
	recording, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		pool.Close()
		return nil, fmt.Errorf("open recording connection: %w", err)
	}
	return &Store{pool: pool, recording: recording, slot: cfg.Slot, shard: cfg.Shard, schemas: cfg.PayloadSchemas, log: cfg.Log}, nil
}

func registerTypes(conn *pgx.Conn) {
	conn.TypeMap().RegisterDefaultPgType(outbox.UUID{}, "uuid")
	conn.TypeMap().RegisterDefaultPgType([]outbox.UUID{}, "_uuid")
}

// parse reads a DSN and adds what is ours.
func (cfg *Config) parse(dsn string) (*pgxpool.Config, error) {
	pc, err := pgxpool.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("parse database URL: %w", err)
	}
	if cfg.ConnectTimeout > 0 {
		pc.ConnConfig.ConnectTimeout = cfg.ConnectTimeout
	}
	pc.ConnConfig.DialFunc = (&net.Dialer{Control: boundSilence}).DialContext
	// No statement is prepared, but for what prepared says: here at the price of results in text form.
	pc.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
	return pc, nil
}

// fresh is what to connect with now.
func (cfg *Config) fresh() (*pgxpool.Config, error) {
	if cfg.Refresh == nil {
		return cfg.parse(cfg.URL)
	}
	dsn, err := cfg.Refresh()
	if err != nil {
		return nil, err
	}
	return cfg.parse(dsn)
}

// silence is for how long a server may acknowledge nothing before a connection to it is given up, where the system can do that: a machine that is gone,
// and a router that has forgotten the connection, say no word, and most statements have no bound of their own, since they may well take long.
const silence = 30 * time.Second

// farewell bounds how long Close waits.
const farewell = 5 * time.Second

// Close closes the pool and waits for connections in use, but not for long: it takes half a minute to give up one whose server is silent. What is left then
// ends by itself.
func (s *Store) Close() {
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		s.recording.Close()
		s.pool.Close()
	}()
	patience := time.NewTimer(farewell)
	defer patience.Stop()
	select {
	case <-closed:
	case <-patience.C:
	}
}

// forTenant puts the tenant's schema into a statement, where it stands as {tenant}.
func forTenant(sql, tenant string) string {
	return strings.ReplaceAll(sql, "{tenant}", pgx.Identifier{tenant}.Sanitize())
}

// code returns the SQLSTATE of an error that the server reported, empty for any other.
func code(err error) string {
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		return pgErr.Code
	}
	return ""
}

// IsDataException tells whether the server could not compute with a value that it was given or has: it cannot the next time either.
func IsDataException(err error) bool { return strings.HasPrefix(code(err), "22") }

// A few SQLSTATEs by name.
const (
	codeFenced           = "OR001" // raised by outbox_relay.advance
	codeLockNotAvailable = "55P03"
	codeUndefinedTable   = "42P01" // or its schema
	codeUnique           = "23505"
	codeDenied           = "42501"
	codeUnknownStatement = "26000" // prepared on another session
	codeLimit            = "54000" // such as the bytes of a row's text
	codeReadOnly         = "25006" // a server that has become a standby
	codeOutOfMemory      = "53200" // that for locks, above all
)

// isTenants tells whether an error of the server is about the tenant whose statement it answers. Anything else (no answer at all, a
// server that shuts down or has run out of something, a deadlock) would hit the next tenant as well and may be over the next time. A value
// that does not fit what we read it into comes from the tenant's table as well.
func isTenants(err error) bool {
	if _, unreadable := errors.AsType[pgx.ScanArgError](err); unreadable {
		return true
	}
	c := code(err)
	if c == "" || c == codeFenced || c == codeReadOnly {
		return false
	}
	switch c[:2] {
	case "08", "40", "53", "57", "58": // connection, rollback, resources, operator intervention, system
		return false
	}
	return true
}

// tenantFault is a *TenantError for an error that is the tenant's own. Any other says what was being done.
func tenantFault(err error, tenant, format string, args ...any) error {
	if isTenants(err) {
		return &TenantError{Tenant: tenant, Err: err}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), err)
	}
	return nil
}
