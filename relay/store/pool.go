package store

import (
	"errors"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// Pool is how the connections of a Store are.
type Pool struct {
	Acquired, Idle, Opening int           // at the moment
	Limit                   int           // on their sum
	Opened                  int64         // since New
	Waits                   int64         // for a connection, as none was idle
	Waited                  time.Duration // in all these
}

// Pool counts the connections.
func (s *Store) Pool() (p Pool) {
	for _, pool := range []*pgxpool.Pool{s.pool, s.recording} {
		n := pool.Stat()
		p.Acquired += int(n.AcquiredConns())
		p.Idle += int(n.IdleConns())
		p.Opening += int(n.ConstructingConns())
		p.Limit += int(n.MaxConns())
		p.Opened += n.NewConnsCount()
		p.Waits += n.EmptyAcquireCount()
		p.Waited += n.EmptyAcquireWaitTime()
	}
	return p
}

// primaryHint is for who has come to a standby.
const primaryHint = "let it lead to the primary: target_session_attrs=read-write picks it from several hosts"

// explain gives a hint where database.url leads to what cannot be worked with: a standby, which refuses the first row that is locked or written, or a pool of somebody
// else's that takes no transaction. PgBouncer has one code for all it has to say, and says it in English.
func explain(err error) error {
	said, ok := errors.AsType[*pgconn.PgError](err)
	switch {
	case !ok:
	case said.Code == codeReadOnly:
		return &hinted{err, "the server of database.url is a standby, " + primaryHint}
	case said.Code == "08P01" && strings.Contains(said.Message, "statement pooling mode"):
		return &hinted{err, "database.url leads through a pool in statement mode, which takes no transactions: let it lead to the server itself, or to a pool in session or transaction mode"}
	}
	return err
}
