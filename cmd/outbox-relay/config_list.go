package main

import (
	"fmt"
	"maps"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/neo-commons/outbox-relay/delivery"
	"github.com/neo-commons/outbox-relay/relay"
)

// decodeNumbers reads a list of whole numbers.
func (l leaf) decodeNumbers(dst *[]int, raw any) (errs []error) {
	items, ok := raw.([]any)
	if !ok {
		for part := range strings.SplitSeq(fmt.Sprint(raw), ",") {
			items = append(items, part)
		}
	}
	var numbers []int
	for _, item := range items {
		text := strings.TrimSpace(fmt.Sprint(item))
		if text == "" {
			continue
		}
		n, err := strconv.Atoi(text)
		if err != nil {
			errs = append(errs, &relay.FieldError{Key: l.key, Value: strconv.Quote(text), Remedy: "must be a list of whole numbers: [443, 8443] in the file, 443,8443 in the environment"})
		}
		numbers = append(numbers, n)
	}
	if errs == nil {
		*dst = numbers
	}
	return errs
}

// decodeProfiles reads a list of entries. Their keys are those of the struct; a fault names them with the number of the entry.
func (l leaf) decodeProfiles(dst *[]delivery.TLSProfile, raw any) (errs []error) {
	fault := func(key, value, remedy string) {
		errs = append(errs, &relay.FieldError{Key: key, Value: value, Remedy: remedy})
	}
	list, ok := raw.([]any)
	if !ok {
		fault(l.key, "", "must be a list in the file, each entry beginning with its tenant: - tenant: acme")
		return errs
	}
	var profiles []delivery.TLSProfile
	for i, item := range list {
		prefix := fmt.Sprintf("%s[%d]", l.key, i)
		fields, ok := item.(map[string]any)
		if !ok {
			fault(prefix, "", "must be an entry with its keys below it, beginning with its tenant: - tenant: acme")
			continue
		}
		var profile delivery.TLSProfile
		var known []string
		for _, field := range leavesIn(prefix+".", reflect.ValueOf(&profile).Elem()) {
			known = append(known, field.key)
			if value := fields[strings.TrimPrefix(field.key, prefix+".")]; value != nil {
				errs = append(errs, field.decode(value)...)
			}
		}
		for _, name := range slices.Sorted(maps.Keys(fields)) {
			if key := prefix + "." + name; !slices.Contains(known, key) {
				fault(key, "", "is no key of an entry"+didYouMean(key, known))
			}
		}
		profiles = append(profiles, profile)
	}
	if errs == nil {
		*dst = profiles
	}
	return errs
}

// plainProfiles are entries as the file would have them, without what they leave out.
func plainProfiles(profiles []delivery.TLSProfile) []map[string]any {
	list := make([]map[string]any, len(profiles))
	for i := range profiles {
		list[i] = make(map[string]any)
		for _, field := range leavesIn("", reflect.ValueOf(&profiles[i]).Elem()) {
			if !field.value.IsZero() {
				list[i][field.key] = field.plain()
			}
		}
	}
	return list
}

// hideUserinfo shows the URL of a proxy without its password. A user without one is often a token.
func hideUserinfo(text string) string {
	u, err := url.Parse(text)
	if err != nil || text != "" && u.Host == "" {
		return "(hidden: not a URL)"
	}
	if _, ok := u.User.Password(); u.User != nil && !ok {
		u.User = url.User("xxxxx")
	}
	return u.Redacted()
}
