package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// lockPollInterval is the time between two tries to get the lock of another process that installs PostgreSQL.
const lockPollInterval = 200 * time.Millisecond

// lockFile takes an exclusive lock that ends with the process, creating the file and its folder.
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

var errNotDebianRoot = errors.New("apt-get install: needs root on a Debian-like system")

func aptInstall(ctx context.Context, log io.Writer) error {
	if _, err := exec.LookPath("apt-get"); err != nil || os.Geteuid() != 0 {
		return errNotDebianRoot
	}
	_, _ = ctx, log
	return errNotDebianRoot
}

const embeddedRepository = "https://repo1.maven.org/maven2"

func download(_ context.Context, _ io.Writer, _, _ string) error { return errors.New("no download") }
