// Package metrics serves the custom metrics API (custom.metrics.k8s.io), which the
// HorizontalPodAutoscaler asks:
//
//	enclave_requests_per_second   requests handed to the workload per second, over the last 15 s
//	enclave_memory_utilization    memory in use in percent of the enclave's memory: 80 is 80 %
//
// Both are metrics of pods. A pod has them while it is Ready, its enclave runs the workload and has shown
// the expected PCRs to initboot, and its sidecar has answered within the last 15 s.
package metrics

import (
	"context"
	"math"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/metrics/pkg/apis/custom_metrics"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/custom-metrics-apiserver/pkg/provider"

	"cloister.dev/cloister/controller/scrape"
	"cloister.dev/cloister/internal/podsock"
)

// Names of the metrics.
const (
	RequestsPerSecond = "enclave_requests_per_second"
	MemoryUtilization = "enclave_memory_utilization"
)

var pods = schema.GroupResource{Resource: "pods"}

// maxValue is more than any enclave reaches. What a host claims beyond has no value: as a number of the API
// it would wrap around, and one pod could make the sum of all others negative.
const maxValue = 1e9

// table has all metrics; value reports false where a pod has none.
var table = []struct {
	name  string
	value func(scrape.Observation) (v float64, over time.Duration, ok bool)
}{
	{RequestsPerSecond, func(o scrape.Observation) (float64, time.Duration, bool) {
		return o.Requests, o.Window, o.Window > 0
	}},
	{MemoryUtilization, func(o scrape.Observation) (float64, time.Duration, bool) {
		s := o.Snapshot.Stats
		if s.GetMemoryTotal() == 0 || s.GetMemoryUsed() > s.GetMemoryTotal() {
			return 0, 0, false
		}
		return 100 * float64(s.GetMemoryUsed()) / float64(s.GetMemoryTotal()), 0, true
	}},
}

// Provider implements provider.CustomMetricsProvider.
type Provider struct {
	// Observe returns what is known of the pods that match.
	Observe func(context.Context, ...client.ListOption) ([]scrape.Observation, error)
}

var _ provider.CustomMetricsProvider = Provider{}

// ListAllMetrics implements provider.CustomMetricsProvider.
func (Provider) ListAllMetrics() []provider.CustomMetricInfo {
	var out []provider.CustomMetricInfo
	for _, m := range table {
		out = append(out, provider.CustomMetricInfo{GroupResource: pods, Namespaced: true, Metric: m.name})
	}
	return out
}

// GetMetricByName implements provider.CustomMetricsProvider.
func (p Provider) GetMetricByName(ctx context.Context, name types.NamespacedName, info provider.CustomMetricInfo, metricSelector labels.Selector) (*custom_metrics.MetricValue, error) {
	list, err := p.values(ctx, info, metricSelector, func(o scrape.Observation) bool { return o.Pod.Name == name.Name }, client.InNamespace(name.Namespace))
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, provider.NewMetricNotFoundForError(info.GroupResource, info.Metric, name.Name)
	}
	return &list[0], nil
}

// GetMetricBySelector implements provider.CustomMetricsProvider. Pods without a value are left out, as the
// autoscaler expects it: it takes care of them.
func (p Provider) GetMetricBySelector(ctx context.Context, namespace string, selector labels.Selector, info provider.CustomMetricInfo, metricSelector labels.Selector) (*custom_metrics.MetricValueList, error) {
	list, err := p.values(ctx, info, metricSelector, func(scrape.Observation) bool { return true },
		client.InNamespace(namespace), client.MatchingLabelsSelector{Selector: selector})
	if err != nil {
		return nil, err
	}
	return &custom_metrics.MetricValueList{Items: list}, nil
}

func (p Provider) values(ctx context.Context, info provider.CustomMetricInfo, metricSelector labels.Selector, wanted func(scrape.Observation) bool, opts ...client.ListOption) ([]custom_metrics.MetricValue, error) {
	if info.GroupResource != pods {
		return nil, provider.NewMetricNotFoundError(info.GroupResource, info.Metric)
	}
	if metricSelector != nil && !metricSelector.Empty() {
		return nil, apierrors.NewBadRequest("enclave metrics have no labels: leave the metric's selector out")
	}
	for _, m := range table {
		if m.name != info.Metric {
			continue
		}
		observations, err := p.Observe(ctx, opts...)
		if err != nil {
			return nil, err
		}
		out := []custom_metrics.MetricValue{}
		for _, o := range observations {
			if !wanted(o) || !counts(o) {
				continue
			}
			if v, over, ok := m.value(o); ok && v >= 0 && v <= maxValue {
				out = append(out, metricValue(o, m.name, v, over))
			}
		}
		return out, nil
	}
	return nil, provider.NewMetricNotFoundError(info.GroupResource, info.Metric)
}

// counts reports whether a pod has metrics.
func counts(o scrape.Observation) bool {
	s := o.Snapshot
	return s != nil && s.Stats != nil && s.Attested && s.Phase == podsock.EnclaveState_PHASE_RUNNING && scrape.Ready(o.Pod)
}

func metricValue(o scrape.Observation, name string, v float64, over time.Duration) custom_metrics.MetricValue {
	out := custom_metrics.MetricValue{
		DescribedObject: custom_metrics.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: o.Pod.Namespace, Name: o.Pod.Name},
		Metric:          custom_metrics.MetricIdentifier{Name: name},
		Timestamp:       metav1.NewTime(o.At),
		Value:           *resource.NewMilliQuantity(int64(math.Round(v*1000)), resource.DecimalSI),
	}
	if over > 0 {
		seconds := int64(math.Round(over.Seconds()))
		out.WindowSeconds = &seconds
	}
	return out
}
