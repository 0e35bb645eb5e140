package relay

import (
	"errors"
	"os"
	"regexp"
	"strings"

	"github.com/neo-commons/outbox-relay/seal"
)

// Secrets says how the secrets of endpoints are kept in the database.
type Secrets struct {
	// Keys are those of sealed secrets, each as id=file:PATH or id=env:NAME: the configuration names them and holds none. The first one seals, all open.
	Keys []string `mapstructure:"keys"`
	// RequireSealed makes an endpoint whose secret is plain invalid.
	RequireSealed bool `mapstructure:"require_sealed"`
}

const (
	keysKey     = "secrets.keys"
	keysRemedy  = "must be id=file:PATH or id=env:NAME, for a key of 32 bytes in base64 or hex in that file or variable"
	hiddenValue = "(hidden)" // what is not in order may be a key
)

// keySource is where a key comes from.
type keySource struct{ id, kind, place string }

// parseKeySource reads an entry of secrets.keys. What holds a key instead of naming one is none.
func parseKeySource(entry string) (k keySource, ok bool) {
	id, source, _ := strings.Cut(entry, "=")
	kind, place, _ := strings.Cut(source, ":")
	k = keySource{id, kind, place}
	for _, part := range []string{place, strings.TrimPrefix(place, "/")} {
		if _, err := seal.ParseKey("key", part); err == nil {
			return k, false
		}
	}
	switch kind {
	case "file":
		return k, place != ""
	case "env":
		return k, regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`).MatchString(place)
	}
	return k, false
}

// ShowKeySource returns an entry of secrets.keys as it may be shown: one that is not in order may hold the key itself.
func ShowKeySource(entry string) string {
	if _, ok := parseKeySource(entry); ok {
		return entry
	}
	return "(hidden: not id=file:PATH or id=env:NAME)"
}

// KeyVariables lists the variables that keys come from.
func (s Secrets) KeyVariables() (names []string) {
	for _, entry := range s.Keys {
		if k, ok := parseKeySource(entry); ok && k.kind == "env" {
			names = append(names, k.place)
		}
	}
	return names
}

// KeyFiles lists the files that keys come from.
func (s Secrets) KeyFiles() (names []string) {
	for _, entry := range s.Keys {
		if k, ok := parseKeySource(entry); ok && k.kind == "file" {
			names = append(names, k.place)
		}
	}
	return names
}

// Ring reads the keys. The error joins a *[FieldError] for each fault; the ring has the keys without one.
func (s Secrets) Ring() (*seal.Ring, error) {
	var f faults
	var keys []seal.Key
	seen := make(map[string]bool)
	for _, entry := range s.Keys {
		k, ok := parseKeySource(entry)
		if !ok {
			f.add(keysKey, hiddenValue, keysRemedy)
			continue
		}
		if seen[k.id] {
			f.add(keysKey, entry, "has the id of another one: drop one of the two, or call it differently")
			continue
		}
		seen[k.id] = true
		text, err := k.read()
		if err != nil {
			f.add(keysKey, entry, "%v", err)
			continue
		}
		key, err := seal.ParseKey(k.id, text)
		if err != nil {
			f.add(keysKey, entry, "%v", err)
			continue
		}
		keys = append(keys, key)
	}
	ring, err := seal.NewRing(keys...)
	if err != nil {
		return nil, err
	}
	return ring, errors.Join(f...)
}

func (k keySource) read() (string, error) {
	if k.kind == "env" {
		text := os.Getenv(k.place)
		if text == "" {
			return "", errors.New("the variable is not set: put the key into it, or drop the entry")
		}
		return text, nil
	}
	return readSmall(k.place)
}

func (s Secrets) validate(f *faults) {
	_, err := s.Ring()
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		*f = append(*f, joined.Unwrap()...)
	}
	if s.RequireSealed && len(s.Keys) == 0 {
		f.add("secrets.require_sealed", s.RequireSealed, "needs secrets.keys: without a key no secret can be sealed, and no endpoint used")
	}
}
