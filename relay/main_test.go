package relay_test

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("OUTBOX_RELAY_BENCH_RECEIVER") != "" {
		os.Exit(serveCounter())
	}
	os.Exit(pgtest.Main(leakTest{m}))
}

type leakTest struct{ m *testing.M }

func (l leakTest) Run() int {
	code := l.m.Run()
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}
