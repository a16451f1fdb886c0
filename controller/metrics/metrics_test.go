package metrics

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/custom-metrics-apiserver/pkg/provider"

	"cloister.dev/cloister/controller/scrape"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
)

var update = flag.Bool("update", false, "rewrite the goldens")

// observed is what is known of one pod. The good one has everything.
type observed struct {
	scrape.Observation
}

func good(name string, requests float64) *observed {
	return &observed{scrape.Observation{
		Pod: &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "test", Name: name, Labels: map[string]string{"app": "web"}},
			Status:     corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
		},
		Snapshot: &podmetrics.Snapshot{
			Phase: podsock.EnclaveState_PHASE_RUNNING, Generation: 1, Attested: true,
			Stats: &channel.StatsResponse{MemoryUsed: 100 << 20, MemoryTotal: 300 << 20},
		},
		At:       time.Date(2026, 11, 24, 9, 0, 0, 0, time.UTC),
		Requests: requests, Window: 15 * time.Second,
	}}
}

func (o *observed) but(change func(*observed)) *observed {
	change(o)
	return o
}

// newProvider knows the pods.
func newProvider(t *testing.T, all ...*observed) Provider {
	t.Helper()
	known := map[string]scrape.Observation{}
	var objects []client.Object
	for _, o := range all {
		objects = append(objects, o.Pod)
		known[o.Pod.Name] = o.Observation
	}
	cluster := fake.NewClientBuilder().WithObjects(objects...).Build()
	return Provider{Observe: func(ctx context.Context, opts ...client.ListOption) (out []scrape.Observation, err error) {
		var list corev1.PodList
		err = cluster.List(ctx, &list, opts...)
		for _, pod := range list.Items {
			out = append(out, known[pod.Name])
		}
		return out, err
	}}
}

func info(name string) provider.CustomMetricInfo {
	return provider.CustomMetricInfo{GroupResource: schema.GroupResource{Resource: "pods"}, Namespaced: true, Metric: name}
}

// TestValues: what the library is handed, which makes the API of it.
func TestValues(t *testing.T) {
	other := good("other-app", 7).but(func(o *observed) { o.Pod.Labels["app"] = "db" })
	elsewhere := good("elsewhere", 7).but(func(o *observed) { o.Pod.Namespace = "elsewhere" })
	p := newProvider(t, good("a", 12.34567), good("b", 0), other, elsewhere)
	selector := labels.SelectorFromSet(labels.Set{"app": "web"})
	got := map[string]any{}
	for _, m := range p.ListAllMetrics() {
		list, err := p.GetMetricBySelector(t.Context(), "test", selector, m, labels.Everything())
		if err != nil {
			t.Fatal(err)
		}
		got[m.Metric] = list.Items
	}
	text, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/values.json"
	if *update {
		if err := os.WriteFile(golden, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(text)); diff != "" {
		t.Error(diff)
	}

	one, err := p.GetMetricByName(t.Context(), types.NamespacedName{Namespace: "test", Name: "a"}, info(MemoryUtilization), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := one.Value.String(); got != "33333m" || one.DescribedObject.Name != "a" {
		t.Errorf("%s of %s", got, one.DescribedObject.Name)
	}
}

// TestLeftOut: a pod that is not known to serve from an enclave has no value.
func TestLeftOut(t *testing.T) {
	for name, change := range map[string]func(*observed){
		"no answer":     func(o *observed) { o.Snapshot = nil },
		"no counters":   func(o *observed) { o.Snapshot.Stats = nil },
		"not attested":  func(o *observed) { o.Snapshot.Attested = false },
		"draining":      func(o *observed) { o.Snapshot.Phase = podsock.EnclaveState_PHASE_DRAINING },
		"not ready":     func(o *observed) { o.Pod.Status.Conditions[0].Status = corev1.ConditionFalse },
		"no conditions": func(o *observed) { o.Pod.Status.Conditions = nil },
		"one answer":    func(o *observed) { o.Window, o.Snapshot.Stats.MemoryTotal = 0, 0 },
		"not possible":  func(o *observed) { o.Requests, o.Snapshot.Stats.MemoryUsed = 1e18, 1<<62 },
		"being deleted": func(o *observed) {
			now := metav1.Now()
			o.Pod.DeletionTimestamp, o.Pod.Finalizers = &now, []string{"x/y"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, good("a", 1).but(change))
			for _, m := range p.ListAllMetrics() {
				list, err := p.GetMetricBySelector(t.Context(), "test", labels.Everything(), m, nil)
				if err != nil || len(list.Items) != 0 {
					t.Errorf("%s: %v, %v", m.Metric, list, err)
				}
				if _, err := p.GetMetricByName(t.Context(), types.NamespacedName{Namespace: "test", Name: "a"}, m, nil); !apierrors.IsNotFound(err) {
					t.Errorf("%s by name: %v", m.Metric, err)
				}
			}
		})
	}
}

func TestRefused(t *testing.T) {
	p := newProvider(t, good("a", 1))
	selector, err := labels.Parse("x=y")
	if err != nil {
		t.Fatal(err)
	}
	nodes := info(MemoryUtilization)
	nodes.GroupResource.Resource = "nodes"
	for name, tt := range map[string]struct {
		info     provider.CustomMetricInfo
		selector labels.Selector
		is       func(error) bool
	}{
		"unknown metric":   {info("enclave_luck"), nil, apierrors.IsNotFound},
		"of nodes":         {nodes, nil, apierrors.IsNotFound},
		"by metric labels": {info(MemoryUtilization), selector, apierrors.IsBadRequest},
	} {
		t.Run(name, func(t *testing.T) {
			if list, err := p.GetMetricBySelector(t.Context(), "test", labels.Everything(), tt.info, tt.selector); !tt.is(err) {
				t.Errorf("%v, %v", list, err)
			}
		})
	}
}
