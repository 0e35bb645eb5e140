package main

import "math"

// load is what a relay has to bear at one point of an axis. Each tenant has as many subscriptions as it has endpoints or event types, whichever are more: the
// k-th is of endpoint k and type k, where those of which there are fewer begin again.
type load struct {
	deliveries int
	tenants    int // events are for each in turn
	endpoints  int // of each tenant
	types      int // of each tenant; events are of each in turn
	data       int // size of an event's data, in bytes
	idle       int // further subscriptions to the first type, whose filters no event passes
	waiting    int // deliveries in the retry queue that are not due
	due        bool
	relays     int
}

// fanOut is the number of deliveries of an event.
func (l *load) fanOut() int { return max(l.endpoints, l.types) / l.types }

// shape is how the cost of a delivery should grow.
type shape string

const (
	flat   shape = "flat"
	linear shape = "linear"
	shared shape = "shared" // among so many, as on machines of their own
)

// at is what the shape expects at x, from what it was at the first and at the last point.
func (s shape) at(x, first, last, y, end float64) float64 {
	switch {
	case s == linear && last > first:
		return y + (x-first)*(end-y)/(last-first)
	case s == shared:
		return y * first / x
	default:
		return y
	}
}

// axis is one thing that grows while all else stays as it is. It becomes a table and a plot.
type axis struct {
	name  string
	about string
	lines []line
}

// line is one way in which it grows.
type line struct {
	name  string // empty if it is the only one
	shape shape
	xs    []int
	once  int // from this x on only the first round counts, as each takes minutes; zero: none
	set   func(l *load, x int)
}

const (
	// usualData is the size of an event's data that makes a body of about 300 bytes, as the contenders have.
	usualData = 240
	// bulk bounds the bytes of all bodies of a point.
	bulk = 300 << 20
	// tries bounds the filters that are tried in vain at a point.
	tries = 20_000_000
	// fewest is the number of deliveries from which on there is something to measure.
	fewest = 100
)

// axes lists what may grow. n is the number of deliveries of a point, unless that would take too long.
func axes(n int) []axis {
	return []axis{
		{"tenants", "tenants, one endpoint each", []line{
			{"", flat, []int{1, 10, 100, 1000}, 0, func(l *load, x int) { l.tenants = x }},
		}},
		{"endpoints", "endpoints of one tenant, each with its own event type", []line{
			{"", flat, []int{1, 10, 100, 1000, 10_000}, 0, func(l *load, x int) { l.endpoints, l.types = x, x }},
		}},
		{"subscriptions", "subscriptions of one tenant, of which one matches", []line{
			{"each to its own event type", flat, []int{1, 10, 100, 1000, 10_000, 100_000}, 0, func(l *load, x int) { l.types = x }},
			{"all to one type, each with a filter", linear, []int{1, 10, 100, 1000, 10_000, 100_000}, 0, func(l *load, x int) {
				l.idle, l.deliveries = x-1, min(n, max(fewest, tries/x))
			}},
		}},
		{"payload", "bytes of an event's data", []line{
			{"", linear, []int{100, 1000, 10_000, 100_000, 1_000_000}, 0, func(l *load, x int) {
				l.data, l.deliveries = x, min(n, max(fewest, bulk/x))
			}},
		}},
		{"backlog", "events that wait in the log when the relay starts", []line{
			{"", flat, []int{1000, 10_000, 100_000, 1_000_000}, 1_000_000, func(l *load, x int) { l.deliveries = x }},
		}},
		{"fan-out", "endpoints that each event goes to", []line{
			{"", flat, []int{1, 3, 10, 30, 100}, 0, func(l *load, x int) { l.endpoints, l.deliveries = x, (n+x-1)/x*x }},
		}},
		{"queue", "deliveries that wait in the retry queue and are not due", []line{
			{"new events beside them", flat, []int{1000, 10_000, 100_000, 1_000_000}, 0, func(l *load, x int) { l.waiting, l.deliveries = x, 3*n }},
			{"due deliveries among them", flat, []int{1000, 10_000, 100_000, 1_000_000}, 0, func(l *load, x int) { l.waiting, l.due = x, true }},
		}},
		{"replicas", "relays that work off due deliveries, on one machine", []line{
			{"", shared, []int{1, 2, 3, 4}, 0, func(l *load, x int) { l.relays, l.due, l.deliveries = x, true, 2*n }},
		}},
	}
}

// load is that of one of the line's points.
func (l *line) load(n, x int) load {
	at := load{deliveries: n, tenants: 1, endpoints: 1, types: 1, data: usualData, relays: 1}
	l.set(&at, x)
	return at
}

// short leaves out the points beyond a share of the greatest, but never the first two.
func (l *line) short(scale float64) []int {
	limit := int(math.Ceil(scale * float64(l.xs[len(l.xs)-1])))
	n := 2
	for n < len(l.xs) && l.xs[n] <= limit {
		n++
	}
	return l.xs[:n]
}
