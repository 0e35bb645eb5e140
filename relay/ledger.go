package relay

import (
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
)

// A ledger knows which commits are fully recorded. The stream opens an entry for every transaction that leads to deliveries, the recorder settles
// deliveries in any order, and the ledger yields the position up to which everything is settled: what may be confirmed.
//
//	commits   #41 ✓   #42 (2 open)   #43 ✓   #44 (still being read)
//	          ▲ covered ends here    ▲ high: recorded, but not covered
//
// One ledger belongs to one session of leadership. It is safe for concurrent use.
type ledger struct {
	tenure *tenure // of the session

	mu      sync.Mutex
	commits []commit // commits[head:] are not covered yet; commits[head] has number base+head
	head    int
	base    int
	covered pglogrepl.LSN // all up to here is settled
	high    pglogrepl.LSN // greatest commit LSN with a settled delivery

	outstanding int           // deliveries added and not settled, written or abandoned, over all commits
	sealed      chan struct{} // closed once nothing is outstanding after seal
}

// commit is one transaction of the stream with deliveries.
type commit struct {
	at     time.Time     // by the server's clock
	lsn    pglogrepl.LSN // of the commit record; known when the transaction begins to arrive
	end    pglogrepl.LSN // all before it is covered once the commit is settled; grows over later commits without deliveries
	open   int           // deliveries not settled
	closed bool          // the whole transaction has been read
}

// noCommit is the number of no commit: the delivery came from the retry queue, or its commit is settled already.
const noCommit = -1

func newLedger(covered, high pglogrepl.LSN) *ledger {
	return &ledger{covered: covered, high: high}
}

// begin opens an entry and returns its number. Only the newest entry may be open for reading.
func (l *ledger) begin(lsn pglogrepl.LSN, at time.Time) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.head > 1024 && l.head > len(l.commits)/2 {
		l.base += l.head
		l.commits = l.commits[:copy(l.commits, l.commits[l.head:])]
		l.head = 0
	}
	l.commits = append(l.commits, commit{lsn: lsn, at: at})
	return l.base + len(l.commits) - 1
}

// add counts one more delivery of commit n. The entry cannot be covered before end, whatever has been settled.
func (l *ledger) add(n int) {
	l.mu.Lock()
	l.commits[n-l.base].open++
	l.outstanding++
	l.mu.Unlock()
}

// end closes the transaction that the stream has just read to its end. n is its entry, or noCommit if it led to no delivery: then its position
// belongs to whatever came before it.
func (l *ledger) end(n int, end pglogrepl.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n == noCommit {
		l.extend(end)
		return
	}
	c := &l.commits[n-l.base]
	c.end, c.closed = end, true
	l.advance()
}

// idle tells that the server has nothing before lsn that concerns us.
func (l *ledger) idle(lsn pglogrepl.LSN) {
	l.mu.Lock()
	l.extend(lsn)
	l.mu.Unlock()
}

// extend gives a position without deliveries to the newest entry, or covers it where there is none. It is called under the lock.
func (l *ledger) extend(lsn pglogrepl.LSN) {
	if l.head < len(l.commits) {
		c := &l.commits[len(l.commits)-1]
		c.end = max(c.end, lsn)
		return
	}
	l.covered = max(l.covered, lsn)
}

// settle takes off one delivery of commit n that needs no record of this session.
func (l *ledger) settle(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.commits[n-l.base].open--
	l.advance()
	l.less(1)
}

// record takes off one delivery of commit n whose outcome the next record transaction writes, together with the position that it completes. It is
// outstanding until written tells of the end of that transaction.
func (l *ledger) record(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &l.commits[n-l.base]
	c.open--
	l.high = max(l.high, c.lsn)
	l.advance()
}

// written tells that the record transaction of n deliveries has committed, or that another leader made it void.
func (l *ledger) written(n int) { l.abandon(n) }

// abandon gives up on n deliveries: their commits are never covered by this ledger, so the log keeps them.
func (l *ledger) abandon(n int) {
	l.mu.Lock()
	l.less(n)
	l.mu.Unlock()
}

// less counts n deliveries out. It is called under the lock.
func (l *ledger) less(n int) {
	l.outstanding -= n
	if l.sealed != nil && l.outstanding == 0 {
		close(l.sealed)
	}
}

// seal returns a channel that is closed once every delivery is settled, written or abandoned. Nothing may be added after it; it is called once.
func (l *ledger) seal() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sealed = make(chan struct{})
	if l.outstanding == 0 {
		close(l.sealed)
	}
	return l.sealed
}

// advance covers the oldest entries that are settled. It is called under the lock.
func (l *ledger) advance() {
	for l.head < len(l.commits) {
		c := &l.commits[l.head]
		if !c.closed || c.open > 0 {
			return
		}
		l.covered = max(l.covered, c.end)
		l.head++
	}
}

// oldest returns when the first commit was made that is not covered; zero: there is none.
func (l *ledger) oldest() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.head == len(l.commits) {
		return time.Time{}
	}
	return l.commits[l.head].at
}

// position returns what the next record transaction may cover.
func (l *ledger) position() (covered, high pglogrepl.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.covered, l.high
}
