//go:build failpoints

package failpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
)

func points() []Point {
	return []Point{
		Decoded, Sending, Answered, Recording, Committing, Persisted, Acked, Deferred, Claimed, Taken, Draining, Audited,
		HealLed, HealDropped, HealRenewed, HealSettled, HealMarked, HealQueued,
	}
}

func bugs() []Bug {
	return []Bug{
		AckBeforePersist, AckCommitLSN, FlushZero, NoKeepaliveAck, HealByID, NoOnConflict, HealWithoutSwitch, StartInFuture, HealWithoutMarks,
	}
}

// What the environment asks for is read before main, so that a slip in a name ends the process at once.
var (
	last, passings = point(os.Getenv("OUTBOX_RELAY_FAILPOINT"))
	planted        = known("OUTBOX_RELAY_PLANTED", Bug(os.Getenv("OUTBOX_RELAY_PLANTED")), bugs())
	passed         atomic.Int64
)

func point(value string) (Point, int64) {
	if value == "" {
		return "", 0
	}
	name, number, _ := strings.Cut(value, ":")
	n, err := strconv.ParseInt(number, 10, 64)
	if err != nil || n < 1 {
		refuse("OUTBOX_RELAY_FAILPOINT: %q: want a name, a colon and the passing that is the last, 1 or more", value)
	}
	return known("OUTBOX_RELAY_FAILPOINT", Point(name), points()), n
}

func known[T ~string](variable string, name T, names []T) T {
	for _, n := range names {
		if n == name {
			return name
		}
	}
	if name != "" {
		refuse("%s: %q is none of %q", variable, name, names)
	}
	return name
}

func refuse(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
	os.Exit(2)
}

// Hit kills the process if this is the place and the passing that were chosen. It does not return then.
func Hit(p Point) {
	if p != last || passed.Add(1) != passings {
		return
	}
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// Planted tells whether the relay is to work as if the bug had been made.
func Planted(b Bug) bool { return b == planted }
