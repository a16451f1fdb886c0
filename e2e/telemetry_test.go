package e2e

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	logs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/workload"
)

// telemetry is manifests/observability in a test's namespace.
type telemetry struct {
	ns        *namespace
	host      string // of the collector
	cert, key []byte // of the collector, which is its own authority
}

// newTelemetry makes the collector's identity. The workloads' manifests name it, and the collector wants to
// know their measurements, so start comes later.
func newTelemetry(t *testing.T, ns *namespace) *telemetry {
	t.Helper()
	o := &telemetry{ns: ns, host: "otel-collector." + ns.name + ".svc.cluster.local"}
	o.cert, o.key = certificate(t, o.host)
	return o
}

// plugin is a plugin that sends to the collector.
func (o *telemetry) plugin(name, pluginType string, more map[string]any) map[string]any {
	config := map[string]any{"endpoint": o.host + ":4317", "ca": string(o.cert)}
	for key, value := range more {
		config[key] = value
	}
	return map[string]any{"name": name, "type": pluginType, "builtin": "otlp", "config": config}
}

// start deploys the collector, which trusts what is in the measurement set file, and the servers behind it.
func (o *telemetry) start(t *testing.T, measurements string) {
	t.Helper()
	read := func(file string) string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	create(t, o.ns, &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "otel-collector-tls"}, Data: map[string][]byte{"tls.crt": o.cert, "tls.key": o.key},
	}, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "otel-collector-trust"},
		Data:       map[string]string{"measurements.json": read(measurements), "root.pem": read(o.ns.root)},
	})
	manifests := strings.ReplaceAll(output(t, "kubectl", "kustomize", "../manifests/observability"), "cloister-observability", o.ns.name)
	for _, name := range []string{"collector", "prometheus", "jaeger", "victorialogs"} {
		manifests = strings.ReplaceAll(manifests, "image: cloister.dev/"+name+"\n", "image: "+setting(t, "CLOISTER_"+strings.ToUpper(name)+"_IMAGE")+"\n")
	}
	apply := exec.CommandContext(t.Context(), "kubectl", "-n", o.ns.name, "apply", "-f", "-")
	apply.Stdin = strings.NewReader(manifests)
	if out, err := apply.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v: %s", err, out)
	}
	t.Cleanup(func() { // what does not go with the namespace
		remove := exec.Command("kubectl", "delete", "clusterrole/"+o.ns.name, "clusterrolebinding/"+o.ns.name)
		if out, err := remove.CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
}

// wait waits until what a test needs of it serves.
func (o *telemetry) wait(t *testing.T, apps ...string) {
	t.Helper()
	for _, app := range apps {
		o.ns.ready(t, app, 1)
	}
}

// get asks for a page that must be there.
func get(t *testing.T, addr, path string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		return nil
	}
	return body
}

// logLines asks VictoriaLogs for the records that have a phrase.
func logLines(t *testing.T, addr, phrase string) (records []map[string]string) {
	t.Helper()
	query := url.Values{"query": {fmt.Sprintf("_time:1h %q", phrase)}}
	for lines := bufio.NewScanner(strings.NewReader(string(get(t, addr, "/select/logsql/query?"+query.Encode())))); lines.Scan(); {
		var r map[string]string
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("VictoriaLogs answers %s: %v", lines.Bytes(), err)
		}
		records = append(records, r)
	}
	return records
}

// jaegerTrace is what the API of Jaeger's page says of one trace.
type jaegerTrace struct {
	Spans []struct {
		SpanID, OperationName, ProcessID string
		References                       []struct{ SpanID string }
		Tags                             []jaegerTag
	}
	Processes map[string]struct {
		ServiceName string
		Tags        []jaegerTag
	}
}

type jaegerTag struct {
	Key   string
	Value any
}

// trace waits until Jaeger, at addr, has n spans of a trace.
func trace(t *testing.T, addr, id string, n int) jaegerTrace {
	t.Helper()
	var answer struct{ Data []jaegerTrace }
	eventually(t, time.Minute, "the trace in Jaeger", func() (bool, string) {
		body := get(t, addr, "/api/traces/"+id)
		return body != nil && json.Unmarshal(body, &answer) == nil && len(answer.Data) == 1 && len(answer.Data[0].Spans) == n, string(body)
	})
	return answer.Data[0]
}

