package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
)

// migrateRemedy is for everything that migrate creates.
const migrateRemedy = "run outbox-relay migrate"

func (k *checker) installed(ctx context.Context) error {
	const name = "schema outbox_relay"
	var there, usable bool
	err := k.conn.QueryRow(ctx, `SELECT count(*) > 0, coalesce(bool_or(has_schema_privilege(n.oid, 'USAGE')), false)
		FROM pg_catalog.pg_namespace n WHERE n.nspname = 'outbox_relay'`).Scan(&there, &usable)
	if err != nil {
		return err
	}
	switch {
	case !there:
		k.fail(name, "missing", migrateRemedy)
	case !usable:
		k.fail(name, "this role may not use it", k.grantRemedy())
	default:
		var version int64
		err := k.conn.QueryRow(ctx, "SELECT coalesce(max(version_id), 0) FROM outbox_relay.schema_migrations WHERE is_applied").Scan(&version)
		if err != nil {
			return err
		}
		want, err := schema.Version()
		switch {
		case err != nil:
			return err
		case version < want:
			k.fail(name, fmt.Sprintf("version %d, and this relay needs %d", version, want), migrateRemedy)
		case version > want:
			k.warn(name, fmt.Sprintf("version %d, and this relay knows %d", version, want), "use a relay as new as the one that has migrated it")
		default:
			k.ok(name, "version %d", version)
		}
	}
	return nil
}

func (k *checker) grantRemedy() string {
	return fmt.Sprintf("GRANT %s TO %s", schema.RunnerRole, pgx.Identifier{k.conn.Conn().Config().User}.Sanitize())
}

func (k *checker) publications(ctx context.Context) error {
	type publication struct {
		Name                                           string
		Exists, Insert, Update, Delete, Truncate, Root bool
		Tables                                         int
	}
	rows, err := k.conn.Query(ctx, `
		SELECT w.name, p.oid IS NOT NULL, coalesce(p.pubinsert, false), coalesce(p.pubupdate, false), coalesce(p.pubdelete, false),
		       coalesce(p.pubtruncate, false), coalesce(p.pubviaroot, false),
		       (SELECT count(*) FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = p.oid)
		  FROM unnest($1::text[]) w (name) LEFT JOIN pg_catalog.pg_publication p ON p.pubname = w.name`,
		[]string{schema.EventsPublication, schema.RegistryPublication})
	if err != nil {
		return err
	}
	all, err := pgx.CollectRows(rows, pgx.RowToStructByPos[publication])
	if err != nil {
		return err
	}
	for _, p := range all {
		name := "publication " + p.Name
		changes := p.Update && p.Delete && p.Truncate
		switch {
		case !p.Exists:
			k.fail(name, "missing", migrateRemedy)
		case !p.Insert || !p.Root || p.Name == schema.RegistryPublication && !changes:
			want := "insert"
			if p.Name == schema.RegistryPublication {
				want = "insert, update, delete, truncate"
			}
			k.fail(name, "somebody changed what it publishes",
				fmt.Sprintf("ALTER PUBLICATION %s SET (publish = '%s', publish_via_partition_root = true)", p.Name, want))
		default:
			k.ok(name, "%d tables", p.Tables)
		}
	}
	return nil
}

// slotFacts is a row of pg_replication_slots.
type slotFacts struct {
	Plugin, Database string
	ActivePID        int32
	Status, Invalid  string
	Retained, Lag    int64 // bytes
	Safe             int64 // bytes; negative: no limit
}

func (k *checker) slotRow(ctx context.Context, slot string) (slotFacts, error) {
	rows, err := k.conn.Query(ctx, `
		SELECT coalesce(s.plugin, ''), coalesce(s.database, ''), coalesce(s.active_pid, 0), coalesce(s.wal_status, ''),
		       coalesce(to_jsonb(s) ->> 'invalidation_reason', ''),
		       coalesce(pg_wal_lsn_diff(w.lsn, s.restart_lsn), 0)::int8, coalesce(pg_wal_lsn_diff(w.lsn, s.confirmed_flush_lsn), 0)::int8,
		       coalesce(s.safe_wal_size, -1)
		  FROM pg_catalog.pg_replication_slots s, (SELECT pg_current_wal_lsn() AS lsn) w WHERE s.slot_name = $1`, slot)
	if err != nil {
		return slotFacts{}, err
	}
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[slotFacts])
}

