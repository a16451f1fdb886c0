package enclavereceiver

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/component/componentstatus"
	"go.opentelemetry.io/collector/config/configgrpc"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/config/configtls"
	"go.opentelemetry.io/collector/consumer"
	"go.opentelemetry.io/collector/consumer/consumererror"
	"go.opentelemetry.io/collector/pdata/pcommon"
	"go.opentelemetry.io/collector/pdata/plog/plogotlp"
	"go.opentelemetry.io/collector/pdata/pmetric/pmetricotlp"
	"go.opentelemetry.io/collector/pdata/ptrace/ptraceotlp"
	"go.opentelemetry.io/collector/receiver"
	"go.opentelemetry.io/collector/receiver/receiverhelper"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcmetadata "google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/collector/enclavereceiver/internal/metadata"
)

// reserved tells whether the receiver alone sets a resource attribute: one of its own, or of the pod.
// Prometheus and Loki know k8s.pod.name as k8s_pod_name, so the character after the namespace is all the
// same, as long as they replace it.
func reserved(key string) bool {
	for _, namespace := range []string{"cloister", "k8s"} {
		if rest, ok := strings.CutPrefix(key, namespace); ok && rest != "" {
			c := rest[0]
			return !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9')
		}
	}
	return false
}

// podAttributes are what enclaved says of the enclave's pod, in the metadata of each call. The code that
// does so is measured; what it says, the host has told it.
var podAttributes = []string{"k8s.namespace.name", "k8s.pod.name", "k8s.pod.uid"}

// enclaveReceiver serves the three services of OTLP on one port.
type enclaveReceiver struct {
	cfg    *Config
	set    receiver.Settings
	forget func()
	report *receiverhelper.ObsReport

	refused metric.Int64Counter
	dropped metric.Int64Counter

	traces  consumer.Traces
	metrics consumer.Metrics
	logs    consumer.Logs

	starting, stopping sync.Once
	verifier           *attestation.ClientVerifier
	server             *grpc.Server
	serving            sync.WaitGroup
}

func newReceiver(cfg *Config, set receiver.Settings, forget func()) (*enclaveReceiver, error) {
	r := &enclaveReceiver{cfg: cfg, set: set, forget: forget}
	var err error
	r.report, err = receiverhelper.NewObsReport(receiverhelper.ObsReportSettings{
		ReceiverID: set.ID, Transport: "grpc", ReceiverCreateSettings: set,
	})
	if err != nil {
		return nil, err
	}
	meter := set.MeterProvider.Meter(metadata.ScopeName)
	r.refused, err = meter.Int64Counter("otelcol_receiver_enclave_refused_connections", metric.WithUnit("{connections}"),
		metric.WithDescription("Connections that were refused, because they did not come from an attested enclave of the measurement set."))
	if err != nil {
		return nil, err
	}
	r.dropped, err = meter.Int64Counter("otelcol_receiver_enclave_dropped_attributes", metric.WithUnit("{attributes}"),
		metric.WithDescription("Resource attributes that senders had set themselves although they are the receiver's to say."))
	return r, err
}

// Start implements component.Component. The receiver is one for all signals and starts once.
func (r *enclaveReceiver) Start(ctx context.Context, host component.Host) (err error) {
	r.starting.Do(func() { err = r.start(ctx, host) })
	return err
}

func (r *enclaveReceiver) start(ctx context.Context, host component.Host) error {
	var err error
	if r.verifier, err = r.cfg.verifier(); err != nil {
		return err
	}
	base, err := r.cfg.TLS.Get().LoadTLSConfig(ctx)
	if err != nil {
		return fmt.Errorf("load certificate: %w", err)
	}
	// configgrpc knows no client certificate without an authority, so TLS is given to it as an option.
	plain := r.cfg.ServerConfig
	plain.TLS = configoptional.None[configtls.ServerConfig]()
	creds := &countingCredentials{credentials.NewTLS(r.verifier.ServerConfig(base)), r.refuse}
	r.server, err = plain.ToServer(ctx, host.GetExtensions(), r.set.TelemetrySettings, configgrpc.WithGrpcServerOption(grpc.Creds(creds)))
	if err != nil {
		return err
	}
	if r.traces != nil {
		ptraceotlp.RegisterGRPCServer(r.server, &tracesServer{r: r})
	}
	if r.metrics != nil {
		pmetricotlp.RegisterGRPCServer(r.server, &metricsServer{r: r})
	}
	if r.logs != nil {
		plogotlp.RegisterGRPCServer(r.server, &logsServer{r: r})
	}
	l, err := r.cfg.NetAddr.Listen(ctx)
	if err != nil {
		return err
	}
	r.set.Logger.Info("serving attested enclaves", zap.String("endpoint", l.Addr().String()))
	r.serving.Go(func() {
		if err := r.server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			componentstatus.ReportStatus(host, componentstatus.NewFatalErrorEvent(err))
		}
	})
	return nil
}

// Shutdown implements component.Component.
func (r *enclaveReceiver) Shutdown(context.Context) error {
	r.stopping.Do(func() {
		r.forget()
		if r.server != nil {
			r.server.GracefulStop()
		}
		r.serving.Wait()
	})
	return nil
}

