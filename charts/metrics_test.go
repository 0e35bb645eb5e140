package charts_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// families starts a relay, which has all its metrics before it has reached a database, and scrapes it.
func families(t *testing.T) map[string]*dto.MetricFamily {
	t.Helper()
	path := binary(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "run", "--patient", "--listen", "127.0.0.1:0", "--database-url", "postgres://relay@127.0.0.1:1/app", "--log-format", "json")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	log, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	defer func() {
		cancel()
		_ = cmd.Wait() // it was told to end
	}()
	address := regexp.MustCompile(`"serving health and metrics","address":"([^"]+)"`)
	var url string
	for lines := bufio.NewScanner(log); url == "" && lines.Scan(); {
		if found := address.FindStringSubmatch(lines.Text()); found != nil {
			url = "http://" + found[1] + "/metrics"
		}
	}
	require.NotEmpty(t, url, "the relay did not say where it serves metrics")
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if list := scrape(ctx, t, url); list["outbox_relay_window_deliveries"] != nil { // the last to be registered
			return list
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			require.NoError(t, ctx.Err())
		}
	}
}

func scrape(ctx context.Context, t *testing.T, url string) map[string]*dto.MetricFamily {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	require.NoError(t, err)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer func() { assert.NoError(t, resp.Body.Close()) }()
	text := expfmt.NewTextParser(model.UTF8Validation)
	list, err := text.TextToMetricFamilies(resp.Body)
	require.NoError(t, err)
	return list
}

// catalogue is what a relay exposes: of each series' name, the values that each label has.
type catalogue map[string]map[string][]string

func newCatalogue(list map[string]*dto.MetricFamily) catalogue {
	c := make(catalogue)
	for name, family := range list {
		values := make(map[string][]string)
		for _, metric := range family.Metric {
			for _, pair := range metric.Label {
				values[pair.GetName()] = append(values[pair.GetName()], pair.GetValue())
			}
		}
		if c[name] = values; family.GetType() == dto.MetricType_HISTOGRAM {
			c[name+"_bucket"], c[name+"_sum"], c[name+"_count"] = values, values, values
		}
	}
	return c
}

// check parses an expression as Prometheus would, and makes sure that all it asks for is there: every name, every label, and a value for every matcher. Labels
// that Prometheus itself or a second database adds are taken for granted.
func (c catalogue) check(t *testing.T, expr, where string) {
	t.Helper()
	given := []string{"namespace", "job", "pod", "instance", "database", "shard", "le"}
	parsed, err := parser.NewParser(parser.Options{}).ParseExpr(expr)
	require.NoError(t, err, "%s: %s", where, expr)
	names := 0
	parser.Inspect(parsed, func(node parser.Node, _ []parser.Node) error {
		selector, ok := node.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		names++
		values, ok := c[selector.Name]
		assert.True(t, ok, "%s: a relay has no metric %s", where, selector.Name)
		for _, m := range selector.LabelMatchers {
			if m.Name == model.MetricNameLabel || slices.Contains(given, m.Name) {
				continue
			}
			assert.True(t, slices.ContainsFunc(values[m.Name], m.Matches), "%s: %s has no series with %s", where, selector.Name, m)
		}
		return nil
	})
	assert.Positive(t, names, "%s: %s asks for nothing", where, expr)
	for _, grouping := range regexp.MustCompile(`\bby \(([^)]*)\)`).FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(grouping[1], ",") {
			label = strings.TrimSpace(label)
			known := slices.Contains(given, label) || slices.ContainsFunc(selectors(parsed), func(name string) bool { return c[name][label] != nil })
			assert.True(t, known, "%s: nothing that it asks for has a label %s", where, label)
		}
	}
}

func selectors(expr parser.Expr) (names []string) {
	parser.Inspect(expr, func(node parser.Node, _ []parser.Node) error {
		if selector, ok := node.(*parser.VectorSelector); ok {
			names = append(names, selector.Name)
		}
		return nil
	})
	return names
}

// TestAlertsAndDashboard ask for what a running relay exposes, and every alert has its section in the runbook.
func TestAlertsAndDashboard(t *testing.T) {
	t.Parallel()
	known := newCatalogue(families(t))
	runbook, err := os.ReadFile("outbox-relay/README.md")
	require.NoError(t, err)

	rules := alerts(t, everything)
	require.Greater(t, len(rules), 8)
	for _, rule := range rules {
		if rule.Alert == "Mine" {
			continue
		}
		known.check(t, rule.Expr.String(), rule.Alert)
		assert.Contains(t, []string{"critical", "warning"}, rule.Labels["severity"], rule.Alert)
		assert.Equal(t, "sales", rule.Labels["team"], rule.Alert)
		assert.Contains(t, string(runbook), "\n### "+rule.Alert+"\n")
		assert.True(t, strings.HasSuffix(rule.Annotations["runbook_url"], "README.md#"+strings.ToLower(rule.Alert)), rule.Annotations)
		assert.NotEmpty(t, rule.Annotations["summary"])
		assert.NotEmpty(t, rule.Annotations["description"])
		assert.Contains(t, rule.Expr.String(), `namespace="sales"`, "alerts are about the relays of the release's namespace")
	}

	var board dashboard
	text, err := os.ReadFile("outbox-relay/dashboards/outbox-relay.json")
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &board))
	var panels int
	ids := make(map[int]bool)
	for _, panel := range board.Panels {
		assert.False(t, ids[panel.ID], "two panels have the id %d", panel.ID)
		ids[panel.ID] = true
		for _, target := range panel.Targets {
			known.check(t, strings.ReplaceAll(target.Expr, "$__rate_interval", "5m"), panel.Title)
			assert.Contains(t, target.Expr, `namespace=~"$namespace",job=~"$job"`, panel.Title)
			panels++
		}
	}
	assert.Greater(t, panels, 25)
	for _, variable := range board.Templating.List {
		if name, ok := strings.CutPrefix(variable.Definition, "label_values("); ok {
			assert.Contains(t, known, name[:strings.IndexAny(name, "{,")])
		}
	}
}

type dashboard struct {
	Panels []struct {
		ID      int
		Title   string
		Targets []struct{ Expr string }
	}
	Templating struct {
		List []struct{ Definition string }
	}
}

func alerts(t *testing.T, values string) []monitoring.Rule {
	t.Helper()
	groups := get[*monitoring.PrometheusRule](t, must(t, values), "shop-outbox-relay").Spec.Groups
	require.Len(t, groups, 1)
	return groups[0].Rules
}

// TestAlertsAreTunable by values, and can be left out one by one.
func TestAlertsAreTunable(t *testing.T) {
	t.Parallel()
	all := alerts(t, minimal+"prometheusRule: {enabled: true}\n")
	rules := alerts(t, minimal+`
prometheusRule: {enabled: true, disabled: [OutboxRelayHealed], matchers: 'cluster="a",job="b"', slotLagSeconds: 77, successRatio: 0.5, runbookURL: "https://wiki/"}
`)
	assert.Len(t, rules, len(all)-1)
	var text strings.Builder
	for _, rule := range rules {
		assert.NotEqual(t, "OutboxRelayHealed", rule.Alert)
		assert.Contains(t, rule.Expr.String(), `cluster="a",job="b"`)
		assert.Equal(t, "https://wiki/"+strings.ToLower(rule.Alert), rule.Annotations["runbook_url"])
		fmt.Fprintln(&text, rule.Expr.String())
	}
	assert.Contains(t, text.String(), "> 77\n")
	assert.Contains(t, text.String(), "< 0.5\n")
}
