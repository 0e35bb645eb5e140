package route

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

func compiled(t *testing.T, text string) *PayloadSchema {
	t.Helper()
	s := compilePayloadSchema(text)
	require.NoError(t, s.fault())
	return s
}

// numbered repeats a part of a document, with its number in it.
func numbered(format string, n int) string {
	parts := make([]string, n)
	for i := range parts {
		parts[i] = fmt.Sprintf(format, i)
	}
	return strings.Join(parts, ",")
}

const orderSchema = `{
	"type": "object", "required": ["amount"],
	"properties": {"amount": {"type": "number", "minimum": 0}, "currency": {"enum": ["EUR", "USD"]}, "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}}},
	"patternProperties": {"^x_": {"type": "string"}}, "additionalProperties": false,
	"$defs": {"line": {"type": "object", "properties": {"sku": {"type": "string", "pattern": "^[A-Z]{2}[0-9]+$"}}}}
}`

func TestPayloadSchemaCheck(t *testing.T) {
	t.Parallel()
	s := compiled(t, orderSchema)
	for payload, want := range map[string]string{
		`{"amount": 0}`: "",
		`{"amount": 12345678901234567890123456789.5, "currency": "EUR", "lines": [{"sku": "AB1"}], "x_y": ""}`: "",
		`{}`:                                   "payload_schema: the payload does not match #/required",
		`[]`:                                   "payload_schema: the payload does not match #/type",
		`{"amount": -1}`:                       "payload_schema: the payload does not match #/properties/amount/minimum",
		`{"amount": "planted"}`:                "payload_schema: the payload does not match #/properties/amount/type",
		`{"amount": 1, "planted": 1}`:          "payload_schema: the payload does not match #/additionalProperties",
		`{"amount": 1, "currency": "planted"}`: "payload_schema: the payload does not match #/properties/currency/enum",
		`{"amount": 1, "x_planted": 1}`:        "payload_schema: the payload does not match #/patternProperties/%5Ex_/type",
		`{"amount": 1, "lines": [{"sku": "planted"}, {"sku": "planted too"}]}`: "payload_schema: the payload does not match #/$defs/line/properties/sku/pattern",
		`{"currency": "planted", "lines": 1, "x_a": 1, "b": 1}`:                "payload_schema: the payload does not match #/additionalProperties, #/patternProperties/%5Ex_/type, #/properties/currency/enum and 2 more",
	} {
		assert.Equal(t, want, s.Check([]byte(payload)), payload)
	}
	var none *PayloadSchema
	assert.Empty(t, none.Check([]byte(`{}`)))
	assert.Empty(t, compiled(t, `{}`).Check([]byte(`[1]`)))
	assert.Empty(t, compiled(t, `true`).Check([]byte(`[1]`)))
	assert.NotEmpty(t, compiled(t, `false`).Check([]byte(`[1]`)))
	assert.NotEmpty(t, compiled(t, `{"$schema": "http://json-schema.org/draft-07/schema#", "format": "date"}`).Check([]byte(`"planted"`)), "formats count where the draft has them do so")
	assert.Empty(t, compiled(t, `{"format": "date"}`).Check([]byte(`"no date"`)))
	assert.NotEmpty(t, compiled(t, `{"$id": "https://example.com/a", "$ref": "b", "$defs": {"b": {"$id": "b", "type": "object"}}}`).Check([]byte(`1`)))
	assert.NotEmpty(t, compiled(t, `{"$ref": "https://json-schema.org/draft/2020-12/schema"}`).Check([]byte(`{"type": 1}`)), "the schema of schemas comes with the library")
	other := filepath.Join(t.TempDir(), "schema.json")
	require.NoError(t, os.WriteFile(other, []byte(`{"type": "object"}`), 0o600))
	require.Error(t, compilePayloadSchema(`{"$ref": "file://`+other+`"}`).fault(), "it is there and is a schema, and yet nothing is loaded")
	assert.Contains(t, s.Check([]byte(strings.Repeat("[", 20_000)+strings.Repeat("]", 20_000))), "cannot be parsed")
}

func TestPayloadSchemasThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"no JSON":             `{`,
		"no schema":           `[]`,
		"a text":              `"x"`,
		"a wrong keyword":     `{"type": 5}`,
		"no such type":        `{"type": "text"}`,
		"a remote reference":  `{"$ref": "https://example.com/schema.json"}`,
		"a file":              `{"$ref": "file:///etc/passwd"}`,
		"a relative one":      `{"$ref": "other.json"}`,
		"an absolute path":    `{"$ref": "/etc/passwd"}`,
		"a remote meta":       `{"$schema": "https://example.com/meta", "type": "object"}`,
		"nothing there":       `{"$ref": "#/$defs/missing"}`,
		"a broken pattern":    `{"pattern": "("}`,
		"a pattern of ECMA's": `{"pattern": "(?=a)"}`,
		"a huge pattern":      `{"pattern": "(abcdefghij){1000}"}`,
		"many large patterns": `{"allOf": [` + strings.TrimSuffix(strings.Repeat(`{"pattern": "a{1,1000}"},`, 60), ",") + `]}`,
		"a huge number":       `{"minimum": ` + strings.Repeat("9", maxNumber+1) + `}`,
		"a huge exponent":     `{"const": 1e-9999}`,
		"too large":           `{"title": "` + strings.Repeat("a", maxSchemaSize) + `"}`,
		"too many":            `{"enum": [` + strings.TrimSuffix(strings.Repeat("1,", maxSchemaNodes), ",") + `]}`,
		"too deep":            strings.Repeat(`{"not":`, maxSchemaDepth) + "{}" + strings.Repeat("}", maxSchemaDepth),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			began := time.Now()
			s := compilePayloadSchema(text)
			require.ErrorContains(t, s.fault(), "payload_schema: ")
			require.ErrorContains(t, s.fault(), "events of the type are not held against it")
			assert.Less(t, len(s.fault().Error()), 400)
			assert.NotContains(t, s.fault().Error(), "\n")
			assert.Empty(t, s.Check([]byte(`{"a": 1}`)), "it counts as none")
			assert.Less(t, time.Since(began), 20*time.Second)
		})
	}
}

