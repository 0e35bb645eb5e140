package route

import (
	"encoding/json"
	"math/big"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestDecimal(t *testing.T) {
	t.Parallel()
	// In ascending order; numbers in one line are equal.
	ascending := [][]string{
		{"-1e400", "-10e399"},
		{"-12345678901234567891"},
		{"-12345678901234567890", "-1234567890123456789e1"},
		{"-100", "-1e2", "-1E+2", "-100.00"},
		{"-99.999"},
		{"-1.5", "-15e-1"},
		{"-1.05"},
		{"-0.001", "-1e-3"},
		{"0", "-0", "0.00", "0e9", "0E-9999999999999", "-0.0e99"},
		{"1e-400"},
		{"0.001", "1e-3"},
		{"0.01", "0.010"},
		{"0.1", "0.10", "1e-1", "10e-2"},
		{"0.10000000000000000001"},
		{"0.9"},
		{"1", "1.0", "1e0", "10e-1"},
		{"1.0000000001"},
		{"9"},
		{"10", "1e1", "0.1e2"},
		{"10.1", "1010e-2"},
		{"99.999"},
		{"100", "1e2"},
		{"12345678901234567890"},
		{"12345678901234567891"},
		{"1e400"},
	}
	var all []decimal
	var rank []int
	for i, equal := range ascending {
		for _, token := range equal {
			d, ok := parseDecimal([]byte(token))
			require.True(t, ok, token)
			all, rank = append(all, d), append(rank, i)
		}
	}
	for i := range all {
		for j := range all {
			want := 0
			if rank[i] != rank[j] {
				want = 1
			}
			if rank[i] < rank[j] {
				want = -1
			}
			assert.Equal(t, want, all[i].compare(all[j]), "%v and %v", ascending[rank[i]], ascending[rank[j]])
		}
	}
}

func TestDecimalRefuses(t *testing.T) {
	t.Parallel()
	for _, token := range []string{"", "-", "--1", "1e", "1e+", "1.2.3", "1e1.5", "0x1", "1e99999999999999999999", "1e-99999999999999999999", "e1"} {
		_, ok := parseDecimal([]byte(token))
		assert.False(t, ok, token)
	}
}

func FuzzDecimal(f *testing.F) {
	f.Add("1.50", "15e-1")
	f.Add("-0", "0.0")
	f.Add("100", "1e2")
	f.Fuzz(func(t *testing.T, a, b string) {
		x, okA := parseDecimal([]byte(a))
		y, okB := parseDecimal([]byte(b))
		if !json.Valid([]byte(a)) || !json.Valid([]byte(b)) || hugeExponent.MatchString(a+" "+b) || a == "" || b == "" {
			return
		}
		r, isA := new(big.Rat).SetString(strings.TrimSpace(a))
		s, isB := new(big.Rat).SetString(strings.TrimSpace(b))
		if !isA || !isB || strings.TrimSpace(a) != a || strings.TrimSpace(b) != b {
			return
		}
		require.True(t, okA && okB)
		require.Equal(t, r.Cmp(s), x.compare(y))
		require.Equal(t, s.Cmp(r), y.compare(x))
	})
}

func FuzzWalk(f *testing.F) {
	f.Add([]byte(shop))
	f.Add([]byte(` [ [ ], {"a" : "\"]" } ] `))
	f.Fuzz(func(t *testing.T, doc []byte) {
		start := space(doc, 0)
		end := skip(doc, start)
		for m := membersOf(doc, start); kindAt(doc, start) == kindObject && m.advance(); {
			unescape(nil, m.key)
		}
		count := 0
		e := elementsOf(doc, start)
		for kindAt(doc, start) == kindArray && e.advance() {
			count++
		}
		if !json.Valid(doc) || !utf8.Valid(doc) {
			return
		}
		require.Equal(t, len(doc), space(doc, end))
		switch v := decode(t, string(doc)).(type) {
		case string:
			require.Equal(t, v, string(unescape(nil, doc[start+1:end-1])))
		case []any:
			require.Len(t, flatten(v), count)
		}
	})
}
