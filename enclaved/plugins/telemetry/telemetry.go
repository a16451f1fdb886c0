// Package telemetry is the built-in telemetry plugin: metrics of the enclave and of the requests to its
// workload, a span for each of these requests, and an intake for what the workload sends itself.
package telemetry

import (
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clogs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	ctrace "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/workload"
)

const (
	// interval is how often metrics are sent.
	interval = 10 * time.Second

	// Spans are sent when there are batch of them, and at the latest after delay.
	batch = 256
	delay = time.Second

	// maxText bounds each attribute that a request chooses, in bytes: spans are kept by number.
	maxText = 1 << 10

	scope = "cloister.dev/telemetry"
)

// Usage is what the enclave uses at one moment.
type Usage struct {
	MemoryUsed, MemoryTotal uint64 // bytes
	CPU                     time.Duration
	NSMCalls                uint64
}

// Exporter sends telemetry and never waits.
type Exporter interface {
	Logs(*logs.ResourceLogs)
	Metrics(*metrics.ResourceMetrics)
	Spans(*trace.ResourceSpans)
	Dropped() otlp.Dropped
}

// Config of the plugin.
type Config struct {
	Exporter Exporter
	// Resource is what its own data comes from.
	Resource *resource.Resource
	// Usage reads the enclave's usage.
	Usage func() (Usage, error)
	// Listen opens the intake: workload.TelemetryPort on the loopback device.
	Listen func() (net.Listener, error)
}

// Plugin is the plugin of one workload.
type Plugin struct {
	cfg    Config
	start  uint64 // nanoseconds since 1970
	intake *otlp.Server
	active atomic.Int64
	spans  otlp.Batch[*trace.Span]

	mu        sync.Mutex
	durations map[series]*histogram

	stop    chan struct{}
	running sync.WaitGroup
}

// New returns a plugin that does not run yet.
func New(cfg Config) *Plugin {
	return &Plugin{
		cfg: cfg, start: uint64(time.Now().UnixNano()), durations: map[series]*histogram{}, stop: make(chan struct{}),
		spans: otlp.Batch[*trace.Span]{Size: batch, Delay: delay, Send: func(spans []*trace.Span) {
			cfg.Exporter.Spans(&trace.ResourceSpans{
				Resource:   cfg.Resource,
				ScopeSpans: []*trace.ScopeSpans{{Scope: &common.InstrumentationScope{Name: scope}, Spans: spans}},
			})
		}},
	}
}

// Start implements plugin.InProcess.
func (p *Plugin) Start() error {
	l, err := p.cfg.Listen()
	if err != nil {
		return fmt.Errorf("listen for the workload's telemetry: %w", err)
	}
	p.intake = otlp.Serve(l, otlp.Handler{
		Logs: func(r *clogs.ExportLogsServiceRequest) {
			for _, r := range r.GetResourceLogs() {
				p.cfg.Exporter.Logs(r)
			}
		},
		Metrics: func(r *cmetrics.ExportMetricsServiceRequest) {
			for _, r := range r.GetResourceMetrics() {
				p.cfg.Exporter.Metrics(r)
			}
		},
		Traces: func(r *ctrace.ExportTraceServiceRequest) {
			for _, r := range r.GetResourceSpans() {
				p.cfg.Exporter.Spans(r)
			}
		},
	})
	p.running.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			p.collect()
			select {
			case <-tick.C:
			case <-p.stop:
				return
			}
		}
	})
	return nil
}

// Shutdown implements plugin.InProcess: the exporter gets the last metrics and spans.
func (p *Plugin) Shutdown() {
	p.intake.Close()
	close(p.stop)
	p.running.Wait()
	p.collect()
	p.spans.Flush()
}

