package wal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pglogrepl"
)

// LSN is a position in the write-ahead log.
type LSN = pglogrepl.LSN

// Op says what happened to a row, or to the whole table.
type Op uint8

// The operations of a Change.
const (
	Insert Op = iota + 1
	Update
	Delete
	Truncate
)

// Relation describes a published table as the server announced it. It is immutable: after a change of the table the server announces it anew, and
// the changes that follow carry another *Relation, so that pointers tell versions apart.
type Relation struct {
	ID            uint32 // the table's OID; the root's for a partition when the publication says so
	Schema, Table string
	Columns       []Column
}

// Column describes a column of a Relation.
type Column struct {
	Name string
	Type uint32 // OID of the data type
	Key  bool   // part of the replica identity
}

// Column returns the index of the named column, or -1.
func (r *Relation) Column(name string) int {
	for i := range r.Columns {
		if r.Columns[i].Name == name {
			return i
		}
	}
	return -1
}

// Change is one row's change, or the truncation of a table.
type Change struct {
	Relation *Relation
	Op       Op
	// New is the row after an Insert or Update, else empty. Columns whose large value an Update left alone may be missing: see Tuple.IsUnchanged.
	New Tuple
	// Old is the row before a Delete, and before an Update that changed the replica identity; else empty. Under the default replica identity all
	// columns but the key are null.
	Old Tuple
}

// Begin opens a transaction. Transactions arrive whole, in commit order, and only when they have committed.
type Begin struct {
	CommitLSN  LSN // of the commit record
	CommitTime time.Time
	XID        uint32
}

// Commit ends a transaction.
type Commit struct {
	CommitLSN  LSN // as in Begin
	EndLSN     LSN // of the first byte after the commit record: confirming it, and not less, keeps the transaction from being sent again
	CommitTime time.Time
}

// kind is the type byte of a pgoutput message.
// Source: https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html
type kind byte

const (
	kindBegin    kind = 'B'
	kindCommit   kind = 'C'
	kindOrigin   kind = 'O'
	kindRelation kind = 'R'
	kindType     kind = 'Y'
	kindMessage  kind = 'M'
	kindInsert   kind = 'I'
	kindUpdate   kind = 'U'
	kindDelete   kind = 'D'
	kindTruncate kind = 'T'
)

var (
	errTruncated = errors.New("message ends too early")
	errTrailing  = errors.New("bytes after the end of the message")
	errOrder     = errors.New("message out of order")
)

// decoder reads the messages of pgoutput, protocol version 1. Rows are not copied: the tuples of change alias the message, and they and the slices
// behind them are used again for the next one. The zero value is ready for use.
type decoder struct {
	relations map[uint32]*Relation
	open      bool // between begin and commit

	begin     Begin
	commit    Commit
	change    Change
	truncated []*Relation
	columns   [2][]value // behind change.New and change.Old
}

// decode reads one message and returns its kind, which tells the field of d that holds the result. Any input is safe: what is not a well-formed
// message in its place is an error, and memory is taken in proportion to the length of msg at most.
func (d *decoder) decode(msg []byte) (kind, error) {
	if len(msg) == 0 {
		return 0, errTruncated
	}
	k, r := kind(msg[0]), reader{msg[1:]}
	var err error
	switch k {
	case kindBegin:
		err = d.readBegin(&r)
	case kindCommit:
		err = d.readCommit(&r)
	case kindRelation:
		err = d.readRelation(&r)
	case kindInsert, kindUpdate, kindDelete:
		err = d.readChange(k, &r)
	case kindTruncate:
		err = d.readTruncate(&r)
	case kindOrigin, kindType, kindMessage:
		return k, nil // nothing in them concerns the relay
	default:
		return k, fmt.Errorf("decode message: unknown type %q", byte(k))
	}
	if err == nil && len(r.b) != 0 {
		err = errTrailing
	}
	if err != nil {
		return k, fmt.Errorf("decode message of type %q: %w", byte(k), err)
	}
	return k, nil
}

func (d *decoder) readBegin(r *reader) error {
	b, ok := r.next(20)
	if !ok {
		return errTruncated
	}
	if d.open {
		return errOrder
	}
	d.open = true
	d.begin = Begin{CommitLSN: LSN(be64(b)), CommitTime: binaryTime(be64(b[8:])), XID: be32(b[16:])}
	return nil
}

func (d *decoder) readCommit(r *reader) error {
	b, ok := r.next(25) // a byte of flags, unused, comes first
	if !ok {
		return errTruncated
	}
	if !d.open {
		return errOrder
	}
	d.open = false
	d.commit = Commit{CommitLSN: LSN(be64(b[1:])), EndLSN: LSN(be64(b[9:])), CommitTime: binaryTime(be64(b[17:]))}
	return nil
}

// minColumn is the least length of a column's description: flags, an empty name with its zero byte, type and modifier.
const minColumn = 1 + 1 + 4 + 4