// TestWorkOfPayloadSchemas has schemas of a few lines that ask for 2 to the power of forty steps and more, each in another way.
func TestWorkOfPayloadSchemas(t *testing.T) {
	t.Parallel()
	chain := func(format string) string { // n refers twice to n-1
		var defs []string
		for i := 1; i <= 40; i++ {
			defs = append(defs, fmt.Sprintf(`"n%d": `+format, i, i-1, i-1))
		}
		return `{"$defs": {"n0": {"type": "null"}, ` + strings.Join(defs, ", ") + `}, %s}`
	}
	deep := strings.Repeat(`{"a":`, 60) + "1" + strings.Repeat("}", 60)
	few := "[" + numbered(`{"a": %d}`, 2000) + "]"
	twice := `{"properties": {"a": {"$ref": "#/$defs/n"}}, "patternProperties": {"^a": {"$ref": "#/$defs/n"}}, "minProperties": 1}`
	for name, tc := range map[string]struct{ schema, payload string }{
		"anyOf":                  {fmt.Sprintf(chain(`{"anyOf": [{"$ref": "#/$defs/n%d"}, {"$ref": "#/$defs/n%d"}]}`), `"$ref": "#/$defs/n40"`), `1`},
		"not":                    {fmt.Sprintf(chain(`{"anyOf": [{"$ref": "#/$defs/n%d"}, {"$ref": "#/$defs/n%d"}]}`), `"not": {"$ref": "#/$defs/n40"}`), `1`},
		"allOf":                  {fmt.Sprintf(chain(`{"allOf": [{"$ref": "#/$defs/n%d"}, {"$ref": "#/$defs/n%d"}]}`), `"$ref": "#/$defs/n40"`), `null`},
		"oneOf":                  {fmt.Sprintf(chain(`{"oneOf": [{"$ref": "#/$defs/n%d"}, {"$ref": "#/$defs/n%d"}]}`), `"$ref": "#/$defs/n40"`), `1`},
		"if":                     {fmt.Sprintf(chain(`{"if": {"$ref": "#/$defs/n%d"}, "else": {"$ref": "#/$defs/n%d"}}`), `"$ref": "#/$defs/n40"`), `1`},
		"two ways to a property": {`{"$defs": {"n": ` + twice + `}, "$ref": "#/$defs/n"}`, deep},
		"and negated":            {`{"$defs": {"n": ` + twice + `}, "not": {"$ref": "#/$defs/n"}}`, strings.Replace(deep, "1", "{}", 1)},
		"dynamic":                {`{"$defs": {"n": {"$dynamicAnchor": "x", ` + strings.ReplaceAll(twice[1:], `"$ref": "#/$defs/n"`, `"$dynamicRef": "#x"`) + `}, "$dynamicRef": "#x"}`, deep},
		"draft 7":                {`{"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": ` + strings.ReplaceAll(twice, "$defs", "definitions") + `}, "allOf": [{"$ref": "#/definitions/n"}]}`, deep},
		"a large enum":           {`{"items": {"enum": [` + strings.TrimSuffix(strings.Repeat("1.5,", 4000), ",") + `]}}`, "[" + strings.TrimSuffix(strings.Repeat("2.5,", 200_000), ",") + "]"},
		"a long number":          {`{"minimum": 0}`, strings.Repeat("9", 100_000)},
		"a huge exponent":        {`{"type": "integer"}`, `1e1000000`},
		"a slow pattern":         {`{"pattern": "^(a?){500}(a|b)*(b|a)*c$"}`, `"` + strings.Repeat("a", 3_000_000) + `"`},
		"one for names":          {`{"patternProperties": {"^(a?){500}(a|b)*(b|a)*c$": true}}`, `{"` + strings.Repeat("a", 3_000_000) + `": 1}`},
		"an enum of properties":  {`{"additionalProperties": {"enum": [` + numbered("%d.5", 4000) + `]}}`, "{" + numbered(`"%d": 1`, 10_000) + "}"},
		"many in anyOf":          {`{"items": {"anyOf": [` + strings.TrimSuffix(strings.Repeat("false,", 4000), ",") + `]}}`, few},
		"many in oneOf":          {`{"items": {"oneOf": [` + strings.TrimSuffix(strings.Repeat("false,", 4000), ",") + `]}}`, few},
		"many in allOf":          {`{"items": {"allOf": [` + strings.TrimSuffix(strings.Repeat("true,", 4000), ",") + `]}}`, few},
		"many that depend":       {`{"items": {"dependentSchemas": {` + numbered(`"n%d": true`, 4000) + `}}}`, few},
		"many, in draft 7":       {`{"$schema": "http://json-schema.org/draft-07/schema#", "items": {"dependencies": {` + numbered(`"n%d": true`, 4000) + `}}}`, few},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := compiled(t, tc.schema)
			began := time.Now()
			assert.Equal(t, "payload_schema: to hold the payload against it asks for too much work", s.Check([]byte(tc.payload)))
			assert.Less(t, time.Since(began), 20*time.Second)
			if tc.payload == deep {
				assert.Empty(t, s.Check([]byte(`[]`)), "the next one has steps of its own")
			}
		})
	}
}

