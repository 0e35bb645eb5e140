package route

import (
	"fmt"
	"strings"
)

const (
	oneSegment   = "*"
	manySegments = "**"
)

// NewsPrefix begins the types of the relay's own news. Who asks for everything means the application's events, so no pattern that begins with a
// wildcard stands for news: it has to be asked for by name, as in outbox_relay.**.
const NewsPrefix = "outbox_relay."

// pattern is an event type with wildcards, split at its dots. A segment * stands for one segment of a type, ** for any number of
// them, none included. There are never two ** in a row.
type pattern []string

// isPattern tells a pattern from an exact event type.
func isPattern(text string) bool { return strings.Contains(text, oneSegment) }

func compilePattern(text string) (pattern, error) {
	var p pattern
	for segment := range strings.SplitSeq(text, ".") {
		switch {
		case segment == "":
			return nil, fmt.Errorf("pattern %.255q: has an empty segment", text)
		case segment == manySegments && len(p) > 0 && p[len(p)-1] == manySegments:
			continue
		case segment != oneSegment && segment != manySegments && isPattern(segment):
			return nil, fmt.Errorf("pattern %.255q: a wildcard must be a segment of its own: * for one, ** for any number", text)
		}
		p = append(p, segment)
	}
	return p, nil
}

// match reports whether the pattern stands for the event type. It takes at most len(p) × len(eventType) steps: a ** that has to take
// in more is always the last one met, since what stands between two of them is best found as early as possible.
func (p pattern) match(eventType string) bool {
	if strings.HasPrefix(eventType, NewsPrefix) && isPattern(p[0]) {
		return false
	}
	rest, more := eventType, true // what is left of the type, and whether that is a segment at all
	at := 0
	star, starRest := -1, "" // the last **, and what follows the segments it has taken in
	for more {
		segment, tail, next := strings.Cut(rest, ".")
		switch {
		case at < len(p) && p[at] == manySegments:
			star, starRest = at, rest
			at++
			continue
		case at < len(p) && (p[at] == oneSegment || p[at] == segment):
			at++
			rest, more = tail, next
			continue
		case star < 0:
			return false
		}
		at = star + 1
		_, rest, more = strings.Cut(starRest, ".")
		starRest = rest
	}
	return at == len(p) || at == len(p)-1 && p[at] == manySegments
}
