package charts_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// What follows from other files is written into the chart by UPDATE=1 go test -run TestGenerated, and held against them without it.
const (
	valuesFile = "outbox-relay/values.yaml"
	schemaFile = "outbox-relay/values.schema.json"
	readmeFile = "outbox-relay/README.md"
)

// TestGenerated: the README's table is that of values.yaml, and the schema of config that of config.example.yaml.
func TestGenerated(t *testing.T) {
	t.Parallel()
	for file, made := range map[string][]byte{readmeFile: readme(t), schemaFile: schema(t)} {
		if os.Getenv("UPDATE") != "" {
			require.NoError(t, os.WriteFile(file, made, 0o644))
		}
		is, err := os.ReadFile(file)
		require.NoError(t, err)
		assert.Equal(t, string(made), string(is), "%s is not up to date: cd charts && UPDATE=1 go test -run TestGenerated .", file)
	}
}

func readYAML(t *testing.T, file string) *yaml.Node {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var doc yaml.Node
	require.NoError(t, yaml.Unmarshal(text, &doc))
	return doc.Content[0]
}

// fields are the keys of a mapping with what they hold.
func fields(mapping *yaml.Node, each func(key, value *yaml.Node)) {
	for i := 0; i < len(mapping.Content); i += 2 {
		each(mapping.Content[i], mapping.Content[i+1])
	}
}

// readme fills the table of values in, as helm-docs would.
func readme(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile(readmeFile)
	require.NoError(t, err)
	const begin, end = "<!-- values -->\n", "<!-- /values -->\n"
	head, rest, found := strings.Cut(string(text), begin)
	require.True(t, found)
	_, tail, found := strings.Cut(rest, end)
	require.True(t, found)
	var table strings.Builder
	table.WriteString("| Key | Type | Default | Description |\n|-----|------|---------|-------------|\n")
	rows(t, &table, "", readYAML(t, valuesFile))
	return []byte(head + begin + table.String() + end + tail)
}

// rows writes one for each value that has a comment beginning with "--"; every value has one, or is a section of such.
func rows(t *testing.T, table *strings.Builder, prefix string, mapping *yaml.Node) {
	t.Helper()
	fields(mapping, func(key, value *yaml.Node) {
		_, comment, documented := strings.Cut(key.HeadComment, "# -- ")
		if !documented {
			require.Equal(t, yaml.MappingNode, value.Kind, "%s%s has no comment", prefix, key.Value)
			require.NotEmpty(t, value.Content, "%s%s has no comment", prefix, key.Value)
			rows(t, table, prefix+key.Value+".", value)
			return
		}
		var plain any
		require.NoError(t, value.Decode(&plain))
		def, err := json.Marshal(plain)
		require.NoError(t, err)
		kind := map[string]string{"!!str": "string", "!!int": "int", "!!float": "float", "!!bool": "bool", "!!map": "object", "!!seq": "list", "!!null": "int"}[value.Tag]
		fmt.Fprintf(table, "| %s%s | %s | `%s` | %s |\n", prefix, key.Value, kind, def, strings.ReplaceAll(comment, "\n# ", " "))
	})
}

