package supervise

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clogs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	ctrace "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// Nothing of the workload's output reaches the console but what the logging plugin lets through.
func TestRedaction(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("flood", "3000"))},
		Plugins: []workload.Plugin{{
			Name: "logs", Type: workload.PluginLogging, Builtin: "stdout", Config: json.RawMessage(`{"redact":["x{9,}","last"]}`),
		}},
	})
	r := e.follow(t, nil)
	r.check(t, 0, "")
	if r.stdout != "[redacted]\n[redacted]\n" || r.stderr != "the [redacted] word" {
		t.Errorf("the console shows %q and %q", r.stdout, r.stderr)
	}
}

// collector is an OTLP server behind the sidecar that takes telemetry of this enclave alone.
type collector struct {
	ca string

	mu    sync.Mutex
	lines []string
	names []string // of metrics
	spans []string // parent of each
}

// collect starts one. The enclave's measurement comes later than the plugin's config, which names the ca.
func collect(t *testing.T, e *enclave, port uint32, trusted func() *attestation.ClientVerifier) *collector {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"collector.example"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c := &collector{ca: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
	own := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2"}}
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	intake := otlp.Serve(tls.NewListener(server, &tls.Config{
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return trusted().ServerConfig(own), nil },
	}), otlp.Handler{
		Logs: func(r *clogs.ExportLogsServiceRequest) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, r := range r.GetResourceLogs() {
				for _, l := range r.GetScopeLogs()[0].GetLogRecords() {
					c.lines = append(c.lines, l.GetBody().GetStringValue())
				}
			}
		},
		Metrics: func(r *cmetrics.ExportMetricsServiceRequest) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, r := range r.GetResourceMetrics() {
				for _, m := range r.GetScopeMetrics()[0].GetMetrics() {
					c.names = append(c.names, m.GetName())
				}
			}
		},
		Traces: func(r *ctrace.ExportTraceServiceRequest) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for _, r := range r.GetResourceSpans() {
				for _, s := range r.GetScopeSpans()[0].GetSpans() {
					c.spans = append(c.spans, fmt.Sprintf("%x", s.GetParentSpanId()))
				}
			}
		},
	})
	t.Cleanup(intake.Close)

	l, err := net.Listen("unix", e.host(port))
	if err != nil {
		t.Fatal(err)
	}
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	sidecar := &http.Server{Protocols: protocols, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "collector.example:4317" {
			http.Error(w, "refused", http.StatusForbidden)
			return
		}
		conn, err := net.Dial("tcp", server.Addr().String())
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer conn.Close()
		http.NewResponseController(w).Flush()
		go func() {
			io.Copy(conn, r.Body)
			conn.(*net.TCPConn).CloseWrite()
		}()
		io.Copy(flushed{w}, conn)
	})}
	go sidecar.Serve(e.secret.Listen(l, port))
	t.Cleanup(func() { sidecar.Close() })
	return c
}

type flushed struct{ http.ResponseWriter }

func (f flushed) Write(b []byte) (int, error) {
	n, err := f.ResponseWriter.Write(b)
	return n, errors.Join(err, http.NewResponseController(f.ResponseWriter).Flush())
}

// What the workload prints and what the gateway sees reaches a collector that knows the measurement, the
// last of it before the run ends; with logs: otlp the console stays empty.
func TestTelemetry(t *testing.T) {
	e := newEnclave(t)
	const egress = 70002
	var verifier *attestation.ClientVerifier
	c := collect(t, e, egress, func() *attestation.ClientVerifier { return verifier })
	m := &workload.Manifest{APIVersion: workload.APIVersion, Logs: workload.LogsOTLP}
	port := freePort(t)
	m.Image = workload.Image{Digest: e.addImage(t, cmdConfig("serve", fmt.Sprint(port), "204 No Content"))}
	m.Ports = []workload.Port{{Port: port}}
	config, err := json.Marshal(map[string]string{"endpoint": "collector.example:4317", "ca": c.ca})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []workload.Plugin{
		{Name: "logs", Type: workload.PluginLogging, Builtin: "otlp"}, {Name: "telemetry", Type: workload.PluginTelemetry, Builtin: "otlp"},
	} {
		if err := p.SetConfig(config); err != nil {
			t.Fatal(err)
		}
		m.Plugins = append(m.Plugins, p)
	}
	canonical, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	verifier, err = attestation.NewClientVerifier(attestation.Options{Root: e.module.Root(), Measurements: e.module.Measurements(canonical)})
	if err != nil {
		t.Fatal(err)
	}
	e.configure(t, m)

	asked := false
	r := e.followRun(t, &channel.RunRequest{EgressPort: egress, Pod: &channel.Pod{Name: "web-0"}}, func(r *result, _ *channel.RunEvent) {
		if asked || !r.started {
			return
		}
		asked = true
		for {
			s := e.dialTLS(t, port)
			fmt.Fprintf(s, "GET / HTTP/1.1\r\nHost: x\r\nTraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\nConnection: close\r\n\r\n")
			b, err := io.ReadAll(s)
			if err != nil {
				t.Error(err)
			}
			if err != nil || strings.HasPrefix(string(b), "HTTP/1.1 204") {
				break // before that the workload does not listen yet
			}
		}
		e.stopLater(t, 0, 0)
	})
	r.check(t, 137, "killed")
	if r.stdout != "" {
		t.Errorf("the console shows %q", r.stdout)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Equal(c.lines, []string{"serving"}) {
		t.Errorf("the collector has the lines %q", c.lines)
	}
	if len(c.spans) == 0 || c.spans[0] != "00f067aa0ba902b7" {
		t.Errorf("the collector has spans below %q", c.spans)
	}
	for _, name := range []string{"cloister.enclave.memory.usage", "cloister.enclave.cpu.time", "cloister.enclave.nsm.calls", "http.server.request.duration"} {
		if !slices.Contains(c.names, name) {
			t.Errorf("the collector has no %s, only %q", name, c.names)
		}
	}
}

// A collector that refuses the enclave, as one that does not know its measurement, holds nothing up.
func TestTelemetryRefused(t *testing.T) {
	e := newEnclave(t)
	const egress = 70002
	c := collect(t, e, egress, func() *attestation.ClientVerifier {
		v, err := attestation.NewClientVerifier(attestation.Options{Root: e.module.Root(), Measurements: e.module.Measurements([]byte("{}"))})
		if err != nil {
			t.Error(err)
		}
		return v
	})
	config, err := json.Marshal(map[string]string{"endpoint": "collector.example:4317", "ca": c.ca})
	if err != nil {
		t.Fatal(err)
	}
	p := workload.Plugin{Name: "logs", Type: workload.PluginLogging, Builtin: "otlp"}
	if err := p.SetConfig(config); err != nil {
		t.Fatal(err)
	}
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("flood", "3000"))}, Plugins: []workload.Plugin{p},
	})
	begin := time.Now()
	r := e.followRun(t, &channel.RunRequest{EgressPort: egress}, nil)
	r.check(t, 0, "")
	if len(r.stdout) != 2048 || len(c.lines) != 0 {
		t.Errorf("%d bytes on the console, %q at the collector", len(r.stdout), c.lines)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("the run took %s", took)
	}
}
