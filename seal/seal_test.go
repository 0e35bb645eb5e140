package seal_test

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

const (
	tenant  = "acme"
	planted = "whsec_cGxhbnRlZC1zZWNyZXQtcGxhbnRlZC1zZWNyZXQ="
	// keyText is 32 bytes, 00 to 1f.
	keyText = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
)

func endpoint() outbox.UUID { return outbox.UUID{1, 2, 3, 15: 9} }

func ring(t testing.TB, texts ...string) *seal.Ring {
	t.Helper()
	var keys []seal.Key
	for _, text := range texts {
		id, material, _ := strings.Cut(text, "=")
		key, err := seal.ParseKey(id, material)
		require.NoError(t, err)
		keys = append(keys, key)
	}
	r, err := seal.NewRing(keys...)
	require.NoError(t, err)
	return r
}

func TestSealedSecretOpens(t *testing.T) {
	t.Parallel()
	r := ring(t, "k1="+keyText)
	for _, secret := range []string{"x", planted, "whsk_" + strings.Repeat("A", 88), "Grüße \x00\n", strings.Repeat("s", seal.MaxSecret)} {
		text, err := r.Seal(tenant, endpoint(), secret)
		require.NoError(t, err)
		assert.True(t, strings.HasPrefix(text, "sealed:v1:k1:"), text)
		assert.True(t, seal.IsSealed(text))
		assert.Equal(t, "k1", seal.KeyOf(text))
		if len(secret) > 8 { // fewer come about by chance
			assert.NotContains(t, text, base64.RawURLEncoding.EncodeToString([]byte(secret)))
		}
		opened, err := r.Open(tenant, endpoint(), text)
		require.NoError(t, err)
		assert.Equal(t, secret, opened)
		again, err := r.Seal(tenant, endpoint(), secret)
		require.NoError(t, err)
		assert.NotEqual(t, text, again)
	}
}

// The columns of the tables are varchar(512).
func TestLongestTextFits(t *testing.T) {
	t.Parallel()
	text, err := ring(t, strings.Repeat("k", 32)+"="+keyText).Seal(tenant, endpoint(), strings.Repeat("s", seal.MaxSecret))
	require.NoError(t, err)
	assert.Len(t, text, 502)
	text, err = ring(t, "2026="+keyText).Seal(tenant, endpoint(), "whsec_"+base64.StdEncoding.EncodeToString(make([]byte, 64)))
	require.NoError(t, err)
	assert.Len(t, text, 258)
}

func TestWhatCannotBeSealed(t *testing.T) {
	t.Parallel()
	r := ring(t, "k1="+keyText)
	sealed, err := r.Seal(tenant, endpoint(), planted)
	require.NoError(t, err)
	for _, bad := range []string{"", strings.Repeat("s", seal.MaxSecret+1), sealed, "sealed:"} {
		_, err := r.Seal(tenant, endpoint(), bad)
		require.ErrorIs(t, err, seal.ErrSecret)
	}
	for _, none := range []*seal.Ring{nil, ring(t)} {
		assert.True(t, none.Empty())
		assert.Empty(t, none.First())
		_, err := none.Seal(tenant, endpoint(), planted)
		require.ErrorContains(t, err, "secrets.keys")
		_, err = none.Open(tenant, endpoint(), sealed)
		require.ErrorIs(t, err, seal.ErrUnknownKey)
	}
}

func TestKeysRotate(t *testing.T) {
	t.Parallel()
	older, newer := "2025="+keyText, "2026="+seal.NewKey()
	text, err := ring(t, older).Seal(tenant, endpoint(), planted)
	require.NoError(t, err)
	both := ring(t, newer, older)
	assert.Equal(t, "2026", both.First())
	opened, err := both.Open(tenant, endpoint(), text)
	require.NoError(t, err)
	fresh, err := both.Seal(tenant, endpoint(), opened)
	require.NoError(t, err)
	assert.True(t, strings.HasPrefix(fresh, seal.Prefix("2026")))
	_, err = ring(t, newer).Open(tenant, endpoint(), fresh)
	require.NoError(t, err)
	_, err = ring(t, newer).Open(tenant, endpoint(), text)
	require.ErrorIs(t, err, seal.ErrUnknownKey)
	require.EqualError(t, err, "is sealed with the key 2025, which is not among secrets.keys: add it")
}

