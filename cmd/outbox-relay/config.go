package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
	"github.com/spf13/viper"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

const envPrefix = "OUTBOX_RELAY"

// config is the whole configuration, in the order in which it is printed. Every leaf is a key; config.example.yaml explains them.
type config struct {
	relay.Config `mapstructure:",squash"`
	Server       server  `mapstructure:"server"`
	Log          logging `mapstructure:"log"`
	// Databases is the list of them; empty: there is one, Config.Database.
	Databases []databaseEntry `mapstructure:"-"`
	// name is that of the entry whose database is Config.Database, see each.
	name string
}

type server struct {
	Listen string `mapstructure:"listen"` // host:port of health and metrics; empty means none
	Pprof  string `mapstructure:"pprof"`  // host:port of the profiler, on loopback; empty means none
}

type logging struct {
	Level  string `mapstructure:"level"`
	Format string `mapstructure:"format"`
}

func defaultConfig() config {
	return config{
		Config: relay.DefaultConfig(),
		Server: server{Listen: "127.0.0.1:9464"},
		Log:    logging{Level: "info", Format: "auto"},
	}
}

// flagKeys are the flags that stand for a key.
func flagKeys() map[string]string {
	return map[string]string{
		"database-url": "database.url",
		"listen":       "server.listen",
		"log-level":    "log.level",
		"log-format":   "log.format",
	}
}

// configError is every fault of the configuration at once.
type configError struct{ faults []error }

func (e *configError) Error() string {
	lines := make([]string, len(e.faults))
	for i, f := range e.faults {
		lines[i] = "\n  " + f.Error()
	}
	if len(lines) == 1 {
		return "configuration:" + lines[0]
	}
	return fmt.Sprintf("configuration: %d faults:%s", len(lines), strings.Join(lines, ""))
}

func (e *configError) add(key, value, remedy string) {
	e.faults = append(e.faults, &relay.FieldError{Key: key, Value: value, Remedy: remedy})
}

// without leaves the faults of some keys out.
func (e *configError) without(keys ...string) error {
	return e.that(func(key string) bool { return !slices.Contains(keys, key) })
}

// of leaves the faults of all other keys out.
func (e *configError) of(keys []string) error {
	return e.that(func(key string) bool { return slices.Contains(keys, key) })
}

// that keeps the faults of the keys that hold, and what is no fault of a key.
func (e *configError) that(hold func(key string) bool) error {
	rest := slices.DeleteFunc(slices.Clone(e.faults), func(fault error) bool {
		f, ok := errors.AsType[*relay.FieldError](fault)
		return ok && !hold(f.Key)
	})
	if len(rest) == 0 {
		return nil
	}
	return &configError{rest}
}

// loadConfig merges defaults, file, environment and flags, in rising order of precedence. The error is a *configError; the configuration
// that comes with it holds what could be read.
//
// Each key is asked of viper on its own and decoded here. viper's Unmarshal would turn `30` into 30 nanoseconds, drop nested keys that only
// the environment has, and word its faults for programmers.
func loadConfig(file string, flags *pflag.FlagSet) (config, error) {
	v := viper.New()
	v.SetEnvPrefix(envPrefix)
	v.SetEnvKeyReplacer(strings.NewReplacer(".", "_"))
	v.AutomaticEnv()
	c := defaultConfig()
	var faults configError
	if file != "" {
		v.SetConfigFile(file)
		v.SetConfigType("yaml")
		if err := v.ReadInConfig(); err != nil {
			faults.add("--config", file, readFault(err))
			return c, &faults
		}
	}
	leaves := leavesOf(&c)
	faults.unknownKeys(v, leaves)
	list := v.Get(databasesKey)
	if none, ok := list.([]any); ok && len(none) == 0 {
		list = nil
	}
	flags.Visit(func(f *pflag.Flag) {
		if key, ok := flagKeys()[f.Name]; ok && (list == nil || key != "database.url") {
			v.Set(key, f.Value.String())
		}
	})

	broken := map[string]bool{} // said once: such a key kept its default, which Validate has no quarrel with, or is missing
	for _, l := range leaves {
		raw := v.Get(l.key)
		if raw == nil {
			continue
		}
		for _, fault := range l.decode(raw) {
			broken[l.key] = true
			faults.faults = append(faults.faults, fault)
		}
	}
	if broken["secrets.keys"] {
		broken["secrets.require_sealed"] = true // there are keys for it
	}
	given := func(key string) bool { return v.Get(key) != nil }
	c.ApplyProfile(given)
	c.Fit(given)
	if f := flags.Lookup("database-url"); f != nil && f.Changed && list == nil {
		c.Database.URLFile = "" // for this one time: somebody works as another role
	}
	if list == nil {
		faults.readFiles(&c.Database, c.key, broken)
	}
	if list != nil {
		r := databaseReader{common: c.Database, flags: flags, broken: broken}
		r.read(list)
		c.Databases, leaves = r.entries, append(leaves, r.leaves...)
		faults.faults = append(faults.faults, r.faults.faults...)
	}
	faults.unknownEnv(withoutVariables(os.Environ(), c.Secrets.KeyVariables()), leaves)
	for _, fault := range split(c.validateAll()) {
		if f, ok := errors.AsType[*relay.FieldError](fault); !ok || !broken[f.Key] {
			faults.faults = append(faults.faults, fault)
		}
	}
	if len(faults.faults) > 0 {
		return c, &faults
	}
	return c, nil
}

