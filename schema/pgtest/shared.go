package pgtest

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"
)

const (
	sharedTimeout = 10 * time.Minute // to start the shared server; it may have to be installed first
	dropTimeout   = time.Minute      // to drop the database of a test
)

// TB is the part of testing.TB that is needed here; the package is linked into the demo too, where testing has no place.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(f func())
	Context() context.Context
}

// sharedServer is the server that all tests of a process use.
type sharedServer struct {
	mu     sync.Mutex
	server *Server
	err    error // why it could not be started; no second test tries again
}

//nolint:gochecknoglobals // one server for all tests of a process is the point; they have nothing else in common to keep it in
var shared sharedServer

func (s *sharedServer) get(ctx context.Context) (*Server, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil && s.err == nil {
		s.server, s.err = Start(ctx, Options{Log: os.Stderr})
	}
	return s.server, s.err
}

func (s *sharedServer) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.server == nil {
		return nil
	}
	return s.server.Close()
}

// Main runs the tests of a package and then closes the server they shared, if any asked for one. It returns the exit code.
func Main(m interface{ Run() int }) int {
	code := m.Run()
	if err := shared.close(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	return code
}

// Shared returns the server that the tests of this process share; the first call starts it. A test that stops or kills a
// server starts one of its own. Without Main, the server ends with the process all the same.
func Shared(tb TB) *Server {
	tb.Helper()
	// The server outlives the test that happens to be the first.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(tb.Context()), sharedTimeout)
	defer cancel()
	s, err := shared.get(ctx)
	if err != nil {
		tb.Fatalf("start the PostgreSQL of the tests: %v", err)
	}
	return s
}

// Database returns the DSN of a new, empty database on the shared server, for its superuser. When the test ends, it is
// dropped with its replication slots. Slots and roles are common to all databases of a server: tests that run in
// parallel give theirs different names.
func Database(tb TB) string {
	tb.Helper()
	s := Shared(tb)
	name, err := s.CreateDatabase(tb.Context())
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() {
		// The context of the test has ended by now.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(tb.Context()), dropTimeout)
		defer cancel()
		if err := s.DropDatabase(ctx, name); err != nil {
			tb.Errorf("%v", err)
		}
	})
	return s.URL(name)
}
