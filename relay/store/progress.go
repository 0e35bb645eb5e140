package store

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/outbox"
)

// ErrInstance says that the progress in the database was made elsewhere: the database is a copy, or was restored into another cluster.
// Relaying from it could mail real receivers again, or skip events.
var ErrInstance = errors.New("the progress belongs to another instance")

// ErrUnknown says that nothing is known of the slot: no relay has led it, and migrate has not made it.
var ErrUnknown = errors.New("nothing is known of the slot: run outbox-relay migrate")

// ErrDenied says that the role may not use the schema outbox_relay.
var ErrDenied = errors.New("the role is no member of outbox_relay_runner")

// hinted is an error with a remedy.
type hinted struct {
	error

	hint string
}

func (e *hinted) Unwrap() error { return e.error }

// Hint is what to do about it.
func (e *hinted) Hint() string { return e.hint }

// ErrOutdated says that the database has not been migrated to what this version of the relay needs.
var ErrOutdated = errors.New("the schema outbox_relay is older than this relay: run outbox-relay migrate")

// shapeVersion is the least outbox_relay.shape_version() that the statements of this package work with.
const shapeVersion = 1

// ErrRestored says that the tables come from another cluster, by a logical restore or a migration: transaction ids and positions in them mean nothing
// here. The instance is the same, by its name: healing mends it.
var ErrRestored = errors.New("the database was restored into another cluster")

// foreign are the rows of progress by which the database is not ours. Parameters are slot, cluster and instance. A slot that no instance has led yet, such as
// one that was made on a copy, says nothing: those of the other slots, which came with the copy, do.
const foreign = `
FROM outbox_relay.progress f LEFT JOIN outbox_relay.progress own ON own.slot = $1::text
WHERE CASE
  WHEN f.slot <> $1::text AND (own.instance_id <> '' OR own.epoch > 0 AND (own.system_identifier IN ('', $2::text) OR $2::text = '')) THEN false
  WHEN f.instance_id <> '' THEN f.instance_id <> $3::text
  WHEN f.slot <> $1::text AND (own.system_identifier <> '' OR EXISTS (SELECT FROM outbox_relay.progress k WHERE k.instance_id <> '' AND k.instance_id = $3::text)) THEN false
  ELSE $2::text <> '' AND f.system_identifier NOT IN ('', $2::text) END`

const lead = `
INSERT INTO outbox_relay.progress AS p (slot, system_identifier, instance_id, epoch, timeline, shard)
SELECT $1::text, $2::text, $3::text, 1, outbox_relay.timeline(), $5::int4 WHERE NOT EXISTS (SELECT ` + foreign + `)
ON CONFLICT (slot) DO UPDATE SET epoch = p.epoch + 1, timeline = excluded.timeline, updated_at = CASE WHEN $4::bool THEN p.updated_at ELSE now() END,
  system_identifier = CASE WHEN p.system_identifier = '' THEN excluded.system_identifier ELSE p.system_identifier END,
  instance_id = CASE WHEN p.instance_id = '' THEN excluded.instance_id ELSE p.instance_id END
WHERE (p.system_identifier IN ('', excluded.system_identifier) OR excluded.system_identifier = '') AND p.instance_id IN ('', excluded.instance_id)
RETURNING epoch, lsn::text, high_lsn::text`

// LeadOptions say who begins to lead.
type LeadOptions struct {
	// InstanceID is the name of the deployment, and SystemID that of the cluster. The first leader's are kept, and a later one's must be the same. An
	// empty SystemID is neither kept nor compared.
	InstanceID, SystemID string
	// Restored leaves the time of the last record what it is: healing goes by it.
	Restored bool
}

// Lead begins a new epoch of the slot, which fences every leader before, and returns where to go on. The caller holds the slot, or heals it. Lead changes
// nothing and returns ErrInstance where another instance, or a copy of the database, is at work, by whichever slot, and ErrRestored where only the cluster is
// another one and both have a name.
func (s *Store) Lead(ctx context.Context, o LeadOptions) (Progress, error) {
	var (
		p         Progress
		lsn, high string
		shape     int
	)
	if err := s.pool.QueryRow(ctx, `SELECT outbox_relay.shape_version()`).Scan(&shape); err != nil {
		return Progress{}, fmt.Errorf("read version of schema outbox_relay: %w", err)
	}
	if shape < shapeVersion {
		return Progress{}, fmt.Errorf("%w: version %d, want %d", ErrOutdated, shape, shapeVersion)
	}
	err := s.pool.QueryRow(ctx, lead, s.slot, o.SystemID, o.InstanceID, o.Restored, s.shard).Scan(&p.Epoch, &lsn, &high)
	if errors.Is(err, pgx.ErrNoRows) {
		return Progress{}, s.instanceError(ctx, o)
	}
	if err == nil {
		p.LSN, err = pglogrepl.ParseLSN(lsn)
	}
	if err == nil {
		p.High, err = pglogrepl.ParseLSN(high)
	}
	if err != nil {
		return Progress{}, fmt.Errorf("begin epoch of slot %q: %w", s.slot, err)
	}
	return p, nil
}