// readFault is why a file cannot be read, in one line and without what the parser cites of it: that may be a part of a password.
func readFault(err error) string {
	parse, ok := errors.AsType[viper.ConfigParseError](err)
	if !ok {
		return err.Error()
	}
	text, _, _ := strings.Cut(parse.Unwrap().Error(), "invalid map key: ")
	text = regexp.MustCompile("`[^`]*`|'[^']*'").ReplaceAllStringFunc(text, func(cited string) string {
		if len(cited) == len("','") && strings.Contains(",:?-[]{}", cited[1:2]) { // what it has expected
			return cited
		}
		return "(hidden)"
	})
	return strings.Join(strings.Fields(text), " ")
}

func (c *config) validateAll() error {
	errs := c.validateDatabases()
	fault := func(key, value, remedy string) {
		errs = append(errs, &relay.FieldError{Key: key, Value: strconv.Quote(value), Remedy: remedy})
	}
	if c.Server.Listen != "" {
		_, port, err := net.SplitHostPort(c.Server.Listen)
		if _, bad := strconv.ParseUint(port, 10, 16); err != nil || bad != nil {
			fault("server.listen", c.Server.Listen, `must be host:port, :port for every interface, or "" for none: 127.0.0.1:9464`)
		}
	}
	if c.Server.Pprof != "" && !onLoopback(c.Server.Pprof) {
		fault("server.pprof", c.Server.Pprof, `must be an address of loopback and a port, as nobody is asked who they are, or "" for none: 127.0.0.1:6060`)
	}
	if _, ok := logLevel(c.Log.Level); !ok {
		fault("log.level", c.Log.Level, "must be debug, info, warn or error")
	}
	if !slices.Contains([]string{"auto", "json", "text"}, c.Log.Format) {
		fault("log.format", c.Log.Format, "must be json, text, or auto: text on a terminal, json anywhere else")
	}
	return errors.Join(errs...)
}

// onLoopback tells whether only this machine can come to an address. A name could be resolved to any.
func onLoopback(address string) bool {
	at, err := netip.ParseAddrPort(address)
	return err == nil && at.Addr().IsLoopback()
}

// policy says which endpoints are never asked.
func (c *config) policy() *delivery.Policy {
	client := c.ClientConfig(version())
	return client.Policy()
}

func (l logging) level() slog.Level {
	level, _ := logLevel(l.Level) // of one that is not valid: info
	return level
}

func logLevel(name string) (slog.Level, bool) {
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	level, ok := levels[name]
	return level, ok
}

// split takes apart what errors.Join has put together.
func split(err error) []error {
	if err == nil {
		return nil
	}
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return []error{err}
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, split(e)...)
	}
	return all
}

// leaf is one key with the place its value goes to.
type leaf struct {
	key   string
	value reflect.Value // addressable
}

