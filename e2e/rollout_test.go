package e2e

import (
	"encoding/json"
	"os"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Two replicas are replaced one by one under clients that verify every connection: one connects for
// each request, others keep a connection, one of these has long requests. No request fails.
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
	fresh := results["fresh"]
	if fresh.Connections != fresh.Requests || fresh.Requests < 20 {
		t.Errorf("the client with new connections made %d requests over %d connections", fresh.Requests, fresh.Connections)
	}
	for name, protocol := range map[string]string{"kept": "HTTP/2.0", "kept HTTP/1.1": "HTTP/1.1", "slow": "HTTP/2.0"} {
		if r := results[name]; r.Protocol != protocol || r.Connections < 2 || r.Connections > 10 {
			t.Errorf("the client %q used %s and %d connections: it must have moved, and only when it had to", name, r.Protocol, r.Connections)
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
	const measurements, root = nodeDir + "/measurements.json", nodeDir + "/root.pem"
	for from, to := range map[string]string{set: measurements, ns.root: root} {
		content, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		if err := ns.writeOnNode(t.Context(), to, content); err != nil {
			t.Fatal(err)
		}
	}
	clients, _ := ns.start(t, append([]string{
		"load", "-addr", svc.Spec.ClusterIP + ":443", "-measurements", measurements, "-root", root,
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
