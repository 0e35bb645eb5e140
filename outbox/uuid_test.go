package outbox_test

import (
	"encoding/json"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/neo-commons/outbox-relay/outbox"
)

const someText = "0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11"

func TestNewUUIDIsVersion7(t *testing.T) {
	t.Parallel()
	before := time.Now().UnixMilli()
	u := outbox.NewUUID()
	after := time.Now().UnixMilli()

	assert.Equal(t, byte(0x70), u[6]&0xf0, "version")
	assert.Equal(t, byte(0x80), u[8]&0xc0, "variant")
	var ms int64
	for _, b := range u[:6] {
		ms = ms<<8 | int64(b)
	}
	assert.GreaterOrEqual(t, ms, before)
	assert.LessOrEqual(t, ms, after+1000, "the ids made at once by other tests may run a little ahead of the clock")
}

func TestNewUUIDRisesAcrossGoroutines(t *testing.T) {
	t.Parallel()
	const goroutines, each = 8, 20_000
	made := make([][]outbox.UUID, goroutines)
	var wg sync.WaitGroup
	for g := range made {
		wg.Go(func() {
			for range each {
				made[g] = append(made[g], outbox.NewUUID())
			}
		})
	}
	wg.Wait()

	seen := make(map[outbox.UUID]struct{}, goroutines*each)
	for _, ids := range made {
		require.True(t, slices.IsSortedFunc(ids, func(a, b outbox.UUID) int { return strings.Compare(string(a[:]), string(b[:])) }))
		for _, id := range ids {
			seen[id] = struct{}{}
		}
	}
	assert.Len(t, seen, goroutines*each)
}

func TestUUIDText(t *testing.T) {
	t.Parallel()
	u, err := outbox.ParseUUID(strings.ToUpper(someText))
	require.NoError(t, err)
	assert.Equal(t, someText, u.String())

	appended, err := u.AppendText([]byte("id "))
	require.NoError(t, err)
	assert.Equal(t, "id "+someText, string(appended))

	type doc struct {
		ID   outbox.UUID `json:"id"`
		None outbox.UUID `json:"none,omitzero"`
	}
	encoded, err := json.Marshal(doc{ID: u})
	require.NoError(t, err)
	assert.JSONEq(t, `{"id":"`+someText+`"}`, string(encoded))
	var decoded doc
	require.NoError(t, json.Unmarshal(encoded, &decoded))
	assert.Equal(t, u, decoded.ID)
}

func TestParseUUIDRefuses(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", "0190c2f53f2a7cc3b1c59d9c6f3f8a11", "{" + someText + "}", "urn:uuid:" + someText, someText + "0", someText[:35],
		"0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a1g", "0190c2f5-3f2a-7cc3-b1c5_9d9c6f3f8a11", strings.Repeat("-", 36), "0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a1\x00",
	} {
		u := outbox.UUID{1}
		require.Error(t, u.UnmarshalText([]byte(text)), text)
		assert.Equal(t, outbox.UUID{1}, u, "unchanged after an error")
		_, err := outbox.ParseUUID(text)
		require.Error(t, err, text)
	}
}

func TestUUIDNull(t *testing.T) {
	t.Parallel()
	var none outbox.UUID
	assert.True(t, none.IsZero())
	value, err := none.Value()
	require.NoError(t, err)
	assert.Nil(t, value)
	binary, err := none.UUIDValue()
	require.NoError(t, err)
	assert.False(t, binary.Valid)

	u := outbox.NewUUID()
	require.NoError(t, u.ScanUUID(pgtype.UUID{}))
	assert.True(t, u.IsZero())
	u = outbox.NewUUID()
	require.NoError(t, u.Scan(nil))
	assert.True(t, u.IsZero())
}

func TestUUIDScan(t *testing.T) {
	t.Parallel()
	want, err := outbox.ParseUUID(someText)
	require.NoError(t, err)
	for _, src := range []any{someText, []byte(someText), want[:]} {
		var u outbox.UUID
		require.NoError(t, u.Scan(src))
		assert.Equal(t, want, u)
	}
	var u outbox.UUID
	require.Error(t, u.Scan(7))
	require.Error(t, u.Scan("7"))
}

func TestUUIDEncodesWithoutSurprisingAllocations(t *testing.T) { //nolint:paralleltest // AllocsPerRun counts the whole process
	u := outbox.NewUUID()
	m := pgtype.NewMap()
	buf := make([]byte, 0, 64)
	allocs := testing.AllocsPerRun(100, func() {
		var err error
		buf, err = m.Encode(pgtype.UUIDOID, pgtype.BinaryFormatCode, u, buf[:0])
		if err != nil || len(buf) != 16 {
			t.Fatal(len(buf), err)
		}
	})
	assert.LessOrEqual(t, allocs, 2.0, "one for the interface, one for the plan")
}

func FuzzParseUUID(f *testing.F) {
	f.Add(someText)
	f.Add(strings.ToUpper(someText))
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := outbox.ParseUUID(text)
		if err == nil {
			assert.Equal(t, strings.ToLower(text), u.String())
		}
	})
}

func BenchmarkNewUUID(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		outbox.NewUUID()
	}
}

func BenchmarkNewUUIDParallel(b *testing.B) {
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			outbox.NewUUID()
		}
	})
}
