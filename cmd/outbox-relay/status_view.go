package main

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/neo-commons/outbox-relay/outbox"
	"github.com/neo-commons/outbox-relay/relay/desk"
	"github.com/neo-commons/outbox-relay/relay/store"
)

// statusView lays a report out in lines.
type statusView struct {
	painter
	lines []string
}

// line adds one with a name in front, which may be empty. What it says is red, green, yellow or dim where that means something.
func (v *statusView) line(name, color, format string, args ...any) {
	v.lines = append(v.lines, v.paint(colorDim, fmt.Sprintf("%-10s", name))+" "+v.paint(color, fmt.Sprintf(format, args...)))
}

// rows adds a table below a line: its cells have tabs between them.
func (v *statusView) rows(rows []string) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		say(w, "%s\n", row)
	}
	_ = w.Flush() // into memory
	for line := range strings.Lines(b.String()) {
		v.lines = append(v.lines, "  "+strings.TrimRight(line, " \n"))
	}
}

func (v *statusView) report(r *statusReport) {
	v.relay(&r.Relay)
	for i := range r.Databases {
		v.database(&r.Databases[i])
	}
}

func (v *statusView) relay(r *statusRelay) {
	switch {
	case r.Address == "":
		v.line("relay", colorDim, "server.listen names nothing that can be asked")
	case !r.Reachable:
		v.line("relay", colorDim, "not reachable from here, at %s", r.Address)
	default:
		name := "relay"
		for _, line := range r.Says {
			v.line(name, goodIf(r.Ready), "%s", plain(line))
			name = ""
		}
	}
}

func goodIf(yes bool) string {
	if yes {
		return colorGreen
	}
	return colorRed
}

func (v *statusView) database(d *statusDatabase) {
	if d.Name != "" {
		v.lines = append(v.lines, "")
	}
	if d.err != nil {
		v.line("database", colorRed, "%s", short(strings.TrimPrefix(d.config.named(d.err).Error(), "database "), 500))
		if hint := hintOf(d.err); hint != "" {
			v.line("", "", "%s", plain(hint))
		}
		return
	}
	o := d.Overview
	server, _, _ := strings.Cut(o.Server, " ") // the rest is who built it
	v.line("database", "", "%s, PostgreSQL %s%s, at %s", suffixIf(d.Name != "", d.Name+": ")+plain(o.Database), plain(server), suffixIf(o.Standby, ", a standby"), timeText(o.At))
	v.gap("slot", desk.PartSlots, o)
	for i := range o.Slots {
		v.slot(&o.Slots[i], o, int64(d.config.Database.WALBudget))
	}
	v.connected(o)
	v.commits(o)
	v.flow(o)
	v.queue(o)
	v.endpoints(o)
	v.letters(o)
	v.tenants(d.Tenants, o)
	v.recoveries(o)
}

// gap says why a part is not known, and whether that is all there is to say.
func (v *statusView) gap(name, part string, o *desk.Overview) bool {
	why := o.Gap(part)
	if why != "" {
		v.line(name, colorYellow, "not all is known: %s", short(why, 300))
	}
	return why != ""
}

