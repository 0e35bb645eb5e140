package route

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// The reference reads filters the slow and plain way: it decodes everything, collects the values at a path and looks at each.

type missing struct{}

func referenceMatch(t testing.TB, filter string, e *outbox.Event) bool {
	t.Helper()
	r := reference{event: e}
	return r.condition(decode(t, filter), true, decode(t, string(e.Data)), nil)
}

func decode(t testing.TB, doc string) (v any) {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(doc))
	d.UseNumber()
	require.NoError(t, d.Decode(&v), doc)
	return v
}

type reference struct{ event *outbox.Event }

func (r reference) condition(cond any, top bool, origin any, path []string) bool {
	object, ok := cond.(map[string]any)
	if !ok {
		object = map[string]any{"$eq": cond}
	}
	var comparisons, fields []string
	for key, operand := range object {
		holds := true
		name, rest, _ := strings.Cut(key, ".")
		switch {
		case !strings.HasPrefix(key, "$"):
			fields = append(fields, key)
		case top && r.isColumn(name):
			var columnPath []string
			if rest != "" {
				columnPath = strings.Split(rest, ".")
			}
			holds = r.condition(operand, false, r.column(name), columnPath)
		case key == "$and":
			for _, c := range operand.([]any) {
				holds = holds && r.condition(c, top, origin, path)
			}
		case key == "$or":
			holds = false
			for _, c := range operand.([]any) {
				holds = holds || r.condition(c, top, origin, path)
			}
		case key == "$not":
			holds = !r.condition(operand, top, origin, path)
		case key == "$exists":
			exists := false
			for _, v := range resolve(origin, path) {
				exists = exists || v != missing{}
			}
			holds = exists == operand.(bool)
		case key == "$ne":
			holds = !r.condition(map[string]any{"$eq": operand}, false, origin, path)
		case key == "$nin":
			holds = !r.condition(map[string]any{"$in": operand}, false, origin, path)
		default:
			comparisons = append(comparisons, key)
		}
		if !holds {
			return false
		}
	}
	return len(comparisons)+len(fields) == 0 || r.someValue(object, comparisons, fields, resolve(origin, path))
}

func (r reference) isColumn(name string) bool {
	return name == "$type" || name == "$aggregate_type" || name == "$context_id" || name == "$metadata"
}

func (r reference) column(name string) any {
	switch name {
	case "$type":
		return r.event.Type
	case "$aggregate_type":
		return r.event.AggregateType
	case "$context_id":
		if r.event.ContextID.IsZero() {
			return missing{}
		}
		return r.event.ContextID.String()
	}
	var v any
	_ = json.Unmarshal(r.event.Metadata, &v)
	d := json.NewDecoder(bytes.NewReader(r.event.Metadata))
	d.UseNumber()
	_ = d.Decode(&v)
	return v
}

// someValue looks for one value that everything holds for.
func (r reference) someValue(object map[string]any, comparisons, fields []string, values []any) bool {
	for _, v := range values {
		for _, w := range append([]any{v}, flatten(v)...) {
			if _, isArray := w.([]any); isArray && len(fields) > 0 || w == (missing{}) && len(comparisons) > 0 {
				continue
			}
			all := true
			for _, key := range comparisons {
				all = all && compareReference(key, w, object[key])
			}
			for _, key := range fields {
				all = all && r.condition(object[key], false, w, strings.Split(key, "."))
			}
			if all {
				return true
			}
		}
	}
	return false
}

// resolve returns the values at path, going into each element of the arrays on the way.
func resolve(v any, path []string) []any {
	if len(path) == 0 {
		return []any{v}
	}
	var all []any
	switch v := v.(type) {
	case map[string]any:
		if w, ok := v[path[0]]; ok {
			return resolve(w, path[1:])
		}
		return resolve(missing{}, path[1:])
	case []any:
		for _, w := range flatten(v) {
			if _, isArray := w.([]any); !isArray {
				all = append(all, resolve(w, path)...)
			}
		}
		return all
	}
	return []any{missing{}}
}

// flatten returns the elements of an array, those of arrays in it too.
func flatten(v any) (all []any) {
	array, _ := v.([]any)
	for _, w := range array {
		all = append(append(all, w), flatten(w)...)
	}
	return all
}

