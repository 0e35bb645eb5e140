package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// builds are binaries, each built once for all tests, in folders that TestMain removes.
type builds struct {
	sync.Once
	dir string
	err error
}

//nolint:gochecknoglobals // see builds
var built, builtFaulty builds

func TestMain(m *testing.M) {
	if proxied() {
		return
	}
	code := pgtest.Main(m)
	for _, b := range []*builds{&built, &builtFaulty} {
		if b.dir != "" {
			_ = os.RemoveAll(b.dir)
		}
	}
	os.Exit(code)
}

// binary returns the path of the real thing, built by the first test that asks.
func binary(t testing.TB) string {
	t.Helper()
	return built.path(t)
}

// faultyBinary is the real thing with the places where it can be killed, and the bugs that can be planted.
func faultyBinary(t testing.TB) string {
	t.Helper()
	return builtFaulty.path(t, "-tags", "failpoints")
}

func (b *builds) path(t testing.TB, flags ...string) string {
	t.Helper()
	b.Do(func() {
		if b.dir, b.err = os.MkdirTemp("", "outbox-relay-test-"); b.err != nil {
			return
		}
		args := append([]string{"build", "-o", filepath.Join(b.dir, "outbox-relay")}, flags...)
		out, err := exec.CommandContext(context.Background(), "go", append(args, ".")...).CombinedOutput()
		if err != nil {
			b.err = fmt.Errorf("build the binary: %w\n%s", err, out)
		}
	})
	require.NoError(t, b.err)
	return filepath.Join(b.dir, "outbox-relay")
}

// outcome is what a finished command left behind.
type outcome struct {
	code     int
	out, err string
}

// invoke runs the binary with nothing in its environment but these variables.
func invoke(t *testing.T, env []string, args ...string) outcome {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(t.Context(), binary(t), args...)
	cmd.Env = append(env, "HOME="+t.TempDir())
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); !ok {
		require.NoError(t, err)
	}
	return outcome{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}
