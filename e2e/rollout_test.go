package e2e

import (
	"encoding/json"
	"os"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Two replicas are replaced one by one under clients that verify every connection: one connects for
// each request, one keeps an HTTP/2 connection, one keeps one and has long requests. None fails.
func TestRollout(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)
	pod.Spec.TerminationGracePeriodSeconds = new(int64(15))
	d := deployment(pod, 2)
	set, _ := c.measure(t, d)
	ns.create(t, d)
	ns.create(t, service("app", 8080))
	old := ns.ready(t, "app", 2)

	clients := ns.load(t, "app", set)

	output(t, "kubectl", "-n", ns.name, "rollout", "restart", "deployment/app")
	output(t, "kubectl", "-n", ns.name, "rollout", "status", "deployment/app", "--timeout=180s")
	for _, p := range old {
		output(t, "kubectl", "-n", ns.name, "wait", "--for=delete", "pod/"+p.Name, "--timeout=60s")
	}

	results := noFailures(t, clients)
	fresh, kept, slow := results["fresh"], results["kept"], results["slow"]
	if fresh.Connections != fresh.Requests || fresh.Requests < 20 {
		t.Errorf("the client with new connections made %d requests over %d connections", fresh.Requests, fresh.Connections)
	}
	for _, r := range []outcome{kept, slow} {
		if r.Protocol != "HTTP/2.0" || r.Connections < 2 || r.Connections > 10 {
			t.Errorf("a client that keeps its connection used %s and %d connections: it must have moved, and only when it had to", r.Protocol, r.Connections)
		}
	}
}

// load starts clients of a Service's pods on the node, which verify every connection against set.
func (ns *namespace) load(t *testing.T, service, set string, more ...string) *running {
	t.Helper()
	svc, err := ns.kube.CoreV1().Services(ns.name).Get(t.Context(), service, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for from, to := range map[string]string{set: "/tmp/e2e-measurements.json", ns.root: "/tmp/e2e-root.pem"} {
		content, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := ns.writeOnNode(t.Context(), to, content); err != nil {
			t.Fatal(err)
		}
	}
	clients, _ := ns.start(t, append([]string{
		"load", "-addr", svc.Spec.ClusterIP + ":443", "-measurements", "/tmp/e2e-measurements.json", "-root", "/tmp/e2e-root.pem",
	}, more...)...)
	return clients
}

// outcome is what became of one client of load.
type outcome struct {
	Requests, Connections int
	Failures              []string
	Protocol              string
}

// noFailures stops clients; none of their requests may have failed.
func noFailures(t *testing.T, clients *running) map[string]outcome {
	t.Helper()
	var results map[string]outcome
	if err := json.Unmarshal(clients.stop(t), &results); err != nil {
		t.Fatal(err)
	}
	for name, r := range results {
		t.Logf("%s: %d requests over %d connections, %s", name, r.Requests, r.Connections, r.Protocol)
		for _, f := range r.Failures {
			t.Errorf("%s: a request failed: %s", name, f)
		}
	}
	return results
}
