package charts_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
)

// everything switches all optional parts on.
const everything = `
database: {existingSecret: relay, key: dsn, replicationKey: stream}
config:
  database: {instance_id: production, max_connections: 16}
  delivery: {workers: 2048, endpoint_rate: 12.5}
  network: {allow: [10.20.0.0/16]}
  shutdown: {drain: 1m30s}
  window: {bytes: 128MiB, deliveries: 2000000}
replicas: 3
commonLabels: {team: sales}
imagePullSecrets: [{name: registry}]
serviceAccount: {create: true, annotations: {eks.amazonaws.com/role-arn: "arn:aws:iam::1:role/relay"}}
migrate: {enabled: true, existingSecret: relay-owner}
podDisruptionBudget: {enabled: true}
topologySpreadConstraints: [{maxSkew: 1, topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: ScheduleAnyway}]
nodeSelector: {disk: ssd}
tolerations: [{key: dedicated, operator: Exists}]
affinity: {podAntiAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}
priorityClassName: important
networkPolicy: {enabled: true, metricsFrom: [{namespaceSelector: {matchLabels: {name: monitoring}}}]}
serviceMonitor: {enabled: true, interval: 15s, labels: {release: prometheus}, metricRelabelings: [{action: drop, regex: go_.*, sourceLabels: [__name__]}]}
prometheusRule: {enabled: true, labels: {release: prometheus}, alertLabels: {team: sales}, extraRules: [{alert: Mine, expr: vector(1)}]}
dashboard: {enabled: true, annotations: {grafana_folder: Sales}}
annotations: {owner: sales}
podAnnotations: {example.com/a: b}
podLabels: {example.com/c: d}
extraArgs: [--log-level=debug]
extraEnv: [{name: SSL_CERT_DIR, value: /ca}]
extraEnvFrom: [{configMapRef: {name: more, optional: true}}]
extraVolumes: [{name: ca, configMap: {name: ca}}]
extraVolumeMounts: [{name: ca, mountPath: /ca, readOnly: true}]
extraContainers:
  - name: proxy
    image: example.com/proxy:1
    securityContext: &restricted {allowPrivilegeEscalation: false, runAsNonRoot: true, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}}
extraInitContainers: [{name: wait, image: "example.com/wait:1", securityContext: *restricted}]
extraObjects:
  - {apiVersion: v1, kind: ConfigMap, metadata: {name: "{{ .Release.Name }}-mapping"}}
  - |
    apiVersion: v1
    kind: ConfigMap
    metadata:
      name: {{ include "outbox-relay.fullname" . }}-text
`

// TestMinimal: all that is optional is off, the rest is what the relay needs.
func TestMinimal(t *testing.T) {
	t.Parallel()
	r := must(t, minimal)
	assert.Equal(t, []string{"ConfigMap/shop-outbox-relay", "Deployment/shop-outbox-relay", "Pod/shop-outbox-relay-check"}, r.names())

	d := get[*apps.Deployment](t, r, "shop-outbox-relay")
	assert.EqualValues(t, 1, *d.Spec.Replicas)
	pod := d.Spec.Template
	for key, value := range d.Spec.Selector.MatchLabels {
		assert.Equal(t, value, pod.Labels[key])
	}
	assert.Equal(t, 0, d.Spec.Strategy.RollingUpdate.MaxUnavailable.IntValue(), "the old relay works until the new one stands by")
	assert.Equal(t, 1, d.Spec.Strategy.RollingUpdate.MaxSurge.IntValue())
	assert.EqualValues(t, 35, *pod.Spec.TerminationGracePeriodSeconds, "drain 20s, record 10s, and 5")
	assert.False(t, *pod.Spec.AutomountServiceAccountToken)
	assert.False(t, *pod.Spec.EnableServiceLinks)

	c := relay(t, &pod.Spec)
	assert.Equal(t, "ghcr.io/neo-commons/outbox-relay:0.1.0", c.Image)
	assert.Equal(t, []string{"run", "--config=/etc/outbox-relay/config.yaml", "--patient"}, c.Args)
	assert.Equal(t, "relay/url", variable(c, "OUTBOX_RELAY_DATABASE_URL"))
	assert.Equal(t, "362387865", variable(c, "GOMEMLIMIT"), "nine tenths of 384Mi")
	assert.Equal(t, "/livez", c.LivenessProbe.HTTPGet.Path)
	assert.Equal(t, "/readyz", c.ReadinessProbe.HTTPGet.Path)
	assert.Nil(t, c.StartupProbe)
	assert.Nil(t, c.Lifecycle)
	assert.Equal(t, "metrics", c.Ports[0].Name)
	for _, probe := range []*core.Probe{c.LivenessProbe, c.ReadinessProbe} {
		assert.Equal(t, c.Ports[0].Name, probe.HTTPGet.Port.StrVal)
	}
	assert.Equal(t, "/etc/outbox-relay", c.VolumeMounts[0].MountPath)
	assert.Empty(t, c.VolumeMounts[0].SubPath, "a subPath would never see a change")
	assert.Equal(t, "shop-outbox-relay", pod.Spec.Volumes[0].ConfigMap.Name)

	file := get[*core.ConfigMap](t, r, "shop-outbox-relay").Data["config.yaml"]
	assert.YAMLEq(t, "{log: {format: json}, server: {listen: \":9464\"}}", file)
}

