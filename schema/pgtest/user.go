package pgtest

import (
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// unprivileged returns how the programs of PostgreSQL are started: initdb and postgres refuse to run as root, so root
// starts them as postgres or, where that user does not exist, as nobody. Their own process group keeps a terminal's ^C
// from reaching the server before the test that uses it.
func unprivileged() (*syscall.SysProcAttr, error) {
	attr := &syscall.SysProcAttr{Setpgid: true}
	if os.Geteuid() != 0 {
		return attr, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, fmt.Errorf("a user to run PostgreSQL as (root cannot): %w", err)
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("uid of %s: %w", u.Username, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("gid of %s: %w", u.Username, err)
	}
	attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	return attr, nil
}

// as says who a program ran as, for an error message.
func as(attr *syscall.SysProcAttr) string {
	if attr.Credential == nil {
		return ""
	}
	return fmt.Sprintf(" as uid %d", attr.Credential.Uid)
}

// tempDir makes a folder that the user of attr owns and can reach.
func tempDir(attr *syscall.SysProcAttr) (string, error) {
	base := os.TempDir()
	if attr.Credential != nil && !open(base) {
		base = "/tmp" // root's TMPDIR may be closed to others, as with pam_tmpdir
	}
	dir, err := os.MkdirTemp(base, "pgtest-")
	if err != nil {
		return "", err
	}
	if c := attr.Credential; c != nil {
		if err := os.Chown(dir, int(c.Uid), int(c.Gid)); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// open reports whether every user can reach dir.
func open(dir string) bool {
	for {
		info, err := os.Stat(dir)
		if err != nil || info.Mode()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
		dir = filepath.Dir(dir)
	}
}

// cacheDir is where a downloaded server stays. Root's own cache is usually closed to the user that runs the server.
func cacheDir() (string, error) {
	dir := "/var/cache"
	if os.Geteuid() != 0 {
		var err error
		if dir, err = os.UserCacheDir(); err != nil {
			return "", fmt.Errorf("cache folder: %w", err)
		}
	}
	return filepath.Join(dir, "outbox-relay"), nil
}
