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

// explainPool gives a hint where a pool of somebody else's refuses the first transaction. PgBouncer has one code for all it has to say, and says it in English.
func explainPool(err error) error {
	if said, ok := errors.AsType[*pgconn.PgError](err); ok && said.Code == "08P01" && strings.Contains(said.Message, "statement pooling mode") {
		return &hinted{err, "database.url leads through a pool in statement mode, which takes no transactions: let it lead to the server itself, or to a pool in session or transaction mode"}
	}
	return err
}