// slots looks at the slot of each shard, and for such as were used before.
func (k *checker) slots(ctx context.Context) error {
	for shard := range k.config.Database.Shards {
		if err := k.slot(ctx, k.config.Database.ShardSlot(shard)); err != nil {
			return err
		}
	}
	others, err := schema.OtherSlots(ctx, k.conn, schema.Options{Slot: k.config.Database.Slot, Shards: k.config.Database.Shards})
	for _, u := range others {
		if u.Read {
			if len(k.config.Tenants.Include) == 0 {
				k.warn("slot "+u.Slot, "another relay reads it and serves this database as well", store.OtherReaderRemedy)
			}
			continue
		}
		k.warn("slot "+u.Slot, fmt.Sprintf("no relay reads it, and it is none of those configured: %s of the log kept", size(u.Kept)), u.Remedy())
	}
	return err
}

func (k *checker) slot(ctx context.Context, slot string) error {
	name := "slot " + slot
	s, err := k.slotRow(ctx, slot)
	if errors.Is(err, pgx.ErrNoRows) {
		k.fail(name, "missing", migrateRemedy+", or mend database.slot if it has another name; one that was there, a relay makes anew when it starts")
		return nil
	}
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%s of the log unconfirmed, %s kept", size(s.Lag), size(s.Retained))
	if s.ActivePID != 0 {
		what += fmt.Sprintf(", served by process %d", s.ActivePID)
	} else {
		what += ", no relay reads it"
	}
	making, err := store.ReadMaking(ctx, k.conn, slot)
	if err != nil {
		return err
	}
	switch {
	case s.Plugin != "pgoutput" || s.Database != k.database:
		k.fail(name, fmt.Sprintf("belongs to database %q, plugin %q", s.Database, s.Plugin), "slots belong to the whole server: choose another database.slot")
	case making != nil:
		k.fail(name, "no relay leads: "+making.String(), making.Remedy())
	case s.Status == "lost" || s.Invalid != "":
		k.fail(name, "the server gave it up: "+s.Invalid, "start a relay: it makes it anew and queues what it missed from the tables; then raise max_slot_wal_keep_size")
	case s.Status == "unreserved":
		k.warn(name, what+"; about to be lost", "start a relay, or raise max_slot_wal_keep_size")
	case s.Safe >= 0 && s.Retained > s.Safe:
		k.warn(name, fmt.Sprintf("%s; lost after another %s", what, size(s.Safe)), "start a relay, or raise max_slot_wal_keep_size")
	default:
		k.ok(name, "%s", what)
	}
	return nil
}

// progresses looks at what is known of each slot, and whether every tenant is on one of them.
func (k *checker) progresses(ctx context.Context) error {
	shards := k.config.Database.Shards
	for shard := range shards {
		name := "progress"
		if shards > 1 {
			name += " of shard " + strconv.Itoa(shard)
		}
		if err := k.progress(ctx, name, k.config.Database.ShardSlot(shard)); err != nil {
			return err
		}
	}
	var elsewhere []string
	var leftover string
	err := k.conn.QueryRow(ctx, `SELECT ARRAY(SELECT t.schema FROM outbox_relay.tenants t WHERE t.shard >= $1 ORDER BY 1),
		coalesce((SELECT min(p.slot) FROM outbox_relay.progress p WHERE p.shard >= $1 AND p.slot = $2 || '_' || p.shard), '')`, shards, k.config.Database.Slot).
		Scan(&elsewhere, &leftover)
	switch {
	case err != nil:
		return err
	case len(elsewhere) > 0:
		k.fail("shards", fmt.Sprintf("tenant %s and maybe others are on a shard that database.shards (%d) does not count", elsewhere[0], shards),
			"raise it again, and move them with outbox-relay tenants move before it is lowered")
	case leftover != "":
		k.warn("shards", fmt.Sprintf("slot %s is of a shard that database.shards (%d) does not count", leftover, shards), migrateRemedy+", which drops it, or the server keeps its log for ever")
	case shards > 1:
		k.ok("shards", "every tenant is on one of %d", shards)
	}
	return nil
}

