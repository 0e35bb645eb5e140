package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// MinVersion is the oldest PostgreSQL major version the relay works with.
const MinVersion = 14

// Find returns the folder that holds postgres, initdb and pg_ctl. It looks in PG_BIN, on PATH and in the usual install
// folders; then it installs PostgreSQL with apt-get (as root on a Debian-like system) or downloads an embedded server
// into a cache folder. What it installs is told to log; a nil log is silent. Several processes may call it at once: one
// installs, the others wait for it.
func Find(ctx context.Context, log io.Writer) (string, error) {
	if log == nil {
		log = io.Discard
	}
	cache, cacheErr := cacheDir()
	f := finder{
		getenv: os.Getenv,
		folders: []string{
			"/usr/lib/postgresql/*/bin",
			"/opt/homebrew/opt/postgresql@*/bin",
			"/usr/local/opt/postgresql@*/bin",
			"/opt/homebrew/bin",
			"/Applications/Postgres.app/Contents/Versions/*/bin",
			"/usr/pgsql-*/bin",
		},
		lock: func(ctx context.Context) (func(), error) {
			if cacheErr != nil {
				return nil, cacheErr
			}
			return lockFile(ctx, filepath.Join(cache, "install.lock"))
		},
		get: []func(context.Context) error{
			func(ctx context.Context) error { return aptInstall(ctx, log) },
			func(ctx context.Context) error { return download(ctx, log, embeddedRepository, cache) },
		},
	}
	if cacheErr == nil {
		f.folders = append(f.folders, filepath.Join(cache, "postgresql-*", "bin"))
	}
	return f.find(ctx)
}

// finder holds what Find depends on, so that tests can look at folders of their own.
type finder struct {
	getenv  func(string) string
	folders []string                                         // glob patterns
	lock    func(context.Context) (unlock func(), err error) // keeps other processes from installing at the same time
	get     []func(context.Context) error                    // ways to get a server into one of the folders, tried in order
}

func (f finder) find(ctx context.Context) (string, error) {
	if dir := f.getenv("PG_BIN"); dir != "" {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return "", fmt.Errorf("PG_BIN: %w", err)
		}
		if _, err := version(ctx, dir); err != nil {
			return "", fmt.Errorf("PG_BIN=%s: %w; PG_BIN must name the folder that holds postgres, initdb and pg_ctl", dir, err)
		}
		return dir, nil
	}
	bin, unusable := f.installed(ctx)
	if bin != "" {
		return bin, nil
	}
	unlock, err := f.lock(ctx)
	if err != nil {
		return "", notFound(append(unusable, err))
	}
	defer unlock()
	// Another process may have installed it while this one waited.
	if bin, _ = f.installed(ctx); bin != "" {
		return bin, nil
	}
	var problems []error
	for _, get := range f.get {
		err := get(ctx)
		if bin, unusable = f.installed(ctx); bin != "" {
			return bin, nil
		}
		problems = append(problems, err)
	}
	return "", notFound(append(unusable, problems...))
}

func notFound(problems []error) error {
	return fmt.Errorf("no PostgreSQL %d or newer was found, and none could be got: install it "+
		"(Debian, Ubuntu: apt-get install postgresql; Fedora: dnf install postgresql-server; macOS: brew install postgresql@17) "+
		"or set PG_BIN to the folder that holds postgres, initdb and pg_ctl: %w", MinVersion, errors.Join(problems...))
}

// installed looks on PATH, then for the newest server in the install folders. The problems tell why a candidate was left.
func (f finder) installed(ctx context.Context) (bin string, problems []error) {
	for _, dir := range filepath.SplitList(f.getenv("PATH")) {
		// The link in /usr/local/bin has no share and lib folders beside it: the file it leads to has.
		file, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres"))
		if err != nil {
			continue
		}
		dir, err := filepath.Abs(filepath.Dir(file))
		if err == nil {
			_, err = version(ctx, dir)
		}
		if err == nil {
			return dir, nil
		}
		problems = append(problems, fmt.Errorf("%s on PATH: %w", file, err))
	}
	newest := 0
	for _, pattern := range f.folders {
		// The only error of Glob is a malformed pattern; ours are constants.
		dirs, _ := filepath.Glob(pattern)
		for _, dir := range dirs {
			if _, err := os.Stat(filepath.Join(dir, "postgres")); err != nil {
				continue
			}
			v, err := version(ctx, dir)
			if err != nil {
				problems = append(problems, fmt.Errorf("%s: %w", dir, err))
				continue
			}
			if v > newest {
				bin, newest = dir, v
			}
		}
	}
	return bin, problems
}

// version returns the major version of the server in dir, or why it cannot be used. It runs the program as the user that
// the server will run as, so that a folder this user cannot reach (below /root, say) is found out here.
func version(ctx context.Context, dir string) (int, error) {
	for _, name := range []string{"initdb", "pg_ctl"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			return 0, err
		}
	}
	attr, err := unprivileged()
	if err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "-V")
	cmd.SysProcAttr = attr
	cmd.Dir = "/" // ours may be closed to that user
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("run it%s: %w", as(attr), err)
	}
	// "postgres (PostgreSQL) 15.13 (Debian 15.13-0+deb12u1)"
	_, number, _ := strings.Cut(string(out), ") ")
	var v int
	if _, err := fmt.Sscanf(number, "%d", &v); err != nil {
		return 0, fmt.Errorf("postgres -V printed %q: no version", out)
	}
	if v < MinVersion {
		return 0, fmt.Errorf("it is PostgreSQL %d, older than %d", v, MinVersion)
	}
	return v, nil
}
