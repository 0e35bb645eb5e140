package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/neo-commons/outbox-relay/relay"
	"github.com/neo-commons/outbox-relay/relay/route"
	"github.com/neo-commons/outbox-relay/relay/store"
	"github.com/neo-commons/outbox-relay/schema"
)

// invalidShown is how many rows of a tenant are named; the rest is counted.
const invalidShown = 5

// tenantFacts is what the catalog says of a tenant.
type tenantFacts struct {
	Schema      string
	Gone        bool     // there is no such schema
	Behind      bool     // its tables are of an older version
	Paused      bool     // besides being suspended
	Missing     []string // tables
	Unpublished []string // tables
	Denied      []string // rights
	Foreign     []string // triggers whose function is somebody else's than the table
	Unnumbered  []string // tables of events, partitions among them, where xid has no default
}

const tenantFactsSQL = `
WITH wanted (tbl, pub) AS (VALUES
  ('webhook_events', 'outbox_relay_events'),
  ('webhook_endpoints', 'outbox_relay_registry'),
  ('webhook_event_types', 'outbox_relay_registry'),
  ('webhook_event_subscriptions', 'outbox_relay_registry'),
  ('webhook_subscriptions', 'outbox_relay_registry'),
  ('webhook_deliveries', NULL),
  ('webhook_delivery_attempts', NULL),
  ('webhook_dead_letters', NULL),
  ('webhook_delivery_stats', NULL)),
rights AS MATERIALIZED ( -- SELECT, UPDATE (paused_at, …)
  SELECT g.tbl, m[1] AS privilege, c.col FROM outbox_relay.tenant_grants() g, regexp_matches(g.privileges, '([A-Z]+)(?: \(([^)]*)\))?', 'g') m
    LEFT JOIN LATERAL regexp_split_to_table(m[2], ', *') c (col) ON true)
SELECT t.schema, n.oid IS NULL, t.version < outbox_relay.shape_version(), t.pause IS NOT NULL,
  ARRAY(SELECT w.tbl FROM wanted w WHERE n.oid IS NOT NULL AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace = n.oid AND c.relname = w.tbl)),
  ARRAY(SELECT w.tbl FROM wanted w JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = w.tbl
          JOIN pg_catalog.pg_publication p ON p.pubname = w.pub -- a missing one has been reported
         WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_publication_rel r WHERE r.prpubid = p.oid AND r.prrelid = c.oid)),
  ARRAY(SELECT r.privilege || coalesce(' (' || r.col || ')', '') || ' on ' || r.tbl FROM rights r
          JOIN pg_catalog.pg_class c ON c.relnamespace = n.oid AND c.relname = r.tbl
          LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = r.col
         WHERE CASE WHEN r.col IS NULL THEN NOT has_table_privilege(c.oid, r.privilege)
                    ELSE a.attnum IS NOT NULL AND NOT has_column_privilege(c.oid, a.attnum, r.privilege) END),
  ARRAY(SELECT format('%s on %s (%s)', g.tgname, c.relname, pg_catalog.pg_get_userbyid(p.proowner)) FROM pg_catalog.pg_trigger g
          JOIN pg_catalog.pg_class c ON c.oid = g.tgrelid AND c.relnamespace = n.oid JOIN pg_catalog.pg_proc p ON p.oid = g.tgfoid
         WHERE NOT g.tgisinternal AND NOT pg_has_role(p.proowner, c.relowner, 'MEMBER') -- as every superuser has
           AND EXISTS (SELECT FROM rights r WHERE r.tbl = c.relname AND r.privilege <> 'SELECT') ORDER BY c.relname, g.tgname),
  ARRAY(SELECT a.attrelid::regclass::text FROM pg_catalog.pg_class c
          JOIN pg_catalog.pg_attribute a ON a.attname = 'xid' AND NOT a.atthasdef AND (a.attrelid = c.oid OR a.attrelid IN (SELECT p.relid FROM pg_catalog.pg_partition_tree(c.oid) p))
         WHERE c.relnamespace = n.oid AND c.relname = 'webhook_events' ORDER BY 1)
FROM outbox_relay.tenants t LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema ORDER BY t.schema`

