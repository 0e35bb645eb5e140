package pgtest

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestDownload(t *testing.T) {
	t.Parallel()
	archive := embeddedArchive(t)
	sum := sha256.Sum256(archive)
	cache := reachable(t)
	var log strings.Builder
	require.NoError(t, download(t.Context(), &log, repository(t, archive, hex.EncodeToString(sum[:])), cache))
	require.Contains(t, log.String(), string(embeddedVersion))

	for _, name := range []string{"postgres", "initdb", "pg_ctl"} {
		// They are not run: a child forked in another test may hold what the library has just written open (ETXTBSY).
		info, err := os.Stat(filepath.Join(cache, "postgresql-"+string(embeddedVersion), "bin", name))
		require.NoError(t, err)
		require.Equal(t, os.FileMode(0o755), info.Mode())
	}
	left, err := os.ReadDir(cache)
	require.NoError(t, err)
	require.Len(t, left, 1, "nothing else stays in the cache")

	err = download(t.Context(), &log, "http://127.0.0.1:1", cache)
	require.ErrorContains(t, err, "remove it", "what is there is not downloaded again")
}

func TestDownloadFails(t *testing.T) {
	t.Parallel()
	archive := embeddedArchive(t)
	for _, test := range []struct{ name, repository, err string }{
		{"nobody listens", "http://127.0.0.1:1", "unable to connect to http://127.0.0.1:1"},
		{"wrong sum", repository(t, archive, "00"), "checksums do not match"},
		{"no archive", repository(t, []byte("hello"), ""), "not a valid zip file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			cache := t.TempDir()
			require.ErrorContains(t, download(t.Context(), &strings.Builder{}, test.repository, cache), test.err)
			left, err := os.ReadDir(cache)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// repository serves an archive, and its checksum unless that is empty, to whoever asks for any version.
func repository(t *testing.T, archive []byte, sum string) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, ".jar"):
			_, _ = w.Write(archive)
		case sum != "":
			_, _ = w.Write([]byte(sum))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(s.Close)
	return s.URL
}

// embeddedArchive packs testdata/embedded.txz, which holds shell scripts in the place of postgres, initdb and pg_ctl.
func embeddedArchive(t *testing.T) []byte {
	t.Helper()
	programs, err := os.ReadFile("testdata/embedded.txz")
	require.NoError(t, err)
	var b bytes.Buffer
	z := zip.NewWriter(&b)
	w, err := z.Create("postgres-any.txz")
	require.NoError(t, err)
	_, err = w.Write(programs)
	require.NoError(t, err)
	require.NoError(t, z.Close())
	return b.Bytes()
}
