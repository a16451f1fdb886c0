package enclavereceiver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componenttest"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configtls"
	"go.opentelemetry.io/collector/consumer/consumertest"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/plog"
	"go.opentelemetry.io/collector/pdata/plog/plogotlp"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/pdata/pmetric/pmetricotlp"
	"go.opentelemetry.io/collector/pdata/ptrace"
	"go.opentelemetry.io/collector/pdata/ptrace/ptraceotlp"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/receivertest"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	grpcmetadata "google.golang.org/grpc/metadata"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/collector/enclavereceiver/internal/metadata"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// world is an enclave of one measurement, and the files of a collector that trusts it.
type world struct {
	signer *nsmdev.Signer
	config *Config
	pool   *x509.CertPool
}

var pcr0, pcr16 = bytes.Repeat([]byte{0xa0}, 48), bytes.Repeat([]byte{0xb0}, 48)

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	root, rootKey, err := nsmdev.NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	w := &world{pool: x509.NewCertPool()}
	if w.signer, err = nsmdev.New(root, rootKey); err != nil {
		t.Fatal(err)
	}
	set, err := json.Marshal(workload.MeasurementSet{{PCR0: hex.EncodeToString(pcr0), PCR16: hex.EncodeToString(pcr16)}})
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"collector"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	w.pool.AppendCertsFromPEM(certPEM)

	w.config = createDefaultConfig().(*Config)
	w.config.NetAddr.Endpoint = "127.0.0.1:0"
	w.config.Measurements, w.config.Root = write("set.json", set), write("root.pem", root)
	server := configtls.NewDefaultServerConfig()
	server.CertFile = write("tls.crt", certPEM)
	server.KeyFile = write("tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}))
	w.config.TLS = configoptional.Some(server)
	return w
}

// certificate is that of an enclave with these registers and this use.
func (w *world) certificate(t *testing.T, userData string, pcr16 []byte) tls.Certificate {
	t.Helper()
	key := newKey(t)
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	doc, err := w.signer.Sign(nsmdev.Document{
		ModuleID: "i-0123456789abcdef0-enc0123456789abcdef", Timestamp: now, UserData: []byte(userData), PublicKey: spki,
		PCRs: map[uint][]byte{0: pcr0, 16: pcr16},
	})
	if err != nil {
		t.Fatal(err)
	}
	der, err := attestation.NewCertificate(key, doc, now.Add(-time.Minute), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// sink is a receiver that runs until the test ends, and what it received.
type sink struct {
	consumertest.LogsSink
	metrics consumertest.MetricsSink
	traces  consumertest.TracesSink
	addr    string
	own     *componenttest.Telemetry
}

func (w *world) start(t *testing.T) *sink {
	t.Helper()
	// The port is known only to whoever chose it.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &sink{addr: l.Addr().String(), own: componenttest.NewTelemetry()}
	l.Close()
	w.config.NetAddr.Endpoint = s.addr
	set := receivertest.NewNopSettings(metadata.Type)
	set.TelemetrySettings = s.own.NewTelemetrySettings()
	factory := NewFactory()
	logs, err := factory.CreateLogs(t.Context(), set, w.config, &s.LogsSink)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = factory.CreateMetrics(t.Context(), set, w.config, &s.metrics); err != nil {
		t.Fatal(err)
	}
	if _, err = factory.CreateTraces(t.Context(), set, w.config, &s.traces); err != nil {
		t.Fatal(err)
	}
	if err := logs.Start(t.Context(), componenttest.NewNopHost()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := logs.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		s.own.Shutdown(context.Background())
	})
	return s
}

// dial connects with a certificate, or none.
func (w *world) dial(t *testing.T, addr string, certificates ...tls.Certificate) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: w.pool, ServerName: "collector", Certificates: certificates,
	})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// sum adds up a counter's points that have the attribute value.