func compareReference(op string, v, operand any) bool {
	c, ordered := 0, false
	switch v := v.(type) {
	case json.Number:
		if o, ok := operand.(json.Number); ok {
			a, _ := new(big.Rat).SetString(v.String())
			b, _ := new(big.Rat).SetString(o.String())
			c, ordered = a.Cmp(b), true
		}
	case string:
		if o, ok := operand.(string); ok {
			c, ordered = strings.Compare(v, o), true
		}
	}
	switch op {
	case "$eq":
		return equalReference(v, operand)
	case "$in":
		for _, o := range operand.([]any) {
			if equalReference(v, o) {
				return true
			}
		}
		return false
	case "$gt":
		return ordered && c > 0
	case "$gte":
		return ordered && c >= 0
	case "$lt":
		return ordered && c < 0
	case "$lte":
		return ordered && c <= 0
	}
	s, ok := v.(string)
	switch op {
	case "$startsWith":
		return ok && strings.HasPrefix(s, operand.(string))
	case "$endsWith":
		return ok && strings.HasSuffix(s, operand.(string))
	case "$contains":
		return ok && strings.Contains(s, operand.(string))
	}
	panic("unknown operator " + op)
}

func equalReference(v, o any) bool { return reflect.DeepEqual(canonical(v), canonical(o)) }

func canonical(v any) any {
	switch v := v.(type) {
	case json.Number:
		rat, _ := new(big.Rat).SetString(v.String())
		return rat.RatString() + " as a number"
	case string:
		return v + " as a string"
	case []any:
		all := make([]any, len(v))
		for i := range v {
			all[i] = canonical(v[i])
		}
		return all
	case map[string]any:
		all := make(map[string]any, len(v))
		for k := range v {
			all[k] = canonical(v[k])
		}
		return all
	}
	return v
}

// generator makes small filters and documents that have a good chance to meet.
type generator struct{ *rand.Rand }

func (g generator) pick(of ...string) string { return of[g.IntN(len(of))] }

func (g generator) scalar() string {
	return g.pick(`null`, `true`, `false`, `0`, `-0.0`, `1`, `1.0`, `10e-1`, `-1`, `12345678901234567890`, `12345678901234567891`,
		`"a"`, `"\u0061"`, `"ab"`, `""`, `"é\n"`)
}

func (g generator) document(depth int) string {
	switch n := g.IntN(10); {
	case depth == 0 || n < 3:
		return g.scalar()
	case n < 6:
		var b strings.Builder
		for i := range g.IntN(4) {
			b.WriteString(g.pick("", " ") + strings.Repeat(",", min(i, 1)) + g.document(depth-1))
		}
		return "[" + b.String() + "]"
	default:
		return g.object(depth)
	}
}

func (g generator) object(depth int) string {
	var b strings.Builder
	keys := []string{"a", "b", `\u0063`, "dd"}
	g.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
	for i, key := range keys[:g.IntN(5)] {
		fmt.Fprintf(&b, `%s"%s"%s:%s`, strings.Repeat(",", min(i, 1)), key, g.pick("", " "), g.document(depth-1))
	}
	return "{" + b.String() + "}"
}

func (g generator) condition(depth int, top bool) string {
	if !top && (depth == 0 || g.IntN(4) == 0) {
		return g.pick(g.scalar(), g.scalar(), `[1]`, `["a", []]`)
	}
	keys := []string{g.key(top), g.key(top)}
	if keys[0] == keys[1] || g.IntN(3) > 0 {
		keys = keys[:1]
	}
	var members []string
	for _, key := range keys {
		members = append(members, fmt.Sprintf("%q: %s", key, g.operand(key, max(depth-1, 0), top)))
	}
	return "{" + strings.Join(members, ", ") + "}"
}

func (g generator) key(top bool) string {
	if top && g.IntN(5) == 0 {
		return g.pick("$type", "$aggregate_type", "$context_id", "$metadata", "$metadata.retry")
	}
	if n := g.IntN(10); n < 6 {
		return g.pick("a", "a", "b", "b", "c", "dd", "a.b", "b.a", "a.b.c")
	}
	if top {
		return g.pick("$not", "$and", "$or", "$or", "$exists", "$ne")
	}
	return g.pick("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$startsWith", "$endsWith", "$contains", "$not", "$and", "$or")
}

