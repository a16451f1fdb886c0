package telemetry

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/workload"
)

// sent remembers what was exported.
type sent struct {
	mu      sync.Mutex
	metrics []*metrics.ResourceMetrics
	spans   []*trace.Span
}

func (s *sent) Logs(*logs.ResourceLogs) {}

func (s *sent) Metrics(r *metrics.ResourceMetrics) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.metrics = append(s.metrics, r)
}

func (s *sent) Spans(r *trace.ResourceSpans) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, scope := range r.GetScopeSpans() {
		s.spans = append(s.spans, scope.GetSpans()...)
	}
}

func (s *sent) Dropped() otlp.Dropped { return otlp.Dropped{Logs: 3} }

func plugin(t *testing.T, usage error) (*Plugin, *sent, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sent{}
	p := New(Config{
		Exporter: s, Resource: Resource(&workload.Manifest{Env: []workload.EnvVar{{Name: "OTEL_SERVICE_NAME", Value: "shop"}}}, "one"),
		Usage: func() (Usage, error) {
			return Usage{MemoryUsed: 1 << 20, MemoryTotal: 1 << 30, CPU: 1500 * time.Millisecond, NSMCalls: 7}, usage
		},
		Listen: func() (net.Listener, error) { return l, nil },
	})
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	return p, s, l.Addr().String()
}

