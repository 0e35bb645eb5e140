package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stopTimeout bounds how long a process may take to end once it was asked to. The relay may take 20 s to drain and 10 s to record.
const stopTimeout = 40 * time.Second

// process is a contender, or the receiver, at work: a process of its own, so that what it costs can be told from what measures it.
type process struct {
	name   string
	cmd    *exec.Cmd
	stdin  io.Closer
	ask    func() error // asks the process to end; fails only if it has ended
	stdout io.Reader
	stderr tail
	ended  chan struct{} // closed once it has been waited for
	err    error         // how it ended; to be read after ended
}

// child starts this very program in one of its other roles. It ends when its standard input does, by whatever end this process meets.
func child(ctx context.Context, role string, env ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find own binary: %w", err)
	}
	cmd := exec.CommandContext(ctx, self) //nolint:gosec // this program
	cmd.Env = append(append(os.Environ(), roleVar+"="+role), env...)
	p, err := startProcess(role, cmd)
	if err == nil {
		p.ask = p.stdin.Close // a signal as well could meet it when it no longer catches any, and be how it ended
	}
	return p, err
}

// startProcess starts cmd, which must be made with a context and end at SIGTERM. The caller owns the process and must call stop.
func startProcess(name string, cmd *exec.Cmd) (*process, error) {
	p := &process{name: name, cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &p.stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	// A pipe of our own: Wait would close that of StdoutPipe, perhaps before it is read.
	out, in, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), stdin.Close())
	}
	cmd.Stdout = in
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), stdin.Close(), in.Close(), out.Close())
	}
	_ = in.Close() // the process has its own
	p.stdin, p.stdout = stdin, out
	p.ask = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	go func() { // ends with the process, and stop waits for it
		defer close(p.ended)
		p.err = errors.Join(cmd.Wait(), out.Close())
	}()
	return p, nil
}

// stop asks the process to end, waits for that, and returns how it ended. What it wrote to its standard error is in the error.
func (p *process) stop() error {
	select {
	case <-p.ended:
		return p.failure("ended too early")
	default:
	}
	_ = p.ask()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C:
		_ = p.cmd.Process.Kill()
		<-p.ended
		return p.failure("did not end when it was asked to")
	}
	if p.err != nil {
		return p.failure("ended")
	}
	return nil
}

func (p *process) failure(what string) error {
	err := p.err
	if err == nil {
		err = errors.New("exit status 0")
	}
	return fmt.Errorf("%s %s: %w\n%s", p.name, what, err, p.stderr.String())
}

// statOf returns what /proc says of a process, from its state on (proc(5) numbers that 3); nothing where it says nothing.
func statOf(pid string) []string {
	text, err := os.ReadFile("/proc/" + pid + "/stat") //nolint:gosec // a number
	if err != nil {
		return nil
	}
	_, rest, _ := strings.Cut(string(text), ") ") // the name before it may hold anything
	return strings.Fields(rest)
}

// cpu is the time on a processor that the process has had, to a hundredth of a second. It is zero where the system has no /proc.
func (p *process) cpu() time.Duration {
	fields := statOf(strconv.Itoa(p.cmd.Process.Pid))
	if len(fields) < 13 {
		return 0
	}
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err1 != nil || err2 != nil {
		return 0
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}

// peak is the greatest resident size that the process has had, in bytes. It is zero where the system has no /proc.
func (p *process) peak() int64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(text), "\nVmHWM:")
	var kilobytes int64
	if _, err := fmt.Sscan(rest, &kilobytes); err != nil {
		return 0
	}
	return kilobytes << 10
}

// tail keeps the end of what is written to it.
type tail struct {
	mu   sync.Mutex
	text []byte
}

const tailBytes = 4096

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	if over := len(t.text) - tailBytes; over > 0 {
		t.text = append(t.text[:0], t.text[over:]...)
	}
	return len(p), nil
}

// String returns it.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.text)
}