func TestRingsAreEqual(t *testing.T) {
	t.Parallel()
	raw, err := hex.DecodeString(keyText)
	require.NoError(t, err)
	other := seal.NewKey()
	r := ring(t, "k1="+keyText, "k2="+other)
	assert.True(t, r.Equal(ring(t, "k1="+base64.StdEncoding.EncodeToString(raw), "k2="+other+"\n")), "written differently")
	for name, not := range map[string]*seal.Ring{
		"another key":   ring(t, "k1="+keyText, "k2="+seal.NewKey()),
		"another id":    ring(t, "k1="+keyText, "k3="+other),
		"another order": ring(t, "k2="+other, "k1="+keyText),
		"fewer":         ring(t, "k1="+keyText),
		"none":          ring(t),
		"nil":           nil,
	} {
		assert.False(t, r.Equal(not), name)
		assert.False(t, not.Equal(r), name)
	}
	assert.True(t, ring(t).Equal(nil))
}

func TestTextOpensWhereItWasSealedAlone(t *testing.T) {
	t.Parallel()
	r := ring(t, "k1="+keyText, "k2="+keyText, "k3="+seal.NewKey()) // two names of one key
	text, err := r.Seal(tenant, endpoint(), planted)
	require.NoError(t, err)
	other := endpoint()
	other[15]++
	for name, open := range map[string]func() (string, error){
		"another endpoint":         func() (string, error) { return r.Open(tenant, other, text) },
		"no endpoint":              func() (string, error) { return r.Open(tenant, outbox.UUID{}, text) },
		"another tenant":           func() (string, error) { return r.Open("acme2", endpoint(), text) },
		"upper case":               func() (string, error) { return r.Open("Acme", endpoint(), text) },
		"no tenant":                func() (string, error) { return r.Open("", endpoint(), text) },
		"the same key, renamed":    func() (string, error) { return r.Open(tenant, endpoint(), strings.Replace(text, ":k1:", ":k2:", 1)) },
		"another key":              func() (string, error) { return r.Open(tenant, endpoint(), strings.Replace(text, ":k1:", ":k3:", 1)) },
		"another key of this name": func() (string, error) { return ring(t, "k1="+seal.NewKey()).Open(tenant, endpoint(), text) },
	} {
		opened, err := open()
		require.ErrorIs(t, err, seal.ErrTampered, name)
		assert.Empty(t, opened, name)
		var fault *seal.OpenError
		require.ErrorAs(t, err, &fault, name)
		assert.NotEmpty(t, fault.KeyID, name)
		assert.NotContains(t, err.Error(), text[20:], name)
	}
}

// TestEveryByteCounts changes each byte of each part: nonce, data key and tag, nonce, secret and tag; and joins parts of two texts.
func TestEveryByteCounts(t *testing.T) {
	t.Parallel()
	r := ring(t, "k1="+keyText)
	var sealed [2][]byte
	for i := range sealed {
		text, err := r.Seal(tenant, endpoint(), planted)
		require.NoError(t, err)
		sealed[i], err = base64.RawURLEncoding.DecodeString(strings.TrimPrefix(text, seal.Prefix("k1")))
		require.NoError(t, err)
		require.Len(t, sealed[i], 12+32+16+12+len(planted)+16)
	}
	open := func(content []byte) error {
		_, err := r.Open(tenant, endpoint(), seal.Prefix("k1")+base64.RawURLEncoding.EncodeToString(content))
		return err
	}
	require.NoError(t, open(sealed[0]))
	for i := range sealed[0] {
		changed := append([]byte(nil), sealed[0]...)
		changed[i] ^= 1
		require.ErrorIs(t, open(changed), seal.ErrTampered, "byte %d", i)
	}
	const wrapped = 12 + 32 + 16
	require.ErrorIs(t, open(append(sealed[0][:wrapped:wrapped], sealed[1][wrapped:]...)), seal.ErrTampered)
	require.ErrorIs(t, open(sealed[0][:len(sealed[0])-1]), seal.ErrTampered)
	require.ErrorIs(t, open(append(slices.Clip(sealed[0]), 0)), seal.ErrTampered)
}

