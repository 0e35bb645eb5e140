package charts_test

import (
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
)

// TestNativeSidecar: an application's chart that includes it gets a relay that is up before the application and stopped after it, and whose health is no
// concern of the application's Service.
func TestNativeSidecar(t *testing.T) {
	t.Parallel()
	r := mustApp(t, "")
	assert.Equal(t, []string{"ConfigMap/shop-outbox-relay", "Deployment/shop"}, r.names())
	pod := get[*apps.Deployment](t, r, "shop").Spec.Template
	require.Len(t, pod.Spec.InitContainers, 1)
	require.Len(t, pod.Spec.Containers, 1)
	c := pod.Spec.InitContainers[0]
	assert.Equal(t, core.ContainerRestartPolicyAlways, *c.RestartPolicy)
	assert.Nil(t, c.ReadinessProbe)
	assert.Equal(t, "/livez", c.StartupProbe.HTTPGet.Path, "a database that is away must not hold up the application's start")
	assert.Equal(t, "/livez", c.LivenessProbe.HTTPGet.Path)
	assert.Contains(t, c.Args, "--patient", "a relay that ends would make the pod unready")
	assert.Equal(t, "relay-metrics", c.Ports[0].Name)
	assert.NotEqual(t, pod.Spec.Containers[0].Ports[0].Name, c.Ports[0].Name)
	assert.Equal(t, "shop-database/url", variable(&c, "OUTBOX_RELAY_DATABASE_URL"))
	assert.EqualValues(t, 65, *pod.Spec.TerminationGracePeriodSeconds)
	assert.Len(t, pod.Annotations["checksum/outbox-relay"], 64)
	assert.Equal(t, pod.Spec.Volumes[0].Name, c.VolumeMounts[0].Name)
	assert.Equal(t, get[*core.ConfigMap](t, r, "shop-outbox-relay").Name, pod.Spec.Volumes[0].ConfigMap.Name)
}

func TestClassicSidecar(t *testing.T) {
	t.Parallel()
	r := mustApp(t, "native: false\n")
	pod := get[*apps.Deployment](t, r, "shop").Spec.Template
	assert.Empty(t, pod.Spec.InitContainers)
	require.Len(t, pod.Spec.Containers, 2)
	c := pod.Spec.Containers[1]
	assert.Nil(t, c.RestartPolicy)
	assert.Nil(t, c.ReadinessProbe)
	assert.Nil(t, c.StartupProbe)
	assert.Equal(t, "/livez", c.LivenessProbe.HTTPGet.Path)
	assert.EqualValues(t, 35, *pod.Spec.TerminationGracePeriodSeconds)
}

// TestSidecarHasTheSameContainer: the modes differ in probes, port name and nothing else.
func TestSidecarHasTheSameContainer(t *testing.T) {
	t.Parallel()
	const values = `{database: {existingSecret: shop-database}, config: {delivery: {workers: 7}}, extraEnv: [{name: A, value: b}], extraArgs: [--log-level=warn]}`
	plain := func(c *core.Container) core.Container {
		c.LivenessProbe, c.ReadinessProbe, c.StartupProbe, c.RestartPolicy, c.Ports = nil, nil, nil, nil, nil
		return *c
	}
	standalone := plain(relay(t, &get[*apps.Deployment](t, must(t, values), "shop-outbox-relay").Spec.Template.Spec))
	for _, native := range []string{"true", "false"} {
		pod := get[*apps.Deployment](t, mustApp(t, "native: "+native+"\noutbox-relay: "+values), "shop").Spec.Template
		assert.Equal(t, standalone, plain(relay(t, &pod.Spec)))
	}
}

// TestSidecarMetrics: the PodMonitor finds the application's pods.
func TestSidecarMetrics(t *testing.T) {
	t.Parallel()
	r := mustApp(t, "outbox-relay: {podMonitor: {enabled: true}, prometheusRule: {enabled: true}, dashboard: {enabled: true}, migrate: {enabled: true}}\n")
	assert.Equal(t, []string{
		"ConfigMap/shop-outbox-relay", "ConfigMap/shop-outbox-relay-dashboard", "ConfigMap/shop-outbox-relay-migrate", "Deployment/shop",
		"Job/shop-outbox-relay-migrate", "PodMonitor/shop-outbox-relay", "PrometheusRule/shop-outbox-relay",
	}, r.names())
	pod := get[*apps.Deployment](t, r, "shop").Spec.Template
	monitor := get[*monitoring.PodMonitor](t, r, "shop-outbox-relay")
	for key, value := range monitor.Spec.Selector.MatchLabels {
		assert.Equal(t, value, pod.Labels[key])
	}
	assert.Equal(t, relay(t, &pod.Spec).Ports[0].Name, *monitor.Spec.PodMetricsEndpoints[0].Port)
}