func (g generator) operand(key string, depth int, top bool) string {
	switch key {
	case "$eq", "$ne":
		return g.document(2)
	case "$gt", "$gte", "$lt", "$lte":
		return g.pick(`0`, `1`, `1e0`, `12345678901234567890`, `"a"`, `"aa"`)
	case "$in", "$nin":
		return "[" + g.document(1) + "," + g.document(1) + "]"
	case "$exists":
		return g.pick("true", "false")
	case "$startsWith", "$endsWith", "$contains":
		return g.pick(`""`, `"a"`, `"b"`, `"\n"`, `"ab"`)
	case "$not":
		return g.condition(depth, top)
	case "$and", "$or":
		return "[" + g.condition(depth, top) + "," + g.condition(depth, top) + "]"
	case "$type", "$aggregate_type", "$context_id":
		return g.pick(`"order"`, `"order.created"`, `{"$exists": true}`, `{"$startsWith": "o"}`)
	default:
		return g.condition(depth, false)
	}
}

func TestFilterAgainstReference(t *testing.T) {
	t.Parallel()
	g := generator{rand.New(rand.NewPCG(1, 2))} // the same cases each time
	matched := 0
	const cases = 10_000
	for range cases {
		filter, data := g.condition(3, true), g.object(3)
		f, err := CompileFilter([]byte(filter))
		require.NoError(t, err, filter)
		e := someEvent(t, data)
		got := f.Match(e)
		require.Equal(t, referenceMatch(t, filter, e), got, "%s on %s", filter, data)
		require.Equal(t, got, outlinedMatch(f, e), "%s on %s", filter, data)
		if got {
			matched++
		}
	}
	require.Greater(t, matched, cases/10, "the cases are worth something")
	require.Less(t, matched, cases*9/10, "the cases are worth something")
}

func FuzzFilterCompile(f *testing.F) {
	for _, cases := range filterCases {
		for _, c := range cases {
			f.Add([]byte(c.filter))
		}
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		filter, err := CompileFilter(doc)
		if (err == nil) != (filter != nil) {
			t.Fatal("want either a filter or an error")
		}
		if err == nil {
			filter.Match(someEvent(t, shop))
		}
	})
}

func FuzzFilterMatch(f *testing.F) {
	for _, cases := range filterCases {
		for _, c := range cases {
			f.Add([]byte(c.filter), []byte(shop))
		}
	}
	f.Add([]byte(`{"a": {"$ne": 1}}`), []byte(`{"a": "\`))
	f.Fuzz(func(t *testing.T, doc, data []byte) {
		filter, err := CompileFilter(doc)
		if err != nil {
			return
		}
		e := someEvent(t, string(data))
		got := filter.Match(e)
		require.Equal(t, got, outlinedMatch(filter, e))
		if isPlain(doc) && isPlain(data) {
			require.Equal(t, referenceMatch(t, string(doc), e), got)
		}
	})
}

var hugeExponent = regexp.MustCompile(`[eE][+-]?[0-9]{4}`)

// isPlain tells documents that the reference reads as we do: valid, in UTF-8, without a key twice and without numbers that big.Rat
// would take for ever to expand.
func isPlain(doc []byte) bool {
	if !json.Valid(doc) || !utf8.Valid(doc) || hugeExponent.Match(doc) {
		return false
	}
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	var open []map[string]bool // for each open object its keys, nil for an array
	isKey := false
	for {
		token, err := d.Token()
		if err == io.EOF {
			return true
		}
		inObject := len(open) > 0 && open[len(open)-1] != nil
		switch token {
		case json.Delim('{'):
			open = append(open, map[string]bool{})
			isKey = true
			continue
		case json.Delim('['):
			open = append(open, nil)
			continue
		case json.Delim('}'), json.Delim(']'):
			open = open[:len(open)-1]
		default:
			if inObject && isKey {
				keys := open[len(open)-1]
				if keys[token.(string)] {
					return false
				}
				keys[token.(string)] = true
				isKey = false
				continue
			}
		}
		isKey = len(open) > 0 && open[len(open)-1] != nil
	}
}
