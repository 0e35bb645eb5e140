package delivery

import (
	"crypto/ed25519"
	"encoding/base64"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

// sealedWith returns defaults that have keys of these ids, the first of which seals.
func sealedWith(t *testing.T, ids ...string) Defaults {
	t.Helper()
	d := testDefaults()
	d.Tenant = "acme"
	var keys []seal.Key
	for _, id := range ids {
		key, err := seal.ParseKey(id, strings.Repeat("00", 31)+"0"+id[len(id)-1:])
		require.NoError(t, err)
		keys = append(keys, key)
	}
	var err error
	d.Keys, err = seal.NewRing(keys...)
	require.NoError(t, err)
	return d
}

func TestSealedSecretsSign(t *testing.T) {
	t.Parallel()
	d, id := sealedWith(t, "k1"), outbox.UUID{1}
	sealed := func(token string) string {
		text, err := d.Keys.Seal("acme", id, token)
		require.NoError(t, err)
		return text
	}
	seed, _, public := asymmetric(t)
	m := Encode(nil, FormatStandard, fullEvent(), "src")
	for _, row := range []EndpointRow{
		{SecretToken: sealed(testSecret), SecondarySecret: sealed(olderToken)},
		{SecretToken: testSecret, SecondarySecret: sealed(olderToken)},
		{SecretToken: sealed(testSecret), SecondarySecret: olderToken},
	} {
		row.ID, row.URL, row.SecondarySecretExpires = id, "http://h", time.Now().Add(time.Hour)
		ep, err := NewEndpoint(row, d)
		require.NoError(t, err)
		s := ep.sign(&m, time.Now())
		require.NoError(t, verifier(t, testSecret, true).Verify(m.Body, headersOf(s)))
		require.NoError(t, verifier(t, olderToken, false).Verify(m.Body, headersOf(s)))
		assert.True(t, legacyValid(testSecret, m.Body, s.legacy), "the older header takes the token as it is, and not its sealed text")
	}
	ep, err := NewEndpoint(EndpointRow{ID: id, URL: "http://h", SecretToken: sealed(olderToken)}, d)
	require.NoError(t, err)
	s := ep.sign(&m, time.Now())
	assert.True(t, legacyValid(olderToken, m.Body, s.legacy))
	require.NoError(t, verifier(t, olderToken, false).Verify(m.Body, headersOf(s)))
	ep, err = NewEndpoint(EndpointRow{ID: id, URL: "http://h", SecretToken: sealed(seed)}, d)
	require.NoError(t, err)
	s = ep.sign(&m, time.Now())
	assert.True(t, verifyAsymmetric(public, m.Body, headersOf(s)))
	assert.Empty(t, s.legacy)
}

func TestSecretsThatDoNotOpen(t *testing.T) {
	t.Parallel()
	d, id := sealedWith(t, "k1", "k2"), outbox.UUID{1}
	text, err := d.Keys.Seal("acme", id, testSecret)
	require.NoError(t, err)
	stricter, elsewhere, fewer, none := d, d, sealedWith(t, "k2"), testDefaults()
	stricter.RequireSealed = true
	elsewhere.Tenant = "other"
	for name, c := range map[string]struct {
		row  EndpointRow
		d    Defaults
		want string
	}{
		"key is not there":      {EndpointRow{SecretToken: text}, fewer, "secret_token (hidden): is sealed with the key k1, which is not among secrets.keys: add it"},
		"no keys":               {EndpointRow{SecretToken: text}, none, "secret_token (hidden): is sealed with the key k1, which is not among secrets.keys: add it"},
		"another tenant":        {EndpointRow{SecretToken: text}, elsewhere, "secret_token (hidden): is sealed with the key k1 and cannot be opened"},
		"another endpoint":      {EndpointRow{ID: outbox.UUID{2}, SecretToken: text}, d, "secret_token (hidden): is sealed with the key k1 and cannot be opened"},
		"malformed":             {EndpointRow{SecretToken: text + "="}, d, "secret_token (hidden): is not a sealed secret"},
		"second one":            {EndpointRow{SecretToken: testSecret, SecondarySecret: text}, fewer, "secondary_secret_token (hidden): is sealed with the key k1"},
		"plain, but must not":   {EndpointRow{SecretToken: testSecret}, stricter, "secret_token (hidden): is plain, and secrets.require_sealed wants it sealed: run outbox-relay secrets seal"},
		"second one is plain":   {EndpointRow{SecretToken: text, SecondarySecret: olderToken}, stricter, "secondary_secret_token (hidden): is plain"},
		"none, where it must":   {EndpointRow{}, stricter, "secret_token (hidden): must not be empty"},
		"both, each with fault": {EndpointRow{SecretToken: testSecret, SecondarySecret: text + "="}, stricter, "secondary_secret_token (hidden): is not a sealed secret"},
	} {
		if c.row.ID.IsZero() {
			c.row.ID = id
		}
		c.row.URL = "http://h"
		_, err := NewEndpoint(c.row, c.d)
		require.ErrorContains(t, err, c.want, name)
		assert.NotContains(t, err.Error(), testSecret, name)
		assert.NotContains(t, err.Error(), text[20:], name)
	}
	ep, err := NewEndpoint(EndpointRow{ID: id, URL: "http://h", SecretToken: text}, stricter)
	require.NoError(t, err)
	require.NotNil(t, ep)
}

// The key that a second secret was sealed with may go once the secret's time is over.
func TestSecondSecretThatIsOverNeedsNoKey(t *testing.T) {
	t.Parallel()
	id := outbox.UUID{1}
	text, err := sealedWith(t, "k1").Keys.Seal("acme", id, olderToken)
	require.NoError(t, err)
	row := EndpointRow{ID: id, URL: "http://h", SecretToken: testSecret, SecondarySecret: text, SecondarySecretExpires: time.Now().Add(-time.Second)}
	_, err = NewEndpoint(row, sealedWith(t, "k2"))
	require.NoError(t, err)
	row.SecondarySecretExpires = time.Now().Add(time.Hour)
	_, err = NewEndpoint(row, sealedWith(t, "k2"))
	require.Error(t, err)
}

func TestNewSecrets(t *testing.T) {
	t.Parallel()
	for _, token := range []string{NewSecret(), NewPrivateKey()} {
		assert.Empty(t, SecretFault(token))
		ep, err := NewEndpoint(EndpointRow{URL: "http://h", SecretToken: token}, testDefaults())
		require.NoError(t, err)
		m := Encode(nil, FormatStandard, fullEvent(), "src")
		s := ep.sign(&m, time.Now())
		public := PublicKey(token)
		if public == "" {
			require.NoError(t, verifier(t, token, false).Verify(m.Body, headersOf(s)))
			continue
		}
		key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(public, "whpk_"))
		require.NoError(t, err)
		assert.True(t, verifyAsymmetric(ed25519.PublicKey(key), m.Body, headersOf(s)))
	}
	seed, _, _ := asymmetric(t)
	assert.Equal(t, "whpk_"+rfcPublic, PublicKey(seed))
	assert.Empty(t, PublicKey("whsk_nonsense"))
	first, second := NewSecret(), NewSecret()
	assert.NotEqual(t, first, second)
	assert.Contains(t, SecretFault(""), "must not be empty")
	assert.Contains(t, SecretFault("whpk_"+rfcPublic), "is a public key")
	assert.Contains(t, SecretFault("sealed:v1:k1:AAAA"), "is sealed")
}