func (s *sink) sum(t *testing.T, name, value string) (n int64) {
	t.Helper()
	m, err := s.own.GetMetric(name)
	if err != nil {
		return 0 // not counted yet
	}
	for _, p := range m.Data.(metricdata.Sum[int64]).DataPoints {
		for _, a := range p.Attributes.ToSlice() {
			if a.Value.AsString() == value {
				n += p.Value
			}
		}
	}
	return n
}

// forge sets what a sender has no right to say.
func forge(r pcommon.Resource) {
	r.Attributes().PutStr("service.name", "shop")
	r.Attributes().PutStr("k8s.pod.name", "somebody-else")
	r.Attributes().PutStr("k8s.node.name", "anywhere")
	r.Attributes().PutStr("cloister.pcr16", "00")
	r.Attributes().PutStr("k8s_pod_name", "somebody-else")
	r.Attributes().PutStr("k8s\u00b7pod.name", "somebody-else")
	r.Attributes().PutStr("k8sgpt.model", "its own")
}

var stamped = map[string]any{
	"service.name": "shop", "k8sgpt.model": "its own", "cloister.attested": true, "cloister.enclave.id": "i-0123456789abcdef0-enc0123456789abcdef",
	"cloister.pcr0": hex.EncodeToString(pcr0), "cloister.pcr16": hex.EncodeToString(pcr16), "k8s.pod.name": "web-0",
}

func checkStamped(t *testing.T, r pcommon.Resource) {
	t.Helper()
	got := r.Attributes().AsRaw()
	for key, want := range stamped {
		if got[key] != want {
			t.Errorf("%s is %v, want %v", key, got[key], want)
		}
	}
	if len(got) != len(stamped) {
		t.Errorf("got the attributes %v", got)
	}
}

