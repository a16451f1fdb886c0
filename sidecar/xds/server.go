package xds

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	serverv3 "github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"
)

// NodeID is the node id with which Envoy must come.
const NodeID = "sidecar"

// retryAfter is the pause before a configuration that Envoy refused is sent again: the usual reason, a
// port in use, can go away.
const retryAfter = time.Second

// Server serves the configuration to one Envoy. It is safe for concurrent use.
type Server struct {
	log    *slog.Logger
	grpc   *grpc.Server
	cache  cachev3.SnapshotCache
	cancel context.CancelFunc

	idle, serving *cachev3.Snapshot

	mu        sync.Mutex
	listening bool
	rejected  string // why Envoy refused the last listeners; empty if it took them
	retry     *time.Timer
}

// NewServer returns a server whose configuration has the clusters of routes, no listeners for them yet,
// and egress. It must be stopped.
func NewServer(log *slog.Logger, routes []Route, egress Egress, address string) (*Server, error) {
	idle, err := Snapshot(routes, egress, address, false)
	if err != nil {
		return nil, err
	}
	serving, err := Snapshot(routes, egress, address, true)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{
		log:     log,
		grpc:    grpc.NewServer(),
		cache:   cachev3.NewSnapshotCache(true, nodeHash{}, nil),
		cancel:  cancel,
		idle:    idle,
		serving: serving,
	}
	if err := s.cache.SetSnapshot(ctx, NodeID, idle); err != nil {
		cancel()
		return nil, fmt.Errorf("set snapshot: %w", err)
	}
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(s.grpc, serverv3.NewServer(ctx, s.cache, serverv3.CallbackFuncs{
		StreamDeltaRequestFunc: func(_ int64, r *discoveryv3.DeltaDiscoveryRequest) error {
			s.answered(r)
			return nil
		},
	}))
	return s, nil
}

// nodeHash files every Envoy under its node id.
type nodeHash struct{}

func (nodeHash) ID(n *corev3.Node) string { return n.GetId() }

// Serve answers on l until Stop.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(l); err != nil {
		return fmt.Errorf("serve xDS: %w", err)
	}
	return nil
}

// Stop ends all streams and Serve.
func (s *Server) Stop() {
	s.mu.Lock()
	if s.retry != nil {
		s.retry.Stop()
	}
	s.cancel()
	s.mu.Unlock()
	s.grpc.Stop()
}

// SetListening gives Envoy its listeners, or takes them away. It does not wait for Envoy.
func (s *Server) SetListening(on bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.listening == on {
		return nil
	}
	s.listening, s.rejected = on, ""
	return s.publish()
}

// Rejected returns why Envoy refused the present listeners, or an empty string.
func (s *Server) Rejected() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rejected
}

// publish is called with s.mu held.
func (s *Server) publish() error {
	snapshot := s.idle
	if s.listening {
		snapshot = s.serving
	}
	if err := s.cache.SetSnapshot(context.Background(), NodeID, snapshot); err != nil {
		return fmt.Errorf("set snapshot: %w", err)
	}
	return nil
}

// answered looks at Envoy's acceptance or refusal of a response (ACK or NACK: a request with the
// response's nonce, and for a refusal with error_detail).
func (s *Server) answered(r *discoveryv3.DeltaDiscoveryRequest) {
	if r.GetTypeUrl() != resource.ListenerType || r.GetResponseNonce() == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rejected = r.GetErrorDetail().GetMessage()
	if s.rejected == "" || !s.listening {
		return
	}
	s.log.Error("envoy refused its listeners", "error", s.rejected)
	s.retry = time.AfterFunc(retryAfter, s.again)
}

// again takes the refused listeners out and puts them in: the same resource would not be sent twice.
func (s *Server) again() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.listening || s.rejected == "" {
		return
	}
	s.listening = false
	if err := s.publish(); err != nil {
		s.log.Error("send listeners again", "error", err)
	}
	s.listening = true
	if err := s.publish(); err != nil {
		s.log.Error("send listeners again", "error", err)
	}
}
