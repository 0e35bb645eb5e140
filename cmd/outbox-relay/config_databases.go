package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/pflag"

	"github.com/neo-commons/outbox-relay/relay"
)

// The list of databases. Its keys are no leaves, since there are as many as there are entries; faults and variables call them by the name of the
// entry: databases.orders.url, OUTBOX_RELAY_DATABASES_ORDERS_URL.

const databasesKey = "databases"

// databaseEntry is one database of the list. Once read it is complete: what the file leaves out comes from the section database.
type databaseEntry struct {
	Name           string `mapstructure:"name"`
	relay.Database `mapstructure:",squash"`
}

func (e *databaseEntry) prefix() string { return databasesKey + "." + e.Name + "." }

// leaves are those of the section, called by the entry.
func (e *databaseEntry) leaves() []leaf {
	return leavesIn(e.prefix(), reflect.ValueOf(&e.Database).Elem())
}

const nameRemedy = "must be a name of a-z, 0-9, - and _, one for each entry: it is the label of the metrics and what --database asks for"

// databaseReader reads the list.
type databaseReader struct {
	common   relay.Database // the section, as read
	flags    *pflag.FlagSet
	entries  []databaseEntry
	leaves   []leaf // of all entries, for the names of their variables
	faults   configError
	broken   map[string]bool // keys with a fault
	usesOurs bool            // an entry takes the url of the section
}

func (r *databaseReader) add(key, value, remedy string) {
	r.broken[key] = true
	r.faults.add(key, value, remedy)
}

// read takes what the file says.
func (r *databaseReader) read(raw any) {
	r.broken["database.url"] = true // nobody needs it now; that it leads nowhere is said of the entry that takes it
	list, ok := raw.([]any)
	if !ok {
		r.add(databasesKey, "", "must be a list in the file, each entry beginning with its name: - name: orders")
		return
	}
	r.entries = make([]databaseEntry, 0, len(list))
	for i, item := range list {
		fields, ok := item.(map[string]any)
		if !ok {
			r.add(fmt.Sprintf("%s[%d]", databasesKey, i), "", "must be an entry with its keys below it, beginning with its name: - name: orders")
			continue
		}
		r.readEntry(i, len(list), fields)
	}
	r.variables()
	if _, given := r.flag("database-url"); given && r.asked(len(list)) == "" {
		r.add("--database-url", "", "is for one database: name it with --database")
	}
	if ours := cmp.Or(suffixIf(r.common.URL != "", "database.url"), suffixIf(r.common.URLFile != "", "database.url_file")); ours != "" && !r.usesOurs && len(r.entries) > 0 {
		r.add(ours, "", "is used by no entry of databases, as each has its own: drop it, or make it an entry")
	}
	r.clashes()
}

// asked is the name of the one entry that --database-url is for; empty if there is no telling.
func (r *databaseReader) asked(of int) string {
	if name, given := r.flag("database"); given || of != 1 || len(r.entries) == 0 {
		return name
	}
	return r.entries[0].Name
}

func (r *databaseReader) readEntry(i, of int, fields map[string]any) {
	name, ok := fields["name"].(string)
	if !ok || !regexp.MustCompile(`^[a-z0-9_-]+$`).MatchString(name) {
		said := ""
		if fields["name"] != nil {
			said = strconv.Quote(fmt.Sprint(fields["name"]))
		}
		r.add(fmt.Sprintf("%s[%d].name", databasesKey, i), said, nameRemedy)
		return
	}
	if slices.ContainsFunc(r.entries, func(e databaseEntry) bool { return e.Name == name }) {
		r.add(fmt.Sprintf("%s[%d].name", databasesKey, i), name, "is that of another entry as well: "+nameRemedy)
		return
	}
	r.entries = append(r.entries, databaseEntry{name, r.common}) // there is room: the leaves point into it
	e := &r.entries[len(r.entries)-1]
	leaves := e.leaves()
	known := []string{e.prefix() + "name"}
	given := make(map[string]any)
	for _, l := range leaves {
		known = append(known, l.key)
		key := strings.TrimPrefix(l.key, e.prefix())
		if given[key] = fields[key]; given[key] == nil {
			delete(given, key)
		}
		if value := os.Getenv(envName(l.key)); value != "" {
			given[key] = value
		}
	}
	for _, key := range slices.Sorted(maps.Keys(fields)) {
		if key = e.prefix() + key; !slices.Contains(known, key) {
			r.add(key, "", "is no key of an entry"+didYouMean(key, known))
		}
	}
	if value, ok := r.flag("database-url"); ok && r.asked(of) == name {
		given["url"] = value
		delete(given, "url_file")
	}
	own := given["url"] != nil || given["url_file"] != nil
	if own {
		e.URL, e.URLFile = "", ""
	}
	if own || given["replication_url"] != nil || given["replication_url_file"] != nil {
		e.ReplicationURL, e.ReplicationURLFile = "", "" // that of the section belongs to the url of the section
	}
	for _, l := range leaves {
		if value, ok := given[strings.TrimPrefix(l.key, e.prefix())]; ok {
			for _, fault := range l.decode(value) {
				r.broken[l.key] = true
				r.faults.faults = append(r.faults.faults, fault)
			}
		}
	}
	if !own {
		r.usesOurs = true
	}
	r.faults.readFiles(&e.Database, func(name string) string { return e.prefix() + name }, r.broken)
	r.leaves = append(r.leaves, leaves...)
}