func attributes(list []*common.KeyValue) string {
	var out []string
	for _, a := range list {
		value := a.GetValue().GetStringValue()
		if i, ok := a.GetValue().GetValue().(*common.AnyValue_IntValue); ok {
			value = fmt.Sprint(i.IntValue)
		}
		out = append(out, a.GetKey()+"="+value)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestRequests(t *testing.T) {
	p, s, _ := plugin(t, nil)
	request := func(method, path, traceparent string, status int) {
		r := httptest.NewRequest(method, path, nil)
		if traceparent != "" {
			r.Header.Set("traceparent", traceparent)
		}
		p.Observe(r, 8080)(status)
	}
	request("GET", "/orders?secret=1", "00-"+traceID+"-"+spanID+"-01", 200)
	request("GET", "/", "00-"+traceID+"-"+spanID+"-00", 200) // not sampled: no span, no exemplar
	request("BREW", "/pot", "", 503)
	request("POST", "/", "", 0)
	p.Shutdown()

	var spans []string
	for _, span := range s.spans {
		spans = append(spans, fmt.Sprintf("%s %s: %s", span.GetName(), span.GetStatus().GetCode(), attributes(span.GetAttributes())))
	}
	want := []string{
		"GET STATUS_CODE_UNSET: http.request.method=GET http.response.status_code=200 network.protocol.version=1.1 server.port=8080 url.path=/orders",
		"_OTHER STATUS_CODE_ERROR: error.type=503 http.request.method=_OTHER http.request.method_original=BREW http.response.status_code=503 network.protocol.version=1.1 server.port=8080 url.path=/pot",
		"POST STATUS_CODE_ERROR: error.type=aborted http.request.method=POST network.protocol.version=1.1 server.port=8080 url.path=/",
	}
	if diff := cmp.Diff(want, spans); diff != "" {
		t.Errorf("spans (-want +got):\n%s", diff)
	}
	first := s.spans[0]
	if hex.EncodeToString(first.GetTraceId()) != traceID || hex.EncodeToString(first.GetParentSpanId()) != spanID || first.GetKind() != trace.Span_SPAN_KIND_SERVER {
		t.Errorf("the span is not below the client's: %v", first)
	}
	if len(s.spans[1].GetParentSpanId()) != 0 {
		t.Error("a trace of the gateway's own has a parent")
	}

	last := s.metrics[len(s.metrics)-1]
	if got := attributes(last.GetResource().GetAttributes()); got != "service.instance.id=one service.name=shop" {
		t.Errorf("the resource is %s", got)
	}
	got := map[string]string{}
	for _, m := range last.GetScopeMetrics()[0].GetMetrics() {
		var b strings.Builder
		for _, d := range slices.Concat(m.GetGauge().GetDataPoints(), m.GetSum().GetDataPoints()) {
			fmt.Fprintf(&b, "%s %d %g;", attributes(d.GetAttributes()), d.GetAsInt(), d.GetAsDouble())
		}
		for _, d := range m.GetHistogram().GetDataPoints() {
			if d.GetBucketCounts() == nil || len(d.GetBucketCounts()) != len(d.GetExplicitBounds())+1 {
				t.Errorf("%d counts for %d bounds", len(d.GetBucketCounts()), len(d.GetExplicitBounds()))
			}
			for _, e := range d.GetExemplars() {
				if bytes.Equal(e.GetTraceId(), first.GetTraceId()) && bytes.Equal(e.GetSpanId(), first.GetSpanId()) {
					b.WriteString("exemplar ")
				}
			}
			if strings.Contains(attributes(d.GetAttributes()), "GET") {
				fmt.Fprintf(&b, "%d;", d.GetCount())
			}
		}
		got[m.GetName()+" "+m.GetUnit()] = b.String()
	}
	wantMetrics := map[string]string{
		"cloister.enclave.memory.usage By": " 1048576 0;", "cloister.enclave.memory.limit By": " 1073741824 0;",
		"cloister.enclave.cpu.time s": " 0 1.5;", "cloister.enclave.nsm.calls {calls}": " 7 0;",
		"cloister.telemetry.dropped {items}":     "signal=logs 3 0;signal=metrics 0 0;signal=traces 0 0;",
		"http.server.active_requests {requests}": " 0 0;",
		"http.server.request.duration s":         "exemplar 2;",
	}
	if diff := cmp.Diff(wantMetrics, got); diff != "" {
		t.Errorf("metrics (-want +got):\n%s", diff)
	}
}

// What cannot be read is left out, and the rest is sent.
// Whatever a client writes, spans can be encoded and stay small.
func TestStrangePaths(t *testing.T) {
	p, s, _ := plugin(t, nil)
	for _, path := range []string{"/%ff%C3", "/" + strings.Repeat("a", 1<<20), "/" + strings.Repeat("%ff", 1<<18)} {
		p.Observe(httptest.NewRequest(http.MethodGet, path, nil), 8080)(200)
	}
	p.Observe(&http.Request{Method: "\xff" + strings.Repeat("B", 1<<20), URL: &url.URL{Path: "/"}, Header: http.Header{}}, 8080)(200)
	p.Shutdown()
	if len(s.spans) != 4 {
		t.Fatalf("%d spans, want 4", len(s.spans))
	}
	for _, span := range s.spans {
		b, err := proto.Marshal(span)
		if err != nil || len(b) > 4<<10 {
			t.Errorf("a span of %d bytes: %v", len(b), err)
		}
	}
	if diff := cmp.Diff("/%ff%C3", s.spans[0].GetAttributes()[len(s.spans[0].GetAttributes())-1].GetValue().GetStringValue()); diff != "" {
		t.Errorf("url.path (-want +got):\n%s", diff)
	}
}

func TestUsageFails(t *testing.T) {
	p, s, _ := plugin(t, errors.New("no /proc"))
	p.Shutdown()
	names := ""
	for _, m := range s.metrics[0].GetScopeMetrics()[0].GetMetrics() {
		names += m.GetName() + " "
	}
	if names != "cloister.telemetry.dropped http.server.active_requests " {
		t.Errorf("sent %s", names)
	}
}

func TestIntake(t *testing.T) {
	p, s, addr := plugin(t, nil)
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	own := &metrics.ResourceMetrics{SchemaUrl: "of the workload"}
	err = conn.Invoke(t.Context(), "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
		&cmetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metrics.ResourceMetrics{own}}, &cmetrics.ExportMetricsServiceResponse{})
	if err != nil {
		t.Fatal(err)
	}
	p.Shutdown()
	if !slices.ContainsFunc(s.metrics, func(r *metrics.ResourceMetrics) bool { return r.GetSchemaUrl() == "of the workload" }) {
		t.Error("what the workload sent is not exported")
	}
}

func TestBuckets(t *testing.T) {
	h := newHistogram()
	for _, seconds := range []float64{0, 0.005, 0.0051, 10, 11} {
		h.observe(time.Now(), seconds, traceContext{})
	}
	if want := []uint64{2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}; !slices.Equal(h.counts, want) {
		t.Errorf("counts %v, want %v", h.counts, want)
	}
}

func BenchmarkObserve(b *testing.B) {
	p := New(Config{Exporter: &discard{}})
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	for b.Loop() {
		r.Header.Set("traceparent", "00-"+traceID+"-"+spanID+"-01")
		p.Observe(r, 8080)(200)
	}
}

type discard struct{ sent }

func (*discard) Spans(*trace.ResourceSpans) {}
