package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/delivery/certtest"
	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

// secureDatabase is a server that lets nobody in without TLS and a client certificate for his role.
type secureDatabase struct {
	*pgtest.Server
	authority *certtest.Authority
	ca        string
	dir       string // of the clients' files
}

func startSecureDatabase(t *testing.T) *secureDatabase {
	t.Helper()
	server, err := pgtest.Start(t.Context(), pgtest.Options{})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, server.Close()) })
	d := &secureDatabase{Server: server, authority: certtest.New(t, "database authority"), dir: t.TempDir()}
	d.ca = certtest.Write(t, d.dir, "ca.pem", d.authority.PEM())
	owner, err := os.Stat(server.Dir())
	require.NoError(t, err)
	who, ok := owner.Sys().(*syscall.Stat_t)
	require.True(t, ok)
	place := func(name string, text []byte) string { // for the server's user alone, as PostgreSQL demands of a key
		path := certtest.Write(t, server.Dir(), name, text)
		require.NoError(t, os.Chown(path, int(who.Uid), int(who.Gid)))
		return path
	}
	cert, key := d.authority.Issue(t, "server", "127.0.0.1")
	settings := map[string]string{
		"ssl": "on", "ssl_cert_file": place("server.pem", cert), "ssl_key_file": place("server-key.pem", key), "ssl_ca_file": place("ca.pem", d.authority.PEM()),
		"hba_file": place("hba.conf", []byte("hostssl all all 127.0.0.1/32 trust clientcert=verify-full\n")),
	}
	for name, value := range settings {
		execOn(t, server.URL("postgres"), fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", name, value))
	}
	require.NoError(t, server.Restart(t.Context()))
	return d
}

// dsn is that of a role with its certificate.
func (d *secureDatabase) dsn(t *testing.T, role string) string {
	t.Helper()
	return d.dsnWith(t, role, role)
}

func (d *secureDatabase) dsnWith(t *testing.T, role, name string) string {
	t.Helper()
	cert, key := d.authority.Issue(t, name)
	query := url.Values{
		"sslmode": {"verify-full"}, "sslrootcert": {d.ca},
		"sslcert": {certtest.Write(t, d.dir, name+".pem", cert)}, "sslkey": {certtest.Write(t, d.dir, name+"-key.pem", key)},
	}
	return fmt.Sprintf("postgres://%s@127.0.0.1:%d/postgres?%s", role, d.Port(), query.Encode())
}

// TestMutualTLSFromEndToEnd runs everything as a role that may do no more than it must, from a database that takes nobody without TLS and a certificate, to a
// receiver that does not either.
func TestMutualTLSFromEndToEnd(t *testing.T) {
	t.Parallel()
	d := startSecureDatabase(t)
	owner := d.dsn(t, "postgres")
	for dsn, want := range map[string]string{
		d.URL("postgres"): "no encryption",
		strings.Replace(d.URL("postgres"), "sslmode=disable", "sslmode=require", 1):                  "client certificate",
		d.dsnWith(t, "postgres", "somebody"):                                                         "",
		strings.Replace(d.URL("postgres"), "sslmode=disable", "sslmode=verify-full&sslrootcert=", 1): "unknown authority",
	} {
		conn, err := pgx.Connect(t.Context(), dsn)
		if err == nil {
			_ = conn.Close(t.Context())
		}
		require.Error(t, err, dsn)
		require.ErrorContains(t, err, want)
	}

	// The receiver has an authority of its own and wants a certificate of another one.
	servers, clients, dir := certtest.New(t, "receivers"), certtest.New(t, "acme's clients"), t.TempDir()
	cert, key := clients.Issue(t, "relay of acme")
	settings := fmt.Sprintf("delivery:\n  tls:\n    min_version: 1.3\n    profiles:\n      - tenant: acme\n        ca_file: %s\n        ca_only: true\n        cert_file: %s\n        key_file: %s\n",
		certtest.Write(t, dir, "ca.pem", servers.PEM()), certtest.Write(t, dir, "tls.pem", cert), certtest.Write(t, dir, "tls-key.pem", key))
	s := newSiteOn(t, owner, settings, always(200), "acme", "other")
	s.receiver.Close()
	s.receiver.Server = httptest.NewUnstartedServer(s.receiver)
	s.receiver.TLS = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{servers.Pair(t, "receiver", "127.0.0.1")}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients.Pool(),
	}
	s.receiver.StartTLS()
	t.Cleanup(s.receiver.Close)

	s.exec(t, `CREATE ROLE relay LOGIN REPLICATION IN ROLE outbox_relay_runner`)
	text, err := os.ReadFile(s.config)
	require.NoError(t, err)
	least := filepath.Join(dir, "relay.yaml")
	require.NoError(t, os.WriteFile(least, []byte(strings.Replace(string(text), owner, d.dsn(t, "relay"), 1)), 0o600))
	o := invoke(t, nil, "check", "--config", least)
	require.Equal(t, exitOK, o.code, "%s%s", o.out, o.err)
	require.Contains(t, o.out, "ok    role: has the rights it needs")
	require.Contains(t, o.out, "warn  client certificate "+filepath.Join(dir, "tls.pem")+": CN=relay of acme, until ")

	acme, stranger := s.endpoint(t, "acme", 3), s.endpoint(t, "other", 0)
	s.subscribe(t, "acme", acme, "order.created", "{}")
	s.subscribe(t, "other", stranger, "order.created", "{}")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	p := startRelay(t, least)
	s.leading(ctx, t)
	s.insertMany(t, "acme", "order.created", 50)
	s.insertMany(t, "other", "order.created", 1)
	s.receiver.await(ctx, t, "deliveries", func() bool { return s.arrivedAt(acme) == 50 })
	var class string
	s.receiver.await(ctx, t, "the dead letter of a tenant without a profile", func() bool {
		return s.pool.QueryRow(ctx, `SELECT last_error_code FROM other.webhook_dead_letters`).Scan(&class) == nil
	})
	require.Equal(t, "tls", class)

	var connections, secured, streams int
	require.NoError(t, s.pool.QueryRow(ctx, `SELECT count(*), count(*) FILTER (WHERE s.ssl AND s.client_dn = '/CN=relay'), count(*) FILTER (WHERE a.backend_type = 'walsender')
		FROM pg_stat_activity a JOIN pg_stat_ssl s USING (pid) WHERE a.usename = 'relay'`).Scan(&connections, &secured, &streams))
	require.Equal(t, connections, secured)
	require.Equal(t, 1, streams)
	require.Greater(t, connections, 1)

	o = invoke(t, nil, "endpoints", "test", "-t", "acme", acme.String(), "--config", least)
	require.Contains(t, o.out, "success", o.err)

	// A certificate that is replaced while the relay runs is the next one's that is asked for.
	next := certtest.New(t, "acme's next clients")
	cert, key = next.Issue(t, "relay of acme, renewed")
	certtest.Write(t, dir, "tls.pem", cert)
	certtest.Write(t, dir, "tls-key.pem", key)
	s.receiver.await(ctx, t, "the new certificate", func() bool { return strings.Contains(p.said(t), "files have changed and are in use") })
	s.insertMany(t, "acme", "order.created", 1)
	s.receiver.await(ctx, t, "an attempt that the receiver refuses", func() bool {
		var n int
		return s.pool.QueryRow(ctx, `SELECT count(*) FROM acme.webhook_delivery_attempts WHERE error_class = 'tls'`).Scan(&n) == nil && n > 0
	})
	_, exit := p.stop(t)
	require.NoError(t, exit)
	require.Empty(t, s.receiver.bad)
}
