package otlp_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	clogs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	ctrace "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/workload"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// certificate is one that is its own authority.
func certificate(t *testing.T, name string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// collector is a server that wants a client certificate. It is away until open.
type collector struct {
	config   *tls.Config
	ca       string
	received chan string // a word for each item

	mu   sync.Mutex
	addr string
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	server, ca := certificate(t, "collector.example")
	return &collector{
		config:   &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}},
		ca:       ca,
		received: make(chan string, 10000),
	}
}

func (c *collector) open(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := otlp.Serve(tls.NewListener(l, c.config), otlp.Handler{
		Logs: func(r *clogs.ExportLogsServiceRequest) {
			for _, r := range r.GetResourceLogs() {
				c.received <- r.GetScopeLogs()[0].GetLogRecords()[0].GetBody().GetStringValue()[:4]
			}
		},
		Metrics: func(r *cmetrics.ExportMetricsServiceRequest) { c.received <- r.GetResourceMetrics()[0].GetSchemaUrl() },
		Traces:  func(r *ctrace.ExportTraceServiceRequest) { c.received <- r.GetResourceSpans()[0].GetSchemaUrl() },
	})
	t.Cleanup(s.Close)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.addr = l.Addr().String()
}

// exporter sends to the collector as an enclave does.
func (c *collector) exporter(t *testing.T) *otlp.Exporter {
	t.Helper()
	own, _ := certificate(t, "enclave")
	e, err := otlp.NewExporter(workload.OTLP{Endpoint: "collector.example:4317", CA: c.ca}, otlp.Host{
		Dial: func(ctx context.Context, address string) (net.Conn, error) {
			if address != "collector.example:4317" {
				t.Errorf("dialled %s", address)
			}
			c.mu.Lock()
			addr := c.addr
			c.mu.Unlock()
			if addr == "" {
				return nil, errors.New("away")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
		Certificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &own, nil },
		Pod:         map[string]string{"k8s.pod.name": "web-0"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// line is a log record of about size bytes.
func line(text string, size int) *logs.ResourceLogs {
	body := &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: text + strings.Repeat("x", size)}}
	return &logs.ResourceLogs{ScopeLogs: []*logs.ScopeLogs{{LogRecords: []*logs.LogRecord{{Body: body}}}}}
}

func shutdown(t *testing.T, e *otlp.Exporter, within time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	e.Shutdown(ctx)
}

// What is kept while the collector is away arrives in order, and Shutdown waits for it.
func TestExporter(t *testing.T) {
	c := newCollector(t)
	e := c.exporter(t)
	for _, text := range []string{"log1", "log2"} {
		e.Logs(line(text, 0))
	}
	c.open(t)
	e.Metrics(&metrics.ResourceMetrics{SchemaUrl: "metric"})
	e.Spans(&trace.ResourceSpans{SchemaUrl: "span"})
	shutdown(t, e, 20*time.Second)
	close(c.received)
	var lines, others []string
	for r := range c.received {
		if strings.HasPrefix(r, "log") {
			lines = append(lines, r)
		} else {
			others = append(others, r)
		}
	}
	slices.Sort(others)
	if !slices.Equal(lines, []string{"log1", "log2"}) || !slices.Equal(others, []string{"metric", "span"}) {
		t.Errorf("arrived: %q, %q", lines, others)
	}
	if d := e.Dropped(); d != (otlp.Dropped{}) {
		t.Errorf("dropped %+v", d)
	}
}

// What does not fit is dropped and counted; nothing waits.
func TestBound(t *testing.T) {
	c := newCollector(t)
	e := c.exporter(t)
	const lines = 100
	for range lines {
		e.Logs(line("line", 100<<10))
	}
	dropped := e.Dropped().Logs
	if dropped < lines/2 || dropped >= lines {
		t.Errorf("%d of %d lines of 100 KiB were dropped at once", dropped, lines)
	}
	c.open(t)
	shutdown(t, e, 20*time.Second)
	if got := len(c.received); got+int(dropped) != lines || e.Dropped().Logs != dropped {
		t.Errorf("%d lines arrived and %d were dropped, of %d", got, e.Dropped().Logs, lines)
	}
	e.Logs(line("late", 0))
	if e.Dropped().Logs != dropped+1 {
		t.Error("a line after Shutdown is not counted")
	}
}

// A collector that stays away holds the end up for no longer than was said.
func TestShutdownGivesUp(t *testing.T) {
	e := newCollector(t).exporter(t)
	e.Logs(line("line", 0))
	e.Spans(&trace.ResourceSpans{ScopeSpans: []*trace.ScopeSpans{{Spans: []*trace.Span{{}, {}}}}})
	begin := time.Now()
	shutdown(t, e, 100*time.Millisecond)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
	if d := e.Dropped(); d != (otlp.Dropped{Logs: 1, Spans: 2}) {
		t.Errorf("dropped %+v", d)
	}
}

// A server with another authority gets nothing.
func TestAnotherServer(t *testing.T) {
	c := newCollector(t)
	_, c.ca = certificate(t, "collector.example")
	c.open(t)
	e := c.exporter(t)
	e.Logs(line("line", 0))
	shutdown(t, e, time.Second)
	if len(c.received) != 0 || e.Dropped().Logs != 1 {
		t.Errorf("%d arrived, %+v dropped", len(c.received), e.Dropped())
	}
}

// What a server says of what it was sent does not get into the log, which the host reads. That it cannot be
// reached does.
func TestWordsOfTheServer(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { slog.SetDefault(before) })
	c := newCollector(t)
	e := c.exporter(t)
	e.Logs(line("line", 0))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(c.config)), grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error {
		return status.Error(codes.InvalidArgument, "not UTF-8: line with a secret")
	}))
	go s.Serve(l)
	t.Cleanup(s.Stop)
	c.mu.Lock()
	c.addr = l.Addr().String()
	c.mu.Unlock()
	shutdown(t, e, 20*time.Second)
	if e.Dropped().Logs != 1 || !strings.Contains(log.String(), "InvalidArgument") || strings.Contains(log.String(), "secret") {
		t.Errorf("dropped %+v, logged %s", e.Dropped(), log.String())
	}
	log.Reset()
	e = newCollector(t).exporter(t)
	e.Logs(line("line", 0))
	shutdown(t, e, 100*time.Millisecond)
	if !strings.Contains(log.String(), "away") {
		t.Errorf("logged %s", log.String())
	}
}

// The intake speaks what an ordinary SDK speaks.
func TestServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	took := make(chan int, 1)
	s := otlp.Serve(l, otlp.Handler{
		Traces: func(r *ctrace.ExportTraceServiceRequest) { took <- len(r.GetResourceSpans()) },
	})
	defer s.Close()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	req := &ctrace.ExportTraceServiceRequest{ResourceSpans: []*trace.ResourceSpans{{}, {}}}
	if err := conn.Invoke(t.Context(), "/opentelemetry.proto.collector.trace.v1.TraceService/Export", req, &ctrace.ExportTraceServiceResponse{}); err != nil {
		t.Fatal(err)
	}
	if n := <-took; n != 2 {
		t.Errorf("it took %d resources", n)
	}
}
