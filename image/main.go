// Command image builds the container image of outbox-relay, as a tar of an OCI image layout, with nothing but Go: no Docker, no base image, no network
// beyond the module proxy. The same sources and the same version of Go give the same bytes, on any machine and in any folder.
//
//	/etc/passwd, /etc/group                    the user nonroot, 65532
//	/etc/ssl/certs/ca-certificates.crt         the roots of Mozilla, as golang.org/x/crypto has them
//	/usr/local/bin/outbox-relay                static, stripped, the version stamped
//
// It is a module of its own, so that the relay does not depend on what packs it.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	ctx, cancel := signal.NotifyContext(ctx, os.Interrupt)
	defer cancel()
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	var s source
	flags.StringVar(&s.root, "root", "..", "`folder` of the sources")
	flags.StringVar(&s.version, "version", "devel", "version to stamp")
	flags.StringVar(&s.revision, "revision", "", "commit that the sources are of, for the labels")
	created := flags.Int64("created", 0, "time of the sources in `seconds` since 1970, which the image carries as that of its making")
	file := flags.String("out", "outbox-relay-image.tar", "`file` to write")
	if err := flags.Parse(args); err != nil {
		return err
	}
	s.created = time.Unix(*created, 0).UTC()
	built, err := assemble(ctx, s)
	if err != nil {
		return err
	}
	if err := built.write(*file); err != nil {
		return err
	}
	digest, err := built.index.Digest()
	if err != nil {
		return fmt.Errorf("digest of the image: %w", err)
	}
	fmt.Fprintf(out, "%s\n%s %s\n", *file, s.version, digest)
	for _, p := range built.platforms {
		size, err := compressedSize(p.image)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s: %.1f MB compressed, %.1f MB binary\n", p.platform, float64(size)/1e6, float64(len(p.binary))/1e6)
	}
	return nil
}
