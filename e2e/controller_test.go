package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A standard HorizontalPodAutoscaler takes a Deployment from one replica to three by what the gateways
// inside the enclaves count, and back. No request fails on the way, and all replicas get some.
func TestController(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)
	pod.Spec.TerminationGracePeriodSeconds = new(int64(15))
	d := deployment(pod, 1)
	set, _ := c.measure(t, d)
	ns.create(t, d)
	ns.create(t, service("app", 8080))
	first := ns.ready(t, "app", 1)[0]
	ns.conditions(t, first.Name, corev1.ConditionTrue, corev1.ConditionTrue)

	// One that asks a little stays for all of the test.
	light := ns.load(t, "app", set, "-every", "500ms")
	if _, err := c.kube.AutoscalingV2().HorizontalPodAutoscalers(ns.name).Create(t.Context(), autoscaler("app", 8, 3), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	heavy := ns.load(t, "app", set)
	replicas := func() string {
		return output(t, "kubectl", "-n", ns.name, "get", "hpa", "app", "-o", `jsonpath={.status.currentReplicas} of {.status.desiredReplicas}: {.status.currentMetrics} {.status.conditions[*].message}`)
	}
	var three []corev1.Pod
	eventually(t, 3*time.Minute, "three ready replicas", func() (bool, string) {
		three = slices.DeleteFunc(ns.pods(t, "app"), func(p corev1.Pod) bool { return !isReady(&p) })
		return len(three) == 3, replicas()
	})
	// Each replica serves: that its metric is there says that it is asked, and what it is asked for.
	eventually(t, time.Minute, "requests at every replica", func() (bool, string) {
		rates := ns.metric(t, "enclave_requests_per_second")
		for _, p := range three {
			if q, ok := rates[p.Name]; !ok || q.Sign() <= 0 {
				return false, fmt.Sprint(rates)
			}
		}
		return true, ""
	})
	for name, q := range ns.metric(t, "enclave_memory_utilization") {
		if q.Sign() <= 0 || q.Cmp(resource.MustParse("100")) >= 0 {
			t.Errorf("%s uses %s %% of its memory", name, q.String())
		}
	}
	for _, p := range three {
		ns.conditions(t, p.Name, corev1.ConditionTrue, corev1.ConditionTrue)
	}

	noFailures(t, heavy)
	eventually(t, 3*time.Minute, "one replica", func() (bool, string) { return len(ns.pods(t, "app")) == 1, replicas() })
	eventually(t, time.Minute, "the other pods are gone", func() (bool, string) {
		list, err := c.kube.CoreV1().Pods(ns.name).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items) == 1, fmt.Sprint(len(list.Items))
	})
	noFailures(t, light)
}

// What becomes of an enclave shows on its pod and, when it is bad, on the pod's owner.
func TestState(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	t.Run("lost enclave", func(t *testing.T) {
		d := deployment(c.appPod(t, "app"), 1)
		ns.create(t, d)
		before := ns.ready(t, "app", 1)[0]
		ns.conditions(t, before.Name, corev1.ConditionTrue, corev1.ConditionTrue)
		c.onNode(t, `kill -KILL "$1"`, ns.pid(t, &before, initbootContainer, "/init"))
		message := ns.event(t, "Deployment", "app", "EnclaveLost")
		if !strings.Contains(message, before.Name) || !strings.Contains(message, "the enclave was lost") {
			t.Errorf("the Event says %q", message)
		}
		ns.ready(t, "app", 1)
		ns.conditions(t, before.Name, corev1.ConditionTrue, corev1.ConditionTrue)
	})
	t.Run("no image", func(t *testing.T) {
		pod := c.appPod(t, "nowhere")
		repository, digest, _ := strings.Cut(pod.Spec.Containers[0].Image, "@")
		pod.Spec.Containers[0].Image = strings.Replace(repository, "testapp", "nowhere", 1) + "@" + digest
		ns.create(t, pod)
		if message := ns.event(t, "Pod", "nowhere", "WaitingForImage"); !strings.Contains(message, "image") {
			t.Errorf("the Event says %q", message)
		}
		ns.conditions(t, "nowhere", corev1.ConditionFalse, corev1.ConditionTrue)
	})
}

