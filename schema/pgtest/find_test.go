package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestFindOrder(t *testing.T) {
	t.Parallel()
	const v13, v15, v16 = "postgres (PostgreSQL) 13.9", "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)", "postgres (PostgreSQL) 16beta1"
	for _, test := range []struct {
		name    string
		servers map[string]string // folder: what its postgres -V prints
		pgBin   string
		path    []string
		gets    string // the folder into which a server can be got
		want    string
		err     []string
	}{
		{name: "PG_BIN first", servers: map[string]string{"own": v15, "path": v16, "lib/16/bin": v16}, pgBin: "own", path: []string{"path"}, want: "own"},
		{name: "PG_BIN is not replaced", servers: map[string]string{"path": v16}, pgBin: "own", path: []string{"path"}, err: []string{"PG_BIN=", "no such file"}},
		{name: "PG_BIN too old", servers: map[string]string{"own": v13}, pgBin: "own", err: []string{"PG_BIN=", "PostgreSQL 13, older than 14"}},
		{name: "PATH next", servers: map[string]string{"path": v15, "lib/16/bin": v16}, path: []string{"empty", "path"}, want: "path"},
		{name: "PATH by a link", servers: map[string]string{"lib/15/bin": v15}, path: []string{"link"}, want: "lib/15/bin"},
		{name: "old on PATH", servers: map[string]string{"path": v13, "lib/15/bin": v15}, path: []string{"path"}, want: "lib/15/bin"},
		{name: "newest folder", servers: map[string]string{"lib/9.6/bin": "postgres (PostgreSQL) 9.6.24", "lib/15/bin": v15, "other/16/bin": v16}, want: "other/16/bin"},
		{name: "broken folder", servers: map[string]string{"lib/15/bin": v15, "other/16/bin": "no version"}, want: "lib/15/bin"},
		{name: "got", servers: map[string]string{"path": v13}, path: []string{"path"}, gets: "lib/15/bin", want: "lib/15/bin"},
		{name: "none", servers: map[string]string{"path": v13}, path: []string{"path"}, err: []string{"apt-get install postgresql", "PG_BIN", "older than 14", "no way"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			root := reachable(t)
			for dir, v := range test.servers {
				fake(t.Context(), t, filepath.Join(root, dir), v)
			}
			require.NoError(t, os.Mkdir(filepath.Join(root, "link"), 0o755))
			require.NoError(t, os.Symlink(filepath.Join(root, "lib/15/bin/postgres"), filepath.Join(root, "link/postgres")))
			env := map[string]string{}
			if test.pgBin != "" {
				env["PG_BIN"] = filepath.Join(root, test.pgBin)
			}
			for _, dir := range test.path {
				env["PATH"] += filepath.Join(root, dir) + string(os.PathListSeparator)
			}
			unlocked := 0
			f := finder{
				getenv:  func(name string) string { return env[name] },
				folders: []string{filepath.Join(root, "lib/*/bin"), filepath.Join(root, "other/*/bin")},
				lock:    func(context.Context) (func(), error) { return func() { unlocked++ }, nil },
				get: []func(context.Context) error{
					func(context.Context) error { return errors.New("no way") },
					func(ctx context.Context) error {
						if test.gets == "" {
							return errors.New("no other way")
						}
						fake(ctx, t, filepath.Join(root, test.gets), v15)
						return nil
					},
				},
			}
			got, err := f.find(t.Context())
			for _, part := range test.err {
				require.ErrorContains(t, err, part)
			}
			if test.err == nil {
				require.NoError(t, err)
				require.Equal(t, filepath.Join(root, test.want), got)
			}
			if test.gets != "" {
				require.Equal(t, 1, unlocked)
			}
		})
	}
}

func TestFindLooksAgainOnceItHasTheLock(t *testing.T) {
	t.Parallel()
	root := reachable(t)
	f := finder{
		getenv:  func(string) string { return "" },
		folders: []string{root + "/*"},
		lock: func(ctx context.Context) (func(), error) {
			fake(ctx, t, root+"/bin", "postgres (PostgreSQL) 15.1") // by the process that held the lock
			return func() {}, nil
		},
	}
	got, err := f.find(t.Context())
	require.NoError(t, err)
	require.Equal(t, root+"/bin", got)
}

func TestFindTellsAFolderTheServersUserCannotReach(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(reachable(t), "closed", "bin")
	fake(t.Context(), t, dir, "postgres (PostgreSQL) 15.1")
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o700))
	_, err := version(t.Context(), dir)
	if os.Geteuid() == 0 {
		require.ErrorContains(t, err, "permission denied")
	} else {
		require.NoError(t, err)
	}
}

func TestLockFile(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "new", "lock")
	unlock, err := lockFile(t.Context(), file)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = lockFile(ctx, file)
	require.ErrorIs(t, err, context.Canceled)

	waited := make(chan error, 1)
	go func() {
		unlock, err := lockFile(t.Context(), file)
		if err == nil {
			unlock()
		}
		waited <- err
	}()
	unlock()
	assert.NoError(t, <-waited)
}

// reachable is a temporary folder that the user of the servers can reach: testing makes its own for the owner alone.
func reachable(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Chmod(filepath.Dir(dir), 0o755))
	return dir
}

// fake makes a folder that looks like one of PostgreSQL. A shell writes the programs: while this process had them open
// for writing, a child that it forks in another test would hold them open too, and running them could fail with ETXTBSY.
func fake(ctx context.Context, t *testing.T, dir, version string) {
	t.Helper()
	script := fmt.Sprintf(`mkdir -p %[1]q && cd %[1]q && umask 022 && for f in postgres initdb pg_ctl; do
		printf '#!/bin/sh\necho "%[2]s"\n' >$f && chmod 755 $f || exit; done`, dir, version)
	out, err := exec.CommandContext(ctx, "sh", "-c", script).CombinedOutput()
	require.NoError(t, err, string(out))
}
