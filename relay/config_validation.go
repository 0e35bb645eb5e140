package relay

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/outbox"
)

// Validation bounds what tenants write: the rows of their endpoints and of their events. A row of an endpoint that breaks a bound is invalid; an event
// that breaks one becomes a dead letter for each endpoint that it matches.
type Validation struct {
	// Profile names the bounds that hold where none is given: see [Config.ApplyProfile].
	Profile string `mapstructure:"profile"`

	// MaxURLLength is for endpoint_url, MaxHeaders and MaxHeadersSize (names and values together) for custom_headers.
	MaxURLLength   ByteSize `mapstructure:"max_url_length"`
	MaxHeaders     int      `mapstructure:"max_headers"`
	MaxHeadersSize ByteSize `mapstructure:"max_headers_size"`
	// MinTimeout and MaxTimeout are for timeout_seconds, MaxRetries for max_retry_attempts, MinBackoff and MaxBackoff for retry_backoff_seconds. What a row
	// leaves open is a default of this configuration, and not bounded.
	MinTimeout time.Duration `mapstructure:"min_timeout"`
	MaxTimeout time.Duration `mapstructure:"max_timeout"`
	MaxRetries int           `mapstructure:"max_retries"`
	MinBackoff time.Duration `mapstructure:"min_backoff"`
	MaxBackoff time.Duration `mapstructure:"max_backoff"`

	// EventTypes is the form that an event_type must have: EventTypesAny or EventTypesDotted, which is that of [outbox.Event].
	EventTypes string `mapstructure:"event_types"`
	// MaxEventTypeLength is in characters.
	MaxEventTypeLength int `mapstructure:"max_event_type_length"`
	// MaxPayload and MaxDepth are those of [outbox.Limits]. Zero: no bound.
	MaxPayload ByteSize `mapstructure:"max_payload"`
	MaxDepth   int      `mapstructure:"max_depth"`

	// PayloadSchema says what becomes of an event that is not as the payload_schema of its type says.
	PayloadSchema SchemaMode `mapstructure:"payload_schema"`
}

// The profiles.
const (
	ProfileDevelopment = "development"
	ProfileStaging     = "staging"
	ProfileProduction  = "production"
)

// The forms of event types.
const (
	EventTypesAny    = "any"
	EventTypesDotted = "dotted"
)

// SchemaMode is whether events are held against the payload_schema of their type.
type SchemaMode string

// The modes.
const (
	SchemaOff     SchemaMode = "off"
	SchemaWarn    SchemaMode = "warn"    // counted and logged, and sent
	SchemaEnforce SchemaMode = "enforce" // counted and logged, and a dead letter
)

// defaultValidation is the profile staging.
func defaultValidation() Validation {
	b := delivery.DefaultBounds()
	return Validation{
		Profile:      ProfileStaging,
		MaxURLLength: ByteSize(b.MaxURLLength), MaxHeaders: b.MaxHeaders, MaxHeadersSize: ByteSize(b.MaxHeadersSize),
		MinTimeout: b.MinTimeout, MaxTimeout: b.MaxTimeout, MaxRetries: b.MaxRetries, MinBackoff: b.MinBackoff, MaxBackoff: b.MaxBackoff,
		EventTypes: EventTypesAny, MaxEventTypeLength: 255,
		PayloadSchema: SchemaOff,
	}
}

// ApplyProfile sets the defaults that the profile has instead of those of [DefaultConfig]. What was given stays as it is. A profile that there is not
// changes nothing.
func (c *Config) ApplyProfile(given func(key string) bool) {
	v := &c.Validation
	switch v.Profile {
	case ProfileDevelopment:
		if !given("network.allow") {
			c.Network.Allow = ownNetworks(c.Network.Deny)
		}
	case ProfileProduction:
		l := outbox.ProductionLimits()
		unless(given, "network.https_only", &c.Network.HTTPSOnly, true)
		unless(given, "validation.max_url_length", &v.MaxURLLength, 2*KiB)
		unless(given, "validation.max_headers", &v.MaxHeaders, 20)
		unless(given, "validation.max_headers_size", &v.MaxHeadersSize, 4*KiB)
		unless(given, "validation.min_timeout", &v.MinTimeout, 5*time.Second)
		unless(given, "validation.max_timeout", &v.MaxTimeout, time.Minute)
		unless(given, "validation.min_backoff", &v.MinBackoff, 5*time.Second)
		unless(given, "validation.event_types", &v.EventTypes, EventTypesDotted)
		unless(given, "validation.max_event_type_length", &v.MaxEventTypeLength, l.MaxTypeLength)
		unless(given, "validation.max_payload", &v.MaxPayload, ByteSize(l.MaxPayload))
		unless(given, "validation.max_depth", &v.MaxDepth, l.MaxDepth)
	}
}