// resource is what Jaeger has as the process of a span.
func (j jaegerTrace) resource(id string) map[string]string {
	p := j.Processes[id]
	attributes := map[string]string{"service.name": p.ServiceName}
	for _, tag := range p.Tags {
		attributes[tag.Key] = fmt.Sprint(tag.Value)
	}
	return attributes
}

// attested are the attributes that the collector sets: what was proved, and what the host said of the pod.
func attested(pod *corev1.Pod, entry workload.Measurement) map[string]string {
	return map[string]string{
		"cloister.attested": "true", "cloister.pcr0": entry.PCR0, "cloister.pcr16": entry.PCR16,
		"k8s.pod.name": pod.Name, "k8s.namespace.name": pod.Namespace, "k8s.pod.uid": string(pod.UID),
	}
}

// lacks tells what of want is not so in attributes.
func lacks(attributes, want map[string]string) (missing []string) {
	for key, value := range want {
		if attributes[key] != value {
			missing = append(missing, fmt.Sprintf("%s %q, want %q", key, attributes[key], value))
		}
	}
	return missing
}

// fileRecord is a span or a log record in the collector's file, with the attributes of its resource.
type fileRecord struct {
	attributes  map[string]string
	span, trace string // ids in hex
	body        string // of a log record
}

// file is what the collector's file exporter has written: OTLP as JSON, a request a line.
func (o *telemetry) file(t *testing.T) (records []fileRecord) {
	t.Helper()
	type item struct {
		TraceID, SpanID string
		Body            struct{ StringValue string }
	}
	type resource struct {
		Resource struct {
			Attributes []struct {
				Key   string
				Value struct {
					StringValue string
					BoolValue   bool
				}
			}
		}
		ScopeSpans []struct{ Spans []item }
		ScopeLogs  []struct{ LogRecords []item }
	}
	collector := o.ns.ready(t, "otel-collector", 1)[0]
	content := o.ns.onNode(t, `cat "/var/lib/kubelet/pods/$1/volumes/kubernetes.io~empty-dir/telemetry/otlp.jsonl"`, string(collector.UID))
	for line := range strings.Lines(content) {
		var request struct{ ResourceSpans, ResourceLogs []resource }
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		if err := json.Unmarshal([]byte(line), &request); err != nil {
			t.Fatalf("the collector's file has %s: %v", line, err)
		}
		for _, r := range append(request.ResourceSpans, request.ResourceLogs...) {
			attributes := map[string]string{}
			for _, a := range r.Resource.Attributes {
				attributes[a.Key] = a.Value.StringValue
				if a.Value.BoolValue {
					attributes[a.Key] = "true"
				}
			}
			var items []item
			for _, s := range r.ScopeSpans {
				items = append(items, s.Spans...)
			}
			for _, s := range r.ScopeLogs {
				items = append(items, s.LogRecords...)
			}
			for _, i := range items {
				records = append(records, fileRecord{attributes, i.SpanID, i.TraceID, i.Body.StringValue})
			}
		}
	}
	return records
}

// newTrace is a random trace id, and the header of a client's span in it (W3C Trace Context).
func newTrace() (id, header string) {
	b := make([]byte, 16)
	rand.Read(b)
	id = hex.EncodeToString(b)
	return id, "traceparent: 00-" + id + "-" + clientSpan + "-01"
}

const clientSpan = "00f067aa0ba902b7"

