package e2e

import (
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/manifests/dashboards"
)

// Every query of the dashboard has an answer in Prometheus once there was something of everything: requests,
// telemetry, a client that the collector refuses, a pod that is injected and one that is denied.
func TestDashboard(t *testing.T) {
	c := e2e(t)
	file, err := os.ReadFile("../manifests/dashboards/cloister.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard dashboards.Dashboard
	if err := json.Unmarshal(file, &dashboard); err != nil {
		t.Fatal(err)
	}
	ns := c.namespace(t, true)
	o := newTelemetry(t, ns)
	pod := c.nginxPod(t, "nginx")
	enclaveConfig(pod, map[string]any{"plugins": []any{o.plugin("logs", "logging", nil), o.plugin("telemetry", "telemetry", nil)}})
	set, _ := c.measure(t, pod)
	o.start(t, set)
	ns.create(t, pod)
	denied := c.nginxPod(t, "denied")
	denied.Annotations["cloister.dev/enclave"] = "no-such-container"
	if _, err := c.kube.CoreV1().Pods(ns.name).Create(t.Context(), denied, metav1.CreateOptions{}); err == nil {
		t.Fatal("the pod is not denied")
	}
	o.wait(t, "otel-collector", "prometheus")
	ns.ready(t, "nginx", 1)
	o.refusesOthers(t)

	workload, prometheus := ns.forward(t, "pod/nginx", 80), ns.forward(t, "service/prometheus", 9090)
	// answered tells whether a query has values, with the variables as Grafana would fill them in.
	answered := func(query string) bool {
		query = strings.NewReplacer("$__rate_interval", "1m", "$namespace", ns.name).Replace(query)
		var r struct {
			Status string
			Data   struct{ Result []struct{ Value [2]any } }
		}
		body := get(t, prometheus, "/api/v1/query?"+url.Values{"query": {query}}.Encode())
		if body == nil || json.Unmarshal(body, &r) != nil || r.Status != "success" {
			t.Fatalf("Prometheus does not take %s", query)
		}
		for _, series := range r.Data.Result {
			v, err := strconv.ParseFloat(fmt.Sprint(series.Value[1]), 64)
			if err != nil || math.IsNaN(v) || math.IsInf(v, 0) {
				return false
			}
		}
		return len(r.Data.Result) > 0
	}
	open := map[string]string{}
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			open[target.Expr] = p.Title
		}
	}
	if len(open) == 0 {
		t.Fatal("the dashboard has no query")
	}
	eventually(t, 2*time.Minute, "an answer to every query", func() (bool, string) {
		c.answer(t, workload, set, "/")
		for query := range open {
			if answered(query) {
				delete(open, query)
			}
		}
		return len(open) == 0, fmt.Sprint(open)
	})
}
