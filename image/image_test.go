package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"debug/buildinfo"
	"debug/elf"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) { os.Exit(pgtest.Main(m)) }

// made is the image of these sources, built once for all tests.
//
//nolint:gochecknoglobals // building takes its time
var made struct {
	sync.Once
	image *assembled
	err   error
}

func testSource(root string) source {
	return source{root: root, version: "v1.2.3-test", revision: "abc", created: time.Unix(1_700_000_000, 0).UTC()}
}

func image(t *testing.T) *assembled {
	t.Helper()
	made.Do(func() { made.image, made.err = assemble(t.Context(), testSource("..")) })
	require.NoError(t, made.err)
	return made.image
}

// TestTwoBuildsAreTheSame: another checkout, in another folder, gives the same file.
func TestTwoBuildsAreTheSame(t *testing.T) {
	t.Parallel()
	here := image(t) // first: what compiles the same is in the cache then, and only linked and packed again
	checkout := filepath.Join(t.TempDir(), "elsewhere")
	for _, room := range []string{"cmd", "delivery", "outbox", "relay", "schema", "seal"} {
		require.NoError(t, os.CopyFS(filepath.Join(checkout, room), os.DirFS(filepath.Join("..", room))))
	}
	for _, file := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join("..", file))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(checkout, file), data, 0o600))
	}
	other, err := assemble(t.Context(), testSource(checkout))
	require.NoError(t, err)
	sums := make(map[string]string)
	for name, a := range map[string]*assembled{"here": here, "elsewhere": other} {
		file := filepath.Join(t.TempDir(), name+".tar")
		require.NoError(t, a.write(file))
		data, err := os.ReadFile(file)
		require.NoError(t, err)
		sums[name] = fmt.Sprintf("%x", sha256.Sum256(data))
	}
	assert.Equal(t, sums["here"], sums["elsewhere"])
}

// unpack reads the layout back, as a container engine would.
func unpack(t *testing.T) v1.ImageIndex {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "image.tar")
	require.NoError(t, image(t).write(file))
	data, err := os.ReadFile(file)
	require.NoError(t, err)
	untar(t, data, dir)
	index, err := layout.ImageIndexFromPath(dir)
	require.NoError(t, err)
	manifest, err := index.IndexManifest()
	require.NoError(t, err)
	require.Len(t, manifest.Manifests, 1, "one image, so that nobody has to choose")
	assert.Equal(t, "v1.2.3-test", manifest.Manifests[0].Annotations["org.opencontainers.image.ref.name"])
	inner, err := index.ImageIndex(manifest.Manifests[0].Digest)
	require.NoError(t, err)
	return inner
}

// untar unpacks into dir, and returns the headers by name.
func untar(t *testing.T, data []byte, dir string) map[string]*tar.Header {
	t.Helper()
	headers := make(map[string]*tar.Header)
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers
		}
		require.NoError(t, err)
		headers[h.Name] = h
		assert.Equal(t, testSource("").created, h.ModTime.UTC(), h.Name)
		name := filepath.Join(dir, filepath.FromSlash(h.Name))
		if h.Typeflag == tar.TypeDir {
			require.NoError(t, os.MkdirAll(name, 0o755))
			continue
		}
		content, err := io.ReadAll(r)
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		require.NoError(t, os.WriteFile(name, content, h.FileInfo().Mode().Perm()))
	}
}

// root unpacks the layers of an image.
func root(t *testing.T, one v1.Image) (dir string, headers map[string]*tar.Header) {
	t.Helper()
	dir, headers = t.TempDir(), make(map[string]*tar.Header)
	layers, err := one.Layers()
	require.NoError(t, err)
	for _, l := range layers {
		content, err := l.Uncompressed()
		require.NoError(t, err)
		data, err := io.ReadAll(content)
		require.NoError(t, err)
		maps.Copy(headers, untar(t, data, dir))
	}
	return dir, headers
}

