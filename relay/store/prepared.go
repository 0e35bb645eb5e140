package store

import (
	"crypto/sha256"
	"encoding/hex"

	"github.com/jackc/pgx/v5"
)

const (
	// prepareAfter is how often a statement is sent before it is prepared.
	prepareAfter = 1
	// maxPrepared bounds what the server keeps: some 100 kB for each, as long as the connection lasts.
	maxPrepared = 1000
)

// prepared is what a connection has prepared of the statements that are sent all the time. Parsing and planning one costs as much as ten or twenty of
// the rows that it writes, and with many tenants there is a statement for each.
//
// The name is made of the text, so that whatever session stands behind the connection, a name never means another text: with a pooler in transaction mode, which
// changes it, the statement is unknown sooner or later, and then nothing is prepared any more. A plan cannot be stale: the server makes it
// anew once a table has changed.
type prepared struct {
	uses map[string]int    // by text, of what is not prepared
	name map[string]string // by text
	made []string          // texts whose names the pipeline under way is to make known
	off  bool
	buf  []byte // of the last pipeline, for the next one
}

// preparedOn returns that of a connection, which goes when the connection does.
func preparedOn(conn *pgx.Conn) *prepared {
	const key = "prepared"
	data := conn.PgConn().CustomData()
	if p, ok := data[key].(*prepared); ok {
		return p
	}
	p := &prepared{uses: make(map[string]int), name: make(map[string]string)}
	data[key] = p
	return p
}

// lookUp returns the name under which a statement is prepared; isNew: from now on, so that the caller has to do it. The name is empty where the text has to be
// sent.
func (p *prepared) lookUp(sql string) (name string, isNew bool) {
	if name := p.name[sql]; name != "" || p.off || len(p.name) >= maxPrepared {
		return name, false
	}
	if p.uses[sql]++; p.uses[sql] <= prepareAfter {
		if len(p.uses) > maxPrepared { // tenants that come and go
			clear(p.uses)
		}
		return "", false
	}
	delete(p.uses, sql)
	sum := sha256.Sum256([]byte(sql))
	name = "outbox_relay_" + hex.EncodeToString(sum[:16])
	p.name[sql] = name
	p.made = append(p.made, sql)
	return name, true
}

// settle tells how the pipeline went that was under way. After an error some of what it was to make known may be missing.
func (p *prepared) settle(err error) {
	if err != nil {
		for _, sql := range p.made {
			delete(p.name, sql)
		}
	}
	p.made = p.made[:0]
	if code(err) == codeUnknownStatement {
		clear(p.name)
		p.off = true
	}
}
