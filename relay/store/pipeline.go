package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/neo-commons/outbox-relay/relay/failpoint"
)

// A pipeline sends statements whose results do not matter in one round trip. From its begin until run has returned the connection is good for nothing else.
//
// It is what pgx.Batch is not: a thousand tenants are a thousand texts of each statement, and a batch would first ask the server to
// describe those that its cache has lost. The types of our parameters are known, so there is nothing to ask, and nothing to keep on either
// side but what is worth it, see prepared.
type pipeline struct {
	conn *pgx.Conn
	line *pgconn.Pipeline
	// prepared is for statements that are sent often; nil: none is prepared. What fails there is not known before run.
	prepared *prepared
	buf      []byte // of the values of one statement, which the connection copies
	values   [][]byte
	oids     []uint32
	formats  []int16
	err      error
}

// maxKept bounds the buffer that a connection keeps for its next pipeline: some thousand outcomes without a body.
const maxKept = 1 << 20

func beginPipeline(ctx context.Context, conn *pgx.Conn) *pipeline {
	return &pipeline{conn: conn, line: conn.PgConn().StartPipeline(ctx)}
}

// add puts a statement at the end. Once the server reports an error it skips all that follow.
func (p *pipeline) add(sql string, args ...any) {
	if p.encode(args) {
		p.line.SendQueryParams(sql, p.values, p.oids, p.formats, nil)
	}
}

// addOften is add for what is sent with most batches: often, which takes the same arguments, is prepared and takes the place of sql. Empty: nothing does.
func (p *pipeline) addOften(sql, often string, args ...any) {
	if p.prepared == nil || often == "" {
		p.add(sql, args...)
		return
	}
	if !p.encode(args) {
		return
	}
	name, isNew := p.prepared.lookUp(often)
	switch {
	case name == "":
		p.line.SendQueryParams(sql, p.values, p.oids, p.formats, nil)
		return
	case isNew:
		p.line.SendDeallocate(name) // one of a batch that failed; none is no error
		p.line.SendPrepare(name, often, p.oids)
	}
	p.line.SendQueryPrepared(name, p.values, p.formats, nil)
}

// encode makes the values of one statement, unless there has been an error.
func (p *pipeline) encode(args []any) bool {
	if p.err != nil {
		return false
	}
	p.buf, p.values, p.oids, p.formats = p.buf[:0], p.values[:0], p.oids[:0], p.formats[:0]
	for i, arg := range args {
		if p.err = p.value(arg); p.err != nil {
			p.err = fmt.Errorf("parameter %d: %w", i+1, p.err)
			return false
		}
	}
	return true
}

// value adds the parameter of a statement.
func (p *pipeline) value(arg any) error {
	from := len(p.buf)
	buf, oid, null := appendArray(p.buf, arg)
	format := int16(pgx.BinaryFormatCode)
	if oid == 0 {
		t, ok := p.conn.TypeMap().TypeForValue(arg)
		if !ok {
			return fmt.Errorf("there is no PostgreSQL type for %T", arg)
		}
		oid, format = t.OID, p.conn.TypeMap().FormatCodeForOID(t.OID)
		var err error
		if buf, err = p.conn.TypeMap().Encode(oid, format, arg, p.buf); err != nil {
			return err
		}
		null = buf == nil
	}
	p.oids, p.formats = append(p.oids, oid), append(p.formats, format)
	if null {
		p.values = append(p.values, nil)
		return nil
	}
	p.buf = buf
	p.values = append(p.values, p.buf[from:len(p.buf):len(p.buf)])
	return nil
}

func (p *pipeline) addAll(list []statement) {
	for _, st := range list {
		p.addOften(st.sql, st.often, st.args...)
	}
}

// run sends the pipeline and waits for all answers. It returns the first error. The connection is closed if a value cannot be encoded, which no
// value of ours should be.
func (p *pipeline) run() (err error) {
	if p.prepared != nil {
		defer func() { p.prepared.settle(err) }()
		if cap(p.buf) <= maxKept {
			p.prepared.buf = p.buf[:0]
		}
	}
	if p.err != nil {
		return errors.Join(p.err, p.line.Close())
	}
	if err := p.line.Sync(); err != nil {
		return err
	}
	failpoint.Hit(failpoint.Committing)
	return p.line.Close()
}
