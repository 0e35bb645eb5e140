package route

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

const someContext = "0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11"

func someEvent(t testing.TB, data string) *outbox.Event {
	t.Helper()
	context, err := outbox.ParseUUID(someContext)
	require.NoError(t, err)
	return &outbox.Event{
		Type: "order.created", AggregateType: "order", ContextID: context,
		Data: json.RawMessage(data), Metadata: json.RawMessage(`{"source": "api", "retry": {"count": 2}}`),
	}
}

const shop = `{"id": 7, "tags": ["new", "eu"], "note": null, "paid": true, "total": 19.90, "empty": [], "items": [` +
	`{"qty": 1, "sku": "A"}, {"qty": 5, "sku": "B"}, {"sku": "C", "parts": [{"n": 1}, {"n": 2}]}], ` +
	`"matrix": [[1, 2], [3, [4]]], "customer": {"name": "Zoë \"Z\" O\\N", "tier": "gold", "address": {"country": "DE"}}, "status": "open"}`

type filterCase struct {
	filter string
	want   bool
}

var filterCases = map[string][]filterCase{ //nolint:gochecknoglobals // the table is a corpus for fuzzing too
	"everything": {
		{`{}`, true},
		{` { } `, true},
	},
	"a plain value is equal": {
		{`{"status": "open"}`, true},
		{`{"status": "Open"}`, false},
		{`{"status": "ope"}`, false},
		{`{"paid": true}`, true},
		{`{"paid": false}`, false},
		{`{"paid": "true"}`, false},
		{`{"note": null}`, true},
		{`{"status": null}`, false},
		{`{"missing": null}`, false},
		{`{"id": 7}`, true},
		{`{"id": 7.00}`, true},
		{`{"id": "7"}`, false},
		{`{"total": 19.9}`, true},
		{`{"total": 199e-1}`, true},
		{`{"status": "open", "id": 8}`, false},
		{`{"status": "open", "id": 7}`, true},
		{`{"customer.name": "Zo\u00eb \"Z\" O\\N"}`, true},
	},
	"objects and dots descend": {
		{`{"customer": {"tier": "gold"}}`, true},
		{`{"customer": {"tier": "gold", "address": {"country": "DE"}}}`, true},
		{`{"customer": {"tier": "gold", "address": {"country": "AT"}}}`, false},
		{`{"customer.address.country": "DE"}`, true},
		{`{"customer.address": {"country": "DE"}}`, true},
		{`{"customer": {"address.country": "DE"}}`, true},
		{`{"customer.address.country.code": "DE"}`, false},
		{`{"status": {"tier": "gold"}}`, false},
	},
	"any element of an array": {
		{`{"tags": "eu"}`, true},
		{`{"tags": "us"}`, false},
		{`{"tags": ["new", "eu"]}`, true},
		{`{"tags": ["eu", "new"]}`, false},
		{`{"tags": ["new"]}`, false},
		{`{"empty": []}`, true},
		{`{"empty": null}`, false},
		{`{"items.sku": "B"}`, true},
		{`{"items.sku": "D"}`, false},
		{`{"items.parts.n": 2}`, true},
		{`{"items": {"sku": "A", "qty": 1}}`, true},
		{`{"items": {"sku": "A", "qty": 5}}`, false},
		{`{"items.sku": "A", "items.qty": 5}`, true},
		{`{"items": {"qty": {"$gt": 1, "$lt": 5}}}`, false},
		{`{"items.qty": {"$gt": 1, "$lt": 5}}`, false},
		{`{"items": {"parts": {"n": {"$gte": 2}}}}`, true},
		{`{"matrix": 3}`, true},
		{`{"matrix": 4}`, true},
		{`{"matrix": [4]}`, true},
		{`{"matrix": [1, 2]}`, true},
		{`{"matrix": [2, 1]}`, false},
	},
	"$eq and $ne": {
		{`{"customer.address": {"$eq": {"country": "DE"}}}`, true},
		{`{"customer": {"$eq": {"tier": "gold"}}}`, false},
		{`{"items": {"$eq": {"sku": "A", "qty": 1.0}}}`, true},
		{`{"items": {"$eq": {"qty": 1}}}`, false},
		{`{"items": {"$eq": {"sku": "C", "parts": [{"n": 1}, {"n": 2}]}}}`, true},
		{`{"items": {"$eq": {"sku": "C", "parts": [{"n": 2}, {"n": 1}]}}}`, false},
		{`{"status": {"$eq": "open"}}`, true},
		{`{"status": {"$ne": "open"}}`, false},
		{`{"status": {"$ne": "closed"}}`, true},
		{`{"missing": {"$ne": "closed"}}`, true},
		{`{"tags": {"$ne": "eu"}}`, false},
		{`{"tags": {"$ne": "us"}}`, true},
		{`{"items.sku": {"$ne": "A"}}`, false},
		{`{"items": {"sku": {"$ne": "A"}}}`, true},
		{`{"items": {"sku": {"$ne": "A"}, "qty": 1}}`, false},
		{`{"empty": {"$ne": 1}}`, true},
		{`{"$eq": {"id": 7}}`, false},
	},
	"$gt, $gte, $lt, $lte": {
		{`{"id": {"$gt": 6}}`, true},
		{`{"id": {"$gt": 7}}`, false},
		{`{"id": {"$gte": 7}}`, true},
		{`{"id": {"$gte": 7.0000000000000000001}}`, false},
		{`{"id": {"$lt": 7.0000000000000000001}}`, true},
		{`{"id": {"$lt": 7}}`, false},
		{`{"id": {"$lte": 7}}`, true},
		{`{"id": {"$lte": -7}}`, false},
		{`{"id": {"$gt": "6"}}`, false},
		{`{"note": {"$lt": 1}}`, false},
		{`{"missing": {"$lt": 1}}`, false},
		{`{"paid": {"$gte": 0}}`, false},
		{`{"status": {"$gt": "nope"}}`, true},
		{`{"status": {"$lte": "open"}}`, true},
		{`{"status": {"$lt": "open"}}`, false},
		{`{"status": {"$gte": "opera"}}`, false},
		{`{"items.qty": {"$gt": 4}}`, true},
	},
	"$in and $nin": {
		{`{"status": {"$in": ["closed", "open"]}}`, true},
		{`{"status": {"$in": []}}`, false},
		{`{"status": {"$in": [1, null]}}`, false},
		{`{"id": {"$in": ["7", 7.0]}}`, true},
		{`{"note": {"$in": ["x", null]}}`, true},
		{`{"missing": {"$in": [null]}}`, false},
		{`{"tags": {"$in": ["us", "eu"]}}`, true},
		{`{"tags": {"$in": [["new", "eu"]]}}`, true},
		{`{"customer.address": {"$in": [{"country": "DE"}]}}`, true},
		{`{"status": {"$nin": ["closed"]}}`, true},
		{`{"status": {"$nin": ["open"]}}`, false},
		{`{"missing": {"$nin": ["open"]}}`, true},
		{`{"tags": {"$nin": ["us", "eu"]}}`, false},
	},
	"$exists": {
		{`{"note": {"$exists": true}}`, true},
		{`{"missing": {"$exists": true}}`, false},
		{`{"missing": {"$exists": false}}`, true},
		{`{"empty": {"$exists": true}}`, true},
		{`{"empty.x": {"$exists": false}}`, true},
		{`{"customer": {"address": {"$exists": true}}}`, true},
		{`{"customer.phone": {"$exists": false}}`, true},
		{`{"missing": {"phone": {"$exists": false}}}`, true},
		{`{"missing.phone": {"$exists": false}}`, true},
		{`{"items.parts": {"$exists": true}}`, true},
		{`{"items.parts": {"$exists": false}}`, false},
		{`{"items": {"parts": {"$exists": false}}}`, true},
		{`{"status": {"$exists": true, "$ne": "open"}}`, false},
		{`{"tags": {"$exists": true, "$contains": "e"}}`, true},
	},
	"$startsWith, $endsWith, $contains": {
		{`{"status": {"$startsWith": "op"}}`, true},
		{`{"status": {"$startsWith": "pe"}}`, false},
		{`{"status": {"$startsWith": "open!"}}`, false},
		{`{"status": {"$startsWith": ""}}`, true},
		{`{"status": {"$endsWith": "en"}}`, true},
		{`{"status": {"$endsWith": "op"}}`, false},
		{`{"status": {"$contains": "pe"}}`, true},
		{`{"status": {"$contains": "ep"}}`, false},
		{`{"id": {"$contains": "7"}}`, false},
		{`{"missing": {"$contains": ""}}`, false},
		{`{"tags": {"$contains": "e"}}`, true},
		{`{"tags": {"$startsWith": "n", "$endsWith": "u"}}`, false},
		{`{"customer.name": {"$contains": "ë \"Z"}}`, true},
		{`{"customer.name": {"$endsWith": "\\N"}}`, true},
		{`{"customer.name": {"$endsWith": "\n"}}`, false},
	},
	"$and, $or, $not": {
		{`{"$or": [{"status": "closed"}, {"id": 7}]}`, true},
		{`{"$or": [{"status": "closed"}, {"id": 8}]}`, false},
		{`{"$and": [{"status": "open"}, {"id": 7}]}`, true},
		{`{"$and": [{"status": "open"}, {"id": 8}]}`, false},
		{`{"$and": [{"$or": [{"id": 1}, {"id": 7}]}, {"$not": {"status": "closed"}}], "paid": true}`, true},
		{`{"$not": {"status": "open", "id": 8}}`, true},
		{`{"id": {"$or": [{"$lt": 1}, {"$gt": 5}]}}`, true},
		{`{"id": {"$or": [1, 7]}}`, true},
		{`{"id": {"$not": {"$gt": 5}}}`, false},
		{`{"id": {"$not": 7}}`, false},
		{`{"missing": {"$not": {"$gt": 5}}}`, true},
		{`{"tags": {"$not": "eu"}}`, false},
		{`{"tags": {"$not": {"$in": ["us"]}}}`, true},
		{`{"tags": {"$and": ["new", "eu"]}}`, true},
		{`{"tags": {"$and": ["new", "us"]}}`, false},
		{`{"items": {"sku": "C", "$not": {"qty": {"$exists": true}}}}`, false},
		{`{"items": {"$not": {"sku": "D"}}}`, true},
		{`{"customer": {"$or": [{"tier": "silver"}, {"address.country": "DE"}]}}`, true},
	},
	"columns of the event": {
		{`{"$type": "order.created"}`, true},
		{`{"$type": {"$startsWith": "order."}}`, true},
		{`{"$type": {"$in": ["order.deleted"]}}`, false},
		{`{"$aggregate_type": "order", "status": "open"}`, true},
		{`{"$aggregate_type": {"$ne": "order"}}`, false},
		{`{"$context_id": "` + someContext + `"}`, true},
		{`{"$context_id": {"$exists": true}}`, true},
		{`{"$context_id": {"$gt": "0190"}}`, true},
		{`{"$metadata": {"source": "api"}}`, true},
		{`{"$metadata.source": "web"}`, false},
		{`{"$metadata": {"retry": {"count": {"$gte": 2}}}}`, true},
		{`{"$metadata.retry.count": 2}`, true},
		{`{"$metadata": {"$exists": true}}`, true},
		{`{"$metadata.none": {"$exists": false}}`, true},
		{`{"$or": [{"$type": "x"}, {"$metadata.source": "api"}]}`, true},
		{`{"$not": {"$and": [{"$type": "order.created"}, {"id": 7}]}}`, false},
	},
}

