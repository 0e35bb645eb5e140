package relay

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// DSNs that are kept in files, as Kubernetes, Vault and systemd hand them out. The file is read at the start, and for every connection after that: where it
// leads to must stay, while user and password may change.

const (
	urlKey    = "database.url"
	streamKey = "database.replication_url"
	fileOf    = "_file" // behind these
)

// ReadFiles fills in the DSNs that are kept in files. It returns each fault as a *[FieldError].
func (d *Database) ReadFiles() []error {
	var f faults
	read := func(key string, dsn *string, path string) {
		if path == "" {
			return
		}
		if *dsn != "" {
			f.add(key+fileOf, path, "is given, and so is %s: drop one of the two", strings.TrimPrefix(key, "database."))
			return
		}
		text, err := readSmall(path)
		if err != nil {
			f.add(key+fileOf, path, "%v", err)
			return
		}
		*dsn = text
	}
	read(urlKey, &d.URL, d.URLFile)
	read(streamKey, &d.ReplicationURL, d.ReplicationURLFile)
	return f
}

// urlKey is the key that the pool's DSN comes from.
func (d Database) urlKey() string {
	if d.URLFile != "" {
		return urlKey + fileOf
	}
	return urlKey
}

func (d Database) streamKey() string {
	if d.ReplicationURLFile != "" {
		return streamKey + fileOf
	}
	return streamKey
}

// DSN returns the DSN to connect with now. It differs from URL after the file that it comes from has changed.
func (d Database) DSN() (string, error) { return current(d.urlKey(), d.URL, d.URLFile) }

// StreamDSN is DSN for the replication stream.
func (d Database) StreamDSN() (string, error) {
	if d.ReplicationURL == "" && d.ReplicationURLFile == "" {
		return d.DSN()
	}
	return current(d.streamKey(), d.ReplicationURL, d.ReplicationURLFile)
}

// current reads a DSN anew from its file, unless it has none. One that leads to another place than before is refused: half of the connections would be
// to the one server, half to the other.
func current(key, before, path string) (string, error) {
	if path == "" {
		return before, nil
	}
	dsn, err := readSmall(path)
	if err != nil {
		return "", fmt.Errorf("%s %w", key, err)
	}
	if fault := DSNFault(dsn); fault != "" {
		return "", &FieldError{Key: key, Value: path, Remedy: fault}
	}
	if before != "" && !samePlace(before, dsn) {
		return "", &FieldError{Key: key, Value: path, Remedy: "leads to another server or database than at the start: restart the relay if that is meant"}
	}
	return dsn, nil
}

func samePlace(a, b string) bool {
	one, err := pgconn.ParseConfig(a)
	if err != nil {
		return false
	}
	two, err := pgconn.ParseConfig(b)
	return err == nil && placesOf(one) == placesOf(two)
}

// placesOf lists the servers of a DSN, and its database.
func placesOf(c *pgconn.Config) string {
	list := []string{fmt.Sprintf("%s:%d", c.Host, c.Port)}
	for _, other := range c.Fallbacks { // also the same server again, without TLS
		if place := fmt.Sprintf("%s:%d", other.Host, other.Port); !slices.Contains(list, place) {
			list = append(list, place)
		}
	}
	return strings.Join(list, ",") + "/" + cmp.Or(c.Database, c.User)
}