func TestEverything(t *testing.T) {
	t.Parallel()
	r := must(t, everything)
	const name = "shop-outbox-relay"
	assert.Equal(t, []string{
		"ConfigMap/shop-mapping", "ConfigMap/shop-outbox-relay", "ConfigMap/shop-outbox-relay-dashboard", "ConfigMap/shop-outbox-relay-migrate", "ConfigMap/shop-outbox-relay-text",
		"Deployment/shop-outbox-relay", "Job/shop-outbox-relay-migrate", "NetworkPolicy/shop-outbox-relay", "Pod/shop-outbox-relay-check",
		"PodDisruptionBudget/shop-outbox-relay", "PrometheusRule/shop-outbox-relay", "Service/shop-outbox-relay", "ServiceAccount/shop-outbox-relay", "ServiceMonitor/shop-outbox-relay",
	}, r.names())

	d := get[*apps.Deployment](t, r, name)
	pod := d.Spec.Template
	c := relay(t, &pod.Spec)
	assert.EqualValues(t, 3, *d.Spec.Replicas)
	assert.EqualValues(t, 105, *pod.Spec.TerminationGracePeriodSeconds, "drain 1m30s, record 10s, and 5")
	assert.Equal(t, "sales", d.Labels["team"])
	assert.Equal(t, "d", pod.Labels["example.com/c"])
	assert.Equal(t, "b", pod.Annotations["example.com/a"])
	assert.Equal(t, name, pod.Spec.ServiceAccountName)
	assert.Equal(t, "relay/dsn", variable(c, "OUTBOX_RELAY_DATABASE_URL"))
	assert.Equal(t, "relay/stream", variable(c, "OUTBOX_RELAY_DATABASE_REPLICATION_URL"))
	assert.Equal(t, "/ca", variable(c, "SSL_CERT_DIR"))
	assert.Equal(t, "--log-level=debug", c.Args[3])
	assert.Equal(t, "/ca", c.VolumeMounts[1].MountPath)
	assert.Len(t, pod.Spec.Containers, 2)
	assert.Len(t, pod.Spec.InitContainers, 1)
	assert.Equal(t, d.Spec.Selector.MatchLabels, pod.Spec.TopologySpreadConstraints[0].LabelSelector.MatchLabels)

	file := get[*core.ConfigMap](t, r, name).Data["config.yaml"]
	assert.Contains(t, file, "deliveries: 2000000", "a number stays one that the relay can read")

	service := get[*core.Service](t, r, name)
	assert.Equal(t, d.Spec.Selector.MatchLabels, service.Spec.Selector)
	assert.True(t, service.Spec.PublishNotReadyAddresses)
	monitor := get[*monitoring.ServiceMonitor](t, r, name)
	for key, value := range monitor.Spec.Selector.MatchLabels {
		assert.Equal(t, value, service.Labels[key])
	}
	assert.Equal(t, service.Spec.Ports[0].Name, monitor.Spec.Endpoints[0].Port)
	assert.Equal(t, c.Ports[0].Name, service.Spec.Ports[0].TargetPort.StrVal)

	budget := get[*policy.PodDisruptionBudget](t, r, name)
	assert.Equal(t, d.Spec.Selector.MatchLabels, budget.Spec.Selector.MatchLabels)
	fence := get[*networking.NetworkPolicy](t, r, name)
	assert.Equal(t, d.Spec.Selector.MatchLabels, fence.Spec.PodSelector.MatchLabels)
	assert.Len(t, fence.Spec.Ingress, 1)
	assert.Len(t, fence.Spec.Egress, 3, "names, database, receivers")
	assert.Equal(t, "1", get[*core.ConfigMap](t, r, name+"-dashboard").Labels["grafana_dashboard"])
}