func TestImage(t *testing.T) {
	t.Parallel()
	index := unpack(t)
	require.NoError(t, validate.Index(index), "digests and sizes are as said")
	manifest, err := index.IndexManifest()
	require.NoError(t, err)
	assert.Equal(t, types.OCIImageIndex, manifest.MediaType)
	assert.Equal(t, "v1.2.3-test", manifest.Annotations["org.opencontainers.image.version"])
	require.Len(t, manifest.Manifests, 4, "two platforms and what each is made of")

	machines := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}
	for i, p := range platforms() {
		d := manifest.Manifests[i]
		assert.Equal(t, p, *d.Platform)
		one, err := index.Image(d.Digest)
		require.NoError(t, err)
		size, err := compressedSize(one)
		require.NoError(t, err)
		t.Logf("%s: %.1f MB compressed, %.1f MB binary", p, float64(size)/1e6, float64(len(image(t).platforms[i].binary))/1e6)
		assert.Less(t, size, int64(25_000_000), "what a pull transfers")

		config, err := one.ConfigFile()
		require.NoError(t, err)
		assert.Equal(t, p.Architecture, config.Architecture)
		assert.Equal(t, "65532:65532", config.Config.User)
		assert.Equal(t, []string{"outbox-relay"}, config.Config.Entrypoint)
		assert.Equal(t, []string{"run"}, config.Config.Cmd)
		assert.Equal(t, "abc", config.Config.Labels["org.opencontainers.image.revision"])
		assert.Equal(t, "2023-11-14T22:13:20Z", config.Config.Labels["org.opencontainers.image.created"])
		assert.Equal(t, testSource("").created, config.Created.UTC())

		dir, headers := root(t, one)
		var files []string
		for name, h := range headers {
			assert.Zero(t, h.Uid, name)
			if h.Typeflag == tar.TypeReg {
				files = append(files, name)
			}
		}
		assert.ElementsMatch(t, []string{"etc/group", "etc/passwd", "etc/ssl/certs/ca-certificates.crt", "usr/local/bin/outbox-relay"}, files)
		binary, err := elf.Open(filepath.Join(dir, "usr/local/bin/outbox-relay"))
		require.NoError(t, err)
		assert.Equal(t, machines[p.Architecture], binary.Machine)
		for _, program := range binary.Progs {
			assert.NotEqual(t, elf.PT_INTERP, program.Type, "it is not static")
		}
		require.NoError(t, binary.Close())
	}
}

// TestVersion: the binary that runs here says the version it was stamped with, with nothing in its environment and no file but itself.
func TestVersion(t *testing.T) {
	t.Parallel()
	cmd := exec.CommandContext(t.Context(), hostBinary(t), "version")
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	assert.Equal(t, "outbox-relay v1.2.3-test "+runtime.Version()+"\n", string(out))
}

// hostBinary is the binary of the image for this machine.
func hostBinary(t *testing.T) string {
	t.Helper()
	for _, one := range image(t).platforms {
		if one.platform.Architecture == runtime.GOARCH {
			dir, _ := root(t, one.image)
			return filepath.Join(dir, "usr/local/bin/outbox-relay")
		}
	}
	require.Fail(t, "the image is not for "+runtime.GOARCH)
	return ""
}

func TestCertificates(t *testing.T) {
	t.Parallel()
	dir, _ := root(t, image(t).platforms[0].image)
	data, err := os.ReadFile(filepath.Join(dir, "etc/ssl/certs/ca-certificates.crt"))
	require.NoError(t, err)
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(data))
	count := 0
	for rest := data; ; count++ {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		require.NoError(t, err)
		assert.True(t, certificate.IsCA, certificate.Subject)
	}
	assert.Greater(t, count, 100)
}

