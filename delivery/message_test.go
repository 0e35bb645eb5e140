package delivery

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMessageSurvivesStorage(t *testing.T) {
	t.Parallel()
	for f := range Format(Formats) {
		m := Encode(nil, f, fullEvent(), "/quelle/\u00e4\"\\")
		stored := m.HeaderJSON()
		require.True(t, json.Valid(stored), "%s", stored)
		back, err := ParseMessage(m.ID, m.Body, stored)
		require.NoError(t, err)
		assert.Equal(t, m.ID, back.ID)
		assert.Equal(t, string(m.Body), string(back.Body))
		assert.Equal(t, m.ContentType, back.ContentType)
		assert.ElementsMatch(t, m.Header, back.Header)
	}
}

func TestParseMessageTrustsNoRow(t *testing.T) {
	t.Parallel()
	m, err := ParseMessage(testEvent().ID, []byte("x"), []byte(
		`{"Content-Type": "text/plain", "Host": "evil", "webhook-id": "1", "ce-": "x", "ce-a b": "x", "Ce-Type": "t", "X-Other": 3, "traceparent": "tp"}`))
	require.NoError(t, err)
	assert.Equal(t, "text/plain", m.ContentType)
	assert.Equal(t, []HeaderField{{"ce-type", "t"}, {"traceparent", "tp"}}, m.Header)

	for _, empty := range []string{"", "{}", "null"} {
		m, err = ParseMessage(testEvent().ID, nil, []byte(empty))
		require.NoError(t, err)
		assert.Equal(t, "application/json", m.ContentType)
		assert.Empty(t, m.Header)
	}
	for _, bad := range []string{`[]`, `{"content-type": 1}`, `{"traceparent": "a\r\nb"}`, `{`} {
		_, err = ParseMessage(testEvent().ID, nil, []byte(bad))
		require.ErrorContains(t, err, "request headers of event "+eventID, bad)
	}
}
