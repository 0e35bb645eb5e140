package route

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v6"
)

// Bounds of a payload_schema, which a tenant writes and every tenant's events wait for: what it is made of, and the work of holding one payload against
// it, in steps of some microseconds. A few lines of JSON Schema can ask for more than a lifetime.
const (
	maxSchemaSize    = 256 << 10 // bytes
	maxSchemaNodes   = 5000      // values of the document, of any kind
	maxSchemaDepth   = 100
	stepsPerByte     = 16 // of the payload
	stepsOfAnything  = 10_000
	maxSteps         = 2_000_000
	stepsToExplain   = 20_000 // each may be an error that the library keeps, with a path of its depth
	maxNumber        = 1000   // characters, and exponent: exact arithmetic takes the square of that
	placesShown      = 3
	placesCollected  = 100
	schemaURL        = "schema:///payload"
	verdictURL       = "schema:///verdict"
	vocabularyOfWork = "schema:///work"
)

// PayloadSchema is the compiled payload_schema of an event type: JSON Schema, of draft 2020-12 where it does not say. It is safe for concurrent use. A nil PayloadSchema
// lets everything pass.
type PayloadSchema struct {
	compiled *jsonschema.Schema
	verdict  *jsonschema.Schema // not the compiled one: what only has to say yes or no keeps no errors
	err      error              // why there is none

	mu   sync.Mutex // of what follows, and so of validation
	left int        // steps
}

// errTooMuch ends a validation from within.
var errTooMuch = errors.New("asks for too much work")

// compilePayloadSchema compiles a schema. One that cannot be used lets everything pass. References to other documents are faults, but for those to the schemas of
// JSON Schema itself: nothing is ever loaded.
func compilePayloadSchema(text string) *PayloadSchema {
	s := &PayloadSchema{}
	if err := s.compile(text); err != nil {
		s.compiled, s.err = nil, fmt.Errorf("payload_schema: %.300s; events of the type are not held against it", oneLine(err.Error()))
	}
	return s
}

// oneLine keeps a list of faults in one line of the log.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

func (s *PayloadSchema) fault() error {
	if s == nil {
		return nil
	}
	return s.err
}

func (s *PayloadSchema) compile(text string) (err error) {
	defer func() {
		if r := recover(); r != nil { // the library's, on a document that nobody has thought of
			err = fmt.Errorf("cannot be compiled: %v", r)
		}
	}()
	if len(text) > maxSchemaSize {
		return fmt.Errorf("has %d bytes, more than %d", len(text), maxSchemaSize)
	}
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
	if err != nil {
		return fmt.Errorf("is not JSON: %w", err)
	}
	if nodes, depth := measure(doc); nodes > maxSchemaNodes || depth > maxSchemaDepth {
		return fmt.Errorf("has %d values in %d levels, more than %d or %d", nodes, depth, maxSchemaNodes, maxSchemaDepth)
	}
	if hugeNumber(doc) {
		return fmt.Errorf("has a number of more than %d digits", maxNumber)
	}
	var all []*jsonschema.Schema
	c := jsonschema.NewCompiler()
	c.UseLoader(nil)
	c.DefaultDraft(jsonschema.Draft2020)
	c.UseRegexpEngine(new(patterns).compile)
	c.RegisterVocabulary(&jsonschema.Vocabulary{URL: vocabularyOfWork, Compile: func(ctx *jsonschema.CompilerContext, _ map[string]any) (jsonschema.SchemaExt, error) {
		all = append(all, ctx.Enqueue(nil)) // the schema that is being compiled
		return nil, nil
	}})
	c.AssertVocabs()
	if err := c.AddResource(schemaURL, doc); err != nil {
		return err
	}
	if err := c.AddResource(verdictURL, map[string]any{"not": map[string]any{"$ref": schemaURL}}); err != nil {
		return err
	}
	if s.compiled, err = c.Compile(schemaURL); err != nil {
		return err
	}
	if s.verdict, err = c.Compile(verdictURL); err != nil {
		return err
	}
	heaviest := 1
	for _, sub := range all {
		heaviest = max(heaviest, 1+comparisons(sub)/16)
	}
	for _, sub := range all {
		s.meter(sub, heaviest)
	}
	return nil
}

// measure counts the values of a document, and its levels.
func measure(doc any) (nodes, depth int) {
	below := func(v any) {
		n, d := measure(v)
		nodes, depth = nodes+n, max(depth, d)
	}
	switch doc := doc.(type) {
	case map[string]any:
		for _, v := range doc {
			below(v)
		}
	case []any:
		for _, v := range doc {
			below(v)
		}
	}
	return nodes + 1, depth + 1
}

