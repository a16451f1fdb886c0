// Package dashboards is the Grafana dashboard of enclaves, as code: cloister.json is what Cloister returns,
// and `go test ./manifests/dashboards -update` writes it anew. Grafana imports the file as it is.
//
// Its queries expect the jobs and labels of manifests/observability/prometheus.yml.
package dashboards

import (
	"encoding/json"
	"slices"
)

// Dashboard is the part of Grafana's dashboard model that is used here
// (https://grafana.com/docs/grafana/latest/visualizations/dashboards/build-dashboards/view-dashboard-json-model/).
type Dashboard struct {
	UID           string     `json:"uid"`
	Title         string     `json:"title"`
	Tags          []string   `json:"tags"`
	SchemaVersion int        `json:"schemaVersion"`
	Editable      bool       `json:"editable"`
	Refresh       string     `json:"refresh"`
	Time          TimeRange  `json:"time"`
	Templating    Templating `json:"templating"`
	Panels        []Panel    `json:"panels"`
}

// TimeRange is what is shown at first.
type TimeRange struct {
	From string `json:"from"`
	To   string `json:"to"`
}

// Templating holds the variables that a viewer chooses.
type Templating struct {
	List []Variable `json:"list"`
}

// Variable is one of them.
type Variable struct {
	Name       string      `json:"name"`
	Label      string      `json:"label"`
	Type       string      `json:"type"`
	Query      string      `json:"query"`
	Datasource *Datasource `json:"datasource,omitempty"`
	Refresh    int         `json:"refresh,omitempty"` // 2: when the time range changes
	IncludeAll bool        `json:"includeAll,omitempty"`
	AllValue   string      `json:"allValue,omitempty"`
	Multi      bool        `json:"multi,omitempty"`
}

// Datasource is where a panel's data come from.
type Datasource struct {
	Type string `json:"type"`
	UID  string `json:"uid"`
}

// Panel is one graph.
type Panel struct {
	ID          int         `json:"id"`
	Type        string      `json:"type"`
	Title       string      `json:"title"`
	Description string      `json:"description"`
	Datasource  Datasource  `json:"datasource"`
	GridPos     GridPos     `json:"gridPos"`
	FieldConfig FieldConfig `json:"fieldConfig"`
	Targets     []Target    `json:"targets"`
}

// GridPos is a panel's place; a row has 24 columns.
type GridPos struct {
	H int `json:"h"`
	W int `json:"w"`
	X int `json:"x"`
	Y int `json:"y"`
}

// FieldConfig says how values are shown.
type FieldConfig struct {
	Defaults struct {
		Unit string `json:"unit"`
		Min  int    `json:"min"`
	} `json:"defaults"`
}

// Target is one PromQL query.
type Target struct {
	RefID  string `json:"refId"`
	Expr   string `json:"expr"`
	Legend string `json:"legendFormat"`
}

// panel is what differs from one graph to the next.
type panel struct {
	title, description, unit string
	targets                  []Target
}

