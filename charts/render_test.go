package charts_test

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/releaseutil"
	apps "k8s.io/api/apps/v1"
	batch "k8s.io/api/batch/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	policy "k8s.io/api/policy/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// minimal is the least that the chart asks for.
const minimal = "database: {existingSecret: relay}\n"

// manifest is one rendered object.
type manifest struct {
	kind, name, text string
	object           meta.Object // decoded strictly
}

// rendered is what a release consists of.
type rendered struct {
	manifests []manifest
	notes     string
}

// release says how to render; the zero value renders the chart itself, for a Kubernetes of today.
type release struct {
	app  bool   // the application of testdata with the chart as its dependency
	kube string // version of Kubernetes; empty means v1.33.0
}

func load(t *testing.T, app bool) *chart.Chart {
	t.Helper()
	relay, err := loader.LoadDir("outbox-relay")
	require.NoError(t, err)
	if !app {
		return relay
	}
	shop, err := loader.LoadDir("testdata/app")
	require.NoError(t, err)
	shop.AddDependency(relay)
	return shop
}

// render does what helm install does, up to the talk with Kubernetes.
func (r release) render(t *testing.T, values string) (*rendered, error) {
	t.Helper()
	given, err := chartutil.ReadValues([]byte(values))
	require.NoError(t, err, values)
	c := load(t, r.app)
	if err := chartutil.ProcessDependenciesWithMerge(c, given); err != nil {
		return nil, err
	}
	kube, err := chartutil.ParseKubeVersion(cmp.Or(r.kube, "v1.33.0"))
	require.NoError(t, err)
	capabilities := chartutil.DefaultCapabilities.Copy()
	capabilities.KubeVersion = *kube
	full, err := chartutil.ToRenderValues(c, given, chartutil.ReleaseOptions{Name: "shop", Namespace: "sales", Revision: 1, IsInstall: true}, capabilities)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(c, full)
	if err != nil {
		return nil, err
	}
	out := new(rendered)
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if path.Base(file) == "NOTES.txt" {
			out.notes += files[file]
			continue
		}
		for _, doc := range releaseutil.SplitManifests(files[file]) {
			if strings.TrimSpace(doc) != "" {
				out.manifests = append(out.manifests, decode(t, doc))
			}
		}
	}
	return out, nil
}

// decode reads an object into the very type that Kubernetes, or the Prometheus operator, has for it, as strictly as Kubernetes does when asked to. A field that is
// not there, or is there twice, fails; so does one in the wrong case, which the decoder of YAML alone would take.
func decode(t *testing.T, doc string) manifest {
	t.Helper()
	var head meta.TypeMeta
	require.NoError(t, yaml.Unmarshal([]byte(doc), &head), doc)
	types := map[string]meta.Object{
		"v1/ConfigMap": new(core.ConfigMap), "v1/Secret": new(core.Secret), "v1/Service": new(core.Service), "v1/ServiceAccount": new(core.ServiceAccount),
		"v1/Pod": new(core.Pod), "apps/v1/Deployment": new(apps.Deployment), "batch/v1/Job": new(batch.Job),
		"policy/v1/PodDisruptionBudget": new(policy.PodDisruptionBudget), "networking.k8s.io/v1/NetworkPolicy": new(networking.NetworkPolicy),
		"monitoring.coreos.com/v1/ServiceMonitor": new(monitoring.ServiceMonitor), "monitoring.coreos.com/v1/PodMonitor": new(monitoring.PodMonitor),
		"monitoring.coreos.com/v1/PrometheusRule": new(monitoring.PrometheusRule),
	}
	object := types[head.APIVersion+"/"+head.Kind]
	require.NotNil(t, object, "%s/%s is a type that no test knows:\n%s", head.APIVersion, head.Kind, doc)
	text, err := yaml.YAMLToJSONStrict([]byte(doc))
	require.NoError(t, err, doc)
	faults, err := json.UnmarshalStrict(text, object)
	require.NoError(t, err, doc)
	require.Empty(t, faults, doc)

	assert.Empty(t, validation.IsDNS1123Subdomain(object.GetName()), doc)
	for key, value := range object.GetLabels() {
		assert.Empty(t, validation.IsQualifiedName(key), doc)
		assert.Empty(t, validation.IsValidLabelValue(value), doc)
	}
	return manifest{head.Kind, object.GetName(), doc, object}
}

// must renders what has to be possible.
func must(t *testing.T, values string) *rendered {
	t.Helper()
	out, err := release{}.render(t, values)
	require.NoError(t, err, values)
	return out
}

// mustApp renders the application.
func mustApp(t *testing.T, values string) *rendered {
	t.Helper()
	out, err := release{app: true}.render(t, values)
	require.NoError(t, err, values)
	return out
}

// names lists the objects as kind/name.
func (r *rendered) names() (list []string) {
	for _, m := range r.manifests {
		list = append(list, m.kind+"/"+m.name)
	}
	slices.Sort(list)
	return list
}

// get finds the object of a type that has this name.
func get[T meta.Object](t *testing.T, r *rendered, name string) T {
	t.Helper()
	for _, m := range r.manifests {
		if object, ok := m.object.(T); ok && m.name == name {
			return object
		}
	}
	var none T
	require.Fail(t, fmt.Sprintf("there is no %T %s", none, name), "%v", r.names())
	return none
}

// pods are all that would run, by the name of the object that makes them.
func (r *rendered) pods() map[string]core.PodTemplateSpec {
	list := make(map[string]core.PodTemplateSpec)
	for _, m := range r.manifests {
		switch o := m.object.(type) {
		case *apps.Deployment:
			list[m.kind] = o.Spec.Template
		case *batch.Job:
			list[m.kind] = o.Spec.Template
		case *core.Pod:
			list[m.kind] = core.PodTemplateSpec{ObjectMeta: o.ObjectMeta, Spec: o.Spec}
		}
	}
	return list
}

// relay is the container of the relay, wherever it is in the pod.
func relay(t *testing.T, pod *core.PodSpec) *core.Container {
	t.Helper()
	for _, list := range [][]core.Container{pod.InitContainers, pod.Containers} {
		for i := range list {
			if list[i].Name == "outbox-relay" {
				return &list[i]
			}
		}
	}
	require.Fail(t, "no container outbox-relay")
	return nil
}

// variable is the value of one, or the secret/key it comes from; empty: it is not set.
func variable(c *core.Container, name string) string {
	for _, v := range c.Env {
		if v.Name != name {
			continue
		}
		if v.ValueFrom != nil && v.ValueFrom.SecretKeyRef != nil {
			return v.ValueFrom.SecretKeyRef.Name + "/" + v.ValueFrom.SecretKeyRef.Key
		}
		return v.Value
	}
	return ""
}
