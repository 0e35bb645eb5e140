package outbox_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

func validEvent() outbox.Event {
	return outbox.Event{Type: "order.created", AggregateID: outbox.UUID{1}, AggregateType: "order"}
}

func TestValidateAccepts(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*outbox.Event){
		"the least":            func(*outbox.Event) {},
		"three segments":       func(e *outbox.Event) { e.Type = "shop.order-line.created_2" },
		"longest type":         func(e *outbox.Event) { e.Type = "a." + strings.Repeat("b", 253) },
		"longest name":         func(e *outbox.Event) { e.Name = strings.Repeat("é", 255) },
		"longest aggregate":    func(e *outbox.Event) { e.AggregateType = strings.Repeat("é", 100) },
		"data is any document": func(e *outbox.Event) { e.Data = json.RawMessage(` [1e400, null, "\\u0000", "\ud83d\ude00"] `) },
		"digits in a text":     func(e *outbox.Event) { e.Data = json.RawMessage(`{"1e999999": "-1e999999", "a\"1e999999": "\\"}`) },
		"data is null":         func(e *outbox.Event) { e.Data = json.RawMessage(`null`) },
		"metadata":             func(e *outbox.Event) { e.Metadata = json.RawMessage("\n {\"traceparent\": \"00-…\"}") },
		"time in another zone": func(e *outbox.Event) { e.OccurredAt = time.Now().In(time.FixedZone("", 5*3600)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := validEvent()
			change(&e)
			require.NoError(t, e.Validate())
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(*outbox.Event)
		want   string
	}{
		"no type":              {func(e *outbox.Event) { e.Type = "" }, "Type: is missing"},
		"one segment":          {func(e *outbox.Event) { e.Type = "order" }, `Type: "order" has one segment`},
		"empty segment":        {func(e *outbox.Event) { e.Type = "order..created" }, "empty segment"},
		"trailing dot":         {func(e *outbox.Event) { e.Type = "order." }, "empty segment"},
		"upper case":           {func(e *outbox.Event) { e.Type = "order.Created" }, `holds 'C'; use two or more segments of a-z`},
		"pattern":              {func(e *outbox.Event) { e.Type = "order.*" }, `holds '*'`},
		"other letters":        {func(e *outbox.Event) { e.Type = "größe.changed" }, `holds 'ö'`},
		"long type":            {func(e *outbox.Event) { e.Type = "a." + strings.Repeat("b", 254) }, "256 characters, more than 255"},
		"long name":            {func(e *outbox.Event) { e.Name = strings.Repeat("é", 256) }, "Name: has 256 characters, more than 255"},
		"zero byte in name":    {func(e *outbox.Event) { e.Name = "a\x00b" }, "Name: holds a zero byte"},
		"broken name":          {func(e *outbox.Event) { e.Name = "a\xff" }, "Name: is not valid UTF-8"},
		"no aggregate id":      {func(e *outbox.Event) { e.AggregateID = outbox.UUID{} }, "AggregateID: is missing"},
		"no aggregate type":    {func(e *outbox.Event) { e.AggregateType = "" }, "AggregateType: is missing"},
		"long aggregate type":  {func(e *outbox.Event) { e.AggregateType = strings.Repeat("a", 101) }, "AggregateType: has 101 characters"},
		"negative version":     {func(e *outbox.Event) { e.AggregateVersion = -1 }, "AggregateVersion: is negative"},
		"data is not JSON":     {func(e *outbox.Event) { e.Data = json.RawMessage(`{"secret": }`) }, "Data: is not valid JSON"},
		"data is not UTF-8":    {func(e *outbox.Event) { e.Data = json.RawMessage("\"\xff\"") }, "Data: is not valid UTF-8"},
		"zero character":       {func(e *outbox.Event) { e.Data = json.RawMessage(`["\\", {"a\u0000": 1}]`) }, `Data: holds \u0000`},
		"high surrogate":       {func(e *outbox.Event) { e.Data = json.RawMessage(`"\ud83d"`) }, "Data: holds half of a surrogate pair"},
		"low surrogate":        {func(e *outbox.Event) { e.Data = json.RawMessage(`"\uDE00\ud83d"`) }, "Data: holds half of a surrogate pair"},
		"two high surrogates":  {func(e *outbox.Event) { e.Data = json.RawMessage(`"\ud83d\ud83d\ude00"`) }, "half of a surrogate pair"},
		"huge number":          {func(e *outbox.Event) { e.Data = json.RawMessage(`{"secret": ["1", 1e131072]}`) }, "Data: holds a number that overflows numeric, which has at most 131072 digits before and 16383 behind"},
		"fine number":          {func(e *outbox.Event) { e.Metadata = json.RawMessage(`{"a": -0.1E-16383}`) }, "Metadata: holds a number that overflows numeric"},
		"metadata is a list":   {func(e *outbox.Event) { e.Metadata = json.RawMessage(` []`) }, "Metadata: is not a JSON object"},
		"metadata is not JSON": {func(e *outbox.Event) { e.Metadata = json.RawMessage(`{`) }, "Metadata: is not valid JSON"},
		"time out of range":    {func(e *outbox.Event) { e.OccurredAt = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) }, "OccurredAt: is in the year 10000"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := validEvent()
			c.change(&e)
			err := e.Validate()
			require.ErrorContains(t, err, c.want)
			assert.NotContains(t, err.Error(), "secret")
			var fault *outbox.FieldError
			require.ErrorAs(t, err, &fault)
			assert.NotEmpty(t, fault.Remedy)
		})
	}
}

func TestValidateReportsEveryFaultAtOnce(t *testing.T) {
	t.Parallel()
	e := outbox.Event{AggregateVersion: -1, Data: json.RawMessage(`{`), Metadata: json.RawMessage(`1`)}
	err := e.Validate()
	var joined interface{ Unwrap() []error }
	require.ErrorAs(t, err, &joined)
	var fields []string
	for _, err := range joined.Unwrap() {
		var fault *outbox.FieldError
		require.ErrorAs(t, err, &fault)
		fields = append(fields, fault.Field)
	}
	assert.Equal(t, []string{"Type", "AggregateID", "AggregateType", "AggregateVersion", "Data", "Metadata"}, fields)
}

func FuzzValidate(f *testing.F) {
	f.Add("order.created", []byte(`{"a": "\u0041\ud83d\ude00"}`), []byte(`{}`))
	f.Add("order.created", []byte(`"\`), []byte(`"\u00`))
	f.Fuzz(func(_ *testing.T, kind string, data, metadata []byte) {
		e := validEvent()
		e.Type, e.Data, e.Metadata = kind, data, metadata
		_ = e.Validate()
	})
}
