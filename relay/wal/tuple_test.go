package wal

import (
	"encoding/binary"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestValues reads values of all types the way the server sends them, in both formats.
func TestValues(t *testing.T) {
	t.Parallel()
	const null = "NULL"
	cases := []struct{ sqlType, value, want string }{
		{"uuid", "0198c0de-0000-7000-8000-0123456789ab", "0198c0de-0000-7000-8000-0123456789ab"},
		{"text", "", ""},
		{"text", "grüß😀 'quoted' \\", "grüß😀 'quoted' \\"},
		{"varchar(9)", "varying", "varying"},
		{"char(5)", "ab", "ab   "},
		{"name", "identifier", "identifier"},
		{"mood", "happy", "happy"},
		{"word", "domain", "domain"},
		{"smallint", "-32768", "-32768"},
		{"int", "2147483647", "2147483647"},
		{"int", "-1", "-1"},
		{"bigint", "-9223372036854775808", "-9223372036854775808"},
		{"decimal(3,2)", "2.0", "2"},
		{"decimal(3,2)", "1.05", "1.05"},
		{"decimal(3,2)", "-0.01", "-0.01"},
		{"numeric", "0", "0"},
		{"numeric", "10000", "10000"},
		{"numeric", "123456789012345678901234567890.123456789", "1.2345678901234568e+29"},
		{"numeric", "1e-20", "1e-20"},
		{"numeric", "1e400", "+Inf"},
		{"numeric", "NaN", "NaN"},
		{"numeric", "Infinity", "+Inf"},
		{"numeric", "-Infinity", "-Inf"},
		{"real", "0.5", "0.5"},
		{"double precision", "0.1", "0.1"},
		{"boolean", "true", "true"},
		{"boolean", "false", "false"},
		{"timestamptz", "2024-02-29 23:59:59.123456+00", "2024-02-29T23:59:59.123456Z"},
		{"timestamptz", "1999-12-31 23:59:59+02", "1999-12-31T21:59:59Z"},
		{"timestamptz", "0044-03-15 00:00:00+00 BC", "0001-01-01T00:00:00.000001Z"},
		{"timestamptz", "10000-01-01 00:00:00+00", "9999-12-31T23:59:59.999999Z"},
		{"timestamptz", "infinity", "9999-12-31T23:59:59.999999Z"},
		{"timestamptz", "-infinity", "0001-01-01T00:00:00.000001Z"},
		{"jsonb", `{"b": 1, "a": [true, null, "\u00e4\"\\"], "b": 1.50}`, `{"a": [true, null, "ä\"\\"], "b": 1.50}`},
		{"jsonb", "null", "null"},
		{"jsonb", "-0.0010e2", "-0.10"},
		{"json", `  { "kept" :  "as is" }`, `  { "kept" :  "as is" }`},
		{"uuid", null, null},
		{"jsonb", null, null},
		{"timestamptz", null, null},
	}
	columns, values := make([]string, len(cases)), make([]string, len(cases))
	for i, c := range cases {
		columns[i] = fmt.Sprintf("c%d %s", i, c.sqlType)
		values[i] = quoteLiteral(c.value) + "::" + c.sqlType
		if c.value == null {
			values[i] = null
		}
	}
	d := newDatabase(t, "CREATE TYPE mood AS ENUM ('happy')", "CREATE DOMAIN word AS varchar", "CREATE TABLE v ("+strings.Join(columns, ", ")+")")
	d.exec("SET TimeZone = 'Asia/Kolkata'") // the text form is written in it
	d.exec("INSERT INTO v VALUES (" + strings.Join(values, ", ") + ")")
	for _, binary := range []bool{true, false} {
		var dec decoder
		rows := 0
		for _, msg := range d.messages(binary) {
			k, err := dec.decode(msg)
			require.NoError(t, err)
			if k != kindInsert {
				continue
			}
			rows++
			for i, c := range cases {
				assert.Equal(t, c.want, renderValue(&dec.change.New, i), "%s of type %s, binary %t", c.value, c.sqlType, binary)
			}
		}
		assert.Equal(t, 1, rows)
	}
}

// TestBadValues feeds the getters what no server sends.
func TestBadValues(t *testing.T) {
	t.Parallel()
	get := map[string]func(*Tuple) error{
		"uuid": func(t *Tuple) error { _, err := t.UUID(0); return err },
		"text": func(t *Tuple) error { _, err := t.Bytes(0); return err },
		"json": func(t *Tuple) error { _, err := t.JSON(0); return err },
		"int":  func(t *Tuple) error { _, err := t.Int(0); return err },
		"num":  func(t *Tuple) error { _, err := t.Float(0); return err },
		"bool": func(t *Tuple) error { _, err := t.Bool(0); return err },
		"time": func(t *Tuple) error { _, err := t.Time(0); return err },
	}
	for _, c := range []struct {
		get    string
		oid    uint32
		format byte
		data   string
		want   error
	}{
		{"uuid", 2950, 'b', strings.Repeat("x", 15), errValue},
		{"uuid", 2950, 'b', strings.Repeat("x", 17), errValue},
		{"uuid", 2950, 't', "not a uuid", errValue},
		{"uuid", 25, 'b', strings.Repeat("x", 16), errType},
		{"uuid", 2950, 'u', "", ErrUnchanged},
		{"text", 2950, 'b', "x", errType},
		{"json", 3802, 'b', "", errValue},
		{"json", 3802, 'b', "\x01", errValue},
		{"json", 3802, 'b', "\x02{}", errValue},
		{"json", 3802, 't', "", errValue},
		{"json", 25, 't', "{}", errType},
		{"int", 23, 'b', "abc", errValue},
		{"int", 23, 't', "", errValue},
		{"int", 23, 't', "99999999999999999999", errValue},
		{"num", 1700, 'b', "\x00\x01", errValue},
		{"num", 1700, 'b', be(1, 2) + be(0, 6), errValue},              // a digit is missing
		{"num", 1700, 'b', be(1, 2) + be(0, 6) + "\xff\xff", errValue}, // a digit of 65535
		{"num", 1700, 'b', be(0, 4) + "\x12\x34" + be(0, 2), errValue}, // a sign nobody knows
		{"num", 701, 'b', "1234567", errValue},
		{"num", 700, 'b', "123", errValue},
		{"num", 1700, 't', "1,5", errValue},
		{"bool", 16, 'b', "\x02", errValue},
		{"bool", 16, 't', "true", errValue},
		{"time", 1184, 'b', "1234567", errValue},
		{"time", 1184, 't', "yesterday", errValue},
	} {
		err := get[c.get](tupleOf(c.oid, c.format, c.data))
		require.ErrorIs(t, err, c.want, "%s of %q", c.get, c.data)
		assert.Contains(t, err.Error(), `column "c" of "s"."t"`)
	}
	for name, get := range get {
		tuple := tupleOf(25, 't', "x")
		tuple.values = nil
		require.Error(t, get(tuple), name)
		require.Error(t, get(&Tuple{}), name)
	}
	// Types of extensions and domains have any OID: the getter decides.
	for name, data := range map[string]string{"uuid": strings.Repeat("x", 16), "text": "x", "json": "\x01{}", "int": "1234", "bool": "\x01", "time": "12345678"} {
		require.NoError(t, get[name](tupleOf(99999, 'b', data)), name)
	}
}

func TestUnchangedIsNotNull(t *testing.T) {
	t.Parallel()
	unchanged, null := tupleOf(25, 'u', ""), tupleOf(25, 'n', "")
	assert.True(t, unchanged.IsUnchanged(0))
	assert.False(t, unchanged.IsNull(0))
	assert.True(t, null.IsNull(0))
	assert.False(t, null.IsUnchanged(0))
	assert.False(t, null.IsNull(1))
	assert.False(t, null.IsNull(-1))
	assert.Equal(t, 1, null.Len())
	b, err := null.Bytes(0)
	require.NoError(t, err)
	assert.Nil(t, b)
	b, err = tupleOf(25, 'b', "").Bytes(0)
	require.NoError(t, err)
	assert.NotNil(t, b)
}

func tupleOf(oid uint32, format byte, data string) *Tuple {
	rel := &Relation{Schema: "s", Table: "t", Columns: []Column{{Name: "c", Type: oid}}}
	return &Tuple{rel: rel, values: []value{{format: format, data: []byte(data)}}}
}

// be returns the last size bytes of n in network order.
func be(n uint64, size int) string {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n)
	return string(b[8-size:])
}
