package relay_test

import (
	"os"
	"testing"

	"github.com/neo-commons/outbox-relay/schema/pgtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("OUTBOX_RELAY_BENCH_RECEIVER") != "" {
		os.Exit(serveCounter())
	}
	os.Exit(pgtest.Main(m))
}