func (k *checker) progress(ctx context.Context, name, slot string) error {
	var systemID, instanceID string
	var ahead bool
	err := k.conn.QueryRow(ctx, `
		SELECT p.system_identifier, p.instance_id, coalesce(p.lsn > '0/0' AND s.confirmed_flush_lsn > p.lsn, false)
		  FROM outbox_relay.progress p LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = p.slot WHERE p.slot = $1`, slot).
		Scan(&systemID, &instanceID, &ahead)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	ours := k.config.Database.InstanceID
	foreign := store.CheckInstance(ctx, k.conn, slot, store.LeadOptions{InstanceID: ours, SystemID: k.systemID})
	if foreign != nil && !errors.Is(foreign, store.ErrInstance) {
		return foreign
	}
	switch {
	case systemID != "" && systemID != k.systemID && instanceID != "" && instanceID == ours:
		k.warn(name, "was made on another cluster, "+systemID+", by this instance: the database was restored or moved",
			"start a relay: it queues what occurred since an hour before its last record and has no delivery")
	case systemID != "" && systemID != k.systemID:
		k.fail(name, "was made on another cluster, "+systemID+": this database is a copy, or was restored",
			hintOf(foreign))
	case instanceID != "" && instanceID != ours:
		k.fail(name, fmt.Sprintf("belongs to instance %q, database.instance_id is %q", instanceID, ours),
			hintOf(foreign))
	case foreign != nil: // by what another slot's progress says
		k.failError(name, foreign)
	case err != nil:
		k.fail(name, "nothing is known of slot "+slot, migrateRemedy)
	case ahead:
		k.warn(name, "the slot is ahead of what was recorded: somebody made it anew, or read from it", "start a relay: it queues what it missed from the tables")
	default:
		k.ok(name, "belongs to this cluster and instance")
	}
	return nil
}

// role checks the rights on the relay's own tables; those on a tenant's are checked with the tenant.
func (k *checker) role(ctx context.Context) error {
	var super, adopts bool
	var denied []string
	err := k.conn.QueryRow(ctx, `
		SELECT (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user),
		       ARRAY(SELECT w.p || ' on ' || w.t FROM (VALUES
		           ('outbox_relay.progress', 'SELECT'), ('outbox_relay.progress', 'INSERT'), ('outbox_relay.progress', 'UPDATE'),
		           ('outbox_relay.retry_queue', 'SELECT'), ('outbox_relay.retry_queue', 'INSERT'), ('outbox_relay.retry_queue', 'UPDATE'),
		           ('outbox_relay.retry_queue', 'DELETE'), ('outbox_relay.tenants', 'SELECT'), ('outbox_relay.endpoint_health', 'DELETE'),
		           ('outbox_relay.recoveries', 'UPDATE'), ('outbox_relay.endpoint_verification', 'UPDATE')) w (t, p)
		        WHERE NOT has_table_privilege(w.t, w.p)),
		       has_function_privilege('outbox_relay.add_tenant(text, text, timestamptz)', 'EXECUTE')`).Scan(&super, &denied, &adopts)
	switch {
	case err != nil:
		return err
	case super:
		k.warn("role", "is a superuser", "use one with the rights the relay needs: CREATE ROLE relay LOGIN REPLICATION PASSWORD '…' IN ROLE "+schema.RunnerRole)
	case len(denied) > 0:
		k.fail("role", fmt.Sprintf("lacks %s and maybe more", denied[0]), k.grantRemedy())
	case !adopts && len(k.config.Tenants.AutoAdopt) > 0:
		k.fail("role", "may not execute outbox_relay.add_tenant, as tenants.auto_adopt has it", adoptRemedy)
	default:
		k.ok("role", "has the rights it needs")
	}
	return nil
}
