package wal

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/neo-commons/outbox-relay/outbox"
)

// ErrUnchanged is what a getter of Tuple returns for a large (TOAST) value that an update did not touch. The server does not send such a value,
// not even under REPLICA IDENTITY FULL: read the row by its key.
var ErrUnchanged = errors.New("unchanged large value is not in the log")

// The formats of a column's value in a row.
const (
	formatNull      = 'n'
	formatUnchanged = 'u'
	formatText      = 't'
	formatBinary    = 'b'
)

// value is a column's value; data aliases the message.
type value struct {
	format byte
	data   []byte
}

// Tuple holds the columns of one row. It aliases the receive buffer: it and every slice got from it are valid until the handler's Change returns.
// The zero value has no columns.
//
// The getters take the index of a column, as Relation.Column returns it, decode the text and the binary form alike, and return the zero value for
// null, ErrUnchanged for an unchanged large value, and an error that names column and type, and no value, for anything else they cannot decode.
// A column of a user-defined type (OID 16384 and up: domains, citext, enums) is taken for what the getter returns.
type Tuple struct {
	rel    *Relation
	values []value
}

// Len returns the number of columns.
func (t *Tuple) Len() int { return len(t.values) }

// IsNull reports whether column i is null. A column that the tuple does not have is not.
func (t *Tuple) IsNull(i int) bool { return t.has(i) && t.values[i].format == formatNull }

// IsUnchanged reports whether column i is a large value that an update left alone, so that the log does not carry it.
func (t *Tuple) IsUnchanged(i int) bool { return t.has(i) && t.values[i].format == formatUnchanged }

func (t *Tuple) has(i int) bool { return i >= 0 && i < len(t.values) }

// firstUserOID is where the OIDs of user-defined types begin.
const firstUserOID = 16384

// get returns the bytes of column i, nil for null, and whether they are in binary form.
func (t *Tuple) get(i int, want string, oids ...uint32) (data []byte, binaryForm bool, err error) {
	if !t.has(i) {
		return nil, false, fmt.Errorf("row has no column %d", i)
	}
	v := t.values[i]
	switch v.format {
	case formatNull:
		return nil, false, nil
	case formatUnchanged:
		return nil, false, t.fault(i, want, ErrUnchanged)
	}
	if oid := t.rel.Columns[i].Type; oid < firstUserOID && !slices.Contains(oids, oid) {
		return nil, false, t.fault(i, want, errType)
	}
	return v.data, v.format == formatBinary, nil
}

var (
	errType  = errors.New("column has another type")
	errValue = errors.New("malformed value")
)

func (t *Tuple) fault(i int, want string, err error) error {
	c := t.rel.Columns[i]
	return fmt.Errorf("read column %q of %q.%q (type oid %d) as %s: %w", c.Name, t.rel.Schema, t.rel.Table, c.Type, want, err)
}

// UUID returns column i of type uuid.
func (t *Tuple) UUID(i int) (outbox.UUID, error) {
	data, bin, err := t.get(i, "uuid", pgtype.UUIDOID)
	if err != nil || data == nil {
		return outbox.UUID{}, err
	}
	var u outbox.UUID
	if bin {
		if copy(u[:], data) != len(data) || len(data) != len(u) {
			return outbox.UUID{}, t.fault(i, "uuid", errValue)
		}
		return u, nil
	}
	if err := u.UnmarshalText(data); err != nil {
		return outbox.UUID{}, t.fault(i, "uuid", errValue)
	}
	return u, nil
}

// Bytes returns column i of a text type, in UTF-8. The result aliases the receive buffer; it is nil for null only.
func (t *Tuple) Bytes(i int) ([]byte, error) {
	data, _, err := t.get(i, "text", pgtype.TextOID, pgtype.VarcharOID, pgtype.BPCharOID, pgtype.NameOID, pgtype.UnknownOID)
	return data, err
}

// Text is Bytes, copied into a string.
func (t *Tuple) Text(i int) (string, error) {
	data, err := t.Bytes(i)
	return string(data), err
}

// jsonbVersion is the byte in front of the binary form of jsonb; the text follows. No JSON document begins with it.
const jsonbVersion = 1

// JSON returns the document in column i of type jsonb or json, exactly as a cast to text yields it. The result aliases the receive buffer; it is
// nil for null only (the JSON value null is the document "null").
func (t *Tuple) JSON(i int) ([]byte, error) {
	data, bin, err := t.get(i, "jsonb", pgtype.JSONBOID, pgtype.JSONOID)
	if err != nil || data == nil {
		return nil, err
	}
	oid := t.rel.Columns[i].Type
	if versioned := bin && oid != pgtype.JSONOID && len(data) > 0 && data[0] == jsonbVersion; versioned {
		data = data[1:]
	} else if bin && oid == pgtype.JSONBOID {
		return nil, t.fault(i, "jsonb", errValue)
	}
	if len(data) == 0 {
		return nil, t.fault(i, "jsonb", errValue)
	}
	return data, nil
}

// Int returns column i of type smallint, integer or bigint.
func (t *Tuple) Int(i int) (int64, error) {
	data, bin, err := t.get(i, "integer", pgtype.Int4OID, pgtype.Int8OID, pgtype.Int2OID)
	if err != nil || data == nil {
		return 0, err
	}
	if !bin {
		n, err := strconv.ParseInt(string(data), 10, 64)
		if err != nil {
			return 0, t.fault(i, "integer", errValue)
		}
		return n, nil
	}
	switch len(data) {
	case 2:
		return int64(int16(binary.BigEndian.Uint16(data))), nil //nolint:gosec // two's complement on the wire
	case 4:
		return int64(int32(be32(data))), nil //nolint:gosec // two's complement on the wire
	case 8:
		return int64(be64(data)), nil //nolint:gosec // two's complement on the wire
	}
	return 0, t.fault(i, "integer", errValue)
}

