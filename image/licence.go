package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/google/licensecheck"
)

// allowed are the licences that what is linked into the binary may have: none asks more than that its text goes along, which is why the bill of materials
// has the texts, or, of MPL-2.0, that its own files stay as they are.
func allowed() []string {
	return []string{"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0", "PostgreSQL"}
}

// read is what no scanner knows and somebody has read: of what a module is, in the words of its LICENSE.
func read() map[string]string {
	return map[string]string{"github.com/xi2/xz": "public domain"} // the XZ decoder of the server that "demo" unpacks
}

// minCoverage is how much of a text has to be that of known licences, in percent. The rest are names and years.
const minCoverage = 75

// licences finds the licences of the modules of the sources, by module path, in the modules' own folders.
func licences(ctx context.Context, root string) (map[string][]licence, error) {
	goroot, err := output(ctx, root, "env", "GOROOT")
	if err != nil {
		return nil, err
	}
	folders := map[string]string{"std": strings.TrimSpace(string(goroot))}
	list, err := output(ctx, root, "list", "-m", "-json", "all")
	if err != nil {
		return nil, err
	}
	for decoder := json.NewDecoder(strings.NewReader(string(list))); ; {
		var m struct {
			Path, Dir string
			Main      bool
		}
		if err := decoder.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, fmt.Errorf("list the modules: %w", err)
		}
		if m.Dir != "" && !m.Main { // without a folder: nothing of it was needed
			folders[m.Path] = m.Dir
		}
	}
	found := make(map[string][]licence)
	for path, dir := range folders {
		list, err := licencesIn(dir)
		if err != nil {
			return nil, fmt.Errorf("licence of %s: %w", path, err)
		}
		if name := read()[path]; name != "" && len(list) == 1 && list[0].Named.ID == unknown {
			list[0].Named.ID, list[0].Named.Name = "", name
		}
		found[path] = list
	}
	return found, nil
}

func output(ctx context.Context, root string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // constants of this file
	cmd.Dir, cmd.Env = root, append(os.Environ(), "GOWORK=off")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
	}
	return out, nil
}

const unknown = "unknown"

var licenceFile = regexp.MustCompile(`(?i)^(licen[cs]e|copying)([.-].*)?$`)

// licencesIn reads those at the top of a folder.
func licencesIn(dir string) ([]licence, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var list []licence
	for _, f := range files {
		if f.IsDir() || !licenceFile.MatchString(f.Name()) || strings.HasSuffix(f.Name(), ".go") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(dir, f.Name())) //nolint:gosec // of a module
		if err != nil {
			return nil, err
		}
		coverage := licensecheck.Scan(text)
		ids := make(map[string]struct{})
		for _, match := range coverage.Match {
			ids[match.ID] = struct{}{}
		}
		if coverage.Percent < minCoverage || len(ids) == 0 {
			ids = map[string]struct{}{unknown: {}}
		}
		for _, id := range slices.Sorted(maps.Keys(ids)) {
			list = append(list, licence{named{ID: id, Text: attachment{"text/plain", string(text)}}})
		}
	}
	return list, nil
}

// check tells of components whose licence is missing or is not one of those that are allowed.
func (b *bom) check() error {
	var errs []error
	for _, c := range b.Components {
		if len(c.Licences) == 0 {
			errs = append(errs, fmt.Errorf("%s has no licence that could be found", c.Name))
		}
		for _, l := range c.Licences {
			if l.Named.Name == "" && !slices.Contains(allowed(), l.Named.ID) {
				errs = append(errs, fmt.Errorf("%s has the licence %s, which is none of %s", c.Name, l.Named.ID, strings.Join(allowed(), ", ")))
			}
		}
	}
	return errors.Join(errs...)
}
