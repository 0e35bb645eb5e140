package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// user is nonroot of the distroless images, whom policies know.
const user = "65532:65532"

// assembled is an image for all platforms.
type assembled struct {
	source    source
	index     v1.ImageIndex
	platforms []onePlatform
}

type onePlatform struct {
	platform v1.Platform
	binary   []byte
	image    v1.Image
	bom      []byte
}

func platforms() []v1.Platform {
	return []v1.Platform{{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64"}}
}

// assemble builds for every platform. The index lists the images and, for no platform, what each is made of: a bill of materials with the image as its subject,
// as registries list it.
func assemble(ctx context.Context, s source) (*assembled, error) {
	base, err := baseLayer(s.created)
	if err != nil {
		return nil, err
	}
	found, err := licences(ctx, s.root)
	if err != nil {
		return nil, err
	}
	a := &assembled{source: s, index: mutate.IndexMediaType(empty.Index, types.OCIImageIndex)}
	var boms []mutate.IndexAddendum
	for _, p := range platforms() {
		one := onePlatform{platform: p}
		if one.binary, err = compile(ctx, s, p); err != nil {
			return nil, err
		}
		if one.image, err = makeImage(s, p, base, one.binary); err != nil {
			return nil, err
		}
		if one.bom, err = billOfMaterials(s.version, one.binary, found); err != nil {
			return nil, err
		}
		a.index = mutate.AppendManifests(a.index, mutate.IndexAddendum{Add: one.image, Descriptor: v1.Descriptor{Platform: &p}})
		bom, err := bomArtifact(one.image, one.bom)
		if err != nil {
			return nil, err
		}
		boms = append(boms, mutate.IndexAddendum{Add: bom, Descriptor: v1.Descriptor{
			ArtifactType: bomType, Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
		}})
		a.platforms = append(a.platforms, one)
	}
	a.index = mutate.AppendManifests(a.index, boms...)
	annotated, ok := mutate.Annotations(a.index, s.labels()).(v1.ImageIndex)
	if !ok {
		return nil, errors.New("annotate the index: it is none any more")
	}
	a.index = annotated
	return a, nil
}

func (s source) labels() map[string]string {
	labels := map[string]string{
		"org.opencontainers.image.title":       "outbox-relay",
		"org.opencontainers.image.description": "Sends webhooks from PostgreSQL",
		"org.opencontainers.image.source":      "https://github.com/neo-commons/outbox-relay",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     s.version,
		"org.opencontainers.image.created":     s.created.Format(time.RFC3339),
	}
	if s.revision != "" {
		labels["org.opencontainers.image.revision"] = s.revision
	}
	return labels
}

func makeImage(s source, p v1.Platform, base v1.Layer, binary []byte) (v1.Image, error) {
	top, err := binaryLayer(s.created, binary)
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	created := v1.Time{Time: s.created}
	image, err = mutate.Append(image,
		mutate.Addendum{Layer: base, History: v1.History{Created: created, CreatedBy: "certificates and user"}},
		mutate.Addendum{Layer: top, History: v1.History{Created: created, CreatedBy: "go build ./cmd/outbox-relay"}},
	)
	if err != nil {
		return nil, fmt.Errorf("put layers together: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("configuration of the image: %w", err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = p.OS, p.Architecture, created
	config.Config = v1.Config{
		User:         user,
		Entrypoint:   []string{"outbox-relay"},
		Cmd:          []string{"run"},
		Env:          []string{"PATH=/usr/local/bin"},
		WorkingDir:   "/home/nonroot",
		ExposedPorts: map[string]struct{}{"9464/tcp": {}},
		Labels:       s.labels(),
		StopSignal:   "SIGTERM",
	}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return nil, fmt.Errorf("configure the image: %w", err)
	}
	return image, nil
}

// bomArtifact wraps a bill of materials so that a registry lists it with the image it belongs to.
func bomArtifact(image v1.Image, bom []byte) (v1.Image, error) {
	artifact := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), bomType)
	artifact, err := mutate.AppendLayers(artifact, static.NewLayer(bom, bomType))
	if err != nil {
		return nil, fmt.Errorf("pack the bill of materials: %w", err)
	}
	subject, err := partial.Descriptor(image)
	if err != nil {
		return nil, fmt.Errorf("describe the image: %w", err)
	}
	joined, ok := mutate.Subject(artifact, v1.Descriptor{MediaType: subject.MediaType, Size: subject.Size, Digest: subject.Digest}).(v1.Image)
	if !ok {
		return nil, errors.New("join the bill of materials to its image: it is no image any more")
	}
	return joined, nil
}

// write makes the tar of an OCI layout, which "docker load", "podman load" and "skopeo copy oci-archive:" read.
func (a *assembled) write(file string) error {
	dir, err := os.MkdirTemp("", "outbox-relay-layout-")
	if err != nil {
		return fmt.Errorf("folder for the layout: %w", err)
	}
	defer func() { _ = os.RemoveAll(dir) }() // what stays in the folder for temporary files is nobody's loss
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("begin the layout: %w", err)
	}
	name := map[string]string{"org.opencontainers.image.ref.name": a.source.version, "io.containerd.image.name": "ghcr.io/neo-commons/outbox-relay:" + a.source.version}
	if err := path.AppendIndex(a.index, layout.WithAnnotations(name)); err != nil {
		return fmt.Errorf("write the layout: %w", err)
	}
	var entries []entry
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error { // in lexical order
		if err != nil || name == dir {
			return err
		}
		inside, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if d.IsDir() {
			entries = append(entries, entry{filepath.ToSlash(inside) + "/", 0o755, nil})
			return nil
		}
		data, err := os.ReadFile(name) //nolint:gosec // written above
		entries = append(entries, entry{filepath.ToSlash(inside), 0o644, data})
		return err
	})
	if err != nil {
		return fmt.Errorf("read the layout: %w", err)
	}
	out, err := os.Create(file) //nolint:gosec // the caller's choice
	if err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	if err := errors.Join(writeTar(out, a.source.created, entries), out.Close()); err != nil {
		return fmt.Errorf("write the image: %w", err)
	}
	return nil
}

// compressedSize is what a pull transfers.
func compressedSize(image v1.Image) (int64, error) {
	manifest, err := image.Manifest()
	if err != nil {
		return 0, fmt.Errorf("manifest of the image: %w", err)
	}
	size := manifest.Config.Size
	for _, l := range manifest.Layers {
		size += l.Size
	}
	return size, nil
}
