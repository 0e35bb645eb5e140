package outbox

import (
	"crypto/rand"
	"database/sql/driver"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
)

// UUID is an RFC 9562 UUID in network byte order, the way PostgreSQL keeps it. It is comparable and serves as a map key.
//
// The zero UUID stands for "none": it is written to the database as NULL, and NULL is read as zero.
type UUID [16]byte

const uuidTextLen = 36

// last is the greatest value NewUUID has put into the first 60 bits of an id: 48 bits of Unix milliseconds, 12 bits below them.
// It has to be one per process, for ids to rise whoever asks for them.
var last atomic.Uint64 //nolint:gochecknoglobals // see above

// NewUUID returns a version 7 UUID. Ids rise strictly within the process, also within one millisecond and when the clock steps
// back: the 12 bits after the milliseconds hold the fraction of the millisecond (RFC 9562, section 6.2, method 3), and an id that
// would not be greater than the one before takes that one's time plus 1/4096 ms. NewUUID is safe for concurrent use.
func NewUUID() UUID {
	now := time.Now()
	ticks := uint64(now.UnixMilli())<<12 | uint64(now.Nanosecond()%1e6)<<12/1e6 //nolint:gosec // the clock is past 1970
	for {
		prev := last.Load()
		ticks = max(ticks, prev+1)
		if last.CompareAndSwap(prev, ticks) {
			break
		}
	}

	var u UUID
	binary.BigEndian.PutUint64(u[:8], ticks>>12<<16|7<<12|ticks&0xfff)
	_, _ = rand.Read(u[8:]) // never fails: crypto/rand ends the process instead
	u[8] = u[8]&0x3f | 0x80
	return u
}

// ParseUUID reads the form 01234567-89ab-cdef-0123-456789abcdef, in either case.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	if err := u.UnmarshalText([]byte(s)); err != nil {
		return UUID{}, err
	}
	return u, nil
}

// IsZero reports whether u is the zero UUID, "none".
func (u UUID) IsZero() bool { return u == UUID{} }

// String returns the lower-case form with hyphens, the way PostgreSQL prints it.
func (u UUID) String() string {
	var buf [uuidTextLen]byte
	return string(u.append(buf[:0]))
}

// AppendText appends the form of String to b and returns the longer slice. The error is always nil.
func (u UUID) AppendText(b []byte) ([]byte, error) { return u.append(b), nil }

// MarshalText returns the form of String. The error is always nil.
func (u UUID) MarshalText() ([]byte, error) { return u.append(nil), nil }

func (u UUID) append(b []byte) []byte {
	b = hex.AppendEncode(b, u[0:4])
	b = hex.AppendEncode(append(b, '-'), u[4:6])
	b = hex.AppendEncode(append(b, '-'), u[6:8])
	b = hex.AppendEncode(append(b, '-'), u[8:10])
	return hex.AppendEncode(append(b, '-'), u[10:16])
}

// UnmarshalText is ParseUUID over bytes. On an error u is unchanged.
func (u *UUID) UnmarshalText(text []byte) error {
	if len(text) != uuidTextLen || text[8] != '-' || text[13] != '-' || text[18] != '-' || text[23] != '-' {
		return fmt.Errorf("parse UUID %.40q: want 8-4-4-4-12 hexadecimal digits", text)
	}
	var digits [32]byte
	n := copy(digits[:], text[:8])
	n += copy(digits[n:], text[9:13])
	n += copy(digits[n:], text[14:18])
	n += copy(digits[n:], text[19:23])
	copy(digits[n:], text[24:])

	var parsed UUID
	if _, err := hex.Decode(parsed[:], digits[:]); err != nil {
		return fmt.Errorf("parse UUID %q: want 8-4-4-4-12 hexadecimal digits", text)
	}
	*u = parsed
	return nil
}

// UUIDValue makes pgx send u in PostgreSQL's binary form, and a []UUID as uuid[]. The zero UUID is NULL. The error is always nil.
func (u UUID) UUIDValue() (pgtype.UUID, error) {
	return pgtype.UUID{Bytes: u, Valid: !u.IsZero()}, nil
}

// ScanUUID reads what pgx received. NULL becomes the zero UUID. The error is always nil.
func (u *UUID) ScanUUID(v pgtype.UUID) error {
	if !v.Valid {
		*u = UUID{}
		return nil
	}
	*u = v.Bytes
	return nil
}

// Value makes database/sql drivers send u as text. The zero UUID is NULL. The error is always nil.
func (u UUID) Value() (driver.Value, error) {
	if u.IsZero() {
		return nil, nil //nolint:nilnil // driver.Valuer's form of NULL
	}
	return u.String(), nil
}

// Scan reads what a database/sql driver received: text, 16 raw bytes or NULL, which becomes the zero UUID.
func (u *UUID) Scan(src any) error {
	switch v := src.(type) {
	case nil:
		*u = UUID{}
		return nil
	case string:
		return u.UnmarshalText([]byte(v))
	case []byte:
		if len(v) == len(u) {
			copy(u[:], v)
			return nil
		}
		return u.UnmarshalText(v)
	default:
		return fmt.Errorf("scan UUID: want text or bytes, got %T", src)
	}
}