// tenants looks at each registered tenant this relay serves.
func (k *checker) tenants(ctx context.Context) error {
	rows, err := k.conn.Query(ctx, tenantFactsSQL)
	if err != nil {
		return err
	}
	facts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenantFacts])
	if err != nil {
		return err
	}
	faults, err := k.tableFaults(ctx)
	if err != nil {
		return err
	}
	var served []string
	byName := map[string]tenantFacts{}
	for _, t := range facts {
		if k.config.Tenants.Includes(t.Schema) {
			served = append(served, t.Schema)
			byName[t.Schema] = t
		}
	}
	if err := k.unregistered(ctx, len(facts), len(served)); err != nil || len(served) == 0 {
		return err
	}
	registry, err := k.registry(ctx, served)
	if err != nil {
		return err
	}
	for i := range registry.Tenants {
		t := &registry.Tenants[i]
		if foreign := byName[t.Schema].Foreign; len(foreign) > 0 {
			k.warn("tenant "+t.Schema, "triggers with functions of others than the owner of the table: "+strings.Join(foreign, ", "),
				"see whether you trust them: they run with the rights of the relay's role, which reads the secrets of all tenants")
		}
		if bare := byName[t.Schema].Unnumbered; len(bare) > 0 {
			k.warn("tenant "+t.Schema, "xid has no default in "+strings.Join(bare, ", "),
				"run ALTER TABLE … ALTER COLUMN xid SET DEFAULT pg_current_xact_id() for each: after a suspension or a heal, and in an audit, what is inserted there is not found")
		}
		if k.tables(byName[t.Schema], faults[t.Schema], t) {
			k.rows(t)
		}
	}
	return nil
}

// unregistered looks for what somebody may have forgotten.
func (k *checker) unregistered(ctx context.Context, registered, served int) error {
	candidates, err := schema.Candidates(ctx, k.conn, []string{"*"})
	if err != nil {
		return err
	}
	adopted, err := schema.Candidates(ctx, k.conn, k.config.Tenants.AutoAdopt)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("%d of %d registered are served", served, registered)
	switch {
	case len(adopted) > 0:
		k.ok("tenants", "%s, %s will be adopted", what, strings.Join(adopted, ", "))
	case registered == 0 && len(candidates) > 0:
		k.warn("tenants", "none are registered", "run outbox-relay tenants add SCHEMA; these have a webhook_events table: "+strings.Join(candidates, ", "))
	case registered == 0:
		k.warn("tenants", "none are registered", "run outbox-relay tenants add SCHEMA")
	case served == 0:
		k.warn("tenants", what, "mend tenants.include: "+strings.Join(k.config.Tenants.Include, ", "))
	case len(candidates) > 0:
		k.ok("tenants", "%s; with a webhook_events table but not registered: %s", what, strings.Join(candidates, ", "))
	default:
		k.ok("tenants", "%s", what)
	}
	return nil
}

