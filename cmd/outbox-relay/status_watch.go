package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"
)

// watchStatus shows reports until ctx is done, which is how a person ends it.
func (a *app) watchStatus(ctx context.Context, l *lookout, every time.Duration, output string) error {
	show := func(r *statusReport) error { return writeJSON(a.out, "", r) }
	if output != "json" {
		s := newScreen(a.out)
		defer s.close()
		p := painterFor(a.out)
		show = func(r *statusReport) error {
			v := statusView{painter: p}
			v.report(r)
			return s.draw(r.At, v.lines)
		}
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		report := l.look(ctx)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // ended by a person
		}
		if err := show(report); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Control sequences of a terminal (ECMA-48, and xterm's private modes).
const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l" // the other buffer, no cursor, no wrapping: what is too long for its line is cut by the terminal
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	clearScreen = "\x1b[2J"
	topLeft     = "\x1b[H"
	clearLine   = "\x1b[K" // from here on
	clearBelow  = "\x1b[J"
)

// screen shows one frame after the other: on a terminal in place, over what is there, so that nothing flickers; anywhere else one below the other. It is
// for one goroutine.
type screen struct {
	out           io.Writer
	size          func() (width, height int) // nil: no terminal
	width, height int                        // of the last frame
	last          []string
}

func newScreen(out io.Writer) *screen {
	s := &screen{out: out}
	if f, ok := out.(*os.File); ok && rewritable(out) {
		s.size = func() (int, int) {
			width, height, err := term.GetSize(int(f.Fd()))
			if err != nil || height < 2 {
				return 80, 24
			}
			return width, height
		}
	}
	return s
}

// draw shows a frame, with its time in the first line.
func (s *screen) draw(at time.Time, lines []string) error {
	stamp := at.Format("2006-01-02 15:04:05Z07:00")
	if s.size == nil {
		_, err := fmt.Fprintf(s.out, "%s\n%s\n\n", stamp, strings.Join(lines, "\n"))
		return err
	}
	var b strings.Builder
	width, height := s.size()
	switch {
	case s.last == nil:
		b.WriteString(enterScreen + clearScreen)
	case width != s.width || height != s.height:
		b.WriteString(clearScreen) // whatever the terminal has made of the old lines
	}
	s.width, s.height, s.last = width, height, lines
	shown := append([]string{"outbox-relay status  " + stamp + "  ctrl-C ends it"}, lines...)
	if over := len(shown) - height; over > 0 {
		shown = append(shown[:height-1:height-1], fmt.Sprintf("… %d more lines: make the window higher", over+1))
	}
	b.WriteString(topLeft + strings.Join(shown, clearLine+"\r\n") + clearLine + clearBelow)
	_, err := io.WriteString(s.out, b.String())
	return err
}

// close gives the terminal back as it was, with the last frame below what stood there.
func (s *screen) close() {
	if s.size != nil && s.last != nil {
		say(s.out, "%s%s\n", leaveScreen, strings.Join(s.last, "\n"))
	}
}