func TestAttested(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	conn := w.dial(t, s.addr, w.certificate(t, attestation.UserDataClient, pcr16))
	ctx := grpcmetadata.AppendToOutgoingContext(t.Context(), "k8s.pod.name", "web-0", "k8s.node.name", "not-taken")

	logs := plog.NewLogs()
	rl := logs.ResourceLogs().AppendEmpty()
	forge(rl.Resource())
	rl.ScopeLogs().AppendEmpty().LogRecords().AppendEmpty().Body().SetStr("line")
	if _, err := plogotlp.NewGRPCClient(conn).Export(ctx, plogotlp.NewExportRequestFromLogs(logs)); err != nil {
		t.Fatal(err)
	}
	checkStamped(t, s.AllLogs()[0].ResourceLogs().At(0).Resource())

	metrics := pmetric.NewMetrics()
	rm := metrics.ResourceMetrics().AppendEmpty()
	forge(rm.Resource())
	rm.ScopeMetrics().AppendEmpty().Metrics().AppendEmpty().SetEmptyGauge().DataPoints().AppendEmpty()
	if _, err := pmetricotlp.NewGRPCClient(conn).Export(ctx, pmetricotlp.NewExportRequestFromMetrics(metrics)); err != nil {
		t.Fatal(err)
	}
	checkStamped(t, s.metrics.AllMetrics()[0].ResourceMetrics().At(0).Resource())

	traces := ptrace.NewTraces()
	rt := traces.ResourceSpans().AppendEmpty()
	forge(rt.Resource())
	rt.ScopeSpans().AppendEmpty().Spans().AppendEmpty()
	if _, err := ptraceotlp.NewGRPCClient(conn).Export(ctx, ptraceotlp.NewExportRequestFromTraces(traces)); err != nil {
		t.Fatal(err)
	}
	checkStamped(t, s.traces.AllTraces()[0].ResourceSpans().At(0).Resource())

	for _, signal := range []string{"logs", "metrics", "traces"} {
		if n := s.sum(t, "otelcol_receiver_enclave_dropped_attributes", signal); n != 5 {
			t.Errorf("%d dropped attributes of %s are counted, want 5", n, signal)
		}
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t)
	s := w.start(t)
	stranger := newWorld(t)
	for name, tt := range map[string]struct {
		certificates []tls.Certificate
		reason       string
	}{
		"no certificate":      {nil, "handshake"},
		"another measurement": {[]tls.Certificate{w.certificate(t, attestation.UserDataClient, pcr0)}, string(attestation.RuleMeasurement)},
		"a server's document": {[]tls.Certificate{w.certificate(t, attestation.UserDataServer, pcr16)}, string(attestation.RuleUserData)},
		"another root":        {[]tls.Certificate{stranger.certificate(t, attestation.UserDataClient, pcr16)}, string(attestation.RuleChain)},
	} {
		t.Run(name, func(t *testing.T) {
			before := s.sum(t, "otelcol_receiver_enclave_refused_connections", tt.reason)
			logs := plog.NewLogs()
			logs.ResourceLogs().AppendEmpty().ScopeLogs().AppendEmpty().LogRecords().AppendEmpty()
			_, err := plogotlp.NewGRPCClient(w.dial(t, s.addr, tt.certificates...)).Export(t.Context(), plogotlp.NewExportRequestFromLogs(logs))
			if err == nil || s.LogRecordCount() != 0 {
				t.Errorf("it was served: %v, %d records", err, s.LogRecordCount())
			}
			// It is counted after the client has been told.
			deadline := time.Now().Add(10 * time.Second)
			for s.sum(t, "otelcol_receiver_enclave_refused_connections", tt.reason) <= before {
				if time.Now().After(deadline) {
					t.Fatalf("the refusal is not counted as %s", tt.reason)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
}

func TestLifecycle(t *testing.T) {
	if err := componenttest.CheckConfigStruct(createDefaultConfig()); err != nil {
		t.Error(err)
	}
	w := newWorld(t)
	factory := NewFactory()
	if factory.Type() != component.MustNewType("enclave") {
		t.Errorf("the type is %s", factory.Type())
	}
	set := receivertest.NewNopSettings(metadata.Type)
	create := map[string]func() (component.Component, error){
		"logs": func() (component.Component, error) {
			return factory.CreateLogs(t.Context(), set, w.config, consumertest.NewNop())
		},
		"metrics": func() (component.Component, error) {
			return factory.CreateMetrics(t.Context(), set, w.config, consumertest.NewNop())
		},
		"traces": func() (component.Component, error) {
			return factory.CreateTraces(t.Context(), set, w.config, consumertest.NewNop())
		},
	}
	for name, create := range create {
		t.Run(name, func(t *testing.T) {
			first, err := create()
			if err != nil {
				t.Fatal(err)
			}
			// Before Start.
			if err := first.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
			for range 2 {
				r, err := create()
				if err != nil {
					t.Fatal(err)
				}
				for range 2 { // the collector starts and ends it for each signal
					if err := r.Start(t.Context(), componenttest.NewNopHost()); err != nil {
						t.Fatal(err)
					}
				}
				for range 2 {
					if err := r.Shutdown(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	for name, breakIt := range map[string]func(*Config){
		"no measurements":   func(c *Config) { c.Measurements = filepath.Join(t.TempDir(), "none") },
		"no measurement":    func(c *Config) { c.Measurements = c.Root },
		"root is no root":   func(c *Config) { c.Root = c.Measurements },
		"no certificate":    func(c *Config) { c.TLS.Get().CertFile = c.Measurements },
		"address of others": func(c *Config) { c.NetAddr.Endpoint = "192.0.2.1:1" },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			breakIt(w.config)
			var r receiver.Logs
			r, err := NewFactory().CreateLogs(t.Context(), receivertest.NewNopSettings(metadata.Type), w.config, consumertest.NewNop())
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Start(t.Context(), componenttest.NewNopHost()); err == nil {
				t.Error("it started")
			}
			if err := r.Shutdown(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
