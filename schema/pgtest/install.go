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
	"syscall"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// lockPollInterval is the time between two tries to get the lock of a process that installs PostgreSQL.
const lockPollInterval = 200 * time.Millisecond

// lockFile takes an exclusive lock on a file, which it creates with its folder. The lock ends with the process at the latest.
func lockFile(ctx context.Context, file string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", file, err), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("wait for the lock %s: %w", file, ctx.Err()), f.Close())
		case <-time.After(lockPollInterval):
		}
	}
}

// createCluster is the file in which Debian's packages are told whether to create, and start, a server of their own.
const createCluster = "/etc/postgresql-common/createcluster.conf"

// aptInstall installs the PostgreSQL of the distribution.
func aptInstall(ctx context.Context, log io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("apt-get install postgresql: only root can do that")
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return errors.New("apt-get install postgresql: not a Debian-like system")
	}
	_, _ = fmt.Fprintln(log, "PostgreSQL is not there yet: apt-get install postgresql")
	restore, err := withoutCluster()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, restore()) }()
	_, _ = fmt.Fprintln(log, "The package starts no server by itself now. One of your own on port 5432 takes, later: pg_createcluster VERSION main --start")
	install := []string{"install", "-y", "--no-install-recommends", "postgresql"}
	if aptGet(ctx, install...) == nil {
		return nil
	}
	// Images come without package lists, and old lists name packages that are gone.
	_, _ = fmt.Fprintln(log, "apt-get update, then once more")
	if err := aptGet(ctx, "update"); err != nil {
		return err
	}
	return aptGet(ctx, install...)
}

// withoutCluster keeps the package from starting a server on port 5432, until restore is called. A file that is there already is the owner's will.
func withoutCluster() (restore func() error, err error) {
	if err := os.MkdirAll(filepath.Dir(createCluster), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(createCluster, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, os.ErrExist) {
		return func() error { return nil }, nil
	}
	if err != nil {
		return nil, err
	}
	_, err = f.WriteString("create_main_cluster = false\n")
	return func() error { return os.Remove(createCluster) }, errors.Join(err, f.Close())
}

func aptGet(ctx context.Context, args ...string) error {
	args = append([]string{"-q", "-o", "DPkg::Lock::Timeout=300"}, args...)
	cmd := exec.CommandContext(ctx, "apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "UCF_FORCE_CONFFOLD=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", cmd, err, tail(out))
	}
	return nil
}

const (
	embeddedVersion    = embeddedpostgres.V17
	embeddedRepository = "https://repo1.maven.org/maven2"
)

// download puts an embedded server into the cache folder. The library offers no download without a start, so it is
// given a data folder it takes for an old one: that spares initdb, and pg_ctl refuses to start on it, as root and otherwise.
// The download itself cannot be cancelled.
func download(ctx context.Context, log io.Writer, repository, cache string) (err error) {
	target := filepath.Join(cache, "postgresql-"+string(embeddedVersion))
	if _, err := os.Stat(target); err == nil {
		return fmt.Errorf("%s is there, but of no use; remove it to download it again", target)
	}
	port, err := freePort(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(cache, "download-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte(embeddedVersion), 0o644); err != nil {
		return err
	}
	server := filepath.Join(dir, "postgresql")
	_, _ = fmt.Fprintf(log, "PostgreSQL is not there yet: download of %s from %s to %s\n", embeddedVersion, repository, cache)
	err = embeddedpostgres.NewDatabase(embeddedpostgres.DefaultConfig().
		Version(embeddedVersion).
		BinaryRepositoryURL(repository).
		Port(uint32(port)).
		CachePath(dir).
		RuntimePath(filepath.Join(dir, "run")).
		BinariesPath(server).
		DataPath(data).
		Logger(io.Discard)).Start()
	if err != nil && !strings.HasPrefix(err.Error(), "could not start postgres using ") {
		return fmt.Errorf("download of PostgreSQL %s: %w", embeddedVersion, err)
	}
	// Renamed in one piece: what is in the cache is complete.
	return os.Rename(server, target)
}

// tail is the end of a program's output, for an error message.
func tail(output []byte) []byte {
	return output[max(0, len(output)-tailSize):]
}