// refuse counts a handshake that has failed, and says why.
func (r *enclaveReceiver) refuse(peer net.Addr, err error) {
	reason := "handshake"
	if refusal, ok := errors.AsType[*attestation.Error](err); ok {
		reason = string(refusal.Rule)
	}
	r.refused.Add(context.Background(), 1, metric.WithAttributes(attribute.String("reason", reason)))
	r.set.Logger.Warn("connection refused", zap.Stringer("peer", peer), zap.String("reason", reason), zap.Error(err))
}

// countingCredentials reports the handshakes that fail.
type countingCredentials struct {
	credentials.TransportCredentials
	failed func(net.Addr, error)
}

func (c *countingCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secure, info, err := c.TransportCredentials.ServerHandshake(conn)
	if err != nil {
		c.failed(conn.RemoteAddr(), err)
	}
	return secure, info, err
}

func (c *countingCredentials) Clone() credentials.TransportCredentials {
	return &countingCredentials{c.TransportCredentials.Clone(), c.failed}
}

// identity is what a call's data is marked with.
type identity struct {
	document *attestation.Document
	pod      map[string]string
}

// identify verifies the document of a call's connection again: it may have become too old since.
func (r *enclaveReceiver) identify(ctx context.Context) (*identity, error) {
	var state tls.ConnectionState
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(credentials.TLSInfo); ok {
			state = info.State
		}
	}
	document, err := r.verifier.Document(state)
	if err != nil {
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	id := &identity{document: document, pod: map[string]string{}}
	md, _ := grpcmetadata.FromIncomingContext(ctx)
	for _, key := range podAttributes {
		if v := md.Get(key); len(v) == 1 {
			id.pod[key] = v[0]
		}
	}
	return id, nil
}

// stamp replaces the reserved attributes of a resource and returns how many its sender had set.
func (id *identity) stamp(resource pcommon.Resource) (dropped int64) {
	attributes := resource.Attributes()
	attributes.RemoveIf(func(key string, _ pcommon.Value) bool {
		ours := reserved(key)
		if ours {
			dropped++
		}
		return ours
	})
	attributes.PutBool("cloister.attested", true)
	attributes.PutStr("cloister.enclave.id", id.document.ModuleID)
	attributes.PutStr("cloister.pcr0", hex.EncodeToString(id.document.PCRs[0]))
	attributes.PutStr("cloister.pcr16", hex.EncodeToString(id.document.PCRs[16]))
	for key, value := range id.pod {
		attributes.PutStr(key, value)
	}
	return dropped
}

// count adds to the counter of dropped attributes.
func (r *enclaveReceiver) count(ctx context.Context, signal string, dropped int64) {
	if dropped > 0 {
		r.dropped.Add(ctx, dropped, metric.WithAttributes(attribute.String("signal", signal)))
	}
}

// answer turns a consumer's error into OTLP's: what may succeed later is Unavailable (OTLP
// specification, section "Failures").
func answer(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	if consumererror.IsPermanent(err) {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	return status.Error(codes.Unavailable, err.Error())
}

const format = "protobuf"

type tracesServer struct {
	ptraceotlp.UnimplementedGRPCServer
	r *enclaveReceiver
}

func (s *tracesServer) Export(ctx context.Context, req ptraceotlp.ExportRequest) (ptraceotlp.ExportResponse, error) {
	id, err := s.r.identify(ctx)
	if err != nil {
		return ptraceotlp.NewExportResponse(), err
	}
	data, dropped := req.Traces(), int64(0)
	for _, resource := range data.ResourceSpans().All() {
		dropped += id.stamp(resource.Resource())
	}
	s.r.count(ctx, "traces", dropped)
	n := data.SpanCount()
	ctx = s.r.report.StartTracesOp(ctx)
	err = s.r.traces.ConsumeTraces(ctx, data)
	s.r.report.EndTracesOp(ctx, format, n, err)
	return ptraceotlp.NewExportResponse(), answer(err)
}

type metricsServer struct {
	pmetricotlp.UnimplementedGRPCServer
	r *enclaveReceiver
}

func (s *metricsServer) Export(ctx context.Context, req pmetricotlp.ExportRequest) (pmetricotlp.ExportResponse, error) {
	id, err := s.r.identify(ctx)
	if err != nil {
		return pmetricotlp.NewExportResponse(), err
	}
	data, dropped := req.Metrics(), int64(0)
	for _, resource := range data.ResourceMetrics().All() {
		dropped += id.stamp(resource.Resource())
	}
	s.r.count(ctx, "metrics", dropped)
	n := data.DataPointCount()
	ctx = s.r.report.StartMetricsOp(ctx)
	err = s.r.metrics.ConsumeMetrics(ctx, data)
	s.r.report.EndMetricsOp(ctx, format, n, err)
	return pmetricotlp.NewExportResponse(), answer(err)
}

type logsServer struct {
	plogotlp.UnimplementedGRPCServer
	r *enclaveReceiver
}

func (s *logsServer) Export(ctx context.Context, req plogotlp.ExportRequest) (plogotlp.ExportResponse, error) {
	id, err := s.r.identify(ctx)
	if err != nil {
		return plogotlp.NewExportResponse(), err
	}
	data, dropped := req.Logs(), int64(0)
	for _, resource := range data.ResourceLogs().All() {
		dropped += id.stamp(resource.Resource())
	}
	s.r.count(ctx, "logs", dropped)
	n := data.LogRecordCount()
	ctx = s.r.report.StartLogsOp(ctx)
	err = s.r.logs.ConsumeLogs(ctx, data)
	s.r.report.EndLogsOp(ctx, format, n, err)
	return plogotlp.NewExportResponse(), answer(err)
}
