package relay

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
)

// smallFile is more than a key or a DSN has.
const smallFile = 64 << 10

// readSmall returns what a file holds, without the blanks around it. The error names the file.
func readSmall(path string) (string, error) {
	file, err := os.Open(path) //nolint:gosec // the operator's own configuration names it
	if err != nil {
		return "", fileFault(path, err)
	}
	defer file.Close() //nolint:errcheck // it was read only
	raw, err := io.ReadAll(io.LimitReader(file, smallFile+1))
	if err != nil {
		return "", fileFault(path, err)
	}
	text := strings.TrimSpace(string(raw))
	switch {
	case len(raw) > smallFile:
		return "", fmt.Errorf("cannot be read: %s is larger than %d bytes", path, smallFile)
	case text == "":
		return "", fmt.Errorf("cannot be read: %s is empty", path)
	}
	return text, nil
}

func fileFault(path string, err error) error {
	if cause, ok := errors.AsType[*fs.PathError](err); ok {
		err = cause.Err
	}
	return fmt.Errorf("cannot be read: %s: %w", path, err)
}