// One request from a client that traces is found as a metric, a trace and a log line, with its trace id and
// with what was proved of the enclave. The workload is nginx as it is: it only logs the field with the trace.
// A second one uses OpenTelemetry's SDK.
func TestTelemetry(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	o := newTelemetry(t, ns)
	pod := c.nginxPod(t, "nginx")
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "OTEL_SERVICE_NAME", Value: "shop"}}
	pod.Spec.Containers[0].Command = []string{"sh", "-c",
		`echo 'log_format traced "$request $status $http_traceparent"; access_log /dev/stdout traced;' >/etc/nginx/conf.d/traced.conf && exec nginx -g "daemon off;"`}
	enclaveConfig(pod, map[string]any{"plugins": []any{o.plugin("logs", "logging", nil), o.plugin("telemetry", "telemetry", nil)}})
	set, entry := c.measure(t, pod)
	app := c.appPod(t, "app")
	app.Spec.Containers[0].Env = []corev1.EnvVar{
		{Name: "OTEL_SERVICE_NAME", Value: "orders"},
		{Name: "OTEL_EXPORTER_OTLP_INSECURE", Value: "true"}, // Go's SDK would use TLS
		{Name: "OTEL_RESOURCE_ATTRIBUTES", Value: "team=sales,cloister.pcr16=forged,k8s.pod.name=forged"},
	}
	enclaveConfig(app, map[string]any{"plugins": []any{o.plugin("telemetry", "telemetry", nil)}})
	appSet, appEntry := c.measure(t, app)
	o.start(t, setFile(t, entry, appEntry))
	ns.create(t, pod)
	ns.create(t, app)
	o.wait(t, "otel-collector", "prometheus", "jaeger", "victorialogs")
	running := ns.ready(t, "nginx", 1)[0]

	id, header := newTrace()
	r := c.curl(t, ns.forward(t, "pod/nginx", 80), set, "/", "-H", header)
	if r.code != 0 || !strings.Contains(r.stdout, "Welcome to nginx") {
		t.Fatalf("nginx answers %q, %s", r.stdout, r.stderr)
	}

	jaeger, prometheus, victorialogs := ns.forward(t, "service/jaeger", 16686), ns.forward(t, "service/prometheus", 9090), ns.forward(t, "service/victorialogs", 9428)
	found := trace(t, jaeger, id, 1)
	seen := found.Spans[0]
	if len(seen.References) != 1 || seen.References[0].SpanID != clientSpan {
		t.Errorf("the span's parent is %v, not the client's %s", seen.References, clientSpan)
	}
	resource := found.resource(seen.ProcessID)
	want := attested(&running, entry)
	want["service.name"] = "shop"
	if missing := lacks(resource, want); len(missing) > 0 {
		t.Errorf("the trace has %s", missing)
	}
	if resource["cloister.enclave.id"] == "" {
		t.Error("the trace has no cloister.enclave.id")
	}

	// nginx logs the gateway's span below the client's.
	line := "GET / HTTP/1.1 200 00-" + id + "-" + seen.SpanID + "-01"
	eventually(t, time.Minute, "the log line in VictoriaLogs", func() (bool, string) {
		found := logLines(t, victorialogs, id)
		ok := len(found) == 1 && strings.Contains(found[0]["_msg"], line) &&
			found[0]["k8s.pod.name"] == "nginx" && found[0]["cloister.pcr16"] == entry.PCR16
		return ok, fmt.Sprint(found)
	})
	eventually(t, time.Minute, "span and log line in the collector's file", func() (bool, string) {
		var span, logged bool
		records := o.file(t)
		for _, r := range records {
			if len(lacks(r.attributes, want)) == 0 {
				span = span || r.trace == id && r.span == seen.SpanID
				logged = logged || strings.Contains(r.body, line)
			}
		}
		return span && logged, fmt.Sprint(records)
	})

	query := func(path, query string) string {
		now := time.Now().Unix()
		v := url.Values{"query": {query}, "start": {fmt.Sprint(now - 600)}, "end": {fmt.Sprint(now)}}
		return string(get(t, prometheus, path+"?"+v.Encode()))
	}
	labels := fmt.Sprintf(`{k8s_pod_name="nginx",k8s_namespace_name=%q,cloister_attested="true",cloister_pcr16=%q}`, ns.name, entry.PCR16)
	eventually(t, time.Minute, "the request as an exemplar of the metric in Prometheus", func() (bool, string) {
		answer := query("/api/v1/query_exemplars", "http_server_request_duration_seconds_bucket"+labels)
		return strings.Contains(answer, id), answer
	})
	for _, name := range []string{
		"http_server_request_duration_seconds_count", "http_server_active_requests", "cloister_enclave_memory_usage_bytes",
		"cloister_enclave_memory_limit_bytes", "cloister_enclave_cpu_time_seconds_total", "cloister_enclave_nsm_calls_total",
		"cloister_telemetry_dropped_total",
	} {
		if answer := query("/api/v1/query", name+labels); !strings.Contains(answer, `"value":[`) {
			t.Errorf("Prometheus has no %s: %s", name, answer)
		}
	}

	// The workload's own telemetry: an SDK that finds the intake by itself, and cannot say whose it is.
	running = ns.ready(t, "app", 1)[0]
	want = attested(&running, appEntry)
	want["service.name"], want["team"] = "orders", "sales"
	id, header = newTrace()
	if r := c.curl(t, ns.forward(t, "pod/app", 8080), appSet, "/telemetry", "-f", "-H", header); r.code != 0 {
		t.Fatalf("testapp sends nothing: %s", r.stderr)
	}
	parents := map[string]string{} // by span
	named := map[string]string{}
	found = trace(t, jaeger, id, 2)
	for _, s := range found.Spans {
		if len(s.References) == 1 {
			parents[s.SpanID] = s.References[0].SpanID
		}
		named[s.OperationName] = s.SpanID
		if s.OperationName == "order" {
			if missing := lacks(found.resource(s.ProcessID), want); len(missing) > 0 {
				t.Errorf("the workload's span has %s", missing)
			}
		}
	}
	if own := named["order"]; own == "" || parents[parents[own]] != clientSpan {
		t.Errorf("the workload's span is not below the gateway's, which is below the client's: %v", found.Spans)
	}
	eventually(t, time.Minute, "the workload's log record in VictoriaLogs", func() (bool, string) {
		found := logLines(t, victorialogs, "order taken")
		ok := len(found) == 1 && found[0]["trace_id"] == id && found[0]["span_id"] == named["order"] && len(lacks(found[0], want)) == 0
		return ok, fmt.Sprint(found)
	})
	labels = fmt.Sprintf(`{k8s_pod_name="app",k8s_namespace_name=%q,cloister_attested="true",cloister_pcr16=%q,team="sales"}`, ns.name, appEntry.PCR16)
	eventually(t, time.Minute, "the workload's counter in Prometheus", func() (bool, string) {
		answer := query("/api/v1/query", "testapp_orders_total"+labels)
		return strings.Contains(answer, `,"1"]`), answer
	})
	if t.Failed() {
		return
	}
	o.refusesOthers(t)
}

