package charts_test

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestRefusals: what cannot be right is refused before anything is installed, with the key and what would do.
func TestRefusals(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		values, want string
		release      release
	}{
		"nothing given":          {values: "", want: "database.existingSecret: is required"},
		"typo":                   {values: minimal + "replica: 2", want: "replica"},
		"typo in a section":      {values: minimal + "image: {tags: v1}", want: "tags"},
		"typo in a probe":        {values: minimal + "livenessProbe: {period: 3}", want: "period"},
		"typo in config":         {values: minimal + "config: {delivery: {worker: 3}}", want: "worker"},
		"section of config":      {values: minimal + "config: {delivry: {workers: 3}}", want: "delivry"},
		"duration without unit":  {values: minimal + "config: {delivery: {default_timeout: 30}}", want: "default_timeout"},
		"duration in days":       {values: minimal + "config: {retry: {max_backoff: 1d}}", want: "max_backoff"},
		"size without unit":      {values: minimal + "config: {window: {bytes: 4096}}", want: "bytes"},
		"number in quotes":       {values: minimal + "config: {delivery: {workers: \"3\"}}", want: "workers"},
		"text for a list":        {values: minimal + "config: {network: {allow: 10.0.0.0/8}}", want: "allow"},
		"password in ConfigMap":  {values: minimal + "config: {database: {url: postgres://a:b@c/d}}", want: "url"},
		"password in an entry":   {values: "databases: [{name: a, existingSecret: b, config: {url: postgres://a:b@c/d}}]", want: "url"},
		"listen in config":       {values: minimal + "config: {server: {listen: \":1\"}}", want: "server"},
		"databases in config":    {values: minimal + "config: {databases: []}", want: "databases"},
		"database without name":  {values: "databases: [{existingSecret: b}]", want: "name"},
		"mode":                   {values: minimal + "mode: daemon", want: "mode"},
		"digest":                 {values: minimal + "image: {digest: abc}", want: "digest"},
		"port":                   {values: minimal + "port: 70000", want: "port"},
		"hook":                   {values: minimal + "migrate: {hook: pre-delete}", want: "hook"},
		"owner of several":       {values: "databases: [{name: a, existingSecret: b}]\nmigrate: {enabled: true, existingSecret: owner}", want: "migrate.existingSecret: owner: is one DSN"},
		"alert":                  {values: minimal + "prometheusRule: {disabled: [NoLeader]}", want: "disabled"},
		"budget of none":         {values: minimal + "podDisruptionBudget: {enabled: true, maxUnavailable: 0}", want: "maxUnavailable"},
		"short grace":            {values: minimal + "terminationGracePeriodSeconds: 10", want: "terminationGracePeriodSeconds: 10: must be at least 30"},
		"memory":                 {values: minimal + "resources: {limits: {memory: 3Gigs}}", want: `resources.limits.memory: "3Gigs": write a number and a unit`},
		"two monitors":           {values: minimal + "serviceMonitor: {enabled: true}\npodMonitor: {enabled: true}", want: "twice"},
		"service of a sidecar":   {values: minimal + "mode: sidecar\nserviceMonitor: {enabled: true}", want: "use podMonitor.enabled"},
		"pods of a sidecar":      {values: minimal + "mode: sidecar\npodMonitor: {enabled: true}", want: "sidecar.podLabels: is required"},
		"sidecar and Deployment": {values: "outbox-relay: {mode: standalone}", want: "mode: standalone: must be sidecar", release: release{app: true}},
		"old Kubernetes":         {values: "", want: "needs Kubernetes 1.29, this is v1.28.3: include outbox-relay.classicSidecar", release: release{app: true, kube: "v1.28.3"}},
		"typo of an application": {values: "outbox-relay: {extraEnvs: []}", want: "extraEnvs", release: release{app: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := tc.release.render(t, tc.values)
			require.Error(t, err)
			assert.ErrorContains(t, err, tc.want)
		})
	}
	_, err := release{app: true, kube: "v1.28.3"}.render(t, "native: false")
	require.NoError(t, err, "a classic sidecar needs no new Kubernetes")
}
