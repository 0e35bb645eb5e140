package main

import (
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// another changes a value into one that it is not.
func another(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() + 1)
	case reflect.Float64:
		v.SetFloat(v.Float() + 0.05)
	case reflect.Bool:
		v.SetBool(!v.Bool())
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), v.Len()+1, v.Len()+1))
	default:
		require.Fail(t, "a kind of value that nobody changes", "%v", v.Type())
	}
}

// The example lists what needs a restart, by keys and whole sections, and nothing else.
func TestExampleListsWhatNeedsARestart(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile(examplePath)
	require.NoError(t, err)
	_, list, found := strings.Cut(strings.ReplaceAll(string(text), "\n# ", " "), "until a restart: ")
	require.True(t, found)
	list, _, found = strings.Cut(list, ".\n")
	require.True(t, found)
	listed := strings.Split(list, ", ")
	used := map[string]bool{databasesKey: true} // no key of the section, see differences
	c := defaultConfig()
	for i, l := range leavesOf(&c) {
		next := defaultConfig()
		another(t, leavesOf(&next)[i].value)
		require.Equal(t, []string{l.key}, differences(&c, &next))
		now := c.reloaded(&next)
		needs := len(differences(&now, &next)) > 0
		require.Equal(t, !needs, len(differences(&c, &now)) > 0, l.key)
		says := slices.IndexFunc(listed, func(k string) bool { return k == l.key || strings.HasPrefix(l.key, k+".") })
		assert.Equal(t, needs, says >= 0, "%s: needs a restart: %v", l.key, needs)
		if says >= 0 {
			used[listed[says]] = true
		}
	}
	for _, name := range listed {
		assert.True(t, used[name], "%s is listed and is no key", name)
	}

	next := defaultConfig()
	next.Databases = []databaseEntry{{Name: "one"}, {Name: "two"}}
	assert.Equal(t, []string{"databases"}, differences(&c, &next))
	other := next
	other.Databases = slices.Clone(next.Databases)
	other.Databases[1].Slot = "other"
	assert.Equal(t, []string{"databases.two.slot"}, differences(&next, &other))
	now := next.reloaded(&other)
	assert.Equal(t, next, now)
}
