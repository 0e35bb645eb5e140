package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// arrivals is what the receiver knows. It is the one clock of the drain: a contender cannot count its own deliveries.
type arrivals struct {
	mu    sync.Mutex
	first map[string]int64 // nanoseconds since the epoch at which an event has arrived first, by its id, and by the path if there is one
	total int              // requests, repeated ones among them
	begin int64            // of the first event
	end   int64            // of the last event that was new
}

// ServeHTTP notes a POST and answers it with 200 and nothing. Each path is an endpoint: what goes to two of them counts twice. GET / tells the counts, GET
// /arrivals every event with its time, GET /tenths when the first has arrived and each further tenth of all.
func (a *arrivals) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodPost {
		_, err := io.Copy(io.Discard, r.Body)
		if err == nil {
			a.note(r.Header.Get(idHeader)+strings.TrimPrefix(r.URL.Path, "/"), time.Now().UnixNano())
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch r.URL.Path {
	case "/arrivals":
		for id, at := range a.first {
			_, _ = fmt.Fprintln(w, id, at)
		}
	case "/tenths":
		if times := slices.Sorted(maps.Values(a.first)); len(times) > 0 {
			for i := range 11 {
				_, _ = fmt.Fprintln(w, times[i*(len(times)-1)/10])
			}
		}
	default:
		_, _ = fmt.Fprintln(w, len(a.first), a.total, a.begin, a.end)
	}
}

func (a *arrivals) note(id string, now int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total++
	if _, again := a.first[id]; again {
		return
	}
	if len(a.first) == 0 {
		a.begin = now
	}
	a.first[id], a.end = now, now
}

// serveReceiver is the role of the receiver's process. It prints its address.
func serveReceiver(ctx context.Context, out io.Writer) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	server := &http.Server{Handler: &arrivals{first: make(map[string]int64, 1<<17)}, ReadHeaderTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if _, err := fmt.Fprintln(out, l.Addr()); err != nil {
		return errors.Join(fmt.Errorf("tell the address: %w", err), l.Close())
	}
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve: %w", err)
	}
	return nil
}

// receiver is the parent's side.
type receiver struct {
	*process

	url    string
	client *http.Client
}

func newReceiver(ctx context.Context) (*receiver, error) {
	p, err := child(ctx, roleReceiver)
	if err != nil {
		return nil, err
	}
	var address string
	if _, err := fmt.Fscanln(p.stdout, &address); err != nil {
		return nil, errors.Join(fmt.Errorf("read the receiver's address: %w", err), p.stop())
	}
	return &receiver{process: p, url: "http://" + address, client: &http.Client{Transport: &http.Transport{}, Timeout: time.Minute}}, nil
}

func (r *receiver) close() error {
	r.client.CloseIdleConnections()
	return r.stop()
}

func (r *receiver) get(ctx context.Context, path string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url+path, nil)
	if err != nil {
		return fmt.Errorf("ask the receiver: %w", err)
	}
	res, err := r.client.Do(req)
	if err != nil {
		return fmt.Errorf("ask the receiver: %w", err)
	}
	if err := errors.Join(read(res.Body), res.Body.Close()); err != nil {
		return fmt.Errorf("read the receiver's answer: %w", err)
	}
	return nil
}

// state is what has arrived so far.
type state struct {
	events   int           // each counted once
	requests int           // repeated ones among them
	begin    time.Time     // of the first event
	span     time.Duration // from the first event to the last
}

func (r *receiver) state(ctx context.Context) (s state, err error) {
	err = r.get(ctx, "/", func(body io.Reader) error {
		var begin, end int64
		_, err := fmt.Fscan(body, &s.events, &s.requests, &begin, &end)
		s.begin, s.span = time.Unix(0, begin), time.Duration(end-begin)
		return err
	})
	return s, err
}

// arrived returns when each event has arrived first.
func (r *receiver) arrived(ctx context.Context) (map[string]time.Time, error) {
	at := make(map[string]time.Time)
	err := r.get(ctx, "/arrivals", func(body io.Reader) error {
		lines := bufio.NewScanner(body)
		for lines.Scan() {
			var id string
			var ns int64
			if _, err := fmt.Sscan(lines.Text(), &id, &ns); err != nil {
				return err
			}
			at[id] = time.Unix(0, ns)
		}
		return lines.Err()
	})
	return at, err
}

// tenths returns when the first event has arrived, and each further tenth of those that have.
func (r *receiver) tenths(ctx context.Context) (at [11]time.Time, err error) {
	err = r.get(ctx, "/tenths", func(body io.Reader) error {
		for i := range at {
			var ns int64
			if _, err := fmt.Fscan(body, &ns); err != nil {
				return err
			}
			at[i] = time.Unix(0, ns)
		}
		return nil
	})
	return at, err
}
