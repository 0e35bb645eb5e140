package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// FuzzConfig: whatever a file says, it is read or refused with every fault named, and what was read is read again from what "config" prints.
func FuzzConfig(f *testing.F) {
	example, err := os.ReadFile(examplePath)
	require.NoError(f, err)
	f.Add(string(example))
	f.Add("database: {url: " + dsn + "}\nretry: {multiplier: 1.5, schedule: [5s, 5m]}\nwindow: {bytes: 1.5MiB}\nnetwork: {allow: [10.0.0.0/8, \"fd00::/8\"], ports: 443}")
	f.Add("databases:\n  - {name: a, url: " + dsn + ", slot: a}\n  - {name: b, url: " + dsn + ", slot: b}\n")
	f.Add("delivery: {tls: {profiles: [{tenant: acme, server_name: hooks.internal}]}}\ndatabase: {url: " + dsn + "}")
	for _, c := range faultCases() {
		f.Add(c.yaml)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(text, "file") || strings.Contains(text, "\\") {
			return // it would be read, whatever it is
		}
		c, err := loadText(t, text)
		if err != nil {
			var faults *configError
			require.ErrorAs(t, err, &faults)
			require.NotEmpty(t, faults.faults)
			return
		}
		if strings.Contains(text, "databases") || strings.Contains(text, ":") && strings.Contains(text, "@") && !strings.Contains(text, dsn) {
			return // passwords are hidden where it is printed
		}
		var printed bytes.Buffer
		require.NoError(t, c.write(&printed))
		again, err := loadText(t, printed.String())
		require.NoError(t, err, "%s", &printed)
		assert.Equal(t, c, again)
	})
}
