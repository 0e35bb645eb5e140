package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// source is what an image is made of.
type source struct {
	root     string // folder of the sources
	version  string
	revision string // empty: unknown
	created  time.Time
}

// linkerFlags strip the binary and stamp the version. The Dockerfile has the same.
func linkerFlags(version string) string {
	return "-s -w -buildid= -X main.stamped=" + version
}

// compile builds the command. What could differ from one machine to the next and shows in the binary is set or cleared: paths, version control, C, levels of
// the architecture, settings of the person who builds.
func compile(ctx context.Context, s source, p v1.Platform) ([]byte, error) {
	dir, err := os.MkdirTemp("", "outbox-relay-image-")
	if err != nil {
		return nil, fmt.Errorf("folder for the binary: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // what stays in the folder for temporary files is nobody's loss
	file := filepath.Join(dir, "outbox-relay")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", linkerFlags(s.version), "-o", file, "./cmd/outbox-relay") //nolint:gosec // the caller's own version
	cmd.Dir = s.root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Architecture, "GOAMD64=v1", "GOARM64=v8.0", "GOFLAGS=", "GOEXPERIMENT=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the command for %s: %w\n%s", p, err, out)
	}
	binary, err := os.ReadFile(file) //nolint:gosec // made above
	if err != nil {
		return nil, fmt.Errorf("read the binary: %w", err)
	}
	return binary, nil
}
