package otlp

import (
	"context"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	clogs "go.opentelemetry.io/proto/slim/otlp/collector/logs/v1"
	cmetrics "go.opentelemetry.io/proto/slim/otlp/collector/metrics/v1"
	ctrace "go.opentelemetry.io/proto/slim/otlp/collector/trace/v1"
)

// maxRequest bounds one request of the workload in bytes, gRPC's own default.
const maxRequest = 4 << 20

// Handler takes what a Server was sent.
type Handler struct {
	Logs    func(*clogs.ExportLogsServiceRequest)
	Metrics func(*cmetrics.ExportMetricsServiceRequest)
	Traces  func(*ctrace.ExportTraceServiceRequest)
}

// Server is the intake for the workload.
type Server struct {
	server *grpc.Server
}

// Serve serves OTLP over gRPC on l, which Close closes.
func Serve(l net.Listener, h Handler) *Server {
	s := &Server{server: grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest), grpc.MaxConcurrentStreams(64))}
	register(s.server, "opentelemetry.proto.collector.logs.v1.LogsService", h.Logs, &clogs.ExportLogsServiceResponse{})
	register(s.server, "opentelemetry.proto.collector.metrics.v1.MetricsService", h.Metrics, &cmetrics.ExportMetricsServiceResponse{})
	register(s.server, "opentelemetry.proto.collector.trace.v1.TraceService", h.Traces, &ctrace.ExportTraceServiceResponse{})
	go s.server.Serve(l)
	return s
}

// Close ends what is under way.
func (s *Server) Close() { s.server.Stop() }

// register adds a service with the one method that all of OTLP's have. The generated code of the services
// would bring the gateway of gRPC to JSON with it.
func register[R any, M interface {
	*R
	proto.Message
}](s *grpc.Server, name string, take func(M), answer proto.Message) {
	export := func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		req := M(new(R))
		if err := decode(req); err != nil {
			return nil, err
		}
		take(req)
		return answer, nil
	}
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: name, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: export}},
	}, struct{}{})
}
