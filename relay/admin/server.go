// Package admin serves what operators and their machines ask of a running relay: /livez, /readyz and /metrics, and apart from these the profiler.
package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
)

// Bounds of one exchange. A scrape writes for as long as its reader reads.
const (
	readTimeout     = 5 * time.Second
	writeTimeout    = 30 * time.Second
	idleTimeout     = 2 * time.Minute
	shutdownTimeout = 2 * time.Second
	maxHeaderBytes  = 16 << 10
)

// Health says whether the relay does its work, and what it does or why it does not. It is called by several requests at once.
type Health interface {
	Ready() (ok bool, why string)
}

// Options are what the pages show. All fields are required.
type Options struct {
	Health   Health
	Registry *prometheus.Registry
	Log      *slog.Logger
}

// Server is a listening server. Once made, it must be run, or its port stays taken.
type Server struct {
	what     string // it serves
	listener net.Listener
	http     *http.Server
}

// Listen takes the port, so that a taken one is known before anything else begins.
func Listen(ctx context.Context, address string, o Options) (*Server, error) {
	return listen(ctx, "health and metrics", address, handler(o), writeTimeout, o.Log)
}

func listen(ctx context.Context, what, address string, handler http.Handler, write time.Duration, log *slog.Logger) (*Server, error) {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve %s on %s: %w", what, address, err)
	}
	return &Server{
		what:     what,
		listener: listener,
		http: &http.Server{
			Handler:        handler,
			ReadTimeout:    readTimeout,
			WriteTimeout:   write,
			IdleTimeout:    idleTimeout,
			MaxHeaderBytes: maxHeaderBytes,
			ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug), // clients that went away, mostly
		},
	}, nil
}

// Addr is the address it listens on.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// Run serves until ctx is done, lets requests in progress finish for a moment, and returns nil.
func (s *Server) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve %s: %w", s.what, err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if err := s.http.Shutdown(closing); err != nil {
			return s.http.Close() // a slow reader is not worth waiting for
		}
		return nil
	})
	return group.Wait()
}

func handler(o Options) http.Handler {
	mux := http.NewServeMux()
	// Liveness asks nothing of the database: restarting the relay does not bring that back.
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		status := http.StatusOK
		ok, why := o.Health.Ready()
		if !ok {
			status = http.StatusServiceUnavailable
		}
		answer(w, status, why)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Registry, promhttp.HandlerOpts{
		Registry: o.Registry,
		ErrorLog: slog.NewLogLogger(o.Log.Handler(), slog.LevelError),
	}))
	return mux
}

func answer(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, text+"\n") // who has gone does not miss it
}