// TestMigration: the hook runs before there is any object of the release, so all that it needs has to come with it.
func TestMigration(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ values, secret string }{
		"secret of an owner":   {"database: {existingSecret: relay}\nmigrate: {enabled: true, existingSecret: owner, key: dsn}\n", "owner/dsn"},
		"secret of the relay":  {"database: {existingSecret: relay, key: dsn}\nmigrate: {enabled: true}\n", "relay/dsn"},
		"secret of the chart":  {"database: {url: \"postgres://u:p@db/app\"}\nmigrate: {enabled: true}\n", "shop-outbox-relay-migrate/url"},
		"several databases":    {"databases: [{name: orders-eu, existingSecret: one}]\nmigrate: {enabled: true}\n", "one/url"},
		"made service account": {minimal + "serviceAccount: {create: true}\nmigrate: {enabled: true}\n", "relay/url"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := must(t, tc.values)
			job := get[*batch.Job](t, r, "shop-outbox-relay-migrate")
			assert.Equal(t, "pre-install,pre-upgrade", job.Annotations["helm.sh/hook"])
			pod := job.Spec.Template.Spec
			c := pod.Containers[0]
			assert.Equal(t, "migrate", c.Args[0])
			assert.Equal(t, "default", pod.ServiceAccountName)
			variables := variable(&c, "OUTBOX_RELAY_DATABASE_URL") + variable(&c, "OUTBOX_RELAY_DATABASES_ORDERS_EU_URL")
			assert.Equal(t, tc.secret, variables)

			config := get[*core.ConfigMap](t, r, pod.Volumes[0].ConfigMap.Name)
			assert.Equal(t, job.Annotations["helm.sh/hook"], config.Annotations["helm.sh/hook"])
			assert.Equal(t, "-10", config.Annotations["helm.sh/hook-weight"])
			assert.Equal(t, "-5", job.Annotations["helm.sh/hook-weight"], "it comes after its configuration")
			assert.Equal(t, get[*core.ConfigMap](t, r, "shop-outbox-relay").Data, config.Data)
			if made, _, _ := strings.Cut(tc.secret, "/"); made == job.Name {
				assert.NotEmpty(t, get[*core.Secret](t, r, made).Annotations["helm.sh/hook"])
			}
		})
	}
}

// TestReplicas: a number that is left out is not 0, which would stop the relay at the next upgrade where an autoscaler has the say.
func TestReplicas(t *testing.T) {
	t.Parallel()
	d := get[*apps.Deployment](t, must(t, minimal+"replicas: null\n"), "shop-outbox-relay")
	assert.Nil(t, d.Spec.Replicas)
	d = get[*apps.Deployment](t, must(t, minimal+"replicas: 0\n"), "shop-outbox-relay")
	assert.EqualValues(t, 0, *d.Spec.Replicas)
}

// TestStrategy: Kubernetes refuses rollingUpdate beside Recreate, and the default of it is still there when the type alone is given.
func TestStrategy(t *testing.T) {
	t.Parallel()
	for values, want := range map[string]apps.DeploymentStrategyType{
		"strategy: {type: Recreate}\n": apps.RecreateDeploymentStrategyType, "strategy: {type: RollingUpdate}\n": apps.RollingUpdateDeploymentStrategyType, "strategy: {type: null}\n": "",
	} {
		strategy := get[*apps.Deployment](t, must(t, minimal+values), "shop-outbox-relay").Spec.Strategy
		assert.Equal(t, want, strategy.Type)
		assert.Equal(t, want != apps.RecreateDeploymentStrategyType, strategy.RollingUpdate != nil, values)
	}
}

// TestDisruptionBudget: the field that Kubernetes has since 1.27 is not there for an older one, which the chart admits and which would refuse it.
func TestDisruptionBudget(t *testing.T) {
	t.Parallel()
	for kube, want := range map[string]bool{"v1.25.0": false, "v1.26.15": false, "v1.27.3-gke.100": true, "v1.33.0": true} {
		r, err := release{kube: kube}.render(t, minimal+"podDisruptionBudget: {enabled: true}\n")
		require.NoError(t, err)
		have := get[*policy.PodDisruptionBudget](t, r, "shop-outbox-relay").Spec.UnhealthyPodEvictionPolicy
		assert.Equal(t, want, have != nil, kube)
	}
}

