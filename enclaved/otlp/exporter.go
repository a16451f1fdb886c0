package otlp

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	clogs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	ctrace "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	metrics "go.opentelemetry.io/proto/slim/otlp/metrics/v1"
	trace "go.opentelemetry.io/proto/slim/otlp/trace/v1"

	"cloister.dev/cloister/workload"
)

const (
	// queueBytes bounds what one signal keeps while the other end is away, and batchBytes one request.
	queueBytes = 4 << 20
	batchBytes = 1 << 20

	exportTimeout = 10 * time.Second
	firstRetry    = 500 * time.Millisecond
	lastRetry     = 10 * time.Second

	// The other end's host may vanish without a word. gRPC servers refuse more pings than one in 5
	// minutes unless told otherwise (gRFC A8), so a lost connection shows by time-outs of exports first.
	pingAfter   = 6 * time.Minute
	pingTimeout = 20 * time.Second
)

// Methods of OTLP's services.
const (
	methodLogs    = "/opentelemetry.proto.collector.logs.v1.LogsService/Export"
	methodMetrics = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
	methodTraces  = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
)

// Host is what the enclave around it gives to an exporter.
type Host struct {
	// Dial is the way out: it reaches "host:port" that the manifest names.
	Dial func(ctx context.Context, address string) (net.Conn, error)
	// Certificate is the enclave's attested certificate as a client.
	Certificate func(*tls.CertificateRequestInfo) (*tls.Certificate, error)
	// Pod are resource attributes of the pod, k8s.*, as the host has told them. They go into the metadata
	// of each call, where nothing that the workload sends can get to.
	Pod map[string]string
}

// Dropped counts what could not be sent, by signal: log records, data points and spans.
type Dropped struct{ Logs, Points, Spans uint64 }

// Exporter sends to one server. It is safe for concurrent use, and Logs, Metrics and Spans never wait.
type Exporter struct {
	conn    *grpc.ClientConn
	pod     metadata.MD
	logs    *queue[*logs.ResourceLogs]
	metrics *queue[*metrics.ResourceMetrics]
	spans   *queue[*trace.ResourceSpans]

	sending sync.WaitGroup
	cut     context.CancelFunc
}

// NewExporter returns an exporter that connects when there is something to send. Shutdown must be called.
func NewExporter(cfg workload.OTLP, host Host) (*Exporter, error) {
	authorities, err := cfg.Authorities()
	if err != nil {
		return nil, err
	}
	config := &tls.Config{
		MinVersion: tls.VersionTLS13, ServerName: cfg.Host(), RootCAs: authorities,
		GetClientCertificate: host.Certificate, SessionTicketsDisabled: true,
	}
	connect := grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: firstRetry, Multiplier: 2, Jitter: 0.2, MaxDelay: lastRetry}, MinConnectTimeout: exportTimeout}
	conn, err := grpc.NewClient("passthrough:///"+cfg.Endpoint,
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(host.Dial), grpc.WithNoProxy(), grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(connect), grpc.WithIdleTimeout(0),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}))
	if err != nil {
		return nil, err
	}
	e := &Exporter{
		conn: conn, pod: metadata.New(host.Pod),
		logs: newQueue(countLogs), metrics: newQueue(countPoints), spans: newQueue(countSpans),
	}
	var life context.Context
	life, e.cut = context.WithCancel(metadata.NewOutgoingContext(context.Background(), e.pod))
	e.sending.Go(func() {
		send(life, e.logs, "logs", func(ctx context.Context, batch []*logs.ResourceLogs, server grpc.CallOption) (int64, error) {
			var res clogs.ExportLogsServiceResponse
			err := e.conn.Invoke(ctx, methodLogs, &clogs.ExportLogsServiceRequest{ResourceLogs: batch}, &res, server)
			return res.GetPartialSuccess().GetRejectedLogRecords(), err
		})
	})
	e.sending.Go(func() {
		send(life, e.metrics, "metrics", func(ctx context.Context, batch []*metrics.ResourceMetrics, server grpc.CallOption) (int64, error) {
			var res cmetrics.ExportMetricsServiceResponse
			err := e.conn.Invoke(ctx, methodMetrics, &cmetrics.ExportMetricsServiceRequest{ResourceMetrics: batch}, &res, server)
			return res.GetPartialSuccess().GetRejectedDataPoints(), err
		})
	})
	e.sending.Go(func() {
		send(life, e.spans, "traces", func(ctx context.Context, batch []*trace.ResourceSpans, server grpc.CallOption) (int64, error) {
			var res ctrace.ExportTraceServiceResponse
			err := e.conn.Invoke(ctx, methodTraces, &ctrace.ExportTraceServiceRequest{ResourceSpans: batch}, &res, server)
			return res.GetPartialSuccess().GetRejectedSpans(), err
		})
	})
	return e, nil
}

