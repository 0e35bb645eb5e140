// Package seal keeps the secrets of endpoints so that whoever reads the table, a copy of it or the write-ahead log does not have them. A secret is
// encrypted with a key of its own, and that one with a key which the database does not hold:
//
//	sealed:v1:<id of the key>:<base64url of: nonce, data key, tag, nonce, secret, tag>
//
// Both parts are AES-256-GCM with random nonces. Both are bound to the version, the tenant's schema and the endpoint's id, so that a text which was
// changed, or moved to another endpoint, does not open. They are not bound to a column: a rotation moves the text from one to the other as it is.
//
// It knows nothing of files, databases and configuration.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"

	"github.com/neo-commons/outbox-relay/outbox"
)

// MaxSecret is how many bytes a secret has at most. With the longest id of a key its text has 502 characters then, and fits into the varchar(512) of the
// tables; whsec_ with the 64 bytes that Standard Webhooks allows has 94.
const MaxSecret = 256

const (
	mark     = "sealed:"
	version  = "v1"
	overhead = 12 + 16 // nonce and tag
	wrapped  = KeySize + overhead
)

// The kinds of an [OpenError].
var (
	// ErrMalformed is of a text that is not in the form above.
	ErrMalformed = errors.New("is not a sealed secret: it has to be sealed:" + version + ":KEY:… as outbox-relay writes it")
	// ErrUnknownKey is of a text that was sealed with a key which is not there.
	ErrUnknownKey = errors.New("is sealed with a key that is not among secrets.keys")
	// ErrTampered is of a text that the key does not open for this endpoint.
	ErrTampered = errors.New("cannot be opened: it was changed, or taken from another endpoint or tenant, or the key of this name is another one now")
)

// ErrSecret is of what cannot be sealed.
var ErrSecret = fmt.Errorf("cannot be sealed: a secret has 1 to %d bytes, and is not sealed already", MaxSecret)

// OpenError is why a sealed secret cannot be opened. It holds nothing of it.
type OpenError struct {
	Kind  error  // one of those above
	KeyID string // empty if the text is malformed
}

// Error says why, and names the key.
func (e *OpenError) Error() string {
	switch {
	case e.KeyID == "":
		return e.Kind.Error()
	case errors.Is(e.Kind, ErrUnknownKey):
		return fmt.Sprintf("is sealed with the key %s, which is not among secrets.keys: add it", e.KeyID)
	default:
		return fmt.Sprintf("is sealed with the key %s and %v", e.KeyID, e.Kind)
	}
}

// Unwrap returns Kind.
func (e *OpenError) Unwrap() error { return e.Kind }

// IsSealed tells whether a token is sealed, well or not. No plain token begins like that.
func IsSealed(token string) bool { return strings.HasPrefix(token, mark) }

// Prefix is how the texts begin that a key has sealed.
func Prefix(keyID string) string { return mark + version + ":" + keyID + ":" }

// KeyOf is the id of the key that has sealed a text; empty if it is malformed.
func KeyOf(text string) string {
	id, _, _ := parse(text)
	return id
}

// Seal returns the text to be stored for the secret of an endpoint, made with the first key. Every call returns another one. ErrSecret: it is empty, too long, or
// sealed already. A ring without keys seals nothing, see Empty.
func (r *Ring) Seal(tenant string, endpoint outbox.UUID, secret string) (string, error) {
	if r.Empty() {
		return "", errors.New("there is no key to seal with: give one in secrets.keys")
	}
	if len(secret) == 0 || len(secret) > MaxSecret || IsSealed(secret) {
		return "", ErrSecret
	}
	key := &r.keys[0]
	dataKey := make([]byte, KeySize)
	defer clear(dataKey)
	_, _ = rand.Read(dataKey) // never fails: crypto/rand ends the process instead
	inner, err := gcm(dataKey)
	if err != nil {
		return "", err
	}
	sealed := key.aead.Seal(nil, nil, dataKey, bind("key", key.id, tenant, endpoint))          //nolint:gosec // G407: this AEAD makes its nonce itself, a random one
	sealed = inner.Seal(sealed, nil, []byte(secret), bind("secret", key.id, tenant, endpoint)) //nolint:gosec // G407: as above
	return Prefix(key.id) + base64.RawURLEncoding.EncodeToString(sealed), nil
}

// Open returns the secret of an endpoint. The error is an *[OpenError].
func (r *Ring) Open(tenant string, endpoint outbox.UUID, text string) (string, error) {
	id, sealed, ok := parse(text)
	if !ok {
		return "", &OpenError{Kind: ErrMalformed}
	}
	key := r.find(id)
	if key == nil {
		return "", &OpenError{ErrUnknownKey, id}
	}
	dataKey, err := key.aead.Open(nil, nil, sealed[:wrapped], bind("key", id, tenant, endpoint))
	if err != nil {
		return "", &OpenError{ErrTampered, id}
	}
	defer clear(dataKey)
	inner, err := gcm(dataKey)
	if err != nil {
		return "", &OpenError{ErrTampered, id}
	}
	secret, err := inner.Open(nil, nil, sealed[wrapped:], bind("secret", id, tenant, endpoint))
	if err != nil {
		return "", &OpenError{ErrTampered, id}
	}
	return string(secret), nil
}

// parse takes a text apart. There is one text for each content: base64 has to be exact to the last bit.
func parse(text string) (keyID string, sealed []byte, ok bool) {
	rest, ok := strings.CutPrefix(text, mark+version+":")
	if !ok || len(rest) > maxKeyID+1+base64.RawURLEncoding.EncodedLen(wrapped+overhead+MaxSecret) {
		return "", nil, false
	}
	keyID, encoded, ok := strings.Cut(rest, ":")
	if !ok || !validID(keyID) || strings.ContainsAny(encoded, "\r\n") { // which the decoder would pass over
		return "", nil, false
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(encoded)
	if err != nil || len(sealed) <= wrapped+overhead || len(sealed) > wrapped+overhead+MaxSecret {
		return "", nil, false
	}
	return keyID, sealed, true
}

// bind is the additional data of one part. No part of it can run into the next: none but the last has a NUL, which PostgreSQL allows in no name.
func bind(purpose, keyID, tenant string, endpoint outbox.UUID) []byte {
	return append([]byte("outbox-relay "+mark+version+"\x00"+purpose+"\x00"+keyID+"\x00"+tenant+"\x00"), endpoint[:]...)
}

func gcm(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}