func TestMalformed(t *testing.T) {
	t.Parallel()
	r := ring(t, "k1="+keyText)
	text, err := r.Seal(tenant, endpoint(), "planted-secret-") // 103 bytes: the last character has two bits too many
	require.NoError(t, err)
	encoded := strings.TrimPrefix(text, seal.Prefix("k1"))
	for name, bad := range map[string]string{
		"empty":               "",
		"plain":               planted,
		"the mark":            "sealed:",
		"no version":          "sealed:k1:" + encoded,
		"later version":       "sealed:v2:k1:" + encoded,
		"no key":              "sealed:v1:" + encoded,
		"empty key":           "sealed:v1::" + encoded,
		"bad key":             "sealed:v1:k 1:" + encoded,
		"long key":            "sealed:v1:" + strings.Repeat("k", 33) + ":" + encoded,
		"nothing":             "sealed:v1:k1:",
		"too short":           seal.Prefix("k1") + base64.RawURLEncoding.EncodeToString(make([]byte, 88)),
		"too long":            seal.Prefix("k1") + base64.RawURLEncoding.EncodeToString(make([]byte, 88+seal.MaxSecret+1)),
		"much too long":       seal.Prefix("k1") + strings.Repeat("A", 1<<20),
		"padding":             text + "==",
		"line break":          text[:40] + "\n" + text[40:],
		"blank behind":        text + " ",
		"other alphabet":      seal.Prefix("k1") + strings.Repeat("+/", 80),
		"bits that mean none": text[:len(text)-1] + next(text[len(text)-1:]),
	} {
		_, err := r.Open(tenant, endpoint(), bad)
		require.ErrorIs(t, err, seal.ErrMalformed, name)
		assert.Empty(t, seal.KeyOf(bad), name)
		assert.NotContains(t, err.Error(), "planted", name)
		if len(bad) > 20 {
			assert.NotContains(t, err.Error(), bad[len(bad)-8:], name)
		}
	}
}

// next is the character behind one in the alphabet of base64url.
func next(character string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	return alphabet[strings.Index(alphabet, character)+1:][:1]
}

func TestParseKey(t *testing.T) {
	t.Parallel()
	raw, err := hex.DecodeString(keyText)
	require.NoError(t, err)
	raw[0], raw[1] = 0xfb, 0xff // different in both alphabets
	text, err := ring(t, "k="+hex.EncodeToString(raw)).Seal(tenant, endpoint(), planted)
	require.NoError(t, err)
	for _, form := range []string{
		hex.EncodeToString(raw), strings.ToUpper(hex.EncodeToString(raw)), base64.StdEncoding.EncodeToString(raw), base64.URLEncoding.EncodeToString(raw),
		base64.RawStdEncoding.EncodeToString(raw), base64.RawURLEncoding.EncodeToString(raw), " \n" + base64.StdEncoding.EncodeToString(raw) + "\r\n",
	} {
		_, err := ring(t, "k="+form).Open(tenant, endpoint(), text)
		require.NoError(t, err, form)
	}
	for _, bad := range []string{"", "planted", keyText[:62], keyText + "00", "0x" + keyText, base64.StdEncoding.EncodeToString(raw[:31]), "base64:" + base64.StdEncoding.EncodeToString(raw)} {
		_, err := seal.ParseKey("k", bad)
		require.ErrorContains(t, err, "32 bytes in base64 or hex", bad)
		assert.NotContains(t, err.Error(), "planted")
		assert.NotContains(t, err.Error(), keyText[:62])
	}
	for _, bad := range []string{"", "a b", "a:b", "a=b", "ä", strings.Repeat("k", 33), "k\x00"} {
		_, err := seal.ParseKey(bad, keyText)
		require.ErrorContains(t, err, "has no valid id", bad)
	}
	_, err = seal.ParseKey("k", seal.NewKey())
	require.NoError(t, err)
	first, second := seal.NewKey(), seal.NewKey()
	assert.NotEqual(t, first, second)
	one, err := seal.ParseKey("k", keyText)
	require.NoError(t, err)
	_, err = seal.NewRing(one, one)
	require.EqualError(t, err, "two keys have the id k")
	assert.Equal(t, "k", one.ID())
}