// TestMemoryOfPayloadSchemas: of all that does not match nothing is kept but what is said of it. It is not parallel, since it looks at what is allocated.
func TestMemoryOfPayloadSchemas(t *testing.T) { //nolint:paralleltest // see above
	const levels, values = 1000, 1800
	names, objects := numbered(`"n%d"`, 4900), numbered(`{"a": %d}`, 3000)
	for name, tc := range map[string]struct{ schema, payload string }{
		"a deep place": {
			`{"$defs": {"n": {"if": {"type": "array"}, "then": {"items": {"$ref": "#/$defs/n"}}, "else": {"anyOf": [` + strings.TrimSuffix(strings.Repeat(`{"type": "string"},`, 100), ",") + `]}}}, "$ref": "#/$defs/n"}`,
			strings.Repeat("[", levels) + strings.TrimSuffix(strings.Repeat("1    ,", values), ",") + strings.Repeat("]", levels),
		},
		"required":          {`{"items": {"required": [` + names + `]}}`, "[" + objects + "]"},
		"dependentRequired": {`{"items": {"dependentRequired": {"a": [` + names + `]}}}`, "[" + objects + "]"},
		"dependencies":      {`{"$schema": "http://json-schema.org/draft-07/schema#", "items": {"dependencies": {"a": [` + names + `]}}}`, "[" + objects + "]"},
	} {
		s := compiled(t, tc.schema)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		assert.Contains(t, s.Check([]byte(tc.payload)), "payload_schema: ", name)
		runtime.ReadMemStats(&after)
		assert.Less(t, (after.TotalAlloc-before.TotalAlloc)>>20, uint64(256), name)
	}
}

// TestWorkOfOrdinarySchemas: what is asked for in earnest is far below the bounds.
func TestWorkOfOrdinarySchemas(t *testing.T) {
	t.Parallel()
	s := compiled(t, orderSchema)
	lines := strings.TrimSuffix(strings.Repeat(`{"sku": "AB12345"},`, 50_000), ",")
	text := strings.Repeat("a", 1_000_000)
	assert.Empty(t, s.Check([]byte(`{"amount": 1, "currency": "EUR", "x_text": "`+text+`", "lines": [`+lines+`]}`)))
}

func TestPayloadSchemasOfATenant(t *testing.T) {
	t.Parallel()
	table := NewTenant("acme", defaults())
	assert.Nil(t, table.PayloadSchema("order.created"))
	row := EventTypeRow{ID: outbox.UUID{1}, EventType: "order.created", Enabled: true, PayloadSchema: `{"type": "object"}`}
	require.NoError(t, table.SetEventType(row))
	require.NotNil(t, table.PayloadSchema("order.created"))
	assert.Nil(t, table.PayloadSchema("order.paid"))

	row.PayloadSchema = `{"type": 5}`
	require.Error(t, table.SetEventType(row))
	require.Error(t, table.SetEventType(row))
	require.Len(t, table.Invalid(), 1)
	assert.Equal(t, TableEventTypes, table.Invalid()[0].Table)
	assert.Empty(t, table.PayloadSchema("order.created").Check([]byte(`[]`)))

	row.PayloadSchema = `{"type": "array"}`
	require.NoError(t, table.SetEventType(row))
	assert.NotEmpty(t, table.PayloadSchema("order.created").Check([]byte(`{}`)))
	row.EventType = "order.made"
	require.NoError(t, table.SetEventType(row))
	assert.Nil(t, table.PayloadSchema("order.created"))
	assert.NotNil(t, table.PayloadSchema("order.made"))
	row.PayloadSchema = ""
	require.NoError(t, table.SetEventType(row))
	assert.Nil(t, table.PayloadSchema("order.made"), "taken back")
	row.PayloadSchema = `{"type": 5}`
	require.Error(t, table.SetEventType(row))
	table.Truncate(TableEventTypes)
	assert.Nil(t, table.PayloadSchema("order.made"))
	assert.Empty(t, table.Invalid())
}

func FuzzPayloadSchema(f *testing.F) {
	f.Add(orderSchema, `{"amount": 1}`)
	f.Add(`{"$dynamicRef": "#x", "$dynamicAnchor": "x"}`, `{}`)
	f.Add(`{"unevaluatedProperties": false, "anyOf": [{"properties": {"a": {}}}]}`, `{"a": 1, "b": 2}`)
	f.Fuzz(func(t *testing.T, schema, payload string) {
		if s := compilePayloadSchema(schema); s.fault() != nil && s.Check([]byte(payload)) != "" {
			t.Error("a schema that cannot be used refuses something")
		}
	})
}