// tableFaults asks what add_tenant asks, for tables may have changed since: nothing known to a role that may not ask.
func (k *checker) tableFaults(ctx context.Context) (map[string][]string, error) {
	var may bool
	err := k.conn.QueryRow(ctx, `SELECT has_function_privilege('outbox_relay.tenant_faults(oid)', 'EXECUTE')
		AND has_function_privilege('outbox_relay.tenant_requires()', 'EXECUTE')`).Scan(&may)
	if err != nil || !may {
		return nil, err
	}
	rows, err := k.conn.Query(ctx, `SELECT n.nspname::text, f.fault FROM outbox_relay.tenants t
		JOIN pg_catalog.pg_namespace n ON n.nspname = t.schema, LATERAL outbox_relay.tenant_faults(n.oid) f ORDER BY 1, 2`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	faults := map[string][]string{}
	for rows.Next() {
		var name, fault string
		if err := rows.Scan(&name, &fault); err != nil {
			return nil, err
		}
		faults[name] = append(faults[name], fault)
	}
	return faults, rows.Err()
}

// registry reads the routing rows the way the relay does.
func (k *checker) registry(ctx context.Context, schemas []string) (*store.Registry, error) {
	return store.ReadRegistry(ctx, k.conn.Conn(), schemas, k.config.Validation.PayloadSchema != relay.SchemaOff)
}

// tables reports the first thing that keeps a tenant from working, and whether none does.
func (k *checker) tables(f tenantFacts, faults []string, t *store.TenantRows) bool {
	name := "tenant " + t.Schema
	add := "run outbox-relay tenants add " + t.Schema
	switch {
	case f.Gone:
		k.fail(name, "the schema is gone", "run outbox-relay tenants remove "+t.Schema)
	case len(f.Missing) > 0:
		k.fail(name, "lacks "+strings.Join(f.Missing, ", "), add)
	case len(faults) > 0:
		k.fail(name, strings.Join(faults, "; "), "mend the tables, then "+add)
	case len(f.Unpublished) > 0:
		k.fail(name, "not published: "+strings.Join(f.Unpublished, ", "), add+", with --since if events were missed")
	case len(f.Denied) > 0:
		k.fail(name, "this role lacks "+strings.Join(f.Denied, ", "), k.grantRemedy()+", or "+add)
	case t.Err != nil:
		k.fail(name, t.Err.Error(), add)
	case t.State == store.StateSuspended && f.Paused:
		k.fail(name, "suspended: "+t.Reason, "mend it; it is paused then, as an operator has asked for, until outbox-relay tenants resume "+t.Schema)
	case t.State == store.StateSuspended:
		k.fail(name, "suspended: "+t.Reason, "mend it, then run outbox-relay tenants resume "+t.Schema)
	case t.State == store.StatePaused:
		k.warn(name, strings.TrimSuffix("paused: "+t.Reason, ": "), "run outbox-relay tenants resume "+t.Schema)
		return true
	case f.Behind:
		k.warn(name, "its tables are of an older version", migrateRemedy)
		return true
	default:
		active := 0
		for i := range t.Endpoints {
			if t.Endpoints[i].Active {
				active++
			}
		}
		k.ok(name, "%d endpoints (%d active), %d subscriptions", len(t.Endpoints), active, len(t.Subscriptions))
		return true
	}
	return false
}

// rows puts the tenant's rows through the checks of the relay. An invalid one is left alone by it; everything else goes on.
func (k *checker) rows(t *store.TenantRows) {
	table := t.Routing(k.config.EndpointDefaults())
	policy := k.config.policy()
	denied := 0
	for i := range t.Endpoints {
		id := t.Endpoints[i].ID
		ep := table.Endpoint(id)
		if ep == nil || !ep.Active {
			continue
		}
		if why := cmp.Or(policy.Denied(ep), policy.DeniedAddress(ep)); why != "" {
			if denied++; denied <= invalidShown {
				k.warn(fmt.Sprintf("tenant %s, webhook_endpoints %s", t.Schema, id), why, "change the endpoint or the configuration: its deliveries become dead letters at once")
			}
		}
	}
	if denied > invalidShown {
		k.warn("tenant "+t.Schema, fmt.Sprintf("%d more endpoints are denied by the configuration", denied-invalidShown), "see the ones above")
	}
	k.eventTypes(t)
	invalid := make(map[string]int)
	for _, row := range table.Invalid() {
		if invalid[row.Table]++; invalid[row.Table] > invalidShown {
			continue
		}
		remedy := "it is left out until the row is changed"
		if row.Table == route.TableEventTypes {
			remedy = "change it, or set it to NULL"
		}
		k.warn(fmt.Sprintf("tenant %s, %s %s", t.Schema, row.Table, row.ID), row.Err.Error(), remedy)
	}
	for _, name := range slices.Sorted(maps.Keys(invalid)) {
		if more := invalid[name] - invalidShown; more > 0 {
			k.warn(fmt.Sprintf("tenant %s, %s", t.Schema, name), fmt.Sprintf("%d more rows are invalid", more), "mend the ones above and check again")
		}
	}
}

// eventTypes names the types whose events become dead letters, whatever is in them.
func (k *checker) eventTypes(t *store.TenantRows) {
	limits := k.config.EventLimits()
	broken := 0
	for _, row := range t.EventTypes {
		err := limits.CheckType(row.EventType)
		if err == nil || !row.Enabled {
			continue
		}
		if broken++; broken <= invalidShown {
			k.warn(fmt.Sprintf("tenant %s, %s %s", t.Schema, route.TableEventTypes, row.ID), err.Error(), "its events become dead letters: rename it, or see validation.event_types and max_event_type_length")
		}
	}
	if broken > invalidShown {
		k.warn("tenant "+t.Schema, fmt.Sprintf("%d more event types break the bounds of validation", broken-invalidShown), "see the ones above")
	}
}

// validation says which bounds are in force.
func (k *checker) validation(context.Context) error {
	v := &k.config.Validation
	switch what := fmt.Sprintf("profile %s, payload_schema %s", v.Profile, v.PayloadSchema); v.Profile {
	case relay.ProfileDevelopment:
		k.warn("validation", what, "set validation.profile to production where events are not made up")
	case relay.ProfileStaging:
		k.ok("validation", "%s; production has tighter bounds, and https only: try it with OUTBOX_RELAY_VALIDATION_PROFILE=production outbox-relay check", what)
	default:
		k.ok("validation", "%s", what)
	}
	return nil
}
