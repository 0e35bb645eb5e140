package store

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

// TestArrays holds the arrays against those of pgx, to the byte.
func TestArrays(t *testing.T) {
	t.Parallel()
	one, many := time.Duration(1001), time.Duration(-1<<62)
	m := pgtype.NewMap()
	m.RegisterDefaultPgType([]outbox.UUID{}, "_uuid")
	for _, column := range []any{
		[]outbox.UUID{outbox.NewUUID(), {}, outbox.NewUUID()},
		[]outbox.UUID{},
		[]outbox.UUID(nil),
		[]outbox.UUID{{}},
		[]string{"", "a", "ü\tb"},
		[]string{},
		[]string(nil),
		[]int32{0, -1, 1 << 30},
		[]int32{},
		[]int64{0, -1, -1 << 62},
		[]int64(nil),
		[]time.Duration{0, -time.Microsecond, 3*time.Hour + 999},
		[]time.Duration(nil),
		[]*time.Duration{&one, nil, &many},
		[]*time.Duration{nil},
		[]*time.Duration{},
		[]bool{true, false},
		[]bool(nil),
	} {
		t.Run(fmt.Sprintf("%T of %v", column, column), func(t *testing.T) {
			t.Parallel()
			before := []byte("before")
			got, oid, null := appendArray(before, column)
			known, ok := m.TypeForValue(column)
			require.True(t, ok)
			assert.Equal(t, known.OID, oid)
			want, err := m.Encode(oid, pgtype.BinaryFormatCode, column, before)
			require.NoError(t, err)
			assert.Equal(t, want == nil, null)
			if !null {
				assert.Equal(t, want, got)
			}
		})
	}
	want, err := m.Encode(pgtype.JSONBArrayOID, pgtype.BinaryFormatCode, []json.RawMessage{json.RawMessage(`{"a": 1}`), json.RawMessage("[]")}, nil)
	require.NoError(t, err)
	got, oid, _ := appendArray(nil, []jsonb{`{"a": 1}`, "[]"})
	assert.Equal(t, uint32(pgtype.JSONBArrayOID), oid)
	assert.Equal(t, want, got)

	id := outbox.NewUUID()
	want, err = m.Encode(pgtype.UUIDArrayOID, pgtype.BinaryFormatCode, []pgtype.UUID{{Bytes: id, Valid: true}, {Valid: true}}, nil)
	require.NoError(t, err)
	got, oid, _ = appendArray(nil, given{id, {}})
	assert.Equal(t, uint32(pgtype.UUIDArrayOID), oid)
	assert.Equal(t, want, got)

	_, oid, _ = appendArray(nil, "text")
	assert.Zero(t, oid)
}
