package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/pem"
	"fmt"
	"io"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/crypto/x509roots/fallback/bundle"
)

// entry is a file of a layer, or a folder if its name ends with a slash.
type entry struct {
	name string
	mode int64
	data []byte
}

// baseLayer is the same for all platforms.
func baseLayer(created time.Time) (v1.Layer, error) {
	return layer(created, []entry{
		{"etc/", 0o755, nil},
		{"etc/group", 0o644, []byte("root:x:0:\nnonroot:x:65532:\n")},
		{"etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n")},
		{"etc/ssl/", 0o755, nil},
		{"etc/ssl/certs/", 0o755, nil},
		{"etc/ssl/certs/ca-certificates.crt", 0o644, roots()},
		{"home/", 0o755, nil},
		{"home/nonroot/", 0o755, nil}, // owned by root: nothing is to be written there
		{"tmp/", 0o1777, nil},
		{"usr/", 0o755, nil},
		{"usr/local/", 0o755, nil},
		{"usr/local/bin/", 0o755, nil},
	})
}

// roots are the certificates of the module rather than those of the machine that builds: they have a version and a checksum, and a file of the image can be
// replaced or added to by a mount, which what is linked into the binary cannot. A root that is trusted under conditions only, for certificates from before a
// certain day, is left out: a file has no place for conditions.
func roots() []byte {
	var out bytes.Buffer
	for root := range bundle.Roots() {
		if root.Constraint == nil {
			_ = pem.Encode(&out, &pem.Block{Type: "CERTIFICATE", Bytes: root.Certificate}) // a Buffer takes everything
		}
	}
	return out.Bytes()
}

func binaryLayer(created time.Time, binary []byte) (v1.Layer, error) {
	return layer(created, []entry{{"usr/local/bin/outbox-relay", 0o755, binary}})
}

// layer packs entries as files of root, all of one age.
func layer(created time.Time, entries []entry) (v1.Layer, error) {
	var out bytes.Buffer
	if err := writeTar(&out, created, entries); err != nil {
		return nil, fmt.Errorf("pack layer: %w", err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(out.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestCompression), tarball.WithCompressedCaching)
	if err != nil {
		return nil, fmt.Errorf("compress layer: %w", err)
	}
	return l, nil
}

func writeTar(w io.Writer, created time.Time, entries []entry) error {
	out := tar.NewWriter(w)
	for _, e := range entries {
		h := tar.Header{Format: tar.FormatPAX, Typeflag: tar.TypeReg, Name: e.name, Mode: e.mode, Size: int64(len(e.data)), ModTime: created}
		if e.name[len(e.name)-1] == '/' {
			h.Typeflag = tar.TypeDir
		}
		if err := out.WriteHeader(&h); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
		if _, err := out.Write(e.data); err != nil {
			return fmt.Errorf("%s: %w", e.name, err)
		}
	}
	return out.Close()
}
