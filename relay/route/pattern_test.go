package route

import (
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestPattern(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern string
		match   []string
		refuse  []string
	}{
		{"order.*", []string{"order.created", "order.*"}, []string{"order", "order.item.added", "orders.created", "xorder.created"}},
		{"*.created", []string{"order.created"}, []string{"created", "order.item.created", "order.created.x"}},
		{"*", []string{"order"}, []string{"order.created"}},
		{"order.**", []string{"order", "order.created", "order.item.added"}, []string{"orders.created", "a.order.created"}},
		{"**", []string{"order", "order.created", "a.b.c.d", ""}, nil},
		{"**.created", []string{"created", "order.created", "a.b.created", "created.created"}, []string{"order.created.x", "order.xcreated"}},
		{"order.*.done", []string{"order.item.done"}, []string{"order.done", "order.a.b.done"}},
		{"order.**.done", []string{"order.done", "order.a.done", "order.a.b.done", "order.done.done"}, []string{"order.a", "order.done.a"}},
		{"**.a.**.b.**", []string{"a.b", "x.a.y.b.z", "b.a.a.b"}, []string{"b.a", "a", "x.b.y"}},
		{"order.**.**", []string{"order", "order.a.b"}, []string{"a"}},
		{"*.**", []string{"order", "order.a.b"}, nil},
		{"**.*", []string{"order", "order.a.b"}, nil},
		{"*.*.**", []string{"a.b", "a.b.c"}, []string{"a"}},
		{"outbox_relay.**", []string{"outbox_relay.endpoint.disabled"}, nil},
		{"outbox_relay.*.dead", []string{"outbox_relay.delivery.dead"}, []string{"outbox_relay.delivery.exhausted"}},
		{"**.dead", []string{"parrot.dead", "outbox_relayed.dead"}, []string{"outbox_relay.delivery.dead"}},
		{"*.*.*", []string{"a.b.c"}, []string{"outbox_relay.delivery.dead"}},
	} {
		p, err := compilePattern(c.pattern)
		require.NoError(t, err)
		for _, eventType := range c.match {
			assert.True(t, p.match(eventType), "%s for %s", c.pattern, eventType)
		}
		for _, eventType := range c.refuse {
			assert.False(t, p.match(eventType), "%s for %s", c.pattern, eventType)
		}
	}
}

func TestPatternRefuses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"order.":      "empty segment",
		".*":          "empty segment",
		"order..*":    "empty segment",
		"ord*.x":      "segment of its own",
		"order.***":   "segment of its own",
		"order.*item": "segment of its own",
	} {
		_, err := compilePattern(text)
		require.ErrorContains(t, err, want, text)
	}
}

// Many ** must not make matching try every way to split the type.
func TestPatternStaysLinear(t *testing.T) {
	t.Parallel()
	p, err := compilePattern(strings.Repeat("**.a.", 40) + "b")
	require.NoError(t, err)
	assert.False(t, p.match(strings.Repeat("a.", 120)+"c"))
	assert.True(t, p.match(strings.Repeat("a.", 120)+"b"))
}

func FuzzPattern(f *testing.F) {
	f.Add("order.*", "order.created")
	f.Add("**.a.**.b.*", "a.a.b.b.c")
	f.Add("**.*.**", "..")
	f.Fuzz(func(t *testing.T, text, eventType string) {
		p, err := compilePattern(text)
		if err != nil || len(p) > 20 || strings.Contains(eventType, "\n") || !utf8.ValidString(text) || !utf8.ValidString(eventType) {
			return
		}
		require.Equal(t, patternRegexp(text).MatchString("."+eventType), p.match(eventType), "%q for %q", text, eventType)
	})
}

// patternRegexp says the same in the language of regular expressions, each segment with the dot before it.
func patternRegexp(text string) *regexp.Regexp {
	var b strings.Builder
	b.WriteString("^")
	for segment := range strings.SplitSeq(text, ".") {
		switch segment {
		case "*":
			b.WriteString(`\.[^.]*`)
		case "**":
			b.WriteString(`(\.[^.]*)*`)
		default:
			b.WriteString(`\.` + regexp.QuoteMeta(segment))
		}
	}
	return regexp.MustCompile(b.String() + "$")
}

func BenchmarkPattern(b *testing.B) {
	p, err := compilePattern("order.**.added")
	require.NoError(b, err)
	for b.Loop() {
		p.match("order.item.added")
	}
}
