package delivery

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"strings"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// newSecretBytes is how many random bytes a new secret has: Standard Webhooks wants 24 to 64.
const newSecretBytes = 32

// NewSecret returns a new token for secret_token, which its receiver has to know as well.
func NewSecret() string {
	raw := make([]byte, newSecretBytes)
	_, _ = rand.Read(raw) // never fails: crypto/rand ends the process instead
	return secretPrefix + base64.StdEncoding.EncodeToString(raw)
}

// NewPrivateKey returns a new token for secret_token that signs asymmetrically: the receiver needs no more than its [PublicKey].
func NewPrivateKey() string {
	raw := make([]byte, ed25519.SeedSize)
	_, _ = rand.Read(raw) // never fails: crypto/rand ends the process instead
	return privatePrefix + base64.StdEncoding.EncodeToString(ed25519.NewKeyFromSeed(raw))
}

// PublicKey is what the receiver of an asymmetric token verifies with; empty of any other.
func PublicKey(token string) string {
	encoded, ok := strings.CutPrefix(token, privatePrefix)
	if !ok {
		return ""
	}
	key, ok := parsePrivate(encoded)
	if !ok {
		return ""
	}
	return publicPrefix + base64.StdEncoding.EncodeToString(key[ed25519.SeedSize:])
}

// SecretFault says what is wrong with a token that is to become a secret_token, empty if nothing is. It repeats nothing of it.
func SecretFault(token string) string {
	if seal.IsSealed(token) {
		return "is sealed, and sealed for one endpoint: give the secret itself"
	}
	_, remedy := parseSecret(token)
	return remedy
}

// setSecrets opens the tokens, once for each version of a row. A second one whose time is over signs nothing, whatever it is: the key that it was sealed
// with may have gone with it.
func (ep *Endpoint) setSecrets(row *EndpointRow, d *Defaults, f *faults) {
	parse := func(column, token string) (s *secret, opened string) {
		opened, remedy := d.open(row.ID, token)
		if remedy == "" {
			s, remedy = parseSecret(opened)
		}
		f.check(s != nil, column, "(hidden)", remedy)
		return s, opened
	}
	var token string
	ep.primary, token = parse("secret_token", row.SecretToken)
	switch {
	case ep.primary == nil || ep.primary.private != nil:
	case strings.HasPrefix(token, secretPrefix):
		ep.legacy = newSecret([]byte(token))
	default:
		ep.legacy = ep.primary
	}
	if over := row.SecondarySecretExpires; row.SecondarySecret != "" && (over.IsZero() || time.Now().Before(over)) {
		ep.secondary, _ = parse("secondary_secret_token", row.SecondarySecret)
		ep.secondaryExpires = over
	}
}

// open returns a token as it signs, or says what would do.
func (d *Defaults) open(endpoint outbox.UUID, token string) (opened, remedy string) {
	if !seal.IsSealed(token) {
		if d.RequireSealed && token != "" {
			return "", "is plain, and secrets.require_sealed wants it sealed: run outbox-relay secrets seal"
		}
		return token, ""
	}
	opened, err := d.Keys.Open(d.Tenant, endpoint, token)
	if err != nil {
		return "", err.Error()
	}
	return opened, ""
}