// instanceError is why Lead has done nothing.
func (s *Store) instanceError(ctx context.Context, o LeadOptions) error {
	if err := CheckInstance(ctx, s.pool, s.slot, o); err != nil {
		return err
	}
	var instance, system string
	err := s.pool.QueryRow(ctx, `SELECT p.instance_id, p.system_identifier FROM outbox_relay.progress p WHERE p.slot = $1::text`, s.slot).
		Scan(&instance, &system)
	if err != nil {
		return fmt.Errorf("read progress of slot %q: %w", s.slot, err)
	}
	if instance == "" || instance != o.InstanceID || system == o.SystemID {
		return fmt.Errorf("progress of slot %q has just been changed", s.slot)
	}
	return fmt.Errorf("%w: %s", ErrRestored, whose(s.slot, instance, system, o))
}

// CheckInstance returns ErrInstance where Lead of that slot would.
func CheckInstance(ctx context.Context, db Querier, slot string, o LeadOptions) error {
	var led, instance, system string
	var known bool
	err := db.QueryRow(ctx, `SELECT f.slot, f.instance_id, f.system_identifier, own.slot IS NOT NULL`+foreign+` ORDER BY f.slot <> $1::text, f.instance_id = '', f.slot LIMIT 1`,
		slot, o.SystemID, o.InstanceID).Scan(&led, &instance, &system, &known)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return wrap(err, "read whose the slot is")
	}
	takeOver := "name it, with database.instance_id"
	switch {
	case led == slot:
		takeOver = takeOwn(slot, instance, system, o)
	case o.InstanceID != "":
		takeOver = takeSlot("instance_id", o.InstanceID, slot, known)
	case instance == "":
		takeOver = takeSlot("system_identifier", o.SystemID, slot, known)
	}
	return &hinted{
		fmt.Errorf("%w: %s", ErrInstance, whose(led, instance, system, o)),
		"let a copy of somebody's database alone, or real receivers are called twice; if this relay shall take over, " + takeOver,
	}
}

// takeOwn has a slot's row let us lead. The cluster it was led on stays in it, if that is another one: transaction ids mean nothing here then, and the heal has to
// know (see ErrRestored). Emptied, it would have all that was committed here count as handled.
func takeOwn(slot, instance, system string, o LeadOptions) string {
	moved := system != "" && o.SystemID != "" && system != o.SystemID
	switch {
	case !moved:
		return setProgress("instance_id", "", slot)
	case o.InstanceID != "":
		return setProgress("instance_id", o.InstanceID, slot)
	case instance != "":
		return "set database.instance_id to " + strconv.Quote(instance)
	default:
		return "set database.instance_id to a name, such as " + exampleInstance + ", and " + setProgress("instance_id", exampleInstance, slot)
	}
}

const exampleInstance = "production"

// takeSlot has the row of the slot say that it is ours, whatever the others say. The row comes with the slot: one without would have it healed.
func takeSlot(column, value, slot string, known bool) string {
	if !known {
		return strings.Replace(setProgress(column, value, slot), "run: ", "run outbox-relay migrate, and then: ", 1)
	}
	return setProgress(column, value, slot)
}

func setProgress(column, value, slot string) string {
	return fmt.Sprintf("run: UPDATE outbox_relay.progress SET %s = '%s' WHERE slot = '%s'", column, strings.ReplaceAll(value, "'", "''"), slot)
}

func whose(slot, instance, system string, o LeadOptions) string {
	return fmt.Sprintf("slot %q was served by instance %q on cluster %q, this is instance %q on cluster %q", slot, instance, system, o.InstanceID, o.SystemID)
}

