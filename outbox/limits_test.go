package outbox_test

import (
	"bytes"
	"cmp"
	"encoding/json"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// faulty lists the fields that an error of ValidateWithin or Check names.
func faulty(t *testing.T, err error) (names []string) {
	t.Helper()
	if err == nil {
		return nil
	}
	var one *outbox.FieldError
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			names = append(names, faulty(t, e)...)
		}
		return names
	}
	require.ErrorAs(t, err, &one)
	return []string{one.Field}
}

// TestLimits has each limit met exactly and broken by one, by the library and by a relay, which sees what the database prints.
func TestLimits(t *testing.T) {
	t.Parallel()
	nested := func(n int) string { return strings.Repeat(`{"a":[`, n/2) + "1" + strings.Repeat("]}", n/2) }
	pool, err := pgxpool.New(t.Context(), pgtest.Database(t))
	require.NoError(t, err)
	t.Cleanup(pool.Close)
	for name, tc := range map[string]struct {
		limits                    outbox.Limits
		eventType, data, metadata string
		field                     string // that is at fault; empty: none
	}{
		"no limits":               {data: nested(500)},
		"longest type":            {limits: outbox.Limits{MaxTypeLength: 7}, eventType: "a.bcdef"},
		"type too long":           {limits: outbox.Limits{MaxTypeLength: 6}, eventType: "a.bcdef", field: "Type"},
		"largest payload":         {limits: outbox.Limits{MaxPayload: 9}, data: `{"a":1}`},
		"payload too large":       {limits: outbox.Limits{MaxPayload: 8}, data: `{"a":1}`, field: "Data"},
		"metadata counts":         {limits: outbox.Limits{MaxPayload: 13}, data: `{"a":1}`, metadata: `{"b":2}`, field: "Data"},
		"and may be there":        {limits: outbox.Limits{MaxPayload: 14}, data: `{"a":1}`, metadata: `{"b":2}`},
		"white space is free":     {limits: outbox.Limits{MaxPayload: 9}, data: " {\n\t\"a\" : 1\r} "},
		"but not within a text":   {limits: outbox.Limits{MaxPayload: 11}, data: `{"a":" \" "}`, field: "Data"},
		"numbers grow":            {limits: outbox.Limits{MaxPayload: 20}, data: `{"a":1e20}`, field: "Data"},
		"downwards as well":       {limits: outbox.Limits{MaxPayload: 20}, data: `[-12.5e-20]`, field: "Data"},
		"deepest":                 {limits: outbox.Limits{MaxDepth: 4}, data: nested(4)},
		"too deep":                {limits: outbox.Limits{MaxDepth: 3}, data: nested(4), field: "Data"},
		"metadata too deep":       {limits: outbox.Limits{MaxDepth: 3}, metadata: nested(4), field: "Metadata"},
		"wide is not deep":        {limits: outbox.Limits{MaxDepth: 2}, data: `[{}, [], {}, [1, 2], {"b": "[[[[[["}]`},
		"a text is not deep":      {limits: outbox.Limits{MaxDepth: 1}, data: `["{\"a\": [[[", "\\\\", "]"]`},
		"production: as it comes": {limits: outbox.ProductionLimits(), data: `{"total": 12.50}`},
		"production: nested":      {limits: outbox.ProductionLimits(), data: nested(34), field: "Data"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := validEvent()
			e.Type = cmp.Or(tc.eventType, e.Type)
			e.Data, e.Metadata = json.RawMessage(tc.data), json.RawMessage(tc.metadata)
			var want []string
			if tc.field != "" {
				want = []string{tc.field}
			}
			err := e.ValidateWithin(tc.limits)
			assert.Equal(t, want, faulty(t, err), "%v", err)

			printed := e
			require.NoError(t, pool.QueryRow(t.Context(), `SELECT v.d::jsonb::text, v.m::jsonb::text FROM (VALUES ($1::text, $2::text)) v (d, m)`,
				cmp.Or(tc.data, "{}"), cmp.Or(tc.metadata, "{}")).Scan((*[]byte)(&printed.Data), (*[]byte)(&printed.Metadata)))
			err = tc.limits.Check(&printed)
			assert.Equal(t, want, faulty(t, err), "%v", err)
		})
	}
}

// TestLimitsOfARelay: what the library would refuse for its form is let through with AnyType.
func TestLimitsOfARelay(t *testing.T) {
	t.Parallel()
	e := outbox.Event{Type: "Order created"}
	assert.Equal(t, []string{"Type"}, faulty(t, outbox.Limits{}.Check(&e)))
	require.NoError(t, outbox.Limits{AnyType: true}.Check(&e))
	assert.Equal(t, []string{"Type"}, faulty(t, outbox.Limits{AnyType: true, MaxTypeLength: 12}.Check(&e)))
	require.NoError(t, outbox.Limits{AnyType: true, MaxTypeLength: 13}.Check(&e))
}

// TestLimitsOfWhatIsNoJSON: Validate says what is wrong with it, and the limits have nothing to add.
func TestLimitsOfWhatIsNoJSON(t *testing.T) {
	t.Parallel()
	e := validEvent()
	e.Data, e.Metadata = json.RawMessage(`{"a": [[[[`), json.RawMessage(`[1]`)
	err := e.ValidateWithin(outbox.Limits{MaxPayload: 1, MaxDepth: 1})
	assert.Equal(t, []string{"Data", "Metadata"}, faulty(t, err), "%v", err)
}

// FuzzLimits: whatever the library lets through, so does the relay, and neither breaks.
func FuzzLimits(f *testing.F) {
	for _, doc := range []string{`{"a": [1, "\\\"", {}]}`, `1e3`, `"\u00e9"`, `[`, `"`, `"\`, `-`, "\x00", `{"a":1}}`} {
		f.Add([]byte(doc), 5, 2)
	}
	f.Fuzz(func(t *testing.T, doc []byte, size, depth int) {
		limits := outbox.Limits{AnyType: true, MaxPayload: max(size, 0), MaxDepth: max(depth, 0)}
		e := validEvent()
		e.Data = doc
		relay := limits.Check(&e)
		if err := e.ValidateWithin(limits); err == nil && relay != nil {
			t.Errorf("%q: the relay refuses it: %v", doc, relay)
		}
		var compact bytes.Buffer
		if json.Compact(&compact, doc) == nil && limits.MaxPayload > 0 && compact.Len()+2 <= limits.MaxPayload && relay != nil && limits.MaxDepth == 0 &&
			!bytes.ContainsAny(doc, "eE") {
			t.Errorf("%q: %v", doc, relay)
		}
	})
}