// hugeNumber tells whether a document has a number whose exact value takes long to reckon with.
func hugeNumber(doc any) bool {
	switch doc := doc.(type) {
	case map[string]any:
		for _, v := range doc {
			if hugeNumber(v) {
				return true
			}
		}
	case []any:
		return slices.ContainsFunc(doc, hugeNumber)
	case json.Number:
		_, exponent, _ := strings.Cut(strings.ToLower(doc.String()), "e")
		n, err := strconv.Atoi(cmp.Or(exponent, "0"))
		return len(doc) > maxNumber || err != nil || n > maxNumber || n < -maxNumber
	}
	return false
}

// comparisons is about how many values are compared for enum and const.
func comparisons(s *jsonschema.Schema) (n int) {
	if s.Enum != nil {
		n, _ = measure(s.Enum.Values)
	}
	if s.Const != nil {
		more, _ := measure(*s.Const)
		n += more
	}
	return n
}

// fixedWork is what a part of the schema may cost whatever is held against it. A name that is missing counts like a part below, since the error that says so
// keeps it: a thousand objects that lack a thousand names each are a million.
func fixedWork(s *jsonschema.Schema) int {
	n := 1 + len(s.AllOf) + len(s.AnyOf) + len(s.OneOf) + len(s.Required) + len(s.Dependencies) + len(s.DependentSchemas) + len(s.DependentRequired)
	for _, names := range s.DependentRequired {
		n += len(names)
	}
	for _, of := range s.Dependencies { // what it was before draft 2019-09
		if names, ok := of.([]string); ok {
			n += len(names)
		}
	}
	return n
}

// meter has a part of the schema pay for its work before it is done. The library asks for the format of a value before it looks at anything below it, so
// that is where the steps are counted, whether the part has a format or not.
func (s *PayloadSchema) meter(sub *jsonschema.Schema, heaviest int) {
	patterns := len(sub.PatternProperties)
	fixed := fixedWork(sub)
	weight := 0
	for p := range sub.PatternProperties {
		weight += weightOf(p)
	}
	given := sub.Format
	sub.Format = &jsonschema.Format{Validate: func(v any) error {
		steps := fixed
		switch v := v.(type) {
		case map[string]any:
			steps += len(v) * (2 + patterns)
			if patterns > 0 {
				for name := range v {
					steps += len(name) * weight / 64
				}
			}
		case []any:
			steps += 2 * len(v)
		case string:
			if sub.Pattern != nil {
				steps += len(v) * weightOf(sub.Pattern) / 64
			}
		}
		if s.left -= steps * heaviest; s.left < 0 {
			panic(errTooMuch)
		}
		if given == nil {
			return nil
		}
		return given.Validate(v)
	}}
	if given != nil {
		sub.Format.Name = given.Name
	}
}

// Check says where a payload does not match, in terms of the schema: nothing of the payload is in it. Empty: it matches.
func (s *PayloadSchema) Check(payload []byte) (fault string) {
	if s == nil || s.compiled == nil {
		return ""
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		switch r := recover(); r {
		case nil:
		case errTooMuch:
			fault = "payload_schema: to hold the payload against it " + errTooMuch.Error()
		default:
			fault = "payload_schema: the payload cannot be held against it"
		}
	}()
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(payload))
	if err != nil {
		return "payload_schema: the payload cannot be parsed" // it is nested too deeply
	}
	if hugeNumber(doc) {
		panic(errTooMuch)
	}
	s.left = min(stepsOfAnything+stepsPerByte*len(payload), maxSteps)
	if s.verdict.Validate(doc) != nil {
		return ""
	}
	return s.explain(doc)
}

// explain says where a document that does not match does not, as far as that can be told with little work.
func (s *PayloadSchema) explain(doc any) (fault string) {
	defer func() {
		switch r := recover(); r {
		case nil:
		case errTooMuch:
			fault = "payload_schema: the payload does not match"
		default:
			panic(r)
		}
	}()
	_, depth := measure(doc)
	s.left = stepsToExplain / (1 + depth/8)
	err := s.compiled.Validate(doc)
	invalid, ok := errors.AsType[*jsonschema.ValidationError](err)
	if !ok {
		return "payload_schema: the payload cannot be held against it"
	}
	places := slices.Compact(slices.Sorted(slices.Values(placesOf(invalid, nil))))
	shown := strings.Join(places[:min(placesShown, len(places))], ", ")
	if more := len(places) - placesShown; more > 0 {
		shown += fmt.Sprintf(" and %d more", more)
	}
	return "payload_schema: the payload does not match " + shown
}

// placesOf appends the keywords of the schema that do not match.
func placesOf(e *jsonschema.ValidationError, places []string) []string {
	if len(places) >= placesCollected {
		return places
	}
	if len(e.Causes) > 0 {
		for _, cause := range e.Causes {
			places = placesOf(cause, places)
		}
		return places
	}
	place := strings.TrimPrefix(e.SchemaURL, schemaURL)
	if e.ErrorKind != nil {
		place += "/" + strings.Join(e.ErrorKind.KeywordPath(), "/")
	}
	return append(places, fmt.Sprintf("%.150s", place))
}
