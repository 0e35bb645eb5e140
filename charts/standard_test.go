package charts_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// TestLint is helm lint, of whose findings only the advice to have an icon is no matter.
func TestLint(t *testing.T) {
	t.Parallel()
	for _, text := range []string{minimal, everything} {
		values, err := chartutil.ReadValues([]byte(text))
		require.NoError(t, err)
		kube, err := chartutil.ParseKubeVersion("v1.33.0")
		require.NoError(t, err)
		for _, message := range lint.AllWithKubeVersion("outbox-relay", values, "sales", kube).Messages {
			assert.Less(t, message.Severity, support.WarningSev, message.Error())
		}
	}
}

// variants are the releases that are held against standards.
func variants() map[string]struct {
	release release
	values  string
} {
	const optional = "migrate: {enabled: true}, podMonitor: {enabled: true}, prometheusRule: {enabled: true}, dashboard: {enabled: true}"
	return map[string]struct {
		release release
		values  string
	}{
		"minimal":           {values: minimal},
		"everything":        {values: everything},
		"made secret":       {values: "database: {url: \"postgres://relay@db/app\"}\nmigrate: {enabled: true}\n"},
		"several databases": {values: "databases: [{name: orders-eu, existingSecret: one, config: {slot: orders, shards: 2}}, {name: billing, existingSecret: two, replicationKey: stream}]\n"},
		"pod monitor":       {values: minimal + "podMonitor: {enabled: true}\n"},
		"native sidecar":    {release{app: true}, "outbox-relay: {" + optional + "}\n"},
		"classic sidecar":   {release{app: true}, "native: false\noutbox-relay: {" + optional + "}\n"},
	}
}

// TestRestricted: every pod satisfies the restricted Pod Security Standard of the latest version, by the very code of Kubernetes.
func TestRestricted(t *testing.T) {
	t.Parallel()
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	require.NoError(t, err)
	restricted := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	for name, variant := range variants() {
		r, err := variant.release.render(t, variant.values)
		require.NoError(t, err, name)
		for kind, pod := range r.pods() {
			for _, result := range evaluator.EvaluatePod(restricted, &pod.ObjectMeta, &pod.Spec) {
				assert.True(t, result.Allowed, "%s: %s: %s: %s", name, kind, result.ForbiddenReason, result.ForbiddenDetail)
			}
			if token := pod.Spec.AutomountServiceAccountToken; token != nil { // the application's own pod is its own affair
				assert.False(t, *token, "%s: %s", name, kind)
			}
			for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
				wellFormed(t, &pod.Spec, &c)
			}
		}
	}
}

// wellFormed is what Kubernetes refuses although its types allow it.
func wellFormed(t *testing.T, pod *core.PodSpec, c *core.Container) {
	t.Helper()
	volumes := make(map[string]bool)
	for _, v := range pod.Volumes {
		assert.False(t, volumes[v.Name], "two volumes %s", v.Name)
		volumes[v.Name] = true
	}
	for _, m := range c.VolumeMounts {
		assert.True(t, volumes[m.Name], "%s mounts %s, which is no volume of the pod", c.Name, m.Name)
	}
	seen := make(map[string]bool)
	for _, v := range c.Env {
		assert.False(t, seen[v.Name], "%s has %s twice", c.Name, v.Name)
		seen[v.Name] = true
	}
	for _, p := range c.Ports {
		assert.Empty(t, validation.IsValidPortName(p.Name))
	}
}

// TestConfiguration: the real binary takes the file, the variables and the arguments that the chart gives it.
func TestConfiguration(t *testing.T) {
	t.Parallel()
	for name, variant := range variants() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := variant.release.render(t, variant.values)
			require.NoError(t, err)
			file := filepath.Join(t.TempDir(), "config.yaml")
			require.NoError(t, os.WriteFile(file, []byte(get[*core.ConfigMap](t, r, "shop-outbox-relay").Data["config.yaml"]), 0o600))
			for kind, pod := range r.pods() {
				for _, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
					if c.Image != "ghcr.io/neo-commons/outbox-relay:0.1.0" {
						continue
					}
					var env []string
					for i, v := range c.Env {
						if v.ValueFrom != nil {
							v.Value = "postgres://relay@db.internal:5432/app" + string(rune('a'+i)) // each variable its own database
						}
						env = append(env, v.Name+"="+v.Value)
					}
					out, err := invoke(t, env, "config", "--config", file)
					require.NoError(t, err, "%s: %s: %s", kind, c.Name, out)
					out, err = invoke(t, env, append(c.Args, "--help")...)
					require.NoError(t, err, "%s: %s: %s", kind, c.Name, out)
				}
			}
		})
	}
}
