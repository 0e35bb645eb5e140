package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/relay/wal"
)

// The versions that tests run against.
const (
	oldestVersion = 14
	newestVersion = 18
)

// server is what everything else depends on: it reads the settings.
func (k *checker) server(ctx context.Context) error {
	rows, err := k.conn.Query(ctx, "SELECT name, setting FROM pg_catalog.pg_settings")
	if err != nil {
		return err
	}
	k.settings = map[string]string{}
	for rows.Next() {
		var name, setting string
		if err := rows.Scan(&name, &setting); err != nil {
			return err
		}
		k.settings[name] = setting
	}
	if err := rows.Err(); err != nil {
		return err
	}
	var standby bool
	var role string
	err = k.conn.QueryRow(ctx, "SELECT pg_is_in_recovery(), current_user, current_database(), system_identifier::text FROM pg_control_system()").
		Scan(&standby, &role, &k.database, &k.systemID)
	if err != nil {
		return err
	}
	version, err := strconv.Atoi(k.settings["server_version_num"])
	if err != nil {
		return fmt.Errorf("server_version_num: %w", err)
	}
	what := fmt.Sprintf("PostgreSQL %s, database %s, role %s", k.settings["server_version"], k.database, role)
	place := k.systemID + "/" + k.database
	other := k.seen[place]
	if other == "" {
		k.seen[place] = k.config.name
	}
	switch major := version / 10000; {
	case other != "":
		k.fail("database", what+": the same as that of "+other, "drop one of the two entries, or every event is sent twice")
	case major < oldestVersion:
		k.fail("database", what, fmt.Sprintf("use PostgreSQL %d to %d", oldestVersion, newestVersion))
	case major > newestVersion:
		k.warn("database", what, fmt.Sprintf("this relay was tested with %d to %d", oldestVersion, newestVersion))
	case standby:
		k.fail("database", what+", a standby", "let database.url lead to the primary: target_session_attrs=read-write picks it from several hosts")
	default:
		k.ok("database", "%s", what)
	}
	return nil
}

// pooler compares what the greeting called our session with what the session says of itself: a pooler makes the greeting up.
func (k *checker) pooler(ctx context.Context) error {
	var pid uint32
	if err := k.conn.QueryRow(ctx, "SELECT pg_backend_pid()").Scan(&pid); err != nil {
		return err
	}
	if pid == k.conn.Conn().PgConn().PID() {
		k.ok("pooler", "none between database.url and the server")
		return nil
	}
	if k.config.Database.ReplicationURL != "" {
		k.ok("pooler", "database.url leads through one, and the stream past it")
		return nil
	}
	k.warn("pooler", "database.url leads through one",
		"let it lead to the server itself, or to a pool in session or transaction mode with database.replication_url past the pooler")
	return nil
}

func (k *checker) walLevel(context.Context) error {
	if level := k.settings["wal_level"]; level != "logical" {
		k.fail("wal_level", level, "set wal_level = logical and restart the server (RDS: rds.logical_replication = 1, Cloud SQL: cloudsql.logical_decoding = on)")
		return nil
	}
	k.ok("wal_level", "logical")
	return nil
}

func (k *checker) encoding(context.Context) error {
	if encoding := k.settings["server_encoding"]; encoding != "UTF8" {
		k.fail("server_encoding", encoding, (&wal.StreamError{Kind: wal.ErrEncoding}).Hint())
		return nil
	}
	k.ok("server_encoding", "UTF8")
	return nil
}

