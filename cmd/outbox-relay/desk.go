package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
)

// What the commands about deliveries, dead letters, endpoints and events share.

// inquiry is what each of them can be told.
type inquiry struct {
	tenant, output string
}

func (q *inquiry) addTo(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&q.tenant, "tenant", "t", "", "`SCHEMA` of the tenant; needed if there are several")
	q.output = "table"
	cmd.Flags().VarP(oneOf(&q.output, "FORM", "table", "json"), "output", "o", "`FORM` of the output: table or json")
}

// atDesk runs f with a desk for the tenant.
func (a *app) atDesk(cmd *cobra.Command, q *inquiry, f func(ctx context.Context, d *desk.Desk, c *config) error) error {
	c, err := a.loadOne(cmd)
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	return withDatabase(ctx, &c, func(conn *pgx.Conn) error {
		d, err := desk.Open(ctx, conn, q.tenant, c.Database.Slot)
		if errors.Is(err, desk.ErrChooseTenant) {
			return usageError{err}
		}
		if err != nil {
			return err
		}
		return f(ctx, d, &c)
	})
}

// oneID checks the arguments of the commands for one thing.
func oneID(what string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usage("name one %s by its id, not %d", what, len(args))
		}
		return checkID(args[0])
	}
}

func checkID(text string) error {
	if _, err := outbox.ParseUUID(text); err != nil {
		return usage("%q is no id: write all of it, such as 0190c2f5-3f2a-7cc3-b1c5-9d9c6f3f8a11", text)
	}
	return nil
}

// argument is the id that oneID has checked.
func argument(args []string) outbox.UUID {
	id, _ := outbox.ParseUUID(args[0])
	return id
}

// textFlag is a flag whose text is read into something.
type textFlag struct {
	name string // of the kind of value
	text string
	read func(text string) error
}

func (f *textFlag) String() string { return f.text }
func (f *textFlag) Type() string   { return f.name }

func (f *textFlag) Set(text string) error {
	f.text = text
	return f.read(text)
}

func oneOf(value *string, name string, words ...string) *textFlag {
	return &textFlag{name, *value, func(text string) error {
		if !slices.Contains(words, text) {
			return errors.New("must be " + choice(words))
		}
		*value = text
		return nil
	}}
}

// anyOf reads words with commas between them.
func anyOf(values *[]string, words ...string) *textFlag {
	return &textFlag{"WORD", strings.Join(*values, ","), func(text string) error {
		list := strings.Split(text, ",")
		for _, word := range list {
			if !slices.Contains(words, word) {
				return errors.New("must be " + choice(words) + ", or several of them with commas")
			}
		}
		*values = list
		return nil
	}}
}

func choice(words []string) string {
	return strings.Join(words[:len(words)-1], ", ") + " or " + words[len(words)-1]
}

func idFlag(id *outbox.UUID) *textFlag {
	return &textFlag{"ID", "", func(text string) (err error) {
		*id, err = outbox.ParseUUID(text)
		return err
	}}
}

// moment is a time, or how long ago it is.
type moment struct {
	at  time.Time
	ago time.Duration
}

func (m moment) from(now time.Time) time.Time {
	if m.ago > 0 {
		return now.Add(-m.ago)
	}
	return m.at
}

const momentHelp = "RFC 3339, or how long ago: 90m, 2h, 7d"

func timeFlag(m *moment) *textFlag {
	return &textFlag{"TIME", "", func(text string) (err error) {
		*m, err = parseMoment(text)
		return err
	}}
}

func parseMoment(text string) (m moment, err error) {
	if m.ago, err = parseSpan(text); err == nil && m.ago > 0 {
		return m, nil
	}
	if m.at, err = time.Parse(time.RFC3339, text); err != nil {
		return moment{}, fmt.Errorf("write a time with its zone, such as %s, or how long ago it is, such as 90m, 2h or 7d",
			time.Now().UTC().Add(-24*time.Hour).Format(time.RFC3339))
	}
	return moment{at: m.at}, nil
}

// parseSpan reads a length of time, in days as well.
func parseSpan(text string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(text, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	}
	return time.ParseDuration(text)
}

