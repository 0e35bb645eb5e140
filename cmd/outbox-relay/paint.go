package main

import (
	"io"
	"os"
)

// Colours of a terminal, as parameters of SGR.
const (
	colorRed    = "31"
	colorGreen  = "32"
	colorYellow = "33"
	colorDim    = "2"
)

// rewritable tells whether lines that have been written can be written anew.
func rewritable(out io.Writer) bool { return terminal(out) && os.Getenv("TERM") != "dumb" }

// painter colours text for a person, if they want that.
type painter struct{ colors bool }

func painterFor(out io.Writer) painter {
	return painter{colors: rewritable(out) && os.Getenv("NO_COLOR") == ""} // no-color.org
}

func (p painter) paint(color, text string) string {
	if !p.colors || color == "" {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}
