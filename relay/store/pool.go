package store

import (
	"time"

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
