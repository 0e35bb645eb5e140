package relay

import (
	"errors"
	"io/fs"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

const dsnRemedy = "write postgres://user:password@host:5432/database?sslmode=verify-full, with special characters of the password " +
	"percent-encoded (@ is %40, / is %2F, : is %3A), or host=… user=… dbname=…"

// DSNFault says what is wrong with a DSN, empty if nothing is, or if there is none. It never repeats any of it: the password of a malformed one
// cannot be told from the rest. What pgconn reads may be malformed, too: of postgres://user:p@ss@host/db it makes the host ss@host, and an unknown
// scheme with a query is to it a keyword.
func DSNFault(dsn string) string {
	if dsn == "" {
		return ""
	}
	cfg, err := pgconn.ParseConfig(dsn)
	if missing := new(fs.PathError); errors.As(err, &missing) {
		return "names a file that cannot be read: " + missing.Error()
	}
	if err != nil {
		return parseFault(err)
	}
	for name := range cfg.RuntimeParams {
		if !regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`).MatchString(name) {
			return "is not a PostgreSQL DSN: " + dsnRemedy
		}
	}
	if strings.Contains(placeOf(dsn, cfg), "@") {
		return "has an @ in what comes out as its host or database: percent-encode the password (@ is %40, / is %2F, : is %3A)"
	}
	return ""
}

// placeOf returns what a DSN has for hosts, and as a URL for ports and database, before any decoding.
func placeOf(dsn string, cfg *pgconn.Config) string {
	for _, scheme := range []string{"postgres://", "postgresql://"} {
		place, isURL := strings.CutPrefix(dsn, scheme)
		if !isURL {
			continue
		}
		if i := strings.IndexAny(place, "@/"); i >= 0 && place[i] == '@' { // as pgconn and libpq look for the user
			place = place[i+1:]
		}
		place, _, _ = strings.Cut(place, "?")
		return place
	}
	hosts := []string{cfg.Host}
	for _, other := range cfg.Fallbacks {
		hosts = append(hosts, other.Host)
	}
	return strings.Join(hosts, ",")
}

// parseFault names the setting that pgconn cannot read.
func parseFault(err error) string {
	text := err.Error()
	said := text[strings.LastIndex(text, "`: ")+len("`: "):] // behind the DSN, of which it hides what it can
	if strings.Contains(said, "(sslmode is invalid)") {
		return "has no valid sslmode: use disable, allow, prefer, require, verify-ca or verify-full"
	}
	for _, name := range []string{
		"port", "connect_timeout", "sslcertmode", "sslnegotiation", "target_session_attrs", "min_protocol_version", "max_protocol_version", "channel_binding", "require_auth",
	} {
		if strings.HasPrefix(said, "invalid "+name) || strings.HasPrefix(said, "unknown "+name) {
			return "has no valid " + name + ": " + dsnRemedy
		}
	}
	return "is not a PostgreSQL DSN: " + dsnRemedy
}