// schema fills in what the relay's own configuration may be: its keys, and the form of their values.
func schema(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile(schemaFile)
	require.NoError(t, err)
	var s map[string]any
	require.NoError(t, json.Unmarshal(text, &s))
	sections := make(map[string]any)
	fields(readYAML(t, "../config.example.yaml"), func(name, section *yaml.Node) {
		switch name.Value {
		case "server", "databases": // the chart writes them
		default:
			sections[name.Value] = sectionSchema(t, name.Value, section)
		}
	})
	definitions := s["definitions"].(map[string]any)
	definitions["database"] = sections["database"]
	sections["database"] = map[string]any{"$ref": "#/definitions/database"}
	definitions["config"] = closed(sections)

	var out bytes.Buffer
	enc := json.NewEncoder(&out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	require.NoError(t, enc.Encode(s))
	return out.Bytes()
}

func closed(properties map[string]any) map[string]any {
	return map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
}

func sectionSchema(t *testing.T, name string, section *yaml.Node) map[string]any {
	t.Helper()
	properties := make(map[string]any)
	fields(section, func(key, value *yaml.Node) {
		if name == "database" && (key.Value == "url" || key.Value == "replication_url") {
			return // a ConfigMap is no place for passwords
		}
		property := valueSchema(t, key.Value, value)
		property["description"] = strings.ReplaceAll(strings.TrimPrefix(key.HeadComment, "# "), "\n# ", " ")
		properties[key.Value] = property
	})
	if profiles, ok := properties["profiles"].(map[string]any); ok { // an entry has what the section has, and whose it is
		of := map[string]any{"tenant": text(), "endpoint": text(), "server_name": text()}
		for name, property := range properties {
			if name != "profiles" {
				of[name] = property
			}
		}
		profiles["items"] = closed(of)
	}
	return closed(properties)
}

func text() map[string]any { return map[string]any{"type": "string"} }

// valueSchema goes by the default. Whole numbers and others are not told apart by it, so the relay has the last word on these.
func valueSchema(t *testing.T, key string, value *yaml.Node) map[string]any {
	t.Helper()
	const duration, size = `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`, `^[0-9]+(\.[0-9]+)? ?(B|KiB|MiB|GiB|KB|MB|GB)$`
	switch {
	case value.Kind == yaml.MappingNode:
		return sectionSchema(t, key, value)
	case key == "ports":
		return map[string]any{"type": "array", "items": map[string]any{"type": "integer"}}
	case key == "min_version":
		return map[string]any{"type": []string{"string", "number"}} // 1.3 is one where it has no quotes
	case key == "payload_schema":
		return map[string]any{"type": []string{"string", "boolean"}} // off is one where it has no quotes
	case value.Tag == "!!seq":
		return map[string]any{"type": "array", "items": text()}
	case value.Tag == "!!bool":
		return map[string]any{"type": "boolean"}
	case value.Tag == "!!int" || value.Tag == "!!float":
		return map[string]any{"type": "number"}
	case value.Tag != "!!str":
		require.Fail(t, "a default that is no value", "%s %s", value.Tag, value.Value)
		return nil
	case regexp.MustCompile(duration).MatchString(value.Value):
		return map[string]any{"type": "string", "pattern": duration}
	case regexp.MustCompile(size).MatchString(value.Value):
		return map[string]any{"type": "string", "pattern": size}
	default:
		return text()
	}
}

// TestDefaultsOfStop: the two defaults that the chart has to know are still those of the relay.
func TestDefaultsOfStop(t *testing.T) {
	t.Parallel()
	var example struct {
		Shutdown struct{ Drain string }
		Record   struct{ Timeout string }
	}
	require.NoError(t, readYAML(t, "../config.example.yaml").Decode(&example))
	helpers, err := os.ReadFile("outbox-relay/templates/_helpers.tpl")
	require.NoError(t, err)
	assert.Contains(t, string(helpers), fmt.Sprintf(`dig "shutdown" "drain" %q`, example.Shutdown.Drain))
	assert.Contains(t, string(helpers), fmt.Sprintf(`dig "record" "timeout" %q`, example.Record.Timeout))
}

// TestSchemaIsClosed: every section refuses what it does not know, and every value that the schema has is one of values.yaml.
func TestSchemaIsClosed(t *testing.T) {
	t.Parallel()
	var s map[string]any
	require.NoError(t, json.Unmarshal(schema(t), &s))
	var check func(path string, s map[string]any, values *yaml.Node)
	check = func(path string, s map[string]any, values *yaml.Node) {
		properties, ok := s["properties"].(map[string]any)
		if !ok {
			return
		}
		assert.Equal(t, false, s["additionalProperties"], path)
		have := make(map[string]*yaml.Node)
		if values != nil && values.Kind == yaml.MappingNode {
			fields(values, func(key, value *yaml.Node) { have[key.Value] = value })
		}
		for name, property := range properties {
			below, _ := property.(map[string]any)
			check(path+"."+name, below, have[name])
			if path == "" && name != "global" && name != "enabled" {
				assert.NotNil(t, have[name], "values.yaml lacks %s", name)
			}
		}
	}
	check("", s, readYAML(t, valuesFile))
}