// Float returns column i of any type of number. A numeric or a bigint is rounded to the nearest float64; NaN and the infinities are possible.
func (t *Tuple) Float(i int) (float64, error) {
	data, bin, err := t.get(i, "numeric", pgtype.NumericOID, pgtype.Float8OID, pgtype.Float4OID, pgtype.Int4OID, pgtype.Int8OID, pgtype.Int2OID)
	if err != nil || data == nil {
		return 0, err
	}
	if bin {
		switch t.rel.Columns[i].Type {
		case pgtype.Float8OID:
			if len(data) == 8 {
				return math.Float64frombits(be64(data)), nil
			}
		case pgtype.Float4OID:
			if len(data) == 4 {
				return float64(math.Float32frombits(be32(data))), nil
			}
		case pgtype.Int4OID, pgtype.Int8OID, pgtype.Int2OID:
			n, err := t.Int(i)
			return float64(n), err
		default:
			if f, ok := binaryNumeric(data); ok {
				return f, nil
			}
		}
		return 0, t.fault(i, "numeric", errValue)
	}
	f, err := strconv.ParseFloat(string(data), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) { // out of range is ±Inf, the nearest there is
		return 0, t.fault(i, "numeric", errValue)
	}
	return f, nil
}

// binaryNumeric decodes the binary form of numeric: counts, a sign, and digits in base 10,000 of which the first has the weight 10000^weight.
// Source: numeric_send in src/backend/utils/adt/numeric.c.
func binaryNumeric(data []byte) (float64, bool) {
	if len(data) < 8 {
		return 0, false
	}
	n := int(binary.BigEndian.Uint16(data))
	weight := int(int16(binary.BigEndian.Uint16(data[2:]))) //nolint:gosec // two's complement on the wire
	sign := binary.BigEndian.Uint16(data[4:])
	digits := data[8:]
	if len(digits) != 2*n {
		return 0, false
	}
	var text []byte
	switch sign {
	case 0x0000:
	case 0x4000:
		text = append(text, '-')
	case 0xC000:
		return math.NaN(), true
	case 0xD000:
		return math.Inf(1), true
	case 0xF000:
		return math.Inf(-1), true
	default:
		return 0, false
	}
	text = append(text, '0')
	for ; len(digits) > 0; digits = digits[2:] {
		d := binary.BigEndian.Uint16(digits)
		if d > 9999 {
			return 0, false
		}
		text = append(text, byte('0'+d/1000), byte('0'+d/100%10), byte('0'+d/10%10), byte('0'+d%10))
	}
	text = append(text, 'e')
	text = strconv.AppendInt(text, int64(4*(weight+1-n)), 10)
	f, err := strconv.ParseFloat(string(text), 64) // rounds once, unlike arithmetic on the digits
	return f, err == nil || errors.Is(err, strconv.ErrRange)
}

// Bool returns column i of type boolean.
func (t *Tuple) Bool(i int) (bool, error) {
	data, bin, err := t.get(i, "boolean", pgtype.BoolOID)
	if err != nil || data == nil {
		return false, err
	}
	switch {
	case len(data) != 1:
	case bin && data[0] <= 1:
		return data[0] == 1, nil
	case !bin && (data[0] == 't' || data[0] == 'f'):
		return data[0] == 't', nil
	}
	return false, t.fault(i, "boolean", errValue)
}

// Time returns column i of type timestamptz in UTC. PostgreSQL knows infinity and years that no message format of ours can carry; such a time
// becomes the nearest that RFC 3339 can write: the first microsecond but one of year 1 (the very first is the zero Time, which stands for null) or
// the last of year 9999.
func (t *Tuple) Time(i int) (time.Time, error) {
	data, bin, err := t.get(i, "timestamptz", pgtype.TimestamptzOID)
	if err != nil || data == nil {
		return time.Time{}, err
	}
	if bin {
		if len(data) != 8 {
			return time.Time{}, t.fault(i, "timestamptz", errValue)
		}
		return writable(binaryTime(be64(data))), nil
	}
	var ts pgtype.Timestamptz
	plan := new(pgtype.TimestamptzCodec).PlanScan(nil, pgtype.TimestamptzOID, pgtype.TextFormatCode, &ts)
	if err := plan.Scan(data, &ts); err != nil || !ts.Valid {
		return time.Time{}, t.fault(i, "timestamptz", errValue)
	}
	switch ts.InfinityModifier {
	case pgtype.Infinity:
		return lastTime(), nil
	case pgtype.NegativeInfinity:
		return firstTime(), nil
	case pgtype.Finite:
	}
	return writable(ts.Time.UTC()), nil
}

func firstTime() time.Time { return time.Date(1, 1, 1, 0, 0, 0, 1000, time.UTC) }
func lastTime() time.Time  { return time.Date(9999, 12, 31, 23, 59, 59, 999999000, time.UTC) }

// epochMicros is the epoch of PostgreSQL, 2000-01-01, in microseconds since 1970.
const epochMicros = 946684800 * 1000000

// binaryTime decodes microseconds since 2000; the extremes are the infinities.
func binaryTime(us uint64) time.Time {
	switch n := int64(us); { //nolint:gosec // two's complement on the wire
	case n == math.MinInt64:
		return firstTime()
	case n > math.MaxInt64-epochMicros:
		return lastTime()
	default:
		return time.UnixMicro(n + epochMicros).UTC()
	}
}

// writable moves t into the years 1 to 9999.
func writable(t time.Time) time.Time {
	if first := firstTime(); t.Before(first) {
		return first
	}
	if t.Year() > 9999 {
		return lastTime()
	}
	return t
}