func TestSeveralDatabases(t *testing.T) {
	t.Parallel()
	r := must(t, `
config: {database: {instance_id: production}}
databases:
  - {name: orders-eu, existingSecret: one, config: {slot: relay_orders, shards: 2}}
  - {name: billing, existingSecret: two, key: dsn, replicationKey: stream}
`)
	c := relay(t, &get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec)
	assert.Equal(t, "one/url", variable(c, "OUTBOX_RELAY_DATABASES_ORDERS_EU_URL"))
	assert.Equal(t, "two/dsn", variable(c, "OUTBOX_RELAY_DATABASES_BILLING_URL"))
	assert.Equal(t, "two/stream", variable(c, "OUTBOX_RELAY_DATABASES_BILLING_REPLICATION_URL"))
	assert.Empty(t, variable(c, "OUTBOX_RELAY_DATABASE_URL"))
	assert.YAMLEq(t, `
database: {instance_id: production}
databases: [{name: orders-eu, slot: relay_orders, shards: 2}, {name: billing}]
log: {format: json}
server: {listen: ":9464"}`, get[*core.ConfigMap](t, r, "shop-outbox-relay").Data["config.yaml"])
}

func TestMemoryLimit(t *testing.T) {
	t.Parallel()
	for limit, want := range map[string]string{
		"384Mi": "362387865", "1Gi": "966367641", "0.5Gi": "483183820", "1000000": "900000", "2G": "1800000000", "100k": "90000",
	} {
		r := must(t, minimal+"resources: {limits: {memory: "+limit+"}}\n")
		assert.Equal(t, want, variable(relay(t, &get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec), "GOMEMLIMIT"), limit)
	}
	for values, want := range map[string]string{"goMemLimit: 200MiB\n": "200MiB", "goMemLimit: \"off\"\n": "off", "resources: {limits: {memory: null}}\n": ""} {
		r := must(t, minimal+values)
		assert.Equal(t, want, variable(relay(t, &get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec), "GOMEMLIMIT"), values)
	}
}

// TestGracePeriod: what the pod is given follows the configuration, in every form that a duration has.
func TestGracePeriod(t *testing.T) {
	t.Parallel()
	for values, want := range map[string]int64{
		"config: {shutdown: {drain: 0s}}\n":                                     15,
		"config: {shutdown: {drain: 2m}, record: {timeout: 1m}}\n":              185,
		"config: {shutdown: {drain: 1h0m5s}}\n":                                 3620,
		"config: {shutdown: {drain: 10s}}\nterminationGracePeriodSeconds: 20\n": 20,
		"terminationGracePeriodSeconds: 300\n":                                  300,
	} {
		r := must(t, minimal+values)
		assert.Equal(t, want, *get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec.TerminationGracePeriodSeconds, values)
	}
}

// TestRestartOnConfigChange: pods are made anew for a configuration that running ones do not take on, and for nothing else.
func TestRestartOnConfigChange(t *testing.T) {
	t.Parallel()
	sum := func(values string) string {
		return get[*apps.Deployment](t, must(t, minimal+values), "shop-outbox-relay").Spec.Template.Annotations["checksum/outbox-relay"]
	}
	require.Len(t, sum(""), 64)
	assert.Equal(t, sum(""), sum("replicas: 5\n"))
	assert.Equal(t, sum(""), sum("config: {log: {level: debug}, retry: {attempts: 3}, delivery: {endpoint_rate: 5}, network: {deny: [10.0.0.0/8]}}\n"))
	for _, values := range []string{
		"config: {log: {format: text}}\n", "config: {window: {deliveries: 100}}\n", "config: {delivery: {workers: 7}}\n", "config: {delivery: {tls: {min_version: '1.3'}}}\n",
		"config: {queue: {lease: 2m}}\n", "config: {network: {proxy: 'http://proxy:3128'}}\n", "config: {tenants: {include: [a]}}\n", "config: {database: {slot: other}}\n",
		"port: 9999\n", "databases: [{name: one, existingSecret: one}]\n",
	} {
		assert.NotEqual(t, sum(""), sum(values), values)
	}
	assert.Empty(t, sum("restartOnConfigChange: false\n"))
}

// TestRestartKeys: the chart knows of the same keys as the relay, whose own test holds the list of config.example.yaml.
func TestRestartKeys(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("../config.example.yaml")
	require.NoError(t, err)
	_, list, found := strings.Cut(strings.ReplaceAll(string(example), "\n# ", " "), "until a restart: ")
	require.True(t, found)
	list, _, found = strings.Cut(list, ".\n")
	require.True(t, found)
	helpers, err := os.ReadFile("outbox-relay/templates/_helpers.tpl")
	require.NoError(t, err)
	assert.Contains(t, string(helpers), "{{- define \"outbox-relay.restartKeys\" -}}\n"+strings.ReplaceAll(list, ", ", " ")+"\n{{- end }}")
}

