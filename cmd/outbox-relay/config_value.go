package main

import (
	"fmt"
	"io"
	"net/netip"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"go.yaml.in/yaml/v3"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

// decode stores what the file (typed by YAML), the environment or a flag (both text) says. It returns what is wrong with it, each a
// *relay.FieldError; the value then stays as it was.
func (l leaf) decode(raw any) []error {
	text := strings.TrimSpace(fmt.Sprint(raw))
	if l.holdsSecrets() {
		text = "(hidden)" // what is not of its type may be a secret all the same
	}
	fault := func(value, remedy string) []error {
		return []error{&relay.FieldError{Key: l.key, Value: value, Remedy: remedy}}
	}
	if l.value.Kind() == reflect.Slice && hasBlank(raw) {
		return fault(`""`, "is an empty entry of the list: leave it out")
	}
	switch dst := l.value.Addr().Interface().(type) {
	case *string:
		s, ok := raw.(string)
		if !ok {
			return fault(text, "must be text: put it in quotes")
		}
		*dst = s
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return fault(strconv.Quote(text), "must be a whole number")
		}
		*dst = n
	case *float64:
		n, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return fault(strconv.Quote(text), "must be a number")
		}
		*dst = n
	case *bool:
		if text != "true" && text != "false" {
			return fault(strconv.Quote(text), "must be true or false")
		}
		*dst = text == "true"
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return fault(text, durationRemedy(text))
		}
		*dst = d
	case *relay.ByteSize:
		b, err := relay.ParseByteSize(text)
		if err != nil {
			return fault(text, err.Error())
		}
		*dst = b
	case *[]string:
		list, ok := texts(raw)
		if !ok {
			return fault(text, "must be a list of texts: [a, b] in the file, a,b in the environment")
		}
		*dst = list
	case *[]netip.Prefix:
		return l.decodePrefixes(dst, raw)
	case *[]time.Duration:
		return l.decodeDurations(dst, raw)
	case *[]int:
		return l.decodeNumbers(dst, raw)
	case *delivery.TLSVersion:
		*dst = delivery.TLSVersion(text) // 1.3 is a number in YAML
	case *[]delivery.TLSProfile:
		return l.decodeProfiles(dst, raw)
	case *relay.SchemaMode:
		if *dst = relay.SchemaMode(text); text == "false" { // what some readers of YAML make of an off without quotes
			*dst = relay.SchemaOff
		}
	default:
		panic(fmt.Sprintf("key %s has a type nobody decodes: %T", l.key, dst))
	}
	return nil
}

func durationRemedy(text string) string {
	if _, err := strconv.ParseFloat(text, 64); err == nil {
		return fmt.Sprintf("has no unit: write %ss for seconds, or use ms, m or h", text)
	}
	return "must be a number and a unit of ms, s, m or h: 30s, 1m30s"
}

func (l leaf) decodePrefixes(dst *[]netip.Prefix, raw any) []error {
	const remedy = "must be an address range in CIDR form: 10.0.0.0/8, or 10.1.2.3/32 for one address"
	list, ok := texts(raw)
	if !ok {
		return []error{&relay.FieldError{Key: l.key, Value: fmt.Sprint(raw), Remedy: remedy}}
	}
	var errs []error
	var prefixes []netip.Prefix
	for _, text := range list {
		p, err := netip.ParsePrefix(text)
		switch {
		case err != nil:
			errs = append(errs, &relay.FieldError{Key: l.key, Value: strconv.Quote(text), Remedy: remedy})
		case p != p.Masked():
			errs = append(errs, &relay.FieldError{Key: l.key, Value: text, Remedy: fmt.Sprintf("has address bits beyond its length: write %v, or %v/%d for one address",
				p.Masked(), p.Addr(), p.Addr().BitLen())})
		default:
			prefixes = append(prefixes, p)
		}
	}
	if errs == nil {
		*dst = prefixes
	}
	return errs
}

func (l leaf) decodeDurations(dst *[]time.Duration, raw any) []error {
	list, ok := texts(raw)
	if !ok {
		return []error{&relay.FieldError{Key: l.key, Value: fmt.Sprint(raw), Remedy: "must be a list of times: [5s, 5m, 30m] in the file, 5s,5m,30m in the environment"}}
	}
	var errs []error
	var times []time.Duration
	for _, text := range list {
		d, err := time.ParseDuration(text)
		if err != nil {
			errs = append(errs, &relay.FieldError{Key: l.key, Value: text, Remedy: durationRemedy(text)})
		}
		times = append(times, d)
	}
	if errs == nil {
		*dst = times
	}
	return errs
}

// hasBlank tells whether a list, or a text with commas, has an entry without text: dropped, it could leave a list that means everything. A text that is empty as
// a whole is an empty list.
func hasBlank(raw any) bool {
	blank := func(text string) bool { return strings.TrimSpace(text) == "" }
	switch raw := raw.(type) {
	case string:
		return !blank(raw) && slices.ContainsFunc(strings.Split(raw, ","), blank)
	case []any:
		return slices.ContainsFunc(raw, func(item any) bool {
			text, ok := item.(string)
			return ok && blank(text)
		})
	}
	return false
}