func unless[T any](given func(key string) bool, key string, field *T, value T) {
	if !given(key) {
		*field = value
	}
}

// ownNetworks are loopback and private addresses, without those that are denied as a whole: nobody has asked for them.
func ownNetworks(deny []netip.Prefix) []netip.Prefix {
	var list []netip.Prefix
	for _, text := range []string{"127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"} {
		p := netip.MustParsePrefix(text)
		if !slices.ContainsFunc(deny, func(d netip.Prefix) bool { return d.Bits() <= p.Bits() && d.Contains(p.Addr()) }) {
			list = append(list, p)
		}
	}
	return list
}

// EventLimits bound the events that are sent.
func (c *Config) EventLimits() outbox.Limits {
	v := &c.Validation
	return outbox.Limits{
		MaxTypeLength: v.MaxEventTypeLength, AnyType: v.EventTypes != EventTypesDotted, MaxPayload: int(v.MaxPayload), MaxDepth: v.MaxDepth,
	}
}

func (v *Validation) bounds() delivery.Bounds {
	return delivery.Bounds{
		MaxURLLength: int(v.MaxURLLength), MaxHeaders: v.MaxHeaders, MaxHeadersSize: int(v.MaxHeadersSize),
		MinTimeout: v.MinTimeout, MaxTimeout: v.MaxTimeout, MaxRetries: v.MaxRetries, MinBackoff: v.MinBackoff, MaxBackoff: v.MaxBackoff,
	}
}

// leastTypeLength and leastPayload leave room for the relay's own news.
const (
	leastTypeLength = 32
	leastPayload    = 4 * KiB
)

func (v *Validation) validate(f *faults) {
	oneOf(f, "validation.profile", v.Profile, ProfileDevelopment, ProfileStaging, ProfileProduction)
	between(f, "validation.max_url_length", v.MaxURLLength, 64, 64*KiB)
	between(f, "validation.max_headers", v.MaxHeaders, 0, 1000)
	between(f, "validation.max_headers_size", v.MaxHeadersSize, 0, 64*KiB)
	atLeast(f, "validation.min_timeout", v.MinTimeout, time.Second)
	between(f, "validation.max_timeout", v.MaxTimeout, time.Second, delivery.MaxTimeout)
	between(f, "validation.max_retries", v.MaxRetries, 0, 100)
	atLeast(f, "validation.min_backoff", v.MinBackoff, time.Second)
	atLeast(f, "validation.max_backoff", v.MaxBackoff, time.Second)
	oneOf(f, "validation.event_types", v.EventTypes, EventTypesAny, EventTypesDotted)
	atLeast(f, "validation.max_event_type_length", v.MaxEventTypeLength, leastTypeLength)
	if v.MaxPayload != 0 && v.MaxPayload < leastPayload {
		f.add("validation.max_payload", v.MaxPayload, "must be at least %v, or 0B for no bound", leastPayload)
	}
	atLeast(f, "validation.max_depth", v.MaxDepth, 0)
	oneOf(f, "validation.payload_schema", v.PayloadSchema, SchemaOff, SchemaWarn, SchemaEnforce)
}

func between[T int | time.Duration | ByteSize](f *faults, key string, value, least, most T) {
	if value < least || value > most {
		f.add(key, value, "must be %v to %v", least, most)
	}
}

func oneOf[T ~string](f *faults, key string, value T, names ...T) {
	if slices.Contains(names, value) {
		return
	}
	list := make([]string, len(names))
	for i, name := range names {
		list[i] = string(name)
	}
	last := len(list) - 1
	f.add(key, strconv.Quote(string(value)), "must be %s or %s", strings.Join(list[:last], ", "), list[last])
}