func (d *decoder) readRelation(r *reader) error {
	id, ok := r.uint32()
	if !ok {
		return errTruncated
	}
	schema, ok1 := r.text()
	table, ok2 := r.text()
	_, ok3 := r.next(1) // replica identity
	n, ok4 := r.uint16()
	if !ok1 || !ok2 || !ok3 || !ok4 || len(r.b) < n*minColumn {
		return errTruncated
	}
	rel := &Relation{ID: id, Schema: schema, Table: table, Columns: make([]Column, n)}
	for i := range rel.Columns {
		flags, ok1 := r.next(1)
		name, ok2 := r.text()
		rest, ok3 := r.next(8) // type, then type modifier
		if !ok1 || !ok2 || !ok3 {
			return errTruncated
		}
		rel.Columns[i] = Column{Name: name, Type: be32(rest), Key: flags[0]&1 != 0}
	}
	if d.relations == nil {
		d.relations = make(map[uint32]*Relation)
	}
	d.relations[id] = rel
	return nil
}

// readChange reads the three messages about a row. They differ in which tuples they carry: an insert the new row ('N'), a delete the old one (its
// key 'K' or all of it 'O'), an update the new row and before it, under some circumstances, the old one.
func (d *decoder) readChange(k kind, r *reader) error {
	rel, err := d.relation(r)
	if err != nil {
		return err
	}
	d.change = Change{Relation: rel}
	mark, ok := r.next(1)
	if !ok {
		return errTruncated
	}
	if old := mark[0] == 'K' || mark[0] == 'O'; old && k != kindInsert {
		if d.change.Old, err = d.readTuple(r, rel, 1); err != nil {
			return err
		}
		if k == kindDelete {
			d.change.Op = Delete
			return nil
		}
		if mark, ok = r.next(1); !ok {
			return errTruncated
		}
	}
	if mark[0] != 'N' || k == kindDelete {
		return fmt.Errorf("unexpected tuple %q", mark[0])
	}
	d.change.Op = Insert
	if k == kindUpdate {
		d.change.Op = Update
	}
	d.change.New, err = d.readTuple(r, rel, 0)
	return err
}

// relation reads the id of a change's table, which must have been announced.
func (d *decoder) relation(r *reader) (*Relation, error) {
	id, ok := r.uint32()
	if !ok {
		return nil, errTruncated
	}
	if !d.open {
		return nil, errOrder
	}
	rel := d.relations[id]
	if rel == nil {
		return nil, fmt.Errorf("relation %d has not been announced", id)
	}
	return rel, nil
}

func (d *decoder) readTuple(r *reader, rel *Relation, slot int) (Tuple, error) {
	n, ok := r.uint16()
	if !ok {
		return Tuple{}, errTruncated
	}
	if n != len(rel.Columns) {
		return Tuple{}, fmt.Errorf("row of %q.%q has %d columns, announced were %d", rel.Schema, rel.Table, n, len(rel.Columns))
	}
	values := d.columns[slot][:0]
	for range n {
		mark, ok := r.next(1)
		if !ok {
			return Tuple{}, errTruncated
		}
		v := value{format: mark[0]}
		switch v.format {
		case formatNull, formatUnchanged:
		case formatText, formatBinary:
			size, ok := r.uint32()
			if !ok || uint64(size) > uint64(len(r.b)) {
				return Tuple{}, errTruncated
			}
			v.data, _ = r.next(int(size))
		default:
			return Tuple{}, fmt.Errorf("unknown column format %q", v.format)
		}
		values = append(values, v)
	}
	d.columns[slot] = values
	return Tuple{rel: rel, values: values}, nil
}

func (d *decoder) readTruncate(r *reader) error {
	n, ok1 := r.uint32()
	_, ok2 := r.next(1) // CASCADE, RESTART IDENTITY
	if !ok1 || !ok2 {
		return errTruncated
	}
	d.truncated = d.truncated[:0]
	for range n {
		rel, err := d.relation(r)
		if err != nil {
			return err
		}
		d.truncated = append(d.truncated, rel)
	}
	return nil
}

// reader takes a message apart from the front. Its methods report whether enough was left.
type reader struct{ b []byte }

// next returns the next n bytes; they alias the message and have no room behind them.
func (r *reader) next(n int) ([]byte, bool) {
	if len(r.b) < n {
		return nil, false
	}
	b := r.b[:n:n]
	r.b = r.b[n:]
	return b, true
}

func (r *reader) uint16() (int, bool) {
	b, ok := r.next(2)
	if !ok {
		return 0, false
	}
	return int(binary.BigEndian.Uint16(b)), true
}

func (r *reader) uint32() (uint32, bool) {
	b, ok := r.next(4)
	if !ok {
		return 0, false
	}
	return be32(b), true
}

// text returns a copy of the next zero-terminated string.
func (r *reader) text() (string, bool) {
	end := bytes.IndexByte(r.b, 0)
	if end < 0 {
		return "", false
	}
	s := string(r.b[:end])
	r.b = r.b[end+1:]
	return s, true
}

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }
func be64(b []byte) uint64 { return binary.BigEndian.Uint64(b) }
