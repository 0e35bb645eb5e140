package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/schema"
)

const (
	// statusConnect bounds connecting: who watches wants to see that a database is away, and the others.
	statusConnect = 3 * time.Second
	// statusAsk bounds asking the relay itself, which may be elsewhere.
	statusAsk = 500 * time.Millisecond
	// statusPatience bounds a look at a database whose server says nothing any more.
	statusPatience = 10 * time.Second
	statusInterval = 2 * time.Second
)

// statusReport is what the command prints as JSON: fields are added, not renamed.
type statusReport struct {
	At        time.Time        `json:"at"` // by this machine's clock
	Relay     statusRelay      `json:"relay"`
	Databases []statusDatabase `json:"databases"`
}

// statusRelay is what the process says that listens on server.listen, if there is one here.
type statusRelay struct {
	Address   string   `json:"address,omitempty"`
	Reachable bool     `json:"reachable"`
	Ready     bool     `json:"ready"`
	Says      []string `json:"says,omitempty"` // the lines of /readyz
}

type statusDatabase struct {
	Name    string         `json:"name,omitempty"` // where there are several
	Error   string         `json:"error,omitempty"`
	Tenants *statusTenants `json:"tenants,omitempty"`
	*desk.Overview
	config *config
	err    error
}

// statusTenants counts the tenants by state, and lists those that are not simply active.
type statusTenants struct {
	Active    int          `json:"active"`
	Paused    int          `json:"paused"`
	Suspended int          `json:"suspended"`
	Filling   int          `json:"filling"` // of the active ones, those whose earlier events are being queued
	Listed    []tenantJSON `json:"listed"`  // the first twenty that are paused, suspended or filling
}

const tenantsListed = 20

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	var every time.Duration
	output := "text"
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show in one screen who leads, how far, what fails and what waits",
		Long: `Show in one screen what an operator asks first: what the relay on server.listen says, if it can be
reached from here; and of each database who reads its slots, since when and how far, and what log
the server keeps for them; whether commits wait for a synchronous standby; rate and success of the
last minute's deliveries; what waits, and why; which endpoints fail; dead letters; tenants that are
held up. Nothing is changed.

It needs the rights of the relay's role and no more. Of a reader with another role, the address, and
whether its commits wait, is known only to members of pg_read_all_stats. However much has piled up,
a bounded number of rows is read: "100,000+" means that there may be more. What takes too long all
the same, or is locked, is left out, and it says so.

--watch shows it anew every --interval until it is interrupted: on a terminal in place, elsewhere
in blocks that begin with the time. With -o json it is an object, one a line with --watch; fields
may be added to it, and are not renamed.

Exit codes: 0 shown, whatever it is; 1 a database could not be looked at. To have something fail
when all is not well, use outbox-relay check.`,
		Example: `  outbox-relay status --config /etc/outbox-relay/config.yaml
  outbox-relay status --watch
  outbox-relay status -o json | jq '.databases[].slots[] | {name, lag_bytes}'
  outbox-relay status -o json | jq -e '.databases[].retry_queue.oldest_due_seconds < 60'`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if every < 100*time.Millisecond {
				return usage("--interval %v: must be 100ms or more", every)
			}
			c, err := a.load(cmd)
			if err != nil {
				return err
			}
			list := c.each()
			if a.database != "" {
				one, err := a.pick(&c)
				if err != nil {
					return err
				}
				list = []*config{&one}
			}
			l := lookout{listen: c.Server.Listen}
			for _, one := range list {
				l.databases = append(l.databases, &watched{config: one})
			}
			defer l.close(cmd.Context())
			if watch {
				return a.watchStatus(cmd.Context(), &l, every, output)
			}
			return a.showStatus(cmd.Context(), &l, output)
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&watch, "watch", "w", false, "show it anew until interrupted")
	flags.DurationVar(&every, "interval", statusInterval, "with --watch: look every `TIME`")
	flags.VarP(oneOf(&output, "FORMAT", "text", "json"), "output", "o", "print as `FORMAT`: text or json")
	return cmd
}