// replication does what the stream will do first.
func (k *checker) replication(ctx context.Context) error {
	d := &k.config.Database
	key := "database.url" + suffixIf(d.URLFile != "", "_file")
	if d.ReplicationURL != "" {
		key = "database.replication_url" + suffixIf(d.ReplicationURLFile != "", "_file")
	}
	conn, err := dial(ctx, key, d.StreamURL(), d.ConnectTimeout, map[string]string{"replication": "database"})
	if err != nil {
		k.fail("replication", err.Error(), replicationRemedy(err, key))
		return nil
	}
	defer func() { _ = hangUp(ctx, conn) }()
	system, err := pglogrepl.IdentifySystem(ctx, conn.PgConn())
	if err != nil {
		k.fail("replication", err.Error(), replicationRemedy(err, key))
		return nil
	}
	results, err := conn.PgConn().Exec(ctx, "SELECT pg_catalog.pg_backend_pid()").ReadAll()
	if err != nil {
		return err
	}
	pid := string(results[0].Rows[0][0])
	k.sender = pid
	switch {
	case system.SystemID != k.systemID:
		k.fail("replication", key+" leads to another server than database.url", "let both lead to the same server")
	case system.DBName != k.database:
		k.fail("replication", fmt.Sprintf("%s leads to database %s, database.url to %s", key, system.DBName, k.database), "name the same database in both")
	case pid != strconv.FormatUint(uint64(conn.PgConn().PID()), 10):
		k.warn("replication", key+" leads through a pooler", "let it lead to the server itself: a pooler may end a stream at any time")
	default:
		k.ok("replication", "%s may stream, cluster %s", key, system.SystemID)
	}
	return nil
}

func replicationRemedy(err error, key string) string {
	if server, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch server.Code {
		case "42501":
			return "ALTER ROLE … REPLICATION for the role of " + key + " (RDS: GRANT rds_replication TO …)"
		case "28000":
			return "ALTER ROLE … REPLICATION for the role of " + key + ", and let pg_hba.conf admit it to this database"
		case "53300":
			return "raise max_wal_senders, or stop other replication clients"
		case "08P01", "42601":
			return "a pooler that cannot replicate is in the way: let database.replication_url lead to the server itself"
		}
	}
	return hintOf(err)
}

func (k *checker) slotsLeft(ctx context.Context) error {
	var slots []string
	for shard := range k.config.Database.Shards {
		slots = append(slots, k.config.Database.ShardSlot(shard))
	}
	var used, ours int
	err := k.conn.QueryRow(ctx, "SELECT count(*), count(*) FILTER (WHERE slot_name = ANY($1::text[])) FROM pg_catalog.pg_replication_slots", slots).Scan(&used, &ours)
	if err != nil {
		return err
	}
	limit, err := strconv.Atoi(k.settings["max_replication_slots"])
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d of max_replication_slots = %d in use", used, limit)
	if used-ours+len(slots) > limit {
		k.fail("replication slots", what, "drop one that nobody uses (pg_replication_slots), or raise max_replication_slots and restart the server")
		return nil
	}
	k.ok("replication slots", "%s", what)
	return nil
}

func (k *checker) sendersLeft(ctx context.Context) error {
	var used int
	if err := k.conn.QueryRow(ctx, "SELECT count(*) FROM pg_catalog.pg_stat_replication r WHERE r.pid::text <> $1::text", k.sender).Scan(&used); err != nil {
		return err
	}
	limit, err := strconv.Atoi(k.settings["max_wal_senders"])
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d of max_wal_senders = %d in use", used, limit)
	if used >= limit {
		k.warn("WAL senders", what, "raise max_wal_senders, unless one of these is the relay: it needs one")
		return nil
	}
	k.ok("WAL senders", "%s", what)
	return nil
}

// durability is about what a crash or a full disk of the server would do.
func (k *checker) durability(context.Context) error {
	switch {
	case k.settings["fsync"] != "on":
		k.warn("durability", "fsync is off", "set fsync = on: a crash of the server loses events, or the whole database")
	case k.settings["synchronous_commit"] == "off":
		k.warn("durability", "synchronous_commit is off", "a crash of the server loses commits that applications were told of; what the relay writes is not affected")
	default:
		k.ok("durability", "synchronous_commit = %s", k.settings["synchronous_commit"])
	}
	if keep := k.settings["max_slot_wal_keep_size"]; keep == "-1" {
		k.warn("max_slot_wal_keep_size", "no limit",
			"set one the disk can hold, such as 10GB: while no relay runs the server keeps the log for it, until the disk is full; a slot that was lost is healed")
	} else {
		k.ok("max_slot_wal_keep_size", "%sMB", keep)
	}
	return nil
}