// panels are all graphs. Those with "attested" in the title show what enclaves have sent to the collector; the
// rest is the host's word.
var panels = []panel{
	{"Enclaves by state", "Confidential pods by the state of their enclave, as the leading controller sees it.", "short",
		[]Target{{Expr: `sum by (reason) (cloister_controller_pods)`, Legend: "{{reason}}"}}},
	{"Enclaves by phase", "What each sidecar says of its enclave.", "short",
		[]Target{{Expr: `sum by (phase) (cloister_enclave_phase{job="sidecars",namespace=~"$namespace"})`, Legend: "{{phase}}"}}},
	{"Requests", "Requests that were handed to the workload.", "reqps",
		[]Target{{Expr: `sum by (namespace, pod) (rate(cloister_enclave_requests_total{job="sidecars",namespace=~"$namespace"}[$__rate_interval]))`, Legend: "{{namespace}}/{{pod}}"}}},
	{"Requests in flight", "Requests that are under way.", "short",
		[]Target{{Expr: `sum by (namespace, pod) (cloister_enclave_requests_in_flight{job="sidecars",namespace=~"$namespace"})`, Legend: "{{namespace}}/{{pod}}"}}},
	{"Latency, attested", "Durations of requests by the telemetry plugin of the enclave.", "s", []Target{
		{Expr: `histogram_quantile(0.5, sum by (le) (rate(http_server_request_duration_seconds_bucket{cloister_attested="true",k8s_namespace_name=~"$namespace"}[$__rate_interval])))`, Legend: "p50"},
		{Expr: `histogram_quantile(0.99, sum by (le) (rate(http_server_request_duration_seconds_bucket{cloister_attested="true",k8s_namespace_name=~"$namespace"}[$__rate_interval])))`, Legend: "p99"},
	}},
	{"Responses by status, attested", "Requests by the telemetry plugin of the enclave.", "reqps",
		[]Target{{Expr: `sum by (http_response_status_code) (rate(http_server_request_duration_seconds_count{cloister_attested="true",k8s_namespace_name=~"$namespace"}[$__rate_interval]))`, Legend: "{{http_response_status_code}}"}}},
	{"Memory of enclaves", "Memory in use, of what the enclave has.", "percentunit",
		[]Target{{Expr: `cloister_enclave_memory_used_bytes{job="sidecars",namespace=~"$namespace"} / cloister_enclave_memory_total_bytes{job="sidecars",namespace=~"$namespace"}`, Legend: "{{namespace}}/{{pod}}"}}},
	{"CPU of enclaves", "CPUs in use.", "short",
		[]Target{{Expr: `rate(cloister_enclave_cpu_seconds_total{job="sidecars",namespace=~"$namespace"}[$__rate_interval])`, Legend: "{{namespace}}/{{pod}}"}}},
	{"NSM calls", "Requests to the security module: each document that is handed out is one.", "ops",
		[]Target{{Expr: `sum by (namespace, pod) (rate(cloister_enclave_nsm_calls_total{job="sidecars",namespace=~"$namespace"}[$__rate_interval]))`, Legend: "{{namespace}}/{{pod}}"}}},
	{"Telemetry that was accepted, attested", "What the collector has taken from enclaves.", "short", []Target{
		{Expr: `sum(rate(otelcol_receiver_accepted_metric_points{receiver="enclave"}[$__rate_interval]))`, Legend: "metric points"},
		{Expr: `sum(rate(otelcol_receiver_accepted_spans{receiver="enclave"}[$__rate_interval]))`, Legend: "spans"},
		{Expr: `sum(rate(otelcol_receiver_accepted_log_records{receiver="enclave"}[$__rate_interval]))`, Legend: "log records"},
	}},
	{"Telemetry that was refused", "Connections to the collector that did not come from an attested enclave it knows, since it started.", "short",
		[]Target{{Expr: `sum by (reason) (otelcol_receiver_enclave_refused_connections)`, Legend: "{{reason}}"}}},
	{"Admission", "Pods that the webhook has injected, skipped or denied.", "short",
		[]Target{{Expr: `sum by (result) (rate(injections_total{job="webhook"}[$__rate_interval]))`, Legend: "{{result}}"}}},
	{"Denials by reason", "Why pods were denied, since the webhook started.", "short",
		[]Target{{Expr: `sum by (reason) (injections_total{job="webhook",result="denied"})`, Legend: "{{reason}}"}}},
}

// Cloister returns the dashboard of enclaves.
func Cloister() Dashboard {
	source := Datasource{Type: "prometheus", UID: "${datasource}"}
	d := Dashboard{
		UID: "cloister", Title: "Cloister", Tags: []string{"cloister"}, SchemaVersion: 39, Refresh: "10s",
		Time: TimeRange{From: "now-30m", To: "now"},
		Templating: Templating{List: []Variable{
			{Name: "datasource", Label: "Prometheus", Type: "datasource", Query: "prometheus"},
			{Name: "namespace", Label: "Namespace", Type: "query", Query: "label_values(cloister_enclave_phase, namespace)",
				Datasource: &source, Refresh: 2, IncludeAll: true, AllValue: ".*", Multi: true},
		}},
	}
	const width, height = 12, 8
	for i, p := range panels {
		out := Panel{
			ID: i + 1, Type: "timeseries", Title: p.title, Description: p.description, Datasource: source, Targets: slices.Clone(p.targets),
			GridPos: GridPos{H: height, W: width, X: i % 2 * width, Y: i / 2 * height},
		}
		out.FieldConfig.Defaults.Unit = p.unit
		for j := range out.Targets {
			out.Targets[j].RefID = string(rune('A' + j))
		}
		d.Panels = append(d.Panels, out)
	}
	return d
}

// JSON is the dashboard as Grafana imports it.
func (d Dashboard) JSON() ([]byte, error) {
	b, err := json.MarshalIndent(d, "", "  ")
	return append(b, '\n'), err
}