// leavesOf lists the keys in the order of the structs.
func leavesOf(c *config) []leaf { return leavesIn("", reflect.ValueOf(c).Elem()) }

// leavesIn lists those of a struct whose tags say what they are called.
func leavesIn(prefix string, v reflect.Value) (leaves []leaf) {
	for i := range v.NumField() {
		name, squash := strings.CutSuffix(v.Type().Field(i).Tag.Get("mapstructure"), ",squash")
		switch field := v.Field(i); {
		case squash:
			leaves = append(leaves, leavesIn(prefix, field)...)
		case name == "" || name == "-":
		case field.Kind() == reflect.Struct:
			leaves = append(leaves, leavesIn(prefix+name+".", field)...)
		default:
			leaves = append(leaves, leaf{prefix + name, field})
		}
	}
	return leaves
}

// unknownKeys finds what the file says and the relay does not know.
func (e *configError) unknownKeys(v *viper.Viper, leaves []leaf) {
	known := []string{databasesKey}
	for _, l := range leaves {
		known = append(known, l.key)
	}
	keys := v.AllKeys()
	slices.Sort(keys)
	for _, key := range keys {
		section := slices.ContainsFunc(known, func(k string) bool { return strings.HasPrefix(k, key+".") })
		switch {
		case slices.Contains(known, key), section && v.Get(key) == nil: // a section whose keys are all commented out
		case strings.HasPrefix(key, databasesKey+"."): // its reader says that it is a list
		case section:
			e.add(key, "", "is a section: indent its keys below it")
		default:
			e.add(key, "", "is no key of the configuration"+didYouMean(key, known))
		}
	}
}

// unknownEnv finds misspelt variables. Not every variable with our prefix is meant for us: Kubernetes adds OUTBOX_RELAY_SERVICE_HOST,
// OUTBOX_RELAY_PORT_9464_TCP and more when a Service has this name. So only what starts like a section, or nearly is a key, counts.
func (e *configError) unknownEnv(environ []string, leaves []leaf) {
	var names []string
	sections := []string{envName(databasesKey) + "_"}
	for _, l := range leaves {
		section, _, _ := strings.Cut(l.key, ".")
		names = append(names, envName(l.key))
		sections = append(sections, envName(section)+"_")
	}
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, envPrefix+"_") || slices.Contains(names, name) ||
			strings.Contains(name, "_SERVICE_") || strings.Contains(name, "_PORT") {
			continue
		}
		inSection := slices.ContainsFunc(sections, func(s string) bool { return strings.HasPrefix(name, s) })
		if hint := didYouMean(name, names); inSection || hint != "" {
			e.add(name, "", "is no variable of the configuration"+hint)
		}
	}
}

// withoutVariables leaves out what is called by a name of our own, but is no key.
func withoutVariables(environ, names []string) []string {
	return slices.DeleteFunc(environ, func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains(names, name)
	})
}

// readFiles fills in the DSNs of a database that are kept in files. key says what its keys are called.
func (e *configError) readFiles(d *relay.Database, key func(name string) string, broken map[string]bool) {
	for _, fault := range d.ReadFiles() {
		if f, ok := errors.AsType[*relay.FieldError](fault); ok {
			name := strings.TrimPrefix(f.Key, "database.")
			named := *f
			named.Key = key(name)
			fault = &named
			broken[key(strings.TrimSuffix(name, "_file"))] = true // it is not missing
		}
		e.faults = append(e.faults, fault)
	}
}

func envName(key string) string {
	return envPrefix + "_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(key))
}

// didYouMean offers the known name that takes the fewest edits, if that is few enough to be a slip. A key in the wrong section is one too.
func didYouMean(name string, known []string) string {
	best := slices.MinFunc(known, func(a, b string) int { return cmp.Compare(edits(name, a), edits(name, b)) })
	if edits(name, best) <= max(2, len(name)/5) {
		return ": did you mean " + best + "?"
	}
	_, last, _ := strings.Cut(name, ".")
	for _, k := range known {
		if cmp.Or(last, name) == k[strings.LastIndexByte(k, '.')+1:] {
			return ": did you mean " + k + "?"
		}
	}
	return ""
}

// edits is the Levenshtein distance.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
