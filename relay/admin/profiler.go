package admin

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/pprof" // it adds to http.DefaultServeMux too, which nothing here serves
	"time"
)

// profileTimeout bounds one profile, which takes as many seconds as it is asked for.
const profileTimeout = 10 * time.Minute

// ListenProfiler is as Listen, for the pages of net/http/pprof below /debug/pprof/. Whoever can come to the address can read what is in memory and slow
// the relay down: it must be one of loopback.
func ListenProfiler(ctx context.Context, address string, log *slog.Logger) (*Server, error) {
	mux := http.NewServeMux()                        // without cmdline: a flag may hold a password
	mux.HandleFunc("GET /debug/pprof/", pprof.Index) // and the profiles by name
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return listen(ctx, "the profiler", address, mux, profileTimeout, log)
}