// texts reads a list of texts, or one text with commas.
func texts(raw any) ([]string, bool) {
	var list []string
	switch raw := raw.(type) {
	case string:
		for part := range strings.SplitSeq(raw, ",") {
			if part = strings.TrimSpace(part); part != "" {
				list = append(list, part)
			}
		}
	case []any:
		for _, item := range raw {
			s, ok := item.(string)
			if !ok {
				return nil, false
			}
			list = append(list, strings.TrimSpace(s)) // as above: a name with a blank before it would match nothing, and nobody would see why
		}
	default:
		return nil, false
	}
	return list, true
}

// holdsSecrets tells whether a value of the key, or one that was meant to be, is not to be shown as it is.
func (l leaf) holdsSecrets() bool {
	return strings.HasSuffix(l.key, ".url") || strings.HasSuffix(l.key, ".replication_url") || l.key == "secrets.keys" || l.key == "network.proxy"
}

// asGiven takes back what was read from files.
func (c *config) asGiven() *config {
	given := *c
	given.Databases = slices.Clone(c.Databases)
	databases := []*relay.Database{&given.Database}
	for i := range given.Databases {
		databases = append(databases, &given.Databases[i].Database)
	}
	for _, d := range databases {
		if d.URLFile != "" {
			d.URL = ""
		}
		if d.ReplicationURLFile != "" {
			d.ReplicationURL = ""
		}
	}
	return &given
}

// write prints the configuration as a file that would lead to it, except for the passwords.
func (c *config) write(w io.Writer) error {
	c = c.asGiven()
	root := &yaml.Node{Kind: yaml.MappingNode}
	sections := map[string]*yaml.Node{"": root}
	for _, l := range leavesOf(c) {
		if err := l.printInto(section(sections, l.key)); err != nil {
			return err
		}
	}
	if len(c.Databases) > 0 {
		list := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range c.Databases {
			e := &c.Databases[i]
			item := &yaml.Node{Kind: yaml.MappingNode}
			for _, l := range append([]leaf{{e.prefix() + "name", reflect.ValueOf(&e.Name).Elem()}}, e.leaves()...) {
				if err := l.printInto(item); err != nil {
					return err
				}
			}
			list.Content = append(list.Content, item)
		}
		root.Content = slices.Insert(root.Content, 2, &yaml.Node{Kind: yaml.ScalarNode, Value: databasesKey}, list) // behind the section database
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(root); err != nil {
		return fmt.Errorf("print the configuration: %w", err)
	}
	return enc.Close()
}

// section is the mapping that a key stands in, made if need be.
func section(sections map[string]*yaml.Node, key string) *yaml.Node {
	name := key[:max(strings.LastIndexByte(key, '.'), 0)]
	if sections[name] == nil {
		sections[name] = &yaml.Node{Kind: yaml.MappingNode}
		outer := section(sections, name)
		outer.Content = append(outer.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: name[strings.LastIndexByte(name, '.')+1:]}, sections[name])
	}
	return sections[name]
}

// printInto adds the key and its value to a mapping.
func (l leaf) printInto(section *yaml.Node) error {
	var value yaml.Node
	if err := value.Encode(l.plain()); err != nil {
		return fmt.Errorf("print %s: %w", l.key, err)
	}
	value.Style = yaml.FlowStyle
	key := &yaml.Node{Kind: yaml.ScalarNode, Value: l.key[strings.LastIndexByte(l.key, '.')+1:]}
	section.Content = append(section.Content, key, &value)
	return nil
}

// plain is the value as the file would have it, with passwords hidden.
func (l leaf) plain() any {
	switch v := l.value.Interface().(type) {
	case time.Duration:
		return durationText(v)
	case relay.ByteSize:
		return v.String()
	case []string:
		list := append([]string{}, v...)
		for i := range list {
			if l.holdsSecrets() {
				list[i] = relay.ShowKeySource(list[i])
			}
		}
		return list
	case []time.Duration:
		list := make([]string, len(v))
		for i, d := range v {
			list[i] = durationText(d)
		}
		return list
	case []netip.Prefix:
		return append([]netip.Prefix{}, v...)
	case []int:
		return append([]int{}, v...)
	case []delivery.TLSProfile:
		return plainProfiles(v)
	case string:
		if l.key == "network.proxy" {
			return hideUserinfo(v)
		}
		if l.holdsSecrets() {
			return hidePassword(v)
		}
	}
	return l.value.Interface()
}

// durationText is 1m where Duration.String says 1m0s.
func durationText(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// hidePassword shows a DSN only if it is one: where the password of another begins and ends nobody knows. URLs are left to pgx, which knows every place
// that holds a password, but offers that only through its error. In the keyword form it misses blanks around the sign and quotes inside quotes.
func hidePassword(dsn string) string {
	if relay.DSNFault(dsn) != "" {
		return "(hidden: not a DSN)"
	}
	if !strings.HasPrefix(dsn, "postgres://") && !strings.HasPrefix(dsn, "postgresql://") {
		return regexp.MustCompile(`password\s*=\s*('(\\.|[^'\\])*'?|(\\.|[^\s\\])*)`).ReplaceAllLiteralString(dsn, "password=xxxxx")
	}
	said := pgconn.NewParseConfigError(dsn, "", nil).Error()
	return said[strings.IndexByte(said, '`')+1 : strings.LastIndexByte(said, '`')]
}
