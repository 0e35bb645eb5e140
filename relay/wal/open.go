package wal

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// Options say what to stream and from where.
type Options struct {
	// URL leads to the server itself, past any pooler, as a role with REPLICATION.
	URL string
	// Refresh returns the URL to connect with, as its password may have changed since the options were made. Nil: it is URL.
	Refresh func() (string, error)
	// Slot is an existing logical slot of the plugin pgoutput, and Publications what to stream through it. Both are required.
	Slot         string
	Publications []string
	// ConnectTimeout bounds each attempt to connect. Zero leaves it to the URL, or 10 s if that says nothing.
	ConnectTimeout time.Duration
	// Heard is called, by the goroutine of Run, for each message of the server, before it is handed over. Nil: nobody wants to know.
	Heard func(now time.Time)
	// Log may be nil.
	Log *slog.Logger
}

const (
	defaultConnectTimeout = 10 * time.Second
	// statusInterval is how often the server hears the confirmed position at least; a third of its wal_sender_timeout if that is less.
	statusInterval = 10 * time.Second
	// defaultSenderTimeout is how long the server may be silent when its own wal_sender_timeout is off.
	defaultSenderTimeout = time.Minute
	minVersion           = 140000
)

// Open connects, checks what the stream needs, and starts the replication at the position the slot remembers: any other could skip commits. The
// slot is then held until Close, and the server expects a sign of life within its wal_sender_timeout: Run gives it, and Beat before and after Run.
// What a person must act on is a *StreamError.
func Open(ctx context.Context, o Options) (s *Stream, err error) {
	err = connected(ctx, o, func(conn *pgconn.PgConn) (bool, error) {
		s, err = start(ctx, conn, o)
		return err == nil, err
	})
	return s, err
}

func config(o Options) (*pgconn.Config, error) {
	if o.Slot == "" || strings.Trim(o.Slot, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
		return nil, fmt.Errorf("slot name %q: use lower-case letters, digits and underscores", o.Slot)
	}
	if len(o.Publications) == 0 {
		return nil, errors.New("no publication to stream")
	}
	dsn := o.URL
	if o.Refresh != nil {
		fresh, err := o.Refresh()
		if err != nil {
			return nil, err
		}
		dsn = fresh
	}
	cfg, err := pgconn.ParseConfig(dsn)
	if err != nil {
		return nil, fmt.Errorf("parse replication URL: %w", err)
	}
	cfg.RuntimeParams["replication"] = "database"
	cfg.RuntimeParams["application_name"] = "outbox-relay"
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	if o.ConnectTimeout > 0 {
		cfg.ConnectTimeout = o.ConnectTimeout
	} else if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = defaultConnectTimeout
	}
	return cfg, nil
}

// start prepares the session and begins to stream on it.
func start(ctx context.Context, conn *pgconn.PgConn, o Options) (*Stream, error) {
	system, err := pglogrepl.IdentifySystem(ctx, conn)
	if err != nil {
		// A pooler may as well swallow the parameter; then an ordinary session takes the command for SQL.
		return nil, fault("identify system", err, map[string]error{"42601": ErrPooler})
	}
	if err := prepare(ctx, conn); err != nil {
		return nil, err
	}
	timeout, err := checkServer(ctx, conn)
	if err != nil {
		return nil, err
	}
	publications, err := checkPublications(ctx, conn, o.Publications)
	if err != nil {
		return nil, err
	}
	slot, err := checkSlot(ctx, conn, o.Slot, system.DBName)
	if err != nil {
		return nil, err
	}
	if err := startReplication(ctx, conn, o, system.DBName); err != nil {
		return nil, err
	}
	s := newStream(conn, o, timeout)
	s.systemID, s.slot, s.publications = system.SystemID, slot, publications
	s.log.Debug("replication started", "slot", slot.Name, "confirmed", slot.ConfirmedFlush.String(), "server_pid", conn.PID())
	return s, nil
}

func startReplication(ctx context.Context, conn *pgconn.PgConn, o Options, database string) error {
	args := []string{
		"proto_version '1'", // 2 and up send transactions that may still roll back
		"publication_names " + quoteLiteral(quoteIdentifiers(o.Publications)),
		"binary 'true'",
	}
	var from LSN // where the slot stands
	if failpoint.Planted(failpoint.StartInFuture) {
		system, err := pglogrepl.IdentifySystem(ctx, conn)
		if err != nil {
			return err
		}
		from = system.XLogPos
	}
	err := pglogrepl.StartReplication(ctx, conn, o.Slot, from, pglogrepl.StartReplicationOptions{PluginArgs: args})
	if err != nil {
		return explainStart(ctx, conn, o.Slot, database, err)
	}
	return nil
}