// beyondRetention refuses to go back further than deliveries are kept: what was delivered before cannot be told from what was missed. kept is how long
// they are, zero for ever.
func beyondRetention(since, now time.Time, kept time.Duration) error {
	border := now.Add(-kept).UTC()
	if kept == 0 || !since.Before(border) {
		return nil
	}
	return hinted{
		fmt.Errorf("%s is further back than deliveries are kept (retention.deliveries is %s): what was delivered before %s would be sent again",
			since.UTC().Format(time.RFC3339), durationText(kept), border.Format(time.RFC3339)),
		"begin with --since " + border.Add(time.Hour).Truncate(time.Hour).Format(time.RFC3339) + " or later, or say --yes if receivers may get those a second time",
	}
}

func rateFlag(rate *float64) *textFlag {
	text := ""
	if *rate > 0 {
		text = strconv.FormatFloat(*rate, 'g', -1, 64)
	}
	return &textFlag{"N", text, func(text string) error {
		n, err := strconv.ParseFloat(strings.TrimSuffix(text, "/s"), 64)
		if err != nil || n != 0 && !(n >= 0.001 && n <= 1_000_000) {
			return errors.New("must be a number of deliveries a second from 0.001 to 1000000, such as 50 or 0.5; 0 for all at once")
		}
		*rate = n
		return nil
	}}
}

func limitFlag(n *int) *textFlag {
	return &textFlag{"N", strconv.Itoa(*n), func(text string) error {
		value, err := strconv.ParseUint(text, 10, 31)
		if err != nil || value == 0 {
			return errors.New("must be a whole number above 0")
		}
		*n = int(value)
		return nil
	}}
}

// print writes the value for scripts, or has it written for people.
func (a *app) print(q *inquiry, value any, table func(w *tabwriter.Writer)) error {
	if q.output == "json" {
		return writeJSON(a.out, "  ", value)
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 3, ' ', 0)
	table(w)
	return w.Flush()
}

// writeJSON writes a value for scripts, on one line without indent. For them < and & are what they are: a page is not made of it.
func writeJSON(w io.Writer, indent string, value any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", indent)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(value)
}

// full tells a person that a list was cut.
func (a *app) full(q *inquiry, shown, limit int) {
	if q.output == "table" && shown == limit {
		say(a.err, "These are %d; there may be more: see --limit\n", shown)
	}
}

// line prints a line of a description, unless there is nothing to say.
func line(w io.Writer, name, format string, args ...any) {
	if text := fmt.Sprintf(format, args...); strings.TrimSpace(text) != "" {
		say(w, "%s\t%s\n", name, text)
	}
}

// plain makes text of others fit for a line of a terminal: what controls a terminal is shown, not done.
func plain(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			return ' '
		case unicode.IsControl(r) || unicode.Is(unicode.Cf, r):
			return '\uFFFD'
		}
		return r
	}, text)
}

// short is plain text cut to n characters.
func short(text string, n int) string {
	if runes := []rune(plain(text)); len(runes) > n {
		return string(runes[:n-1]) + "…"
	}
	return plain(text)
}

// named is how a thing with a name and an id is called.
func named(name string, id outbox.UUID) string {
	if name == "" {
		return id.String()
	}
	return fmt.Sprintf("%s (%s)", plain(name), id)
}

func timeText(t desk.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format(time.RFC3339)
}

// when is a time and how far it is away; empty if it is missing.
func when(t desk.Time, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	return timeText(t) + " (" + relative(t.Time, now) + ")"
}

func relative(t, now time.Time) string {
	if t.After(now) {
		return "in " + span(t.Sub(now))
	}
	return span(now.Sub(t)) + " ago"
}

// span is a duration in its two largest units.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	const day = 24 * time.Hour
	switch {
	case d < 10*time.Minute:
		return durationText(d)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < day:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return fmt.Sprintf("%dd%dh", d/day, d%day/time.Hour)
}

func suffixIf(yes bool, text string) string {
	if yes {
		return text
	}
	return ""
}

// upTo is a number that is counted up to desk.CountLimit.
func upTo(n int) string {
	return strconv.Itoa(n) + suffixIf(n >= desk.CountLimit, "+")
}

// statusText is an answer's status with the kind of failure.
func statusText(code string, status int) string {
	switch {
	case status == 0:
		return cmp.Or(code, "-")
	case code == "" || strings.HasPrefix(code, "http_"):
		return strconv.Itoa(status)
	}
	return fmt.Sprintf("%s %d", code, status)
}