func (v *statusView) slot(s *desk.Slot, o *desk.Overview, budget int64) {
	now := o.At.Time
	v.line("slot", colorIf(!s.Exists, colorRed), "%s%s", s.Name, suffixIf(!s.Exists, " is not there: a relay that starts makes it anew, if it was; else run outbox-relay migrate"))
	switch l := s.Leader; {
	case s.Making != nil:
		v.making(s.Making)
	case l == nil:
		v.line("  leader", colorRed, "nobody reads it%s", suffixIf(!s.RecordedAt.IsZero(), ", last recorded "+away(s.RecordedAt.Time, now)))
	case l.Since.IsZero():
		v.line("  leader", "", "epoch %d, server process %d; who that is, only a member of pg_read_all_stats may know", s.Epoch, l.PID)
	default:
		v.line("  leader", "", "%s for %s, epoch %d, role %s, server process %d, since %s", l.Address, span(now.Sub(l.Since.Time)), s.Epoch, plain(l.Role), l.PID, timeText(l.Since))
	}
	if !s.Exists {
		return
	}
	if s.Making != nil && s.Making.PID != 0 {
		return // it stands nowhere yet
	}
	lag := size(s.Lag) + " unconfirmed"
	if s.LagSeconds != nil {
		lag += fmt.Sprintf(", %s behind", span(time.Duration(*s.LagSeconds*float64(time.Second))))
	}
	v.line("  lag", "", "%s%s", lag, suffixIf(s.Leader != nil && !s.RecordedAt.IsZero(), ", recorded "+away(s.RecordedAt.Time, now)))
	kept, color := size(s.Retained)+" kept", ""
	if s.Limit != nil {
		kept += " of max_slot_wal_keep_size " + size(*s.Limit)
	}
	if s.Safe != nil {
		kept += ", lost after another " + size(*s.Safe)
	}
	if budget > 0 {
		kept += ", of database.wal_budget " + size(budget)
	}
	switch {
	case s.WALStatus == "lost" || s.Invalid != "":
		kept, color = "lost: "+cmp.Or(s.Invalid, "the server gave it up")+"; a relay makes it anew and queues what it missed", colorRed
	case s.WALStatus == "unreserved", budget > 0 && s.Retained >= budget:
		kept, color = kept+": over its limit", colorRed
	case s.Safe != nil && s.Retained > *s.Safe, budget > 0 && s.Retained > budget/2:
		color = colorYellow
	case s.Safe == nil && budget == 0:
		kept += ", without a limit"
	}
	v.line("  log", color, "%s", kept)
}

// making says who makes a slot or heals it, and what that waits for.
func (v *statusView) making(m *store.Making) {
	v.line("  leader", colorRed, "nobody: %s", plain(m.Who()))
	for i := range m.Open {
		o := &m.Open[i]
		v.line("  waits for", colorYellow, "%s; to end it: %s", plain(o.String()), plain(o.Remedy()))
	}
}

// away is how far a time is away from another, which a clock that goes on has made a moment earlier.
func away(t, now time.Time) string {
	if t.Sub(now).Abs() < time.Second {
		return "just now"
	}
	return relative(t, now)
}

func colorIf(yes bool, color string) string {
	if yes {
		return color
	}
	return ""
}

func (v *statusView) connected(o *desk.Overview) {
	if v.gap("relays", desk.PartRelays, o) {
		return
	}
	var hosts []string
	for _, c := range o.Relays {
		hosts = append(hosts, fmt.Sprintf("%s (%d)", cmp.Or(c.Address, "other roles"), c.Connections))
	}
	v.line("relays", colorIf(len(hosts) == 0, colorRed), "connections from %s", cmp.Or(strings.Join(hosts[:min(len(hosts), 8)], ", ")+suffixIf(len(hosts) > 8, " …"), "nowhere"))
}

// commits says that they wait for a standby. That they do not goes without saying.
func (v *statusView) commits(o *desk.Overview) {
	if v.gap("commits", desk.PartCommits, o) || o.Commits == nil {
		return
	}
	v.line("commits", colorRed, "%s", plain(strings.TrimPrefix(o.Commits.String(), "commits ")))
	v.line("", "", "%s", plain(o.Commits.Hint))
}