func TestFilter(t *testing.T) {
	t.Parallel()
	for name, cases := range filterCases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, c := range cases {
				f, err := CompileFilter([]byte(c.filter))
				require.NoError(t, err, c.filter)
				assert.Equal(t, c.want, f.Match(someEvent(t, shop)), c.filter)
				assert.Equal(t, c.want, referenceMatch(t, c.filter, someEvent(t, shop)), "the reference: %s", c.filter)
			}
		})
	}
}

func TestFilterOnOtherDocuments(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		filter, data string
		want         bool
	}{
		{`{"a": 1}`, `[{"a": 2}, {"a": 1}]`, true},
		{`{"$gt": 3}`, `5`, true},
		{`{"$exists": true}`, `null`, true},
		{`{"a": {"$exists": false}}`, `"text"`, true},
		{`{"a": 100}`, `{"a": 1e2}`, true},
		{`{"a": 0}`, `{"a": -0.000}`, true},
		{`{"a": {"$lt": 0}}`, `{"a": -0}`, false},
		{`{"a": 12345678901234567890}`, `{"a": 12345678901234567891}`, false},
		{`{"a": {"$lt": 12345678901234567891}}`, `{"a": 12345678901234567890}`, true},
		{`{"a": 0.1}`, `{"a": 0.10000000000000000001}`, false},
		{`{"a": {"$gt": -12345678901234567891}}`, `{"a": -12345678901234567890}`, true},
		{`{"a": "é"}`, `{"a": "\u00E9"}`, true},
		{`{"é": "\ud83d\ude00"}`, `{"\u00e9": "😀"}`, true},
		{`{"a\"b": 1}`, `{"a": 2, "a\"b": 1}`, true},
		{`{"a": {"$eq": {"b": 1, "cc": 2}}}`, `{"a": {"cc": 2, "b": 1}}`, true},
		{`{"a": {"$eq": {"b": 1, "cc": 2}}}`, `{"a": {"b": 1, "b": 1}}`, false},
		{`{"a": {"$eq": {"b": 1}}}`, `{"a": {"b": 1, "c": 1}}`, false},
		{`{"a": {"$eq": {}}}`, `{"a": {}}`, true},
		{`{"a": {"$eq": {}}}`, `{"a": {"b": 1}}`, false},
		{`{"a": {"$eq": [[]]}}`, `{"a": [[]]}`, true},
		{`{"a": {"$eq": [[]]}}`, `{"a": [[1]]}`, false},
		{`{"a": {"b": {"$ne": 1}}}`, `{"a": []}`, false},
		{`{"a.b": {"$ne": 1}}`, `{"a": []}`, true},
		{`{"a.b": 1}`, ` { "a" : [ [ { "b" : 1 } ] , 2 ] } `, true},
	} {
		f, err := CompileFilter([]byte(c.filter))
		require.NoError(t, err, c.filter)
		assert.Equal(t, c.want, f.Match(someEvent(t, c.data)), "%s on %s", c.filter, c.data)
	}
}

