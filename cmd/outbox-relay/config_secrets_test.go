package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/seal"
)

func TestKeysComeFromFilesAndVariables(t *testing.T) {
	t.Parallel()
	one, two := seal.NewKey(), seal.NewKey()
	file := fileOf(t, "config.yaml", fmt.Sprintf("secrets: {keys: ['2026=file:%s', 2025=env:OUTBOX_RELAY_KEY_2025], require_sealed: true}\n", fileOf(t, "key", one+"\n")))
	o := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_KEY_2025=" + two}, "config", "--config", file)
	require.Equal(t, exitOK, o.code, o.err)
	assert.Regexp(t, `secrets:\n  keys: \['?2026=file:/\S+/key'?, '?2025=env:OUTBOX_RELAY_KEY_2025'?\]\n  require_sealed: true\n`, o.out)
	assert.NotContains(t, o.out, one)
	assert.NotContains(t, o.out, two)

	// The variable of the key has commas between them, and a variable that holds one is no misspelt key.
	o = invoke(t, []string{
		"OUTBOX_RELAY_DATABASE_URL=" + dsn, "OUTBOX_RELAY_SECRETS_KEYS=a=env:OUTBOX_RELAY_SECRETS_KEY_A,b=env:B", "OUTBOX_RELAY_SECRETS_KEY_A=" + one, "B=" + two,
	}, "config")
	require.Equal(t, exitOK, o.code, o.err)

	c, err := loadText(t, fmt.Sprintf("secrets: {keys: ['k2=file:%s', 'k1=file:%s']}", fileOf(t, "k2", two), fileOf(t, "k1", one)), "--database-url="+dsn)
	require.NoError(t, err)
	ring, err := c.Secrets.Ring()
	require.NoError(t, err)
	assert.Equal(t, "keys k2, k1", ring.String())
	key, err := seal.ParseKey("k1", one)
	require.NoError(t, err)
	older, err := seal.NewRing(key)
	require.NoError(t, err)
	text, err := older.Seal("acme", outbox.UUID{1}, "s3cret")
	require.NoError(t, err)
	opened, err := c.EndpointDefaults().Keys.Open("acme", outbox.UUID{1}, text)
	require.NoError(t, err)
	assert.Equal(t, "s3cret", opened)
}

// Whatever stands where a key's source should, it may be the key: it is neither in the faults nor in what config prints.
func TestFaultsOfKeys(t *testing.T) {
	t.Parallel()
	key := seal.NewKey()
	plantedHex := strings.Repeat("5ec4e7aa", 8)
	good := fileOf(t, "good", key)
	const form = "secrets.keys: (hidden): must be id=file:PATH or id=env:NAME, for a key of 32 bytes in base64 or hex in that file or variable"
	empty, wrong := fileOf(t, "empty", "\n"), fileOf(t, "wrong", "s3cret-but-no-key")
	for entry, want := range map[string]string{
		key:                     form,
		plantedHex:              form,
		"k1=" + key:             form,
		"k1=" + plantedHex:      form,
		"k1=file:" + key:        form,
		"k1=env:" + plantedHex:  form,
		"k1=base64:" + key:      form,
		"k1=file:":              form,
		"k1=env:2X":             form,
		"k1":                    form,
		"":                      `secrets.keys: "": is an empty entry of the list: leave it out`,
		"k 1=file:" + good:      "secrets.keys: k 1=file:" + good + ": has no valid id: use 1 to 32 of A-Z, a-z, 0-9, ., _ and -",
		"=file:" + good:         "secrets.keys: =file:" + good + ": has no valid id",
		"k1=file:/nonexistent":  "secrets.keys: k1=file:/nonexistent: cannot be read: /nonexistent: no such file or directory",
		"k1=file:" + empty:      "secrets.keys: k1=file:" + empty + ": cannot be read: " + empty + " is empty",
		"k1=file:" + wrong:      "secrets.keys: k1=file:" + wrong + ": holds no key: it has to be 32 bytes in base64 or hex, as outbox-relay secrets new-key prints them",
		"k1=env:NOT_SET_AT_ALL": "secrets.keys: k1=env:NOT_SET_AT_ALL: the variable is not set: put the key into it, or drop the entry",
		"ok=file:" + good:       "secrets.keys: ok=file:" + good + ": has the id of another one: drop one of the two, or call it differently",
	} {
		c, err := loadText(t, fmt.Sprintf("secrets: {keys: [%q, %q]}", "ok=file:"+good, entry), "--database-url="+dsn)
		var ce *configError
		require.ErrorAs(t, err, &ce, entry)
		require.Len(t, ce.faults, 1, "%v", err)
		require.ErrorContains(t, ce.faults[0], want, entry)
		var printed bytes.Buffer
		require.NoError(t, c.write(&printed))
		for _, planted := range []string{key, plantedHex, "s3cret"} {
			assert.NotContains(t, err.Error()+printed.String(), planted, entry)
		}
	}
	for _, list := range []string{"{k1: " + key + "}", "[[k1, " + key + "]]", "[{k1: " + key + "}]"} {
		_, err := loadText(t, "secrets: {keys: "+list+"}", "--database-url="+dsn)
		require.Error(t, err)
		assert.NotContains(t, err.Error(), key)
	}
	_, err := loadText(t, "secrets: {require_sealed: true}", "--database-url="+dsn)
	require.ErrorContains(t, err, "secrets.require_sealed: true: needs secrets.keys")
}