// flag is the value of a flag that was given.
func (r *databaseReader) flag(name string) (string, bool) {
	f := r.flags.Lookup(name)
	if f == nil || !f.Changed {
		return "", false
	}
	return f.Value.String(), true
}

// variables finds entries whose names come to the same variable: a-b and a_b.
func (r *databaseReader) variables() {
	owners := make(map[string]string)
	for _, l := range r.leaves {
		variable := envName(l.key)
		if other := owners[variable]; other != "" {
			r.add(l.key, "", fmt.Sprintf("has the variable %s, as %s has: name one of the two differently", variable, other))
		}
		owners[variable] = l.key
	}
}

// clashes finds entries that are one database, or share a slot, as far as their DSNs tell.
func (r *databaseReader) clashes() {
	for i := range r.entries {
		for j := range i {
			b, a := &r.entries[i], &r.entries[j]
			switch {
			case samePlace(a.URL, b.URL, true), samePlace(a.StreamURL(), b.StreamURL(), true):
				r.add(b.prefix()+"url", "", fmt.Sprintf("leads to the same database as %surl: drop one of the two entries", a.prefix()))
			case commonSlot(a.Database, b.Database) != "" && samePlace(a.StreamURL(), b.StreamURL(), false):
				r.add(b.prefix()+"slot", commonSlot(a.Database, b.Database), fmt.Sprintf("is that of %s on the same server as well, and slots belong to the whole server: give each database its own",
					strings.TrimSuffix(a.prefix(), ".")))
			}
		}
	}
}

// commonSlot is the first slot that both have, empty if there is none.
func commonSlot(a, b relay.Database) string {
	for i := range a.Shards {
		for j := range b.Shards {
			if a.ShardSlot(i) == b.ShardSlot(j) {
				return a.ShardSlot(i)
			}
		}
	}
	return ""
}

// samePlace tells whether two DSNs have a server in common, and the same database on it. Two names of one server it does not see through.
func samePlace(a, b string, database bool) bool {
	if a == "" || b == "" || relay.DSNFault(a) != "" || relay.DSNFault(b) != "" {
		return false
	}
	one, err := pgconn.ParseConfig(a)
	if err != nil {
		return false
	}
	two, err := pgconn.ParseConfig(b)
	if err != nil {
		return false
	}
	if database && cmp.Or(one.Database, one.User) != cmp.Or(two.Database, two.User) {
		return false
	}
	others := servers(two)
	return slices.ContainsFunc(servers(one), func(s string) bool { return slices.Contains(others, s) })
}

func servers(c *pgconn.Config) []string {
	list := []string{fmt.Sprintf("%s:%d", strings.ToLower(c.Host), c.Port)}
	for _, f := range c.Fallbacks {
		list = append(list, fmt.Sprintf("%s:%d", strings.ToLower(f.Host), f.Port))
	}
	return list
}

// validateDatabases is [relay.Config.Validate] for each database of the configuration. What they have in common is told of once.
func (c *config) validateDatabases() []error {
	if len(c.Databases) == 0 {
		faults := split(c.Validate())
		if c.Database.Shards > 1 {
			faults = append(faults, c.Shareable(c.Database.Shards)...)
		}
		return faults
	}
	faults := split(c.Validate())
	said := make(map[string]bool)
	for _, fault := range faults {
		said[fault.Error()] = true
	}
	relays := 0
	for _, one := range c.each() {
		relays += max(one.Database.Shards, 1)
		for _, fault := range split(one.Validate()) {
			f, ok := errors.AsType[*relay.FieldError](fault)
			if !ok || !strings.HasPrefix(f.Key, "database.") || said[fault.Error()] && f.Key != "database.url" {
				continue
			}
			named := *f
			named.Key = one.key(strings.TrimPrefix(f.Key, "database."))
			if one.Database.URL == "" && named.Key == one.key("url") {
				named.Remedy = fmt.Sprintf("is required: give %s, or url in the entry, for example postgres://outbox_relay@db.internal:5432/app", envName(named.Key))
			}
			faults = append(faults, &named)
		}
	}
	return append(faults, c.Shareable(relays)...)
}

// each lists what there is to relay for: the databases of the list, or the only one.
func (c *config) each() []*config {
	if len(c.Databases) == 0 {
		return []*config{c}
	}
	list := make([]*config, len(c.Databases))
	for i, e := range c.Databases {
		one := *c
		one.Databases, one.name, one.Database = nil, e.Name, e.Database
		list[i] = &one
	}
	return list
}

// key is what a key of the section database is called for the database that c is narrowed to.
func (c *config) key(name string) string {
	if c.name == "" {
		return "database." + name
	}
	return (&databaseEntry{Name: c.name}).prefix() + name
}

// urlKey is the key that the DSN of the database comes from.
func (c *config) urlKey() string {
	if c.Database.URLFile != "" {
		return c.key("url_file")
	}
	return c.key("url")
}

// names lists those of the databases.
func (c *config) names() []string {
	names := make([]string, len(c.Databases))
	for i, e := range c.Databases {
		names[i] = e.Name
	}
	return names
}