func (v *statusView) flow(o *desk.Overview) {
	gap := v.gap("rate", desk.PartDeliveries, o)
	f := &o.Deliveries
	switch {
	case len(f.PerMinute) > 0:
	case gap:
		return
	default:
		v.line("rate", colorDim, "no new delivery within the last minute")
		return
	}
	of := "of the last minute's deliveries"
	if f.Looked.More {
		of = "of the latest " + thousands(int(f.Looked.N)) + " deliveries"
	}
	text, color := rateText(f.PerSecond)+"/s; "+of, ""
	if f.Success != nil {
		text += " " + percent(*f.Success) + " of those attempted succeeded"
		switch {
		case *f.Success < .5:
			color = colorRed
		case *f.Success < .99:
			color = colorYellow
		}
	}
	for _, status := range []string{"retrying", "pending", "failed", "cancelled"} {
		if n := f.PerMinute[status].N; n > 0 {
			text += fmt.Sprintf(", %s %s", thousands(int(n)), status)
		}
	}
	v.line("rate", color, "%s", text)
}

func rateText(n float64) string {
	if n < 10 {
		return fmt.Sprintf("%.1f", n)
	}
	return thousands(int(n + .5))
}

// percent is a share, rounded down: what is not all is not 100 %.
func percent(share float64) string {
	return fmt.Sprintf("%g %%", math.Floor(share*1000)/10)
}

func counted(c desk.Count) string {
	return thousands(int(c.N)) + suffixIf(c.More, "+")
}

func (v *statusView) queue(o *desk.Overview) {
	gap := v.gap("waiting", desk.PartQueue, o)
	q := &o.Queue
	switch {
	case q.Total.N > 0:
	case gap:
		return
	default:
		v.line("waiting", colorGreen, "nothing")
		return
	}
	text, color := counted(q.Total)+" deliveries", ""
	if q.Due.N > 0 {
		text += fmt.Sprintf(": %s due, the first for %s", counted(q.Due), span(time.Duration(q.OldestDue*float64(time.Second))))
		color = colorIf(q.OldestDue > time.Minute.Seconds(), colorYellow)
	}
	if q.Shut.N > 0 {
		text += fmt.Sprintf(", %s due behind open breakers", counted(q.Shut))
	}
	if !q.NextDue.IsZero() {
		text += ", next due " + away(q.NextDue.Time, o.At.Time)
	}
	if q.Leased.N > 0 {
		text += fmt.Sprintf(", %s in the hands of a relay", counted(q.Leased))
	}
	if q.Parked.N > 0 {
		text += fmt.Sprintf(", %s parked", counted(q.Parked))
	}
	v.line("waiting", color, "%s", text)
	var rows []string
	for i := range q.Worst {
		w := &q.Worst[i]
		rows = append(rows, cells(w.Tenant, w.EndpointID, w.Name)+fmt.Sprintf("%s\t%s due\t%s", counted(w.Total), thousands(int(w.Due)), reasonsText(w.Reasons)))
	}
	v.rows(rows)
	rows = nil
	for i := range q.Blocked {
		b := &q.Blocked[i]
		rows = append(rows, fmt.Sprintf("%s\t%s behind delivery %s, attempt %d, %s%s", plain(b.Tenant), thousands(int(b.Behind)), b.HeadID, b.Attempts,
			cmp.Or(plain(b.Reason), "not attempted yet"), suffixIf(!b.HeadDueAt.IsZero(), ", due "+away(b.HeadDueAt.Time, o.At.Time))))
	}
	if len(rows) > 0 {
		v.line("blocked", colorYellow, "orders that wait for their first delivery")
		v.rows(rows)
	}
}

// cells are those that say which endpoint.
func cells(tenant string, id outbox.UUID, name string) string {
	return fmt.Sprintf("%s\t%s\t%s\t", short(tenant, 24), id, short(cmp.Or(name, "-"), 20))
}

func reasonsText(reasons map[string]int64) string {
	var words []string
	for _, reason := range slices.SortedFunc(maps.Keys(reasons), func(a, b string) int { return cmp.Or(cmp.Compare(reasons[b], reasons[a]), cmp.Compare(a, b)) }) {
		words = append(words, cmp.Or(plain(reason), "no reason noted"))
	}
	return strings.Join(words, ", ")
}