// prepare undoes settings of the role or database that would end the session, hide warnings, or change how values are written. Names are set
// through the catalog because older servers do not know all of them.
func prepare(ctx context.Context, conn *pgconn.PgConn) error {
	const sql = `SELECT pg_catalog.set_config(name, CASE name WHEN 'client_min_messages' THEN 'notice' WHEN 'DateStyle' THEN 'ISO'
		WHEN 'standard_conforming_strings' THEN 'on' WHEN 'search_path' THEN '' ELSE '0' END, false) FROM pg_catalog.pg_settings
		WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout', 'idle_session_timeout', 'transaction_timeout',
		'client_min_messages', 'DateStyle', 'standard_conforming_strings', 'search_path')`
	if _, err := conn.Exec(ctx, sql).ReadAll(); err != nil {
		return fault("prepare replication session", err, nil)
	}
	return nil
}

// checkServer returns the server's wal_sender_timeout, zero if it is off.
func checkServer(ctx context.Context, conn *pgconn.PgConn) (time.Duration, error) {
	const op = "check server"
	const sql = `SELECT pg_catalog.current_setting('server_version_num'), pg_catalog.current_setting('wal_level'), setting,
		pg_catalog.current_setting('server_encoding'), pg_catalog.pg_is_in_recovery() FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'`
	rows, err := query(ctx, conn, sql)
	if err != nil {
		return 0, fault(op, err, nil)
	}
	if len(rows) != 1 {
		return 0, fmt.Errorf("%s: no setting wal_sender_timeout", op)
	}
	version, err := strconv.Atoi(string(rows[0][0]))
	if err != nil {
		return 0, fmt.Errorf("%s: version: %w", op, err)
	}
	if version < minVersion {
		return 0, &StreamError{Op: op, Kind: ErrUnsupported}
	}
	// Before anything is missed here: a standby has slots of its own, if any, and the primary's may be as they should.
	if string(rows[0][4]) == "t" {
		return 0, &StreamError{Op: op, Kind: ErrStandby}
	}
	if string(rows[0][1]) != "logical" {
		return 0, &StreamError{Op: op, Kind: ErrWALLevel}
	}
	// What receivers answer is kept as it is, in whatever letters. SQL_ASCII would take it, but also text that is no UTF-8: the stream of all tenants ends at such a row.
	if string(rows[0][3]) != "UTF8" {
		return 0, &StreamError{Op: op, Kind: ErrEncoding}
	}
	ms, err := strconv.Atoi(string(rows[0][2]))
	if err != nil {
		return 0, fmt.Errorf("%s: wal_sender_timeout: %w", op, err)
	}
	return time.Duration(ms) * time.Millisecond, nil
}

// checkPublications looks before the server does: it would notice on the first change only, and version 18 would skip changes then. It returns their OIDs.
func checkPublications(ctx context.Context, conn *pgconn.PgConn, names []string) (oids []uint32, err error) {
	for _, name := range names {
		rows, err := query(ctx, conn, "SELECT oid FROM pg_catalog.pg_publication WHERE pubname = "+quoteLiteral(name))
		if err != nil {
			return nil, fault("check publications", err, nil)
		}
		op := fmt.Sprintf("check publication %q", name)
		if len(rows) == 0 {
			return nil, &StreamError{Op: op, Kind: ErrPublicationMissing}
		}
		oid, err := strconv.ParseUint(string(rows[0][0]), 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%s: OID: %w", op, err)
		}
		oids = append(oids, uint32(oid))
	}
	return oids, nil
}

// explainStart asks the catalog why the replication did not start: the server's words for it differ from version to version.
func explainStart(ctx context.Context, conn *pgconn.PgConn, slot, database string, cause error) error {
	op := fmt.Sprintf("start replication on slot %q", slot)
	var pg *pgconn.PgError
	if !errors.As(cause, &pg) {
		return fmt.Errorf("%s: %w", op, cause)
	}
	for ready := false; !ready; { // pglogrepl leaves the rest of the answer unread
		msg, err := conn.ReceiveMessage(ctx)
		if err != nil {
			return fault(op, cause, nil)
		}
		_, ready = msg.(*pgproto3.ReadyForQuery)
	}
	var known *StreamError
	if _, err := checkSlot(ctx, conn, slot, database); errors.As(err, &known) {
		known.Op, known.Err = op, pg
		return known
	}
	return fault(op, cause, nil)
}

// query runs one statement and returns its rows in text form.
func query(ctx context.Context, conn *pgconn.PgConn, sql string) ([][][]byte, error) {
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil {
		return nil, err
	}
	if len(results) != 1 {
		return nil, fmt.Errorf("got %d results for one statement", len(results))
	}
	return results[0].Rows, nil
}

// quoteLiteral quotes s for SQL under standard_conforming_strings, and for replication commands, which know no other rule.
func quoteLiteral(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

func quoteIdentifiers(names []string) string {
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = `"` + strings.ReplaceAll(n, `"`, `""`) + `"`
	}
	return strings.Join(quoted, ",")
}
