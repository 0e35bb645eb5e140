package store

import (
	"encoding/binary"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"github.com/neo-commons/outbox-relay/outbox"
)

// appendArray appends a column of rows as a PostgreSQL array in binary form (src/backend/utils/adt/arrayfuncs.c, array_recv), and returns its type.
// A nil slice is NULL, for which nothing is appended; a zero UUID and a nil pointer are NULL elements. pgx does the same by reflection, with an
// allocation for most elements: eight for each outcome. It is left what is no array: then the type is 0.
func appendArray(b []byte, column any) (_ []byte, oid uint32, null bool) {
	switch list := column.(type) {
	case []outbox.UUID:
		b = appendElements(b, pgtype.UUIDOID, list, func(b []byte, id outbox.UUID) ([]byte, bool) { return append(b, id[:]...), id.IsZero() })
		return b, pgtype.UUIDArrayOID, list == nil
	case given:
		b = appendElements(b, pgtype.UUIDOID, list, func(b []byte, id outbox.UUID) ([]byte, bool) { return append(b, id[:]...), false })
		return b, pgtype.UUIDArrayOID, list == nil
	case []string:
		b = appendElements(b, pgtype.TextOID, list, func(b []byte, s string) ([]byte, bool) { return append(b, s...), false })
		return b, pgtype.TextArrayOID, list == nil
	case []int32:
		b = appendElements(b, pgtype.Int4OID, list, func(b []byte, n int32) ([]byte, bool) { return binary.BigEndian.AppendUint32(b, uint32(n)), false }) //nolint:gosec // its bits
		return b, pgtype.Int4ArrayOID, list == nil
	case []int64:
		b = appendElements(b, pgtype.Int8OID, list, appendInt64)
		return b, pgtype.Int8ArrayOID, list == nil
	case []time.Duration:
		b = appendElements(b, pgtype.IntervalOID, list, func(b []byte, d time.Duration) ([]byte, bool) { return appendInterval(b, d), false })
		return b, pgtype.IntervalArrayOID, list == nil
	case []*time.Duration:
		b = appendElements(b, pgtype.IntervalOID, list, func(b []byte, d *time.Duration) ([]byte, bool) {
			if d == nil {
				return b, true
			}
			return appendInterval(b, *d), false
		})
		return b, pgtype.IntervalArrayOID, list == nil
	case []jsonb:
		b = appendElements(b, pgtype.JSONBOID, list, func(b []byte, doc jsonb) ([]byte, bool) { return append(append(b, jsonbVersion), doc...), false })
		return b, pgtype.JSONBArrayOID, list == nil
	case []bool:
		b = appendElements(b, pgtype.BoolOID, list, func(b []byte, is bool) ([]byte, bool) {
			if is {
				return append(b, 1), false
			}
			return append(b, 0), false
		})
		return b, pgtype.BoolArrayOID, list == nil
	default:
		return b, 0, false
	}
}

// given are ids of which none is missing: an event may have the zero UUID for its id, and has a dead letter by it.
type given []outbox.UUID

// jsonb is the text of a document.
type jsonb string

// jsonbVersion comes before the text of a document (src/backend/utils/adt/jsonb.c, jsonb_recv).
const jsonbVersion = 1

// appendInterval appends whole microseconds, no days and no months (src/backend/utils/adt/timestamp.c, interval_recv).
func appendInterval(b []byte, d time.Duration) []byte {
	b, _ = appendInt64(b, d.Microseconds())
	return append(b, 0, 0, 0, 0, 0, 0, 0, 0)
}

func appendInt64(b []byte, n int64) ([]byte, bool) {
	return binary.BigEndian.AppendUint64(b, uint64(n)), false //nolint:gosec // its bits
}

// appendElements appends the head of an array and its elements by value, which appends one and tells whether it is NULL instead.
func appendElements[T any](b []byte, oid uint32, list []T, value func([]byte, T) ([]byte, bool)) []byte {
	if list == nil {
		return b
	}
	u32 := binary.BigEndian.AppendUint32
	head := len(b)
	b = u32(u32(u32(b, 1), 0), oid)       // dimensions, whether there are NULLs, type
	b = u32(u32(b, uint32(len(list))), 1) //nolint:gosec // length and first index; a batch is smaller
	for _, v := range list {
		at := len(b)
		var null bool
		if b, null = value(u32(b, 0), v); null {
			b = u32(b[:at], ^uint32(0))
			b[head+7] = 1
			continue
		}
		binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at-4)) //nolint:gosec // PostgreSQL refuses more than 1 GiB in all
	}
	return b
}