// TestBillOfMaterials: it lists every module that is in the binary, and belongs to the image.
func TestBillOfMaterials(t *testing.T) {
	t.Parallel()
	index := unpack(t)
	manifest, err := index.IndexManifest()
	require.NoError(t, err)
	for i, one := range image(t).platforms {
		d := manifest.Manifests[len(platforms())+i]
		assert.Equal(t, "unknown", d.Platform.OS, "no engine takes it for an image")
		artifact, err := index.Image(d.Digest)
		require.NoError(t, err)
		wrapped, err := artifact.Manifest()
		require.NoError(t, err)
		assert.EqualValues(t, bomType, wrapped.Config.MediaType)
		assert.Equal(t, manifest.Manifests[i].Digest, wrapped.Subject.Digest)
		layers, err := artifact.Layers()
		require.NoError(t, err)
		content, err := layers[0].Compressed()
		require.NoError(t, err)
		data, err := io.ReadAll(content)
		require.NoError(t, err)

		var b bom
		require.NoError(t, json.Unmarshal(data, &b))
		assert.Equal(t, "pkg:golang/github.com/neo-commons/outbox-relay@v1.2.3-test", b.Metadata.Component.PURL)
		assert.Regexp(t, `^urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, b.SerialNumber)
		assert.Equal(t, fmt.Sprintf("%x", sha256.Sum256(one.binary)), b.Metadata.Component.Hashes[0].Content)
		listed := make(map[string]string)
		for _, c := range b.Components {
			listed[c.Name] = c.Version
			require.NotEmpty(t, c.Licences, c.Name)
			for _, l := range c.Licences {
				assert.NotEmpty(t, l.Named.Text.Content, c.Name)
			}
			switch c.Name {
			case "std":
				assert.Equal(t, "BSD-3-Clause", c.Licences[0].Named.ID)
			case "github.com/jackc/pgx/v5":
				assert.Equal(t, "MIT", c.Licences[0].Named.ID)
			case "github.com/hashicorp/go-retryablehttp":
				assert.Equal(t, "MPL-2.0", c.Licences[0].Named.ID)
			}
		}
		info, err := buildinfo.Read(bytes.NewReader(one.binary))
		require.NoError(t, err)
		require.Greater(t, len(info.Deps), 10)
		for _, m := range info.Deps {
			assert.Equal(t, m.Version, listed[m.Path], m.Path)
		}
		assert.Contains(t, listed, "github.com/jackc/pgx/v5")
		assert.Equal(t, strings.TrimPrefix(runtime.Version(), "go"), listed["std"])
		assert.Len(t, b.Dependencies[0].DependsOn, len(b.Components))
	}
}

// TestLicencesAreLookedAt: a module whose licence is missing, unknown or not allowed does not get into an image unnoticed.
func TestLicencesAreLookedAt(t *testing.T) {
	t.Parallel()
	binary := image(t).platforms[0].binary
	found, err := licences(t.Context(), "..")
	require.NoError(t, err)
	_, err = billOfMaterials("v1", binary, found)
	require.NoError(t, err)

	const module = "github.com/jackc/pgx/v5"
	dir := t.TempDir()
	for text, want := range map[string]string{
		"":                                       "no licence that could be found",
		"Ask my boss.":                           "the licence unknown",
		"SPDX-License-Identifier: AGPL-3.0-only": "the licence",
	} {
		if text != "" {
			require.NoError(t, os.WriteFile(filepath.Join(dir, "LICENSE.txt"), []byte(text), 0o600))
		}
		other := maps.Clone(found)
		other[module], err = licencesIn(dir)
		require.NoError(t, err)
		_, err = billOfMaterials("v1", binary, other)
		require.ErrorContains(t, err, module+" has "+want)
		_ = os.Remove(filepath.Join(dir, "LICENSE.txt"))
	}
}

// TestDockerfile makes the same of the sources.
func TestDockerfile(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../cmd/outbox-relay/Dockerfile")
	require.NoError(t, err)
	config, err := image(t).platforms[0].image.ConfigFile()
	require.NoError(t, err)
	quoted := func(list []string) string { return `["` + strings.Join(list, `", "`) + `"]` }
	for _, line := range []string{
		"USER " + config.Config.User, "ENTRYPOINT " + quoted(config.Config.Entrypoint), "CMD " + quoted(config.Config.Cmd), "ENV " + config.Config.Env[0],
		"WORKDIR " + config.Config.WorkingDir, "EXPOSE 9464", "STOPSIGNAL " + config.Config.StopSignal,
		"COPY --from=build /out/outbox-relay /usr/local/bin/outbox-relay",
	} {
		assert.Contains(t, string(text), "\n"+line+"\n")
	}
	assert.Contains(t, string(text), `-trimpath -buildvcs=false -ldflags "`+linkerFlags("$VERSION")+`"`)
	for label, value := range config.Config.Labels {
		if !regexp.MustCompile(`\.(version|revision|created)$`).MatchString(label) {
			assert.Contains(t, string(text), label+`="`+value+`"`)
		}
	}
}