func TestFilterWithoutContext(t *testing.T) {
	t.Parallel()
	f, err := CompileFilter([]byte(`{"$context_id": {"$exists": false}}`))
	require.NoError(t, err)
	assert.True(t, f.Match(&outbox.Event{}))
	assert.False(t, f.Match(someEvent(t, `{}`)))
}

// What cannot be read is never taken for a missing key.
func TestFilterOnBrokenDocuments(t *testing.T) {
	t.Parallel()
	for _, data := range []string{
		`{"b": }`, `{"b"`, `{"b": "`, `{"b": "\`, `{"b": [1`, `{"b" 1}`, `{"b": 1, 2}`, `{"b": {"c": [}`, `{"b": 1`, `{1: 1}`, `{"a": ?}`,
		`{"b": nothing`,
	} {
		for _, filter := range []string{`{"a": {"$exists": false}}`, `{"a": {"$ne": 1}}`, `{"$not": {"a": {"$gt": 1}}}`} {
			f, err := CompileFilter([]byte(filter))
			require.NoError(t, err)
			assert.False(t, f.Match(someEvent(t, data)), "%s on %s", filter, data)
			assert.False(t, outlinedMatch(f, someEvent(t, data)), "%s on %s and more", filter, data)
		}
	}
}

func TestFilterOnDeepDocuments(t *testing.T) {
	t.Parallel()
	const depth = 1 << 18
	arrays := `{"a": ` + strings.Repeat("[", depth) + "1" + strings.Repeat("]", depth) + `, "b": 1}`
	objects := `{"a": ` + strings.Repeat(`{"a":`, depth) + "1" + strings.Repeat("}", depth) + `, "b": 1}`
	for filter, want := range map[string]bool{
		`{"b": 1}`:                        true,
		`{"a": 1}`:                        true,
		`{"a": {"$gt": 1}}`:               false,
		`{"a": {"$eq": [[[[1]]]]}}`:       true,
		`{"a": {"c": {"$exists": true}}}`: false,
		`{"a.c": {"$exists": true}}`:      false,
	} {
		f, err := CompileFilter([]byte(filter))
		require.NoError(t, err)
		assert.Equal(t, want, f.Match(someEvent(t, arrays)), filter)
	}
	f, err := CompileFilter([]byte(`{"a.a.a": {"$exists": true}, "b": 1}`))
	require.NoError(t, err)
	assert.True(t, f.Match(someEvent(t, objects)))
}

func TestCompileFilterRefuses(t *testing.T) {
	t.Parallel()
	for filter, want := range map[string]string{
		``:                                      "filter: is not valid JSON",
		`{"a": 1`:                               "filter: is not valid JSON",
		`null`:                                  "filter: at the top: want an object, got null",
		`[]`:                                    "filter: at the top: want an object, got an array",
		`{"a": {"$regex": "x"}}`:                "filter: a.$regex: is no operator: use $eq",
		`{"$where": 1}`:                         "filter: $where: is no operator",
		`{"a": {"$type": "x"}}`:                 "filter: a.$type: is no operator",
		`{"$typo.x": 1}`:                        "filter: $typo.x: is no operator",
		`{"$type.x": "order"}`:                  "filter: $type.x: is no operator",
		`{"$type": {"x": 1}}`:                   "filter: $type.x: has no keys within",
		`{"a": {"$gt": true}}`:                  "filter: a.$gt: want a number or a string, got a boolean",
		`{"a": {"$gte": null}}`:                 "filter: a.$gte: want a number or a string, got null",
		`{"a": {"$lt": []}}`:                    "filter: a.$lt: want a number or a string, got an array",
		`{"a": {"b.c": {"$lte": {}}}}`:          "filter: a.b.c.$lte: want a number or a string, got an object",
		`{"a": {"$in": "x"}}`:                   "filter: a.$in: want an array, got a string",
		`{"a": {"$nin": {}}}`:                   "filter: a.$nin: want an array, got an object",
		`{"a": {"$exists": 1}}`:                 "filter: a.$exists: want true or false, got a number",
		`{"a": {"$startsWith": 1}}`:             "filter: a.$startsWith: want a string, got a number",
		`{"a": {"$endsWith": null}}`:            "filter: a.$endsWith: want a string, got null",
		`{"a": {"$contains": ["x"]}}`:           "filter: a.$contains: want a string, got an array",
		`{"$and": {}}`:                          "filter: $and: want an array of one or more conditions",
		`{"a": {"$or": []}}`:                    "filter: a.$or: want an array of one or more conditions",
		`{"$or": [{"a": 1}, 5]}`:                "filter: $or[1]: want an object, got a number",
		`{"$or": [{"a": 1}, {"b": {"$x": 1}}]}`: "filter: $or[1].b.$x: is no operator",
		`{"$not": "x"}`:                         "filter: $not: want an object, got a string",
		`{"a": {"$not": {"$size": 1}}}`:         "filter: a.$not.$size: is no operator",
		`{"a": {}}`:                             "filter: a: an empty object tests nothing",
		`{"$metadata": {}}`:                     "filter: $metadata: an empty object tests nothing",
		`{"$not": {}}`:                          "filter: $not: an empty object tests nothing",
		`{"$or": [{"id": 1}, {}]}`:              "filter: $or[1]: an empty object tests nothing",
		`{"$and": [{}]}`:                        "filter: $and[0]: an empty object tests nothing",
		`{"$not": {"$or": [{}]}}`:               "filter: $not.$or[0]: an empty object tests nothing",
		`{"a..b": 1}`:                           "filter: a..b: has an empty segment",
		`{"": 1}`:                               "has an empty segment",
		`{"$metadata.": 1}`:                     "filter: $metadata.: has an empty segment",
		`{"a.$gt": 1}`:                          `filter: a.$gt: holds "$gt", which is no key`,
		`{"a": 1, "a": 2}`:                      `filter: key "a" is there twice`,
		`{"a": 1e9999999999999999}`:             "is out of range",
		strings.Repeat(`{"a":`, 66) + `1` + strings.Repeat(`}`, 66):      "nested more than 64 levels deep",
		strings.Repeat(`[`, 9000) + strings.Repeat(`]`, 9000):            "nested more than 64 levels deep",
		`{"a` + strings.Repeat(".a", 64) + `": 1}`:                       "more than 64 segments",
		`{"a": "` + strings.Repeat("x", 64<<10) + `"}`:                   "is 65545 bytes long, more than 65536: share it out to several subscriptions",
		`{"a": {"$in": [` + strings.Repeat("1,", 1021) + `1]}}`:          "holds more than 1024 values, items of lists included: share them out",
		`{"$or": [` + strings.Repeat(`{"a":1},`, 511) + `{"a":1}]}`:      "holds more than 1024 values",
		`{"a": {"$eq": [` + strings.Repeat("[],", 1021) + `[]]}}`:        "holds more than 1024 values",
		`{"` + strings.Repeat("x", 5000) + `": {"$gt": "ok", "$no": 1}}`: "xxx: is no operator",
	} {
		f, err := CompileFilter([]byte(filter))
		require.ErrorContains(t, err, want, "%.100s", filter)
		assert.Nil(t, f)
		assert.Less(t, len(err.Error()), 600)
	}
}

func TestFilterOfGreatestSize(t *testing.T) {
	t.Parallel()
	list := make([]string, 1000)
	for i := range list {
		list[i] = outbox.NewUUID().String()
	}
	doc, err := json.Marshal(map[string]any{"id": map[string]any{"$in": list}, "status": map[string]any{"$ne": "closed"}})
	require.NoError(t, err)
	f, err := CompileFilter(doc)
	require.NoError(t, err)
	assert.True(t, f.Match(someEvent(t, `{"id": "`+list[999]+`"}`)))
	_, err = CompileFilter([]byte(`{"a": "` + strings.Repeat("x", 64<<10-len(`{"a": ""}`)) + `"}`))
	require.NoError(t, err)
}

func TestFilterKeepsNoReferenceToItsDocument(t *testing.T) {
	t.Parallel()
	doc := []byte(`{"id": 7, "status": {"$in": ["open"]}}`)
	f, err := CompileFilter(doc)
	require.NoError(t, err)
	for i := range doc {
		doc[i] = 'x'
	}
	assert.True(t, f.Match(someEvent(t, shop)))
}

func TestFilterMatchAllocatesNothing(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	e := someEvent(t, shop)
	for name, cases := range filterCases {
		for _, c := range cases {
			f, err := CompileFilter([]byte(c.filter))
			require.NoError(t, err)
			assert.Zero(t, testing.AllocsPerRun(10, func() { f.Match(e) }), "%s: %s", name, c.filter)
		}
	}
}

func BenchmarkFilter(b *testing.B) {
	e := someEvent(b, shop)
	for name, filter := range map[string]string{
		"equal":   `{"status": "open"}`,
		"three":   `{"status": "open", "customer.tier": "gold", "total": {"$gt": 10.5}}`,
		"array":   `{"items": {"sku": "B", "qty": {"$gte": 5}}}`,
		"in-1000": `{"status": {"$in": ["` + strings.Repeat(`x","`, 1000) + `open"]}}`,
		"columns": `{"$type": "order.created", "$metadata.source": "api"}`,
	} {
		f, err := CompileFilter([]byte(filter))
		require.NoError(b, err)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if !f.Match(e) {
					b.Fatal("no match")
				}
			}
		})
	}
	b.Run("unmarshal-alone", func(b *testing.B) { // what a filter over a map would start with
		b.ReportAllocs()
		for b.Loop() {
			var v any
			require.NoError(b, json.Unmarshal(e.Data, &v))
		}
	})
}
