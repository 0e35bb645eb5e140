// Package pgtest runs a real, throw-away PostgreSQL: for tests, for benchmarks and for the demo.
//
// A test asks for a database of its own; all tests of a process share one server:
//
//	func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }
//
//	func TestX(t *testing.T) {
//		t.Parallel()
//		dsn := pgtest.Database(t)
//		…
//	}
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// closeTimeout bounds how long Close waits for the server before it kills it.
const closeTimeout = 15 * time.Second

// Options of a server. The zero value suits a test.
type Options struct {
	// Config holds further settings for postgresql.conf; they override the defaults of this package.
	Config map[string]string
	// Durable leaves fsync, full_page_writes and synchronous_commit on, as PostgreSQL has them. Benchmarks need it.
	Durable bool
	// Data is an empty folder for the data, on a disk of the caller's choice; its user becomes that of the server, which must be able to reach it. It is
	// the caller's to remove after Close. Empty: the data is where the rest is, and goes with it.
	Data string
	// Log is told when PostgreSQL has to be installed or downloaded first. Nil is silent.
	Log io.Writer
}

// Server is a PostgreSQL server with an empty data folder of its own. Its methods are safe for concurrent use.
type Server struct {
	bin     string
	dir     string // holds the data folder and the log; removed by Close
	version int
	port    int
	attr    *syscall.SysProcAttr
	names   atomic.Int64 // databases created so far

	mu   sync.Mutex
	proc *process // nil while the server is down
	pid  int      // of the postmaster that runs, or ran last
}

// Start finds a PostgreSQL (see Find), creates a data folder and starts the server in it: wal_level logical, on a free port of
// 127.0.0.1, superuser postgres without password. The server lives until Close, or until this process ends in whatever
// way; it does not end with ctx, which bounds the start alone.
func Start(ctx context.Context, o Options) (*Server, error) {
	bin, err := Find(ctx, o.Log)
	if err != nil {
		return nil, err
	}
	s := &Server{bin: bin}
	if s.version, err = version(ctx, bin); err != nil {
		return nil, err
	}
	if s.attr, err = unprivileged(); err != nil {
		return nil, err
	}
	if s.dir, err = tempDir(s.attr); err != nil {
		return nil, fmt.Errorf("folder for the PostgreSQL data: %w", err)
	}
	if err := s.create(ctx, o); err != nil {
		return nil, errors.Join(err, s.Close()) //nolint:contextcheck // what there is goes, even if ctx is why
	}
	return s, nil
}

// create runs initdb and starts the server for the first time.
func (s *Server) create(ctx context.Context, o Options) error {
	if o.Data != "" {
		if err := s.keepIn(o.Data); err != nil {
			return fmt.Errorf("folder for the PostgreSQL data: %w", err)
		}
	}
	locale := "C.UTF-8"
	if runtime.GOOS == "darwin" {
		locale = "C" // macOS has no C.UTF-8
	}
	initdb := exec.CommandContext(ctx, filepath.Join(s.bin, "initdb"), "-D", s.data(), "-U", "postgres", "-A", "trust",
		"--encoding=UTF8", "--locale="+locale, "--no-sync", "--no-instructions")
	initdb.SysProcAttr = s.attr
	initdb.Dir = s.dir
	initdb.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := initdb.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", initdb, err, out)
	}
	for attempt := 1; ; attempt++ {
		var err error
		if s.port, err = freePort(ctx); err != nil {
			return err
		}
		if err = s.configure(o); err != nil {
			return err
		}
		// Between freePort and the start, another process may have taken the port.
		if err = s.Restart(ctx); err == nil || attempt == 10 || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
	}
}

// keepIn has the data folder be another one. Everything else finds it under its usual name.
func (s *Server) keepIn(dir string) error {
	if c := s.attr.Credential; c != nil {
		if err := os.Chown(dir, int(c.Uid), int(c.Gid)); err != nil {
			return err
		}
	}
	return os.Symlink(dir, s.data())
}