// refusesOthers sends as a client that is no enclave. It is refused and counted.
func (o *telemetry) refusesOthers(t *testing.T) {
	t.Helper()
	own := o.ns.forward(t, "service/otel-collector", 8888)
	refused := func() (n int) {
		for line := range strings.Lines(string(get(t, own, "/metrics"))) {
			if strings.HasPrefix(line, "otelcol_receiver_enclave_refused_connections") {
				fields := strings.Fields(line)
				var count float64
				if _, err := fmt.Sscan(fields[len(fields)-1], &count); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
				n += int(count)
			}
		}
		return n
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(o.cert)
	ordinary, err := tls.X509KeyPair(certificate(t, "client.example"))
	if err != nil {
		t.Fatal(err)
	}
	for name, config := range map[string]*tls.Config{
		"without a certificate":        {},
		"with an ordinary certificate": {Certificates: []tls.Certificate{ordinary}},
	} {
		// kubectl gives a forwarded port up when the pod resets a connection.
		addr := o.ns.forward(t, "service/otel-collector", 4317)
		before := refused()
		config.RootCAs, config.ServerName = pool, o.host
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(config)))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		err = conn.Invoke(ctx, "/opentelemetry.proto.collector.logs.v1.LogsService/Export", &logs.ExportLogsServiceRequest{}, &logs.ExportLogsServiceResponse{})
		cancel()
		conn.Close()
		if err == nil {
			t.Errorf("a client %s was served", name)
		}
		eventually(t, time.Minute, "the refusal of a client "+name+" is counted", func() (bool, string) {
			n := refused()
			return n > before, fmt.Sprint(n)
		})
	}
}