// Admit returns ErrInstance where Lead would, without beginning anything: a copy of a database holds a queue of deliveries that its original makes.
// Where nobody has led a slot and nobody has migrated the database for this one there is no telling, which is ErrUnknown.
func (s *Store) Admit(ctx context.Context, o LeadOptions) error {
	if err := CheckInstance(ctx, s.pool, s.slot, o); err != nil {
		return fmt.Errorf("slot %q: %w", s.slot, err)
	}
	var known bool
	err := s.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $1::text)`, s.slot).Scan(&known)
	if err == nil && !known {
		return fmt.Errorf("slot %q: %w", s.slot, ErrUnknown)
	}
	return wrap(err, "read whose the slot is")
}

// SaveSnapshot keeps a snapshot of which everything has been recorded: what a heal need not look at. ErrFenced: the epoch is over.
func (s *Store) SaveSnapshot(ctx context.Context, epoch int64, snap Snapshot) error {
	tag, err := s.pool.Exec(ctx, `UPDATE outbox_relay.progress p SET snapshot = nullif($3::text, '')::pg_snapshot, updated_at = now()
WHERE p.slot = $1::text AND p.epoch = $2::int8 AND (p.timeline IS NULL OR p.timeline = outbox_relay.timeline())`, s.slot, epoch, snap.String())
	if err != nil {
		return fmt.Errorf("save snapshot of slot %q: %w", s.slot, err)
	}
	if tag.RowsAffected() == 0 {
		return ErrFenced
	}
	return nil
}

// SaveDigests keeps a digest of the routing rows of each tenant, as a leader makes it, and says of which: a tenant that is gone, or that somebody else is
// writing to, is left out. ErrFenced is not reported: then there are none.
func (s *Store) SaveDigests(ctx context.Context, epoch int64, digests map[string]int64) (saved []string, err error) {
	var schemas []string
	var values []int64
	for schema, digest := range digests {
		schemas, values = append(schemas, schema), append(values, digest)
	}
	rows, _ := s.pool.Query(ctx, `UPDATE outbox_relay.tenants t SET digest = v.digest
FROM (SELECT n.schema, d.digest FROM outbox_relay.tenants n JOIN unnest($3::text[], $4::int8[]) d (schema, digest) ON d.schema = n.schema
  WHERE EXISTS (SELECT FROM outbox_relay.progress p WHERE p.slot = $1::text AND p.epoch = $2::int8)
  ORDER BY n.schema FOR UPDATE OF n SKIP LOCKED) v
WHERE t.schema = v.schema RETURNING t.schema`, s.slot, epoch, schemas, values)
	saved, err = pgx.CollectRows(rows, pgx.RowTo[string])
	return saved, wrap(err, "save digests of routing rows")
}

// Recorded tells which deliveries of the events have a row. Where the tenant's table is gone there are none; any other error of the
// tenant's own is a *TenantError.
func (s *Store) Recorded(ctx context.Context, tenant string, events []outbox.UUID) (map[Pair]struct{}, error) {
	const recorded = `SELECT d.webhook_event_id, d.webhook_endpoint_id FROM {tenant}.webhook_deliveries d
WHERE d.relayed AND d.webhook_event_id = ANY($1::uuid[])`
	found := make(map[Pair]struct{})
	rows, _ := s.pool.Query(ctx, forTenant(recorded, tenant), events)
	var p Pair
	_, err := pgx.ForEachRow(rows, []any{&p.Event, &p.Endpoint}, func() error {
		found[p] = struct{}{}
		return nil
	})
	if code(err) == codeUndefinedTable {
		return nil, nil //nolint:nilnil // an empty set
	}
	return found, tenantFault(err, tenant, "look up deliveries of tenant %q", tenant)
}

// Suspended lists the tenants of the shard that are suspended.
func (s *Store) Suspended(ctx context.Context) ([]string, error) {
	rows, _ := s.pool.Query(ctx, `SELECT t.schema FROM outbox_relay.tenants t WHERE t.state = 'suspended' AND t.shard = $1::int4 ORDER BY 1`, s.shard)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return names, wrap(err, "list suspended tenants")
}

// WithoutSchema lists the tenants of the shard whose schema is gone.
func (s *Store) WithoutSchema(ctx context.Context) ([]string, error) {
	rows, _ := s.pool.Query(ctx, `SELECT t.schema FROM outbox_relay.tenants t
WHERE t.shard = $1::int4 AND NOT EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname = t.schema) ORDER BY 1`, s.shard)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return names, wrap(err, "look for schemas that are gone")
}

// Suspend stops a tenant whose events cannot be read. What it misses is queued when it is resumed. ErrFenced says that the epoch is
// over, and nothing was written.
func (s *Store) Suspend(ctx context.Context, epoch int64, tenant, reason string) error {
	w := writer{slot: s.slot, progress: &Progress{Epoch: epoch}, last: &statement{sql: suspend, args: []any{tenant, text(reason), s.slot}}}
	_, err := w.write(ctx, s.pool)
	switch {
	case code(err) == codeFenced:
		return ErrFenced
	case err != nil:
		return fmt.Errorf("suspend tenant %q: %w", tenant, err)
	}
	return nil
}
