// Package charts_test renders the chart with the library of Helm and holds what comes out against Kubernetes' own types, the Pod Security Standards, the parser of
// Prometheus, and the real binary. It is a module of its own, so that the relay depends on none of these.
package charts_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// build is the binary, built once for all tests, in a folder that TestMain removes.
type build struct {
	sync.Once
	dir string
	err error
}

//nolint:gochecknoglobals // see build
var built build

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// binary returns the path of the relay, built by the first test that asks.
func binary(t *testing.T) string {
	t.Helper()
	built.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "outbox-relay-chart-"); built.err != nil {
			return
		}
		cmd := exec.CommandContext(context.Background(), "go", "build", "-o", filepath.Join(built.dir, "outbox-relay"), "./cmd/outbox-relay")
		cmd.Dir = ".."
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("build the binary: %w\n%s", err, out)
		}
	})
	require.NoError(t, built.err)
	return filepath.Join(built.dir, "outbox-relay")
}

// invoke runs the binary with nothing in its environment but these variables, and returns what it printed, to either stream.
func invoke(t *testing.T, env []string, args ...string) (output string, err error) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), binary(t), args...)
	cmd.Env = append(env, "HOME="+t.TempDir())
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}