// Neither a key nor a ring gives itself away when it is printed by mistake, by whatever verb and inside whatever struct.
func TestKeysDoNotPrint(t *testing.T) {
	t.Parallel()
	key, err := seal.ParseKey("k1", keyText)
	require.NoError(t, err)
	r := ring(t, "k1="+keyText)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
		assert.Equal(t, "key k1", fmt.Sprintf(verb, key), verb)
		assert.Equal(t, "key k1", fmt.Sprintf(verb, &key), verb)
		assert.Equal(t, "keys k1", fmt.Sprintf(verb, r), verb)
		assert.Contains(t, fmt.Sprintf(verb, struct{ Keys *seal.Ring }{r}), "keys k1", verb)
	}
	assert.Equal(t, "no keys", (*seal.Ring)(nil).String())
	var out strings.Builder
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "key", key, "ring", r)
	assert.Contains(t, out.String(), `key=k1 ring="keys k1"`)
}

// FuzzOpen knows the texts that open: those of the corpus, which were sealed with the key 00 to 1f. No other may. What the damaged ones of the corpus were
// made of is there too (sealed-undamaged): cutting off the padding of one, or its line break, is within a mutation's reach.
func FuzzOpen(f *testing.F) {
	r := ring(f, "k1="+keyText)
	good := make(map[string]bool)
	corpus, err := filepath.Glob("testdata/fuzz/FuzzOpen/sealed-*")
	require.NoError(f, err)
	require.NotEmpty(f, corpus)
	for _, name := range corpus {
		file, err := os.ReadFile(name)
		require.NoError(f, err)
		text := strings.TrimSuffix(strings.TrimPrefix(string(file), "go test fuzz v1\nstring(\""), "\")\n")
		_, err = r.Open(tenant, endpoint(), text)
		require.NoError(f, err, name)
		good[text] = true
	}
	f.Add("")
	f.Add("whsec_c2VjcmV0")
	f.Add("sealed:v1:k1:")
	f.Add("sealed:v1:k1:" + strings.Repeat("A", 120))
	f.Fuzz(func(t *testing.T, text string) {
		secret, err := r.Open(tenant, endpoint(), text)
		if err == nil {
			require.True(t, good[text], "%q opened", text)
			require.NotEmpty(t, secret)
			return
		}
		require.Empty(t, secret)
		var fault *seal.OpenError
		require.ErrorAs(t, err, &fault)
		require.Equal(t, fault.KeyID, seal.KeyOf(text))
		if seal.KeyOf(text) != "" {
			require.True(t, seal.IsSealed(text))
			require.LessOrEqual(t, len(text), 512)
		}
	})
}

func FuzzParseKey(f *testing.F) {
	f.Add("k1", keyText)
	f.Add("2026", base64.StdEncoding.EncodeToString(make([]byte, 32)))
	f.Add("", "")
	f.Fuzz(func(t *testing.T, id, text string) {
		key, err := seal.ParseKey(id, text)
		if err != nil {
			if len(text) > 20 {
				require.NotContains(t, err.Error(), text)
			}
			return
		}
		require.Equal(t, id, key.ID())
		r, err := seal.NewRing(key)
		require.NoError(t, err)
		sealed, err := r.Seal(tenant, endpoint(), planted)
		require.NoError(t, err)
		require.LessOrEqual(t, len(sealed), 512)
		opened, err := r.Open(tenant, endpoint(), sealed)
		require.NoError(t, err)
		require.Equal(t, planted, opened)
	})
}
