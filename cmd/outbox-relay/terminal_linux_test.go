package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// atTerminal runs a command at a terminal of its own, as a person does: once the question is there, the keys are typed.
func (d database) atTerminal(t *testing.T, question, keys string, args ...string) (said string, code int) {
	t.Helper()
	ours, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	require.NoError(t, err)
	defer func() { assert.NoError(t, ours.Close()) }()
	require.NoError(t, unix.IoctlSetPointerInt(int(ours.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(ours.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	theirs, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// The kernel may drop what a session's leader has written last, as it hangs the terminal up: a shell leads, and stays until all has been read.
	cmd := exec.CommandContext(ctx, "sh", append([]string{"-c", `trap : INT; "$@"; printf '(exit %d)' $?; read -r _`, "sh", binary(t)}, args...)...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = d.env, theirs, theirs, theirs
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	require.NoError(t, theirs.Close())
	var screen bytes.Buffer
	typed := false
	for part := make([]byte, 1024); ; {
		n, err := ours.Read(part)
		require.NoError(t, err, screen.String())
		screen.Write(part[:n])
		if !typed && strings.Contains(screen.String(), question) {
			typed = true
			_, err = ours.WriteString(keys)
			require.NoError(t, err)
		}
		said, rest, ended := strings.Cut(screen.String(), "(exit ")
		if number, _, whole := strings.Cut(rest, ")"); ended && whole {
			code, err = strconv.Atoi(number)
			require.NoError(t, err)
			_, err = ours.WriteString("\n")
			require.NoError(t, err)
			_ = cmd.Wait() // that of the shell
			require.True(t, typed, said)
			return said, code
		}
	}
}

// TestQuestionsAtATerminal: what is not confirmed is not done, and ctrl-C is an answer, too.
func TestQuestionsAtATerminal(t *testing.T) {
	t.Parallel()
	d := installed(t)
	d.exec(t, `INSERT INTO acme.webhook_dead_letters (delivery_id, webhook_event_id, webhook_endpoint_id, request_url, request_method, request_headers, attempts)
		VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'https://receiver.example', 'POST', '{}', 1)`)
	for _, command := range []struct{ args, question, done string }{
		{"deadletters discard --all", "Go on? [y/N] ", "1 dead letter is discarded"},
		{"tenants remove acme", "Remove tenant acme? What it has queued is forgotten. [y/N] ", "acme is no tenant any more"},
	} {
		const ctrlC = "\x03"
		for _, keys := range []string{ctrlC, "n\n", "y\n"} {
			said, code := d.atTerminal(t, command.question, keys, strings.Fields(command.args)...)
			if keys == "y\n" {
				require.Equal(t, exitOK, code, said)
				require.Contains(t, said, command.done)
				continue
			}
			require.Equal(t, exitFailure, code, "%q: %s", keys, said)
			require.Contains(t, said, "error: nothing was changed")
		}
	}
}

// TestInterruptWhileASecretIsAwaited: whoever was to write it has not, and need not for the command to end.
func TestInterruptWhileASecretIsAwaited(t *testing.T) {
	t.Parallel()
	in, out, err := os.Pipe()
	require.NoError(t, err)
	defer func() {
		assert.NoError(t, in.Close())
		assert.NoError(t, out.Close())
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(t), "endpoints", "rotate-secret", "00000000-0000-0000-0000-000000000001", "--secret-file", "-")
	var said bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stderr = []string{"OUTBOX_RELAY_DATABASE_URL=" + dsn}, in, &said
	require.NoError(t, cmd.Start())
	_, err = out.WriteString("the beginning of a secret")
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		left, err := unix.IoctlGetInt(int(in.Fd()), unix.TIOCINQ)
		return err == nil && left == 0
	}, 10*time.Second, time.Millisecond, "the command to read")
	require.NoError(t, cmd.Process.Signal(os.Interrupt))
	_ = cmd.Wait() // its exit code says it
	require.Equal(t, exitFailure, cmd.ProcessState.ExitCode(), said.String())
	require.Equal(t, "error: nothing was changed\n", said.String())
}
