package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/spf13/cobra"

	"github.com/neo-commons/outbox-relay/relay"
)

func (a *app) metricsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "metrics",
		Short: "Print which metrics there are and what they mean",
		Long: `Print the metrics that a relay serves, as a Markdown table: name, type, labels and meaning, and
below it the values that labels may have. It needs neither a configuration nor a database.

Those of single tenants and endpoints are served only with metrics.per_tenant and
metrics.per_endpoint. Where a relay has several databases or shards, all metrics but those of the
process (attempts, connections to receivers, names) have the labels database and shard as well.

outbox_relay_trace_spans_total, the spans by what became of them (label result: exported, failed,
dropped), is not in the table: it is served only where OTEL_TRACES_EXPORTER is otlp.`,
		Example: `  outbox-relay metrics
  outbox-relay metrics | grep objective`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return writeCatalogue(a.out) },
	}
}

// catalogue is what a relay registers, the series of tenants and endpoints included.
func catalogue() ([]*dto.MetricFamily, error) {
	cfg := relay.DefaultConfig()
	cfg.Metrics.PerTenant, cfg.Metrics.PerEndpoint = 1, 1
	registry := prometheus.NewRegistry()
	relay.RegisterMetrics(registry, cfg)
	reloadMetrics(registry)
	return registry.Gather()
}

func writeCatalogue(w io.Writer) error {
	families, err := catalogue()
	if err != nil {
		return fmt.Errorf("gather metrics: %w", err)
	}
	values := make(map[string][]string)
	var b strings.Builder
	b.WriteString("| Metric | Type | Labels | Meaning |\n|---|---|---|---|\n")
	for _, f := range families {
		labels := labelsOf(f)
		for name, has := range labels {
			// status is two things: what a delivery is given, and what the server says of a slot.
			key := name
			if name == "status" || name == "state" {
				key = name + " of " + strings.TrimPrefix(f.GetName(), "outbox_relay_")
			}
			values[key] = has
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f.GetName(), strings.ToLower(f.GetType().String()), codes(slices.Sorted(maps.Keys(labels))), f.GetHelp())
	}
	b.WriteString("\n| Label | Values |\n|---|---|\n")
	for _, name := range slices.Sorted(maps.Keys(values)) {
		label, of, qualified := strings.Cut(name, " of ")
		switch {
		case label == "tenant" || label == "endpoint", strings.HasPrefix(of, "tenant_"), strings.HasPrefix(of, "endpoint_"):
		case qualified:
			fmt.Fprintf(&b, "| `%s` of `%s` | %s |\n", label, of, codes(values[name]))
		default:
			fmt.Fprintf(&b, "| `%s` | %s |\n", label, codes(values[name]))
		}
	}
	_, err = io.WriteString(w, b.String())
	return err
}

// labelsOf are the labels of a family's series, and the values of each in their order.
func labelsOf(f *dto.MetricFamily) map[string][]string {
	labels := make(map[string][]string)
	for _, metric := range f.GetMetric() {
		for _, pair := range metric.GetLabel() {
			if name, value := pair.GetName(), pair.GetValue(); !slices.Contains(labels[name], value) {
				labels[name] = append(labels[name], value)
			}
		}
	}
	for _, values := range labels {
		slices.Sort(values)
	}
	return labels
}

// codes quotes words for Markdown.
func codes(words []string) string {
	quoted := make([]string, len(words))
	for i, word := range words {
		quoted[i] = "`" + word + "`"
	}
	return strings.Join(quoted, ", ")
}
