package pgtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// pollInterval is the time between two looks at a server that is starting.
const pollInterval = 10 * time.Millisecond

// tailSize is how much of the server's log goes into an error, in bytes.
const tailSize = 4 << 10

// supervisor runs the server, $1/postgres, on the data in $2. Its file 3 is a pipe whose other end the process that
// started it holds: `read` returns when that process has ended, in whatever way, then the server is shut down and its
// folder removed. File 4 is a pipe in the other direction, which the supervisor holds open as long as the server runs.
// SIGQUIT is repeated because a background process of sh ignores it until the server has set up its own handlers.
const supervisor = `
"$1/postgres" -D "$2/data" 3<&- 4>&- &
server=$!
(read -r line <&3; trap '' TERM; while kill -QUIT $server; do sleep 0.1; done) 2>/dev/null 4>&- &
watcher=$!
exec 3<&-
wait $server
kill $watcher 2>/dev/null
wait $watcher && rm -rf "$2"
`

// process is a server under its supervisor. No goroutine waits for it, so that tests can look for leaked ones.
type process struct {
	cmd    *exec.Cmd
	leash  *os.File // the server is shut down when this is closed
	alive  *os.File // ends when the supervisor has ended
	log    string
	offset int64 // where the log of this process begins
}

// launch starts the server and waits until it takes connections. s.mu is held.
func (s *Server) launch(ctx context.Context) error {
	p, err := s.spawn(ctx)
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	return s.ready(ctx, p)
}

// spawn starts the supervisor. The ends of the pipes that belong to it are closed here when spawn returns.
func (s *Server) spawn(ctx context.Context) (*process, error) {
	log, err := os.OpenFile(s.log(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	offset, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	leashEnd, leash, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = leashEnd.Close() }()
	alive, aliveEnd, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, leash.Close())
	}
	defer func() { _ = aliveEnd.Close() }()

	// The server outlives ctx; a context that never ends spares exec the goroutine that would watch it.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "/bin/sh", "-c", supervisor, "pgtest", s.bin, s.dir)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C") // without it, macOS refuses to start a server
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{leashEnd, aliveEnd}
	cmd.SysProcAttr = s.attr
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, leash.Close(), alive.Close())
	}
	return &process{cmd: cmd, leash: leash, alive: alive, log: s.log(), offset: offset}, nil
}

// ready waits until p takes connections and makes it the process of s. One that does not is ended.
func (s *Server) ready(ctx context.Context, p *process) error {
	for {
		// A file with the last pid is left over from a postmaster that was killed.
		if pid, ok := postmaster(s.data()); ok && pid != s.pid {
			s.pid, s.proc = pid, p
			return nil
		}
		poll, cancel := context.WithTimeout(ctx, pollInterval)
		err := p.wait(poll)
		cancel()
		if err == nil {
			return fmt.Errorf("PostgreSQL in %s ended while starting:\n%s", s.dir, p.output())
		}
		if ctx.Err() != nil {
			// Dropping the leash makes the supervisor end the server; the error is what counts here.
			_ = p.leash.Close()
			_ = p.wait(context.WithoutCancel(ctx))
			return fmt.Errorf("wait for PostgreSQL in %s to start: %w\n%s", s.dir, ctx.Err(), p.output())
		}
	}
}

// postmaster reads the pid of the server on a data folder, and whether it takes connections.
func postmaster(data string) (pid int, ok bool) {
	// Line 1 is the pid, line 8 the state (src/include/utils/pidfile.h).
	b, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	lines := strings.Split(string(b), "\n")
	if err != nil || len(lines) < 8 {
		return 0, false
	}
	if state := strings.TrimSpace(lines[7]); state != "ready" && state != "standby" { // a hot standby takes them, too
		return 0, false
	}
	pid, err = strconv.Atoi(lines[0])
	return pid, err == nil
}

// wait returns nil once the server has ended, or the error of ctx if that ends first.
func (p *process) wait(ctx context.Context) error {
	if err := p.alive.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.alive.SetReadDeadline(time.Now()) })
	_, err := p.alive.Read(make([]byte, 1))
	if !stop() && errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	if !errors.Is(err, io.EOF) {
		return fmt.Errorf("wait for the supervisor: %w", err)
	}
	// The exit status is of no use: an immediate shutdown is not 0 either.
	_ = p.cmd.Wait()
	return errors.Join(p.leash.Close(), p.alive.Close())
}

// output is the end of what the server has logged since it was started.
func (p *process) output() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	b = b[min(p.offset, int64(len(b))):]
	return string(tail(b))
}
