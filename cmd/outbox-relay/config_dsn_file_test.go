package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// fileOf writes a file of the test and returns its path.
func fileOf(t testing.TB, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

func TestDSNFromAFile(t *testing.T) {
	t.Parallel()
	const one, stream = "postgres://relay:s3cret@db/app", "postgres://relay:s3cret@direct/app"
	path, streamPath := fileOf(t, "dsn", one+"\n"), fileOf(t, "stream", stream)
	text := fmt.Sprintf("database: {url_file: %s, replication_url_file: %s}", path, streamPath)
	c, err := loadText(t, text)
	require.NoError(t, err)
	assert.Equal(t, one, c.Database.URL)
	assert.Equal(t, stream, c.Database.StreamURL())
	assert.Equal(t, "database.url_file", c.urlKey())
	var printed bytes.Buffer
	require.NoError(t, c.write(&printed))
	assert.NotContains(t, printed.String(), "s3cret")
	assert.Contains(t, printed.String(), "url: \"\"\n  url_file: "+path+"\n")
	again, err := loadText(t, printed.String())
	require.NoError(t, err)
	assert.Equal(t, c, again)

	// Somebody who works as another role says so.
	c, err = loadText(t, text, "--database-url="+dsn)
	require.NoError(t, err)
	assert.Equal(t, dsn, c.Database.URL)
	assert.Empty(t, c.Database.URLFile)

	for _, tc := range []struct{ yaml, want string }{
		{"database: {url: 'postgres://u:s3cret@h/a', url_file: " + path + "}", "database.url_file: " + path + ": is given, and so is url: drop one of the two"},
		{"database: {url: 'postgres://h/a', replication_url: 'postgres://u:s3cret@h/a', replication_url_file: " + path + "}", "database.replication_url_file: " + path + ": is given"},
		{"database: {url_file: /nonexistent}", "database.url_file: /nonexistent: cannot be read: /nonexistent: no such file or directory"},
		{"database: {url_file: " + filepath.Dir(path) + "}", "is a directory"},
		{"database: {url_file: " + fileOf(t, "empty", "") + "}", " is empty"},
		{"database: {url_file: " + fileOf(t, "large", strings.Repeat("s3cret", 20_000)) + "}", " is larger than 65536 bytes"},
		{"database: {url_file: " + fileOf(t, "port", "postgres://u:s3cret@h:x/a") + "}", ": has no valid port: write postgres://"},
	} {
		_, err := loadText(t, tc.yaml)
		var ce *configError
		require.ErrorAs(t, err, &ce, tc.yaml)
		require.Len(t, ce.faults, 1, "%v", err)
		require.ErrorContains(t, err, tc.want)
		assert.NotContains(t, err.Error(), "s3cret")
	}
}

func TestDSNsOfTheListFromFiles(t *testing.T) {
	t.Parallel()
	a, b := fileOf(t, "a", "postgres://relay:s3cret@db1/a"), fileOf(t, "b", "postgres://relay:s3cret@db2/b")
	c, err := loadText(t, fmt.Sprintf(`
database: {url_file: %s, replication_url: postgres://direct/a}
databases:
  - name: ours
  - {name: file, url_file: %s}
  - {name: url, url: postgres://db3/c}
`, a, b))
	require.NoError(t, err)
	dsns := make([]string, 0, len(c.Databases))
	for _, e := range c.Databases {
		dsns = append(dsns, e.URL+" "+e.URLFile+" "+e.StreamURL())
	}
	assert.Equal(t, []string{
		"postgres://relay:s3cret@db1/a " + a + " postgres://direct/a", "postgres://relay:s3cret@db2/b " + b + " postgres://relay:s3cret@db2/b",
		"postgres://db3/c  postgres://db3/c",
	}, dsns)
	assert.Equal(t, "databases.file.url_file", c.each()[1].urlKey())
	var printed bytes.Buffer
	require.NoError(t, c.write(&printed))
	assert.NotContains(t, printed.String(), "s3cret")

	for list, want := range map[string]string{
		"[{name: x, url: 'postgres://h/a', url_file: " + a + "}]":          "databases.x.url_file: " + a + ": is given, and so is url",
		"[{name: x, url_file: /nonexistent}]":                              "databases.x.url_file: /nonexistent: cannot be read",
		"[{name: x, url_file: " + a + "}, {name: y, url_file: " + a + "}]": "databases.y.url: leads to the same database as databases.x.url",
	} {
		_, err := loadText(t, "databases: "+list)
		var ce *configError
		require.ErrorAs(t, err, &ce, list)
		require.Len(t, ce.faults, 1, "%v", err)
		require.ErrorContains(t, err, want)
	}
	_, err = loadText(t, fmt.Sprintf("database: {url_file: %s}\ndatabases: [{name: x, url: postgres://h/a}]", a))
	require.ErrorContains(t, err, "database.url_file: is used by no entry of databases")
}

// A password may change in the file; the place may not.
func TestFileIsReadAnew(t *testing.T) {
	t.Parallel()
	path := fileOf(t, "dsn", "postgres://relay:one@db:5432/app?sslmode=disable")
	c, err := loadText(t, "database: {url_file: "+path+"}")
	require.NoError(t, err)
	write := func(text string) { require.NoError(t, os.WriteFile(path, []byte(text), 0o600)) }
	for _, dsn := range []string{"postgres://other:two@db:5432/app?sslmode=require", "host=db port=5432 user=relay password=two dbname=app"} {
		write(dsn)
		now, err := c.Database.DSN()
		require.NoError(t, err)
		assert.Equal(t, dsn, now)
		now, err = c.Database.StreamDSN()
		require.NoError(t, err)
		assert.Equal(t, dsn, now)
	}
	for text, want := range map[string]string{
		"postgres://relay:s3cret@db2:5432/app":         "leads to another server or database than at the start: restart the relay",
		"postgres://relay:s3cret@db:5433/app":          "leads to another server",
		"postgres://relay:s3cret@db:5432/app2":         "leads to another server",
		"postgres://relay:s3cret@db:5432,db2:5432/app": "leads to another server",
		"postgres://relay:s3cret@db:x/app":             "has no valid port",
		"":                                             "is empty",
	} {
		write(text)
		_, err := c.Database.DSN()
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, "database.url_file")
		assert.NotContains(t, err.Error(), "s3cret")
	}
	require.NoError(t, os.Remove(path))
	_, err = c.Database.DSN()
	require.ErrorContains(t, err, "no such file")
	assert.Equal(t, "database.url_file cannot be read: "+path+": no such file or directory", err.Error())
}