// Observe begins the observation of a request, which it gives its place in a trace. End is called when the
// request has been answered, with the status of the answer, 0 when it was broken off.
func (p *Plugin) Observe(r *http.Request, port uint32) (end func(status int)) {
	at := time.Now()
	place, parent := enter(r.Header)
	p.active.Add(1)
	s := series{method: knownMethod(r.Method), protocol: fmt.Sprint(r.ProtoMajor), port: port}
	if r.ProtoMajor == 1 {
		s.protocol = fmt.Sprintf("1.%d", r.ProtoMinor)
	}
	path, method := short(r.URL.EscapedPath()), short(r.Method)
	return func(status int) {
		p.active.Add(-1)
		now := time.Now()
		s.status = status
		var span *trace.Span
		if place.sampled {
			span = &trace.Span{
				TraceId: place.trace[:], SpanId: place.span[:], Name: s.method, Kind: trace.Span_SPAN_KIND_SERVER,
				StartTimeUnixNano: uint64(at.UnixNano()), EndTimeUnixNano: uint64(at.UnixNano()) + uint64(now.Sub(at)),
				Attributes: append(s.attributes(), text("url.path", path)),
				Status:     &trace.Status{},
			}
			if parent != [8]byte{} {
				span.ParentSpanId = parent[:]
			}
			if s.method == "_OTHER" {
				span.Attributes = append(span.Attributes, text("http.request.method_original", method))
			}
			if status == 0 || status >= 500 {
				span.Status.Code = trace.Status_STATUS_CODE_ERROR
			}
		}
		p.record(s, now, now.Sub(at), place, span)
	}
}

func (p *Plugin) record(s series, now time.Time, took time.Duration, place traceContext, span *trace.Span) {
	p.mu.Lock()
	h := p.durations[s]
	if h == nil {
		h = newHistogram()
		p.durations[s] = h
	}
	h.observe(now, took.Seconds(), place)
	p.mu.Unlock()
	if span != nil {
		p.spans.Add(span)
	}
}

// collect hands all metrics to the exporter.
func (p *Plugin) collect() {
	now := uint64(time.Now().UnixNano())
	var list []*metrics.Metric
	if u, err := p.cfg.Usage(); err == nil {
		list = append(list,
			gauge("cloister.enclave.memory.usage", "By", "Memory in use, files included.", now, u.MemoryUsed),
			gauge("cloister.enclave.memory.limit", "By", "Memory of the enclave.", now, u.MemoryTotal),
			p.seconds("cloister.enclave.cpu.time", "CPU time of all processes.", now, u.CPU),
			p.counter("cloister.enclave.nsm.calls", "{calls}", "Requests to the security module.", now, point{value: u.NSMCalls}))
	}
	d := p.cfg.Exporter.Dropped()
	list = append(list, p.counter("cloister.telemetry.dropped", "{items}", "Log records, data points and spans that could not be sent.", now,
		point{d.Logs, "logs"}, point{d.Points, "metrics"}, point{d.Spans, "traces"}))
	active := p.counter("http.server.active_requests", "{requests}", "Requests under way.", now, point{value: uint64(max(p.active.Load(), 0))})
	active.GetSum().IsMonotonic = false
	list = append(list, active)
	if m := p.requests(now); m != nil {
		list = append(list, m)
	}
	p.cfg.Exporter.Metrics(&metrics.ResourceMetrics{
		Resource:     p.cfg.Resource,
		ScopeMetrics: []*metrics.ScopeMetrics{{Scope: &common.InstrumentationScope{Name: scope}, Metrics: list}},
	})
}

// short bounds a text that a stranger has chosen, and makes it UTF-8: else its whole batch could not be
// encoded.
func short(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "\uFFFD") }

// knownMethod keeps strangers from making series (semantic conventions, HTTP metrics).
func knownMethod(m string) string {
	switch m {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE":
		return m
	}
	return "_OTHER"
}

// Resource returns what a workload's telemetry comes from: the name that OTEL_SERVICE_NAME gives it in the
// manifest, and the instance.
func Resource(m *workload.Manifest, instance string) *resource.Resource {
	name := "unknown_service"
	for _, e := range m.Env {
		if e.Name == "OTEL_SERVICE_NAME" && e.Value != "" {
			name = e.Value
		}
	}
	return &resource.Resource{Attributes: []*common.KeyValue{text("service.name", name), text("service.instance.id", instance)}}
}

func text(key, value string) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: value}}}
}

func number(key string, value int64) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: value}}}
}

// attributes are those of the semantic conventions for HTTP servers.
func (s series) attributes() []*common.KeyValue {
	out := []*common.KeyValue{
		text("http.request.method", s.method), text("network.protocol.version", s.protocol),
		number("server.port", int64(s.port)),
	}
	if s.status != 0 {
		out = append(out, number("http.response.status_code", int64(s.status)))
	}
	if s.status == 0 {
		out = append(out, text("error.type", "aborted"))
	} else if s.status >= 500 {
		out = append(out, text("error.type", strconv.Itoa(s.status)))
	}
	return out
}
