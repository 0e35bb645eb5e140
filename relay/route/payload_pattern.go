package route

import (
	"fmt"
	"regexp"
	"regexp/syntax"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// Bounds of the patterns of a payload_schema: of each, and of all together. (x{500}){2} is short, and long once it is compiled.
const (
	maxPatternWeight  = 5_000
	maxPatternsWeight = 50_000
)

// schemaPattern is a pattern of a schema, with about how many states it has. Its syntax is Go's, not that of ECMAScript, and so it takes a time that is linear in the text.
type schemaPattern struct {
	*regexp.Regexp
	weight int
}

// weightOf is about what a byte of the text costs.
func weightOf(r jsonschema.Regexp) int {
	if p, ok := r.(*schemaPattern); ok {
		return p.weight
	}
	return maxPatternWeight
}

// patterns compiles those of one schema.
type patterns struct{ weight int }

func (p *patterns) compile(text string) (jsonschema.Regexp, error) {
	parsed, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return nil, err
	}
	w := states(parsed)
	if p.weight += w; w > maxPatternWeight || p.weight > maxPatternsWeight {
		return nil, fmt.Errorf("patterns of more than %d states, or %d together", maxPatternWeight, maxPatternsWeight)
	}
	compiled, err := regexp.Compile(text)
	if err != nil {
		return nil, err
	}
	return &schemaPattern{compiled, w}, nil
}

// states is about how many a part of a pattern has once it is compiled.
func states(re *syntax.Regexp) int {
	n := 1 + len(re.Rune)/2
	for _, sub := range re.Sub {
		n += states(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1)
	}
	return n
}