// configure writes the settings over those of initdb.
func (s *Server) configure(o Options) error {
	settings := map[string]string{
		"listen_addresses":        "127.0.0.1",
		"port":                    strconv.Itoa(s.port),
		"unix_socket_directories": "", // their path would have to be shorter than 104 bytes
		"max_connections":         "300",
		"wal_level":               "logical",
		"max_replication_slots":   "100",
		"max_wal_senders":         "100",
	}
	if !o.Durable {
		settings["fsync"] = "off"
		settings["full_page_writes"] = "off"
		settings["synchronous_commit"] = "off"
	}
	maps.Copy(settings, o.Config)
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, strings.ReplaceAll(settings[name], "'", "''"))
	}
	// initdb's own file says nothing that matters here but the locale, and every database carries that.
	if err := os.WriteFile(filepath.Join(s.data(), "postgresql.conf"), []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write postgresql.conf: %w", err)
	}
	return nil
}

// freePort looks below the range from which systems take the ports of outgoing connections, lest one of those hold the
// port when a stopped server is to start again.
func freePort(ctx context.Context) (int, error) {
	var err error
	for range 100 {
		port := 15_000 + rand.IntN(15_000)
		var l net.Listener
		if l, err = new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, fmt.Errorf("a free port for PostgreSQL: %w", err)
}

// URL is the DSN of a database of this server, for its superuser. It stays the same over Restart.
func (s *Server) URL(database string) string {
	return fmt.Sprintf("postgres://postgres@127.0.0.1:%d/%s?sslmode=disable", s.port, database)
}

// Bin is the folder of the PostgreSQL programs.
func (s *Server) Bin() string { return s.bin }

// Dir is the folder that holds the data folder, named data, and the server's log, named log. Close removes it.
func (s *Server) Dir() string { return s.dir }

// Port is the TCP port on 127.0.0.1.
func (s *Server) Port() int { return s.port }

// Version is the major version: 15, say.
func (s *Server) Version() int { return s.version }

// PID is the process id of the postmaster; that of the last one while the server is down.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) log() string { return filepath.Join(s.dir, "log") }

// Restart starts the server again, on the same port and data. One that still runs is first stopped in mode fast.
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.end(ctx, syscall.SIGINT); err != nil {
		return err
	}
	for {
		err := s.launch(ctx)
		// After a SIGKILL of the postmaster its children take a moment to notice and leave.
		if err == nil || !strings.Contains(err.Error(), "pre-existing shared memory block") {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}

// Stop shuts the server down and waits until it has ended. The modes are those of pg_ctl: smart waits for clients to leave,
// fast rolls their transactions back, immediate ends without a checkpoint, as in a crash. If ctx ends first, the server
// goes on with the shutdown. Stopping a server that is down does nothing.
func (s *Server) Stop(ctx context.Context, mode string) error {
	signals := map[string]syscall.Signal{"smart": syscall.SIGTERM, "fast": syscall.SIGINT, "immediate": syscall.SIGQUIT}
	signal, ok := signals[mode]
	if !ok {
		return fmt.Errorf("stop PostgreSQL: mode %q is none of smart, fast, immediate", mode)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end(ctx, signal)
}

// Kill ends the postmaster with SIGKILL, as the kernel does when memory runs out, and waits until it has ended.
func (s *Server) Kill(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end(ctx, syscall.SIGKILL)
}

// Close ends the server and removes its folder. A closed server cannot be started again; closing it twice does nothing.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	// Immediate, because in mode fast the server would wait for a replication client that does not read.
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.end(ctx, syscall.SIGQUIT)
	if err != nil {
		killCtx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		err = errors.Join(err, s.end(killCtx, syscall.SIGKILL))
	}
	if err := errors.Join(err, os.RemoveAll(s.dir)); err != nil {
		return fmt.Errorf("close PostgreSQL on port %d: %w", s.port, err)
	}
	return nil
}

// end sends the postmaster a signal and waits until it has ended. s.mu is held.
func (s *Server) end(ctx context.Context, signal syscall.Signal) error {
	if s.proc == nil {
		return nil
	}
	// ESRCH: it has ended already.
	if err := syscall.Kill(s.pid, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal PostgreSQL (pid %d): %w", s.pid, err)
	}
	if err := s.proc.wait(ctx); err != nil {
		return fmt.Errorf("PostgreSQL (pid %d) still runs after %s: %w\n%s", s.pid, signal, err, s.proc.output())
	}
	s.proc = nil
	return nil
}
