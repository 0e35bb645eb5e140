package main

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"sync"
	"time"
)

// newLogger logs for people on a terminal, for machines anywhere else, unless told. level is set to that of c, and may be set to another at any time. The
// caller ends it with flush, which tells what was left out.
func newLogger(w io.Writer, c logging, level *slog.LevelVar) (log *slog.Logger, flush func()) {
	level.Set(c.level())
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // JSON would have a bare number of nanoseconds
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
	var handler slog.Handler
	if c.Format == "text" || c.Format == "auto" && terminal(w) {
		handler = slog.NewTextHandler(w, options)
	} else {
		handler = slog.NewJSONHandler(w, options)
	}
	limits := &logLimits{out: handler, spells: make(map[string]*logSpell)}
	return slog.New(limitedHandler{handler, limits, ""}), limits.flush
}

// What may be logged of one message within logSpellTime: by one tenant, endpoint, database and the like, and in all.
const (
	logSpellTime  = time.Minute
	linesOfOne    = 20
	linesOfAll    = 100
	suppressedMsg = "lines were left out"
)

// logLimits bounds how often a message is repeated, above debug. A receiver, a tenant or a database that fails all the time would otherwise fill a disk,
// and hide what others have to say. The first lines of each are let through, whoever's they are; the rest is counted, and the number is logged once the
// spell is over.
//
// It knows messages by their text, which never varies (the linter sees to that): so what is kept is bounded by the program and linesOfAll.
type logLimits struct {
	out slog.Handler

	mu     sync.Mutex
	spells map[string]*logSpell
}

// logSpell is what has been logged of a message since the first line.
type logSpell struct {
	began      time.Time
	lines      map[string]int // by whom they are about
	all        int
	suppressed int
	level      slog.Level // the greatest of those suppressed
	timer      *time.Timer
}

// admit tells whether a line may be written.
func (l *logLimits) admit(message, about string, level slog.Level, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.spells[message]
	if s == nil || now.Sub(s.began) >= logSpellTime && s.suppressed == 0 {
		s = &logSpell{began: now, lines: make(map[string]int)}
		l.spells[message] = s
	}
	if s.all < linesOfAll && s.lines[about] < linesOfOne {
		s.all++
		s.lines[about]++
		return true
	}
	s.suppressed++
	s.level = max(s.level, level)
	if s.timer == nil {
		s.timer = time.AfterFunc(max(logSpellTime-now.Sub(s.began), 0), func() { l.tell(message, s) })
	}
	return false
}

// tell ends a spell and says how many lines it has cost.
func (l *logLimits) tell(message string, s *logSpell) {
	l.mu.Lock()
	if l.spells[message] != s {
		l.mu.Unlock()
		return
	}
	delete(l.spells, message)
	l.mu.Unlock()
	if s.suppressed == 0 {
		return
	}
	s.timer.Stop()
	ctx := context.Background()
	if !l.out.Enabled(ctx, s.level) {
		return
	}
	r := slog.NewRecord(time.Now(), s.level, suppressedMsg, 0)
	r.AddAttrs(slog.String("line", message), slog.Int("suppressed", s.suppressed), slog.Duration("within", time.Since(s.began).Round(time.Second)))
	_ = l.out.Handle(ctx, r) // as slog.Logger does
}

// flush ends all spells.
func (l *logLimits) flush() {
	l.mu.Lock()
	open := maps.Clone(l.spells)
	l.mu.Unlock()
	for message, s := range open {
		l.tell(message, s)
	}
}

// limitedHandler puts the limits before a handler.
type limitedHandler struct {
	slog.Handler

	limits *logLimits
	about  string // what the logger's own attributes say of whom its lines are about
}

// Handle implements slog.Handler.
func (h limitedHandler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return h.Handler.Handle(ctx, r)
	}
	about := h.about
	r.Attrs(func(a slog.Attr) bool {
		about += aboutWhom(a)
		return true
	})
	if !h.limits.admit(r.Message, about, r.Level, r.Time) { //nolint:contextcheck // what it leaves to a timer belongs to no caller
		return nil
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h limitedHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.Handler = h.Handler.WithAttrs(attrs)
	for _, a := range attrs {
		h.about += aboutWhom(a)
	}
	return h
}

// WithGroup implements slog.Handler.
func (h limitedHandler) WithGroup(name string) slog.Handler {
	h.Handler = h.Handler.WithGroup(name)
	return h
}

// aboutWhom is what an attribute says of whom a line is about; empty: nothing.
func aboutWhom(a slog.Attr) string {
	switch a.Key {
	case "database", "shard", "tenant", "schema", "endpoint", "slot", "key":
		return a.Value.String() + "\x00"
	}
	return ""
}
