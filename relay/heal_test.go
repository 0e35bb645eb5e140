package relay_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// TestRowThatCannotBeSent: a row whose text would have more than 1 GB can be stored, but not sent. It does not hold up what is behind it. Here it is a type that
// says so of its values, which costs less.
func TestRowThatCannotBeSent(t *testing.T) {
	t.Parallel()
	for _, relays := range []int{1, 2} {
		t.Run(fmt.Sprintf("relays %d", relays), func(t *testing.T) {
			t.Parallel()
			testRowThatCannotBeSent(t, relays)
		})
	}
}

func testRowThatCannotBeSent(t *testing.T, relays int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	p := newPlace(ctx, t)
	p.join("one", 1)
	p.join("two", 1)
	p.exec(`CREATE TYPE public.vast`)
	p.exec(`CREATE FUNCTION public.vast_in(cstring) RETURNS public.vast LANGUAGE internal STRICT IMMUTABLE AS 'textin'`)
	p.exec(`CREATE FUNCTION public.vast_out(public.vast) RETURNS cstring LANGUAGE internal STRICT IMMUTABLE AS 'textout'`)
	p.exec(`CREATE TYPE public.vast (INPUT = public.vast_in, OUTPUT = public.vast_out, LIKE = text)`)
	p.exec(`CREATE FUNCTION public.vast_send(public.vast) RETURNS bytea LANGUAGE plpgsql AS $$ BEGIN RAISE program_limit_exceeded; END $$`)
	p.exec(`ALTER TYPE public.vast SET (SEND = public.vast_send)`)
	p.exec(`ALTER TABLE one.webhook_events ADD COLUMN more public.vast`)
	messages := make(chan string, 10_000)
	for range relays {
		p.run(heard{slog.DiscardHandler, messages}, nil)
	}
	p.events("one", 1)
	require.Eventually(t, func() bool { return p.arrived() == 1 }, time.Minute, 10*time.Millisecond)

	for round := range 2 {
		before := p.arrived()
		p.exec(`INSERT INTO one.webhook_events (id, event_type, aggregate_id, aggregate_type, event_data, more)
			VALUES (gen_random_uuid(), 'order.created', gen_random_uuid(), 'order', '{}', 'x')`)
		p.events("two", 3)
		p.events("one", 2)
		require.Eventually(t, func() bool { return p.arrived() == before+6 }, time.Minute, 10*time.Millisecond, "round %d", round)
	}
	var past, healed int
	for len(messages) > 0 {
		text := <-messages
		if strings.HasPrefix(text, "the server cannot send a row") {
			past++
			require.Contains(t, text, "SQLSTATE 54000")
			require.Contains(t, text, "CHECK (octet_length(event_data::text)")
		}
		if strings.HasPrefix(text, "healed:") {
			healed++
		}
	}
	require.Equal(t, 2, healed)
	require.GreaterOrEqual(t, past, 2)
}