// synchronous is about commits that wait for a standby. A role without pg_read_all_stats sees that somebody replicates, and not who: where only the state of
// others could tell, nothing is said.
func (k *checker) synchronous(ctx context.Context) error {
	const fact = "synchronous standby"
	names := k.settings["synchronous_standby_names"]
	if names == "" {
		return nil
	}
	var primary, known bool
	var confirming int
	err := k.conn.QueryRow(ctx, `SELECT NOT pg_is_in_recovery(), count(*) FILTER (WHERE r.sync_state IS NULL) = 0, count(*) FILTER (WHERE r.sync_state IN ('sync', 'quorum'))
		FROM pg_catalog.pg_stat_replication r WHERE r.pid::text <> $1::text`, k.sender).Scan(&primary, &known, &confirming)
	if err != nil {
		return err
	}
	wait, err := store.ReadCommitWait(ctx, k.conn)
	if err != nil {
		return err
	}
	const remedy = "look after the standby, or take it off synchronous_standby_names: until then no commit ends, and no outcome can be recorded"
	switch {
	case wait.Commits > 0:
		k.warn(fact, wait.String(), remedy)
	case !primary:
	case known && confirming == 0:
		k.warn(fact, fmt.Sprintf("synchronous_standby_names = %q, and none of these is connected", names), remedy)
	case confirming > 0:
		k.ok(fact, "synchronous_standby_names = %q, %d of these confirm commits", names, confirming)
	}
	return nil
}

// Differences of clocks. Receivers refuse signatures that are 5 minutes off.
const (
	clockWarn = 2 * time.Second
	clockFail = time.Minute
)

func (k *checker) clock(ctx context.Context) error {
	before := time.Now()
	var server time.Time
	if err := k.conn.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&server); err != nil {
		return err
	}
	trip := time.Since(before)
	off := server.Sub(before.Add(trip / 2)).Abs()
	what := fmt.Sprintf("this host and the server differ by %v", off.Round(time.Millisecond))
	const remedy = "let NTP set both clocks: receivers refuse signatures that are 5 minutes off"
	switch {
	case off > clockFail+trip:
		k.fail("clock", what, remedy)
	case off > clockWarn+trip:
		k.warn("clock", what, remedy)
	default:
		k.ok("clock", "%s", what)
	}
	return nil
}

// certificateWarn is how long before its end a certificate ought to have been renewed.
const certificateWarn = 7 * 24 * time.Hour

// certificates are those that receivers are shown. That they can be read was seen when the configuration was.
func (k *checker) certificates(context.Context) error {
	list, err := k.config.Delivery.TLS.ClientCertificates()
	if err != nil {
		return err
	}
	for _, c := range list {
		fact, what := "client certificate "+c.File, fmt.Sprintf("%s, until %s", c.Subject, c.Until.UTC().Format(time.RFC3339))
		const remedy = "renew it: the relay takes on the new file by itself"
		switch left := time.Until(c.Until); {
		case left < 0:
			k.fail(fact, what+", which is over", remedy)
		case left < certificateWarn:
			k.warn(fact, what, remedy)
		default:
			k.ok(fact, "%s", what)
		}
	}
	return nil
}

// size prints bytes for people.
func size(bytes int64) string {
	switch b := relay.ByteSize(bytes); {
	case b >= 10*relay.GiB:
		return (b / relay.GiB * relay.GiB).String()
	case b >= 10*relay.MiB:
		return (b / relay.MiB * relay.MiB).String()
	case b >= 10*relay.KiB:
		return (b / relay.KiB * relay.KiB).String()
	default:
		return b.String()
	}
}