func TestNames(t *testing.T) {
	t.Parallel()
	for values, want := range map[string]string{
		"": "shop-outbox-relay", "nameOverride: shop-relay\n": "shop-shop-relay", "fullnameOverride: hooks\n": "hooks",
		"fullnameOverride: " + strings.Repeat("x", 100) + "\n": strings.Repeat("x", 55),
	} {
		get[*apps.Deployment](t, must(t, minimal+"migrate: {enabled: true}\n"+values), want)
	}
	for values, want := range map[string]string{
		"image: {tag: v1}\n": "ghcr.io/neo-commons/outbox-relay:v1",
		"image: {repository: x/y, digest: sha256:" + strings.Repeat("a", 64) + "}\n": "x/y@sha256:" + strings.Repeat("a", 64),
	} {
		assert.Equal(t, want, relay(t, &get[*apps.Deployment](t, must(t, minimal+values), "shop-outbox-relay").Spec.Template.Spec).Image)
	}
}

// TestNotes tell what to do next, and only what is left to do.
func TestNotes(t *testing.T) {
	t.Parallel()
	first := must(t, minimal).notes
	assert.Contains(t, first, "outbox-relay migrate")
	assert.Contains(t, first, "tenants add SCHEMA")
	assert.Contains(t, first, "kubectl -n sales rollout status deployment/shop-outbox-relay")
	assert.Contains(t, first, "replicas=2")
	full := must(t, everything).notes
	assert.NotContains(t, full, "outbox-relay migrate --database-url")
	assert.NotContains(t, full, "replicas=2")
	assert.Contains(t, must(t, "database: {url: postgres://x@y/z}\n").notes, "in production")
}

// TestDSNInAFile: a DSN that is mounted as a file, to be rotated without a restart, is not given as a variable as well: the relay refuses two.
func TestDSNInAFile(t *testing.T) {
	t.Parallel()
	r := must(t, `
config: {database: {url_file: /secrets/url}}
extraVolumes: [{name: dsn, secret: {secretName: relay}}]
extraVolumeMounts: [{name: dsn, mountPath: /secrets, readOnly: true}]
`)
	c := relay(t, &get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec)
	assert.Empty(t, variable(c, "OUTBOX_RELAY_DATABASE_URL"))
	r = must(t, `
databases:
  - {name: orders, existingSecret: one, config: {url_file: /secrets/orders}}
  - {name: billing, existingSecret: two}
`)
	c = relay(t, &get[*apps.Deployment](t, r, "shop-outbox-relay").Spec.Template.Spec)
	assert.Empty(t, variable(c, "OUTBOX_RELAY_DATABASES_ORDERS_URL"))
	assert.Equal(t, "two/url", variable(c, "OUTBOX_RELAY_DATABASES_BILLING_URL"))
}

// TestDSNInAFileOfTheJob: one that migrates with the DSN of an owner is not told of the files that hold those of the relay; any other reads them as the relay does.
func TestDSNInAFileOfTheJob(t *testing.T) {
	t.Parallel()
	const files = "config: {database: {instance_id: production, url_file: /secrets/url, replication_url_file: /secrets/stream}}\n"
	r := must(t, files+"migrate: {enabled: true, existingSecret: owner}\n")
	job := get[*batch.Job](t, r, "shop-outbox-relay-migrate").Spec.Template.Spec.Containers[0]
	assert.Equal(t, "owner/url", variable(&job, "OUTBOX_RELAY_DATABASE_URL"))
	text := get[*core.ConfigMap](t, r, "shop-outbox-relay-migrate").Data["config.yaml"]
	assert.YAMLEq(t, "{database: {instance_id: production}, log: {format: json}, server: {listen: \":9464\"}}", text)
	file := filepath.Join(t.TempDir(), "config.yaml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	out, err := invoke(t, []string{"OUTBOX_RELAY_DATABASE_URL=postgres://owner@db.internal/app"}, "config", "--config", file)
	require.NoError(t, err, out)
	relays := get[*core.ConfigMap](t, r, "shop-outbox-relay").Data["config.yaml"]
	assert.Contains(t, relays, "url_file: /secrets/url")
	assert.Contains(t, relays, "replication_url_file: /secrets/stream")

	for _, values := range []string{"", "database: {existingSecret: relay}\n", "database: {url: \"postgres://relay@db/app\"}\n"} {
		r := must(t, files+"migrate: {enabled: true}\n"+values)
		job := get[*batch.Job](t, r, "shop-outbox-relay-migrate").Spec.Template.Spec.Containers[0]
		assert.Empty(t, variable(&job, "OUTBOX_RELAY_DATABASE_URL"), values)
		assert.Equal(t, get[*core.ConfigMap](t, r, "shop-outbox-relay").Data, get[*core.ConfigMap](t, r, "shop-outbox-relay-migrate").Data, values)
	}
}
