package seal

import (
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
)

// KeySize is how many bytes a key has.
const KeySize = 32

const maxKeyID = 32

// Key is one that seals. It does not print what it is made of.
type Key struct {
	id   string
	aead cipher.AEAD
}

// Faults of a key, which do not repeat any of it.
var (
	errKeyID = fmt.Errorf("has no valid id: use 1 to %d of A-Z, a-z, 0-9, ., _ and -", maxKeyID)
	errKey   = fmt.Errorf("holds no key: it has to be %d bytes in base64 or hex, as outbox-relay secrets new-key prints them", KeySize)
)

// ParseKey reads a key of 32 bytes, in hex or any base64; blanks around it do not count.
func ParseKey(id, text string) (Key, error) {
	if !validID(id) {
		return Key{}, errKeyID
	}
	raw, ok := decodeKey(strings.TrimSpace(text))
	if !ok {
		return Key{}, errKey
	}
	defer clear(raw)
	aead, err := gcm(raw)
	if err != nil {
		return Key{}, err
	}
	return Key{id, aead}, nil
}

func decodeKey(text string) (raw []byte, ok bool) {
	if raw, err := hex.DecodeString(text); err == nil {
		return raw, len(raw) == KeySize
	}
	for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding} {
		if raw, err := encoding.DecodeString(text); err == nil {
			return raw, len(raw) == KeySize
		}
	}
	return nil, false
}

// NewKey returns a new key in the form that [ParseKey] reads.
func NewKey() string {
	raw := make([]byte, KeySize)
	defer clear(raw)
	_, _ = rand.Read(raw) // never fails: crypto/rand ends the process instead
	return base64.StdEncoding.EncodeToString(raw)
}

// ID is what the key is called by in sealed texts.
func (k Key) ID() string { return k.id }

// String names the key.
func (k Key) String() string { return "key " + k.id }

// GoString is String.
func (k Key) GoString() string { return k.String() }

// Format is String whatever the verb: some would print what the key is made of.
func (k Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(k.String())) }

// LogValue is the key's id.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.id) }

func validID(id string) bool {
	return len(id) > 0 && len(id) <= maxKeyID && strings.Trim(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == ""
}

// Ring is a set of keys, of which the first seals and all open. A nil Ring has none. It never changes and is safe for concurrent use.
type Ring struct{ keys []Key }

// NewRing returns a ring of keys, each with an id of its own.
func NewRing(keys ...Key) (*Ring, error) {
	r := &Ring{}
	for _, k := range keys {
		if r.find(k.id) != nil {
			return nil, errors.New("two keys have the id " + k.id)
		}
		r.keys = append(r.keys, k)
	}
	return r, nil
}

// Empty tells whether there is no key.
func (r *Ring) Empty() bool { return r == nil || len(r.keys) == 0 }

// Equal tells whether two rings have the same keys by the same ids, in the same order.
func (r *Ring) Equal(other *Ring) bool {
	if r.Empty() || other.Empty() {
		return r.Empty() && other.Empty()
	}
	return slices.EqualFunc(r.keys, other.keys, func(a, b Key) bool {
		_, err := b.aead.Open(nil, nil, a.aead.Seal(nil, nil, nil, nil), nil) //nolint:gosec // G407: this AEAD makes its nonce itself, a random one
		return a.id == b.id && err == nil
	})
}

// First is the id of the key that seals; empty if there is none.
func (r *Ring) First() string {
	if r.Empty() {
		return ""
	}
	return r.keys[0].id
}

func (r *Ring) find(id string) *Key {
	if r != nil {
		for i := range r.keys {
			if r.keys[i].id == id {
				return &r.keys[i]
			}
		}
	}
	return nil
}

// String lists the ids.
func (r *Ring) String() string {
	if r.Empty() {
		return "no keys"
	}
	ids := make([]string, len(r.keys))
	for i, k := range r.keys {
		ids[i] = k.id
	}
	return "keys " + strings.Join(ids, ", ")
}

// GoString is String.
func (r *Ring) GoString() string { return r.String() }

// Format is String whatever the verb.
func (r *Ring) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(r.String())) }

// LogValue is String.
func (r *Ring) LogValue() slog.Value { return slog.StringValue(r.String()) }