func (v *statusView) endpoints(o *desk.Overview) {
	gap := v.gap("failing", desk.PartEndpoints, o)
	t := &o.Endpoints
	var words []string
	for _, part := range []struct {
		n    desk.Count
		what string
	}{{t.Failing, "failing"}, {t.Open, "with an open breaker"}, {t.Disabled, "disabled"}, {t.Paused, "paused"}} {
		if part.n.N > 0 {
			words = append(words, counted(part.n)+" "+part.what)
		}
	}
	switch {
	case len(words) > 0:
	case gap:
		return
	default:
		v.line("failing", colorGreen, "no endpoint")
		return
	}
	v.line("failing", colorYellow, "endpoints: %s", strings.Join(words, ", "))
	rows := make([]string, len(t.Worst))
	for i := range t.Worst {
		x := &t.Worst[i]
		what := x.State.State + suffixIf(!x.State.Since.IsZero(), " "+away(x.State.Since.Time, o.At.Time)) + ": "
		if x.State.State == "active" {
			what = ""
		}
		rows[i] = cells(x.Tenant, x.ID, x.Name) + what + short(strings.Join(troubles(&desk.Endpoint{State: x.State}, o.At.Time), "; "), 120)
	}
	v.rows(rows)
}

func (v *statusView) letters(o *desk.Overview) {
	l := &o.Letters
	if l.Open.N == 0 {
		if o.Gap(desk.PartEndpoints) == "" {
			v.line("dead", colorGreen, "no open dead letter")
		}
		return
	}
	v.line("dead", colorIf(l.LastHour.N > 0, colorYellow), "%s open dead letters, %s of the last hour, the latest %s",
		counted(l.Open), counted(l.LastHour), away(l.LastAt.Time, o.At.Time))
	rows := make([]string, len(l.Worst))
	for i := range l.Worst {
		x := &l.Worst[i]
		rows[i] = cells(x.Tenant, x.EndpointID, x.Name) + fmt.Sprintf("%s\t%s in the last hour\t%s", counted(x.Open), counted(x.LastHour), plain(x.LastCode))
	}
	v.rows(rows)
}

// tenantRows is how many of the tenants that are held up are shown.
const tenantRows = 5

func (v *statusView) tenants(t *statusTenants, o *desk.Overview) {
	v.line("tenants", colorIf(t.Suspended > 0, colorRed), "%s active%s%s%s", thousands(t.Active),
		suffixIf(t.Filling > 0, fmt.Sprintf(", %s of them with earlier events being queued", thousands(t.Filling))),
		suffixIf(t.Paused > 0, fmt.Sprintf(", %s paused", thousands(t.Paused))), suffixIf(t.Suspended > 0, fmt.Sprintf(", %s suspended", thousands(t.Suspended))))
	var rows []string
	for i := range t.Listed[:min(len(t.Listed), tenantRows)] {
		x := &t.Listed[i]
		what := stateText(x.State, x.Paused) + " since " + span(o.At.Sub(x.Since))
		if x.State == "active" {
			what = "queues earlier events: " + x.Backfill
		}
		rows = append(rows, short(x.Schema, 24)+"\t"+what+suffixIf(x.Reason != "", ": "+short(x.Reason, 100))+suffixIf(x.PauseReason != "", "; paused: "+short(x.PauseReason, 100)))
	}
	v.rows(rows)
}

func (v *statusView) recoveries(o *desk.Overview) {
	if v.gap("recovery", desk.PartRecoveries, o) || len(o.Recoveries) == 0 {
		return
	}
	var rows []string
	for i := range o.Recoveries {
		r := &o.Recoveries[i]
		rows = append(rows, short(r.Tenant, 24)+"\t"+r.EndpointID.String()+"\t"+recoveryText(&r.Recovery, o.At.Time))
	}
	v.line("recovering", "", "what endpoints missed")
	v.rows(rows)
}