// Logs sends log records, which must not be changed afterwards. After Shutdown they are dropped.
func (e *Exporter) Logs(r *logs.ResourceLogs) { e.logs.add(r) }

// Metrics sends data points, which must not be changed afterwards.
func (e *Exporter) Metrics(r *metrics.ResourceMetrics) { e.metrics.add(r) }

// Spans sends spans, which must not be changed afterwards.
func (e *Exporter) Spans(r *trace.ResourceSpans) { e.spans.add(r) }

// Dropped returns what has been dropped so far.
func (e *Exporter) Dropped() Dropped {
	return Dropped{e.logs.dropped.Load(), e.metrics.dropped.Load(), e.spans.dropped.Load()}
}

// Shutdown sends what is left as long as ctx allows, and drops the rest.
func (e *Exporter) Shutdown(ctx context.Context) {
	defer e.conn.Close()
	e.logs.close()
	e.metrics.close()
	e.spans.close()
	defer context.AfterFunc(ctx, e.cut)()
	e.sending.Wait()
	e.cut()
	if d := e.Dropped(); d != (Dropped{}) {
		slog.Warn("telemetry was dropped", "logs", d.Logs, "points", d.Points, "spans", d.Spans)
	}
}

// send empties a queue until it is closed and empty, or ctx ends.
func send[T proto.Message](ctx context.Context, q *queue[T], signal string, export func(context.Context, []T, grpc.CallOption) (rejected int64, err error)) {
	down := false
	for {
		batch, count := q.take()
		if batch == nil {
			return
		}
		retry := firstRetry
		for {
			call, cancel := context.WithTimeout(ctx, exportTimeout)
			var server peer.Peer
			rejected, err := export(call, batch, grpc.Peer(&server))
			cancel()
			if err == nil {
				if rejected > 0 {
					q.dropped.Add(uint64(rejected))
					slog.Warn("telemetry was rejected", "signal", signal, "items", rejected)
				}
				if down {
					down = false
					slog.Info("telemetry is taken again", "signal", signal, "dropped", q.dropped.Load())
				}
				break
			}
			if ctx.Err() != nil || !temporary(err) {
				q.dropped.Add(count)
				slog.Warn("telemetry was refused", "signal", signal, "items", count, "error", reason(err, &server))
				break
			}
			if !down {
				down = true
				slog.Warn("telemetry cannot be sent, and is kept for a while", "signal", signal, "error", reason(err, &server))
			}
			select {
			case <-time.After(retry):
			case <-ctx.Done():
			}
			retry = min(2*retry, lastRetry)
		}
	}
}

// reason is why an export failed, without the words of a server that was reached: they may quote what it
// was sent, and the host reads this log.
func reason(err error, server *peer.Peer) string {
	if server.AuthInfo == nil {
		return err.Error()
	}
	return status.Code(err).String()
}

// temporary tells whether a later try may succeed: what the specification calls retryable, and a server
// that does not know this enclave's measurement yet.
func temporary(err error) bool {
	switch status.Code(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Aborted, codes.OutOfRange,
		codes.Unavailable, codes.DataLoss, codes.Unauthenticated, codes.PermissionDenied:
		return true
	}
	return false
}

func countLogs(r *logs.ResourceLogs) (n uint64) {
	for _, s := range r.GetScopeLogs() {
		n += uint64(len(s.GetLogRecords()))
	}
	return n
}

func countSpans(r *trace.ResourceSpans) (n uint64) {
	for _, s := range r.GetScopeSpans() {
		n += uint64(len(s.GetSpans()))
	}
	return n
}

func countPoints(r *metrics.ResourceMetrics) (n uint64) {
	for _, s := range r.GetScopeMetrics() {
		for _, m := range s.GetMetrics() {
			n += uint64(len(m.GetGauge().GetDataPoints()) + len(m.GetSum().GetDataPoints()) + len(m.GetHistogram().GetDataPoints()) +
				len(m.GetExponentialHistogram().GetDataPoints()) + len(m.GetSummary().GetDataPoints()))
		}
	}
	return n
}