func (a *app) showStatus(ctx context.Context, l *lookout, output string) error {
	report := l.look(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if output == "json" {
		if err := writeJSON(a.out, "  ", report); err != nil {
			return err
		}
	} else {
		v := statusView{painter: painterFor(a.out)}
		v.report(report)
		say(a.out, "%s\n", strings.Join(v.lines, "\n"))
	}
	failed := error(nil)
	for i := range report.Databases {
		if d := &report.Databases[i]; d.err != nil {
			failed = errFailed
			if output == "json" {
				a.complain(d.config.named(d.err))
			}
		}
	}
	return failed
}

// lookout looks at all databases and at the relay, again and again over the same connections.
type lookout struct {
	listen    string // server.listen
	databases []*watched
}

type watched struct {
	config *config
	conn   *pgx.Conn // nil: there is none at present
}

func (l *lookout) close(ctx context.Context) {
	for _, w := range l.databases {
		w.hangUp(ctx)
	}
}

func (w *watched) hangUp(ctx context.Context) {
	if w.conn != nil {
		_ = hangUp(ctx, w.conn) // everything has been read
		w.conn = nil
	}
}

// look takes a report. What cannot be looked at is told in it.
func (l *lookout) look(ctx context.Context) *statusReport {
	report := &statusReport{At: time.Now().UTC(), Databases: make([]statusDatabase, len(l.databases))}
	var group errgroup.Group
	group.Go(func() error {
		report.Relay = askRelay(ctx, l.listen)
		return nil
	})
	for i, w := range l.databases {
		group.Go(func() error {
			d := &report.Databases[i]
			*d = statusDatabase{Name: w.config.name, config: w.config}
			if d.err = w.look(ctx, d); d.err != nil {
				d.Error = d.err.Error()
				w.hangUp(ctx)
			}
			return nil
		})
	}
	_ = group.Wait() // each keeps its own
	return report
}

func (w *watched) look(ctx context.Context, d *statusDatabase) error {
	ctx, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	c := w.config.Database
	if w.conn == nil {
		dsn, err := c.DSN()
		if err != nil {
			return err
		}
		// Another name than the relays', which are counted by it.
		conn, err := dial(ctx, w.config.urlKey(), dsn, min(c.ConnectTimeout, statusConnect), map[string]string{"application_name": "outbox-relay status"})
		if err != nil {
			return err
		}
		w.conn = conn
	}
	tenants, err := schema.Tenants(ctx, lent(w.conn))
	if err != nil {
		return err
	}
	var slots, names []string
	for shard := range c.Shards {
		slots = append(slots, c.ShardSlot(shard))
	}
	d.Tenants = countTenants(tenants)
	for _, t := range tenants {
		if t.State != "suspended" { // whose tables are not as they should be
			names = append(names, t.Schema)
		}
	}
	d.Overview, err = desk.Survey(ctx, w.conn, slots, names, desk.OverviewPatience)
	return err
}

func countTenants(tenants []schema.Tenant) *statusTenants {
	s := &statusTenants{Listed: []tenantJSON{}}
	for _, t := range tenants {
		filling := t.Backfill != "" && t.BackfillDoneAt.IsZero()
		switch t.State {
		case "paused":
			s.Paused++
		case "suspended":
			s.Suspended++
		default:
			s.Active++
			if filling {
				s.Filling++
			}
		}
		if (t.State != "active" || filling) && len(s.Listed) < tenantsListed {
			s.Listed = append(s.Listed, jsonOf(&t))
		}
	}
	return s
}

// askRelay asks the relay that listens here what it does. That there is none is no fault: it may be elsewhere, or listen nowhere.
func askRelay(ctx context.Context, listen string) (r statusRelay) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil || port == "0" {
		return r
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
		if ip != nil && ip.To4() == nil {
			host = "::1"
		}
	}
	r.Address = net.JoinHostPort(host, port)
	ctx, cancel := context.WithTimeout(ctx, statusAsk)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Address+"/readyz", http.NoBody)
	if err != nil {
		return r
	}
	transport := &http.Transport{DisableKeepAlives: true} // and no proxy: it is this machine
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return r
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil || resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		return r // something else listens there
	}
	r.Reachable, r.Ready = true, resp.StatusCode == http.StatusOK
	r.Says = strings.Split(strings.TrimSpace(string(body)), "\n")
	return r
}