// The second replica takes over when the leader goes, and metrics are served all the time.
func TestControllerReplicas(t *testing.T) {
	c := e2e(t)
	const system = "cloister-system"
	leader := func() string {
		lease, err := c.kube.CoordinationV1().Leases(system).Get(t.Context(), "cloister-controller", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if lease.Spec.HolderIdentity == nil {
			return ""
		}
		pod, _, _ := strings.Cut(*lease.Spec.HolderIdentity, "_")
		return pod
	}
	var old string
	eventually(t, time.Minute, "a leader", func() (bool, string) { old = leader(); return old != "", "" })
	if err := c.kube.CoreV1().Pods(system).Delete(t.Context(), old, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "another leader", func() (bool, string) {
		if _, err := c.kube.Discovery().RESTClient().Get().AbsPath("/apis/custom.metrics.k8s.io/v1beta2").DoRaw(t.Context()); err != nil {
			t.Errorf("the API is away: %v", err)
		}
		now := leader()
		return now != "" && now != old, now
	})
	output(t, "kubectl", "-n", system, "rollout", "status", "deployment/cloister-controller", "--timeout=60s")
}

// autoscaler holds requests per second and pod at a value, with little patience.
func autoscaler(name string, requests int64, most int32) *autoscalingv2.HorizontalPodAutoscaler {
	patience := &autoscalingv2.HPAScalingRules{StabilizationWindowSeconds: new(int32(10))}
	return &autoscalingv2.HorizontalPodAutoscaler{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: name},
			MinReplicas:    new(int32(1)),
			MaxReplicas:    most,
			Metrics: []autoscalingv2.MetricSpec{{
				Type: autoscalingv2.PodsMetricSourceType,
				Pods: &autoscalingv2.PodsMetricSource{
					Metric: autoscalingv2.MetricIdentifier{Name: "enclave_requests_per_second"},
					Target: autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: resource.NewQuantity(requests, resource.DecimalSI)},
				},
			}},
			Behavior: &autoscalingv2.HorizontalPodAutoscalerBehavior{ScaleDown: patience},
		},
	}
}

// conditions waits for the pod's conditions.
func (ns *namespace) conditions(t *testing.T, pod string, ready, attested corev1.ConditionStatus) {
	t.Helper()
	eventually(t, time.Minute, "conditions of "+pod, func() (bool, string) {
		got := map[corev1.PodConditionType]corev1.ConditionStatus{}
		seen := ""
		for _, c := range ns.pod(t, pod).Status.Conditions {
			got[c.Type] = c.Status
			seen += fmt.Sprintf(" %s=%s (%s)", c.Type, c.Status, c.Reason)
		}
		return got["cloister.dev/EnclaveReady"] == ready && got["cloister.dev/Attested"] == attested, seen
	})
}

// metric asks the custom metrics API for all pods, as the autoscaler does.
func (ns *namespace) metric(t *testing.T, name string) map[string]resource.Quantity {
	t.Helper()
	b, err := ns.kube.Discovery().RESTClient().Get().AbsPath("/apis/custom.metrics.k8s.io/v1beta2/namespaces", ns.name, "pods", "*", name).DoRaw(t.Context())
	if err != nil {
		t.Fatalf("ask for %s: %v: %s", name, err, b)
	}
	var list struct {
		Items []struct {
			DescribedObject corev1.ObjectReference
			Value           resource.Quantity
		}
	}
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	out := map[string]resource.Quantity{}
	for _, i := range list.Items {
		out[i.DescribedObject.Name] = i.Value
	}
	return out
}

// event waits for the controller's Event on an object and returns its message. There must be one only.
func (ns *namespace) event(t *testing.T, kind, name, reason string) (message string) {
	t.Helper()
	eventually(t, time.Minute, "Event "+reason, func() (bool, string) {
		list, err := ns.kube.CoreV1().Events(ns.name).List(t.Context(), metav1.ListOptions{
			FieldSelector: "involvedObject.kind=" + kind + ",involvedObject.name=" + name + ",reason=" + reason,
		})
		if err != nil {
			t.Fatal(err)
		}
		if len(list.Items) > 1 {
			t.Fatalf("%d Events %s", len(list.Items), reason)
		}
		if len(list.Items) == 1 {
			message = list.Items[0].Message
		}
		return message != "", ""
	})
	return message
}
