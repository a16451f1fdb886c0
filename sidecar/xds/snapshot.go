// Package xds makes Envoy's configuration and serves it: delta ADS (the aggregated discovery service,
// incremental variant) over any listener.
//
// Per port there is one cluster, whose only endpoint is a unix socket, and, while there is something to
// serve, one listener that carries TCP to it. Envoy sees ciphertext only. What leaves the enclave has a
// listener of its own; see Egress.
package xds

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Addresses that listeners bind to.
const (
	// IPv4 is every IPv4 address of the pod.
	IPv4 = "0.0.0.0"
	// DualStack is every address of the pod: "::" with ipv4_compat, for pods that have IPv6.
	DualStack = "::"
)

// bufferLimit bounds what Envoy buffers per connection and direction, in bytes. The sidecar's memory is
// small and fixed; back-pressure does the rest.
const bufferLimit = 64 << 10

// Route carries one TCP port to a unix socket.
type Route struct {
	Port   uint16
	Socket string // path
}

// ListenerName returns the name of the listener for port.
func ListenerName(port uint16) string { return "port-" + strconv.Itoa(int(port)) }

// Snapshot returns the clusters of routes and, if listening, their listeners on address, which is IPv4
// or DualStack; and cluster and listener of egress. Its version is the hash of its content.
func Snapshot(routes []Route, egress Egress, address string, listening bool) (*cachev3.Snapshot, error) {
	var clusters, listeners []types.Resource
	for _, r := range routes {
		clusters = append(clusters, cluster(r))
		if listening {
			l, err := listener(r, address)
			if err != nil {
				return nil, err
			}
			listeners = append(listeners, l)
		}
	}
	if len(egress.Endpoints) > 0 {
		c, err := egress.cluster()
		if err != nil {
			return nil, err
		}
		l, err := egress.listener()
		if err != nil {
			return nil, err
		}
		clusters, listeners = append(clusters, c), append(listeners, l)
	}
	version, err := contentHash(clusters, listeners)
	if err != nil {
		return nil, err
	}
	s, err := cachev3.NewSnapshot(version, map[resource.Type][]types.Resource{
		resource.ClusterType:  clusters,
		resource.ListenerType: listeners,
	})
	if err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	if err := s.Consistent(); err != nil {
		return nil, fmt.Errorf("create snapshot: %w", err)
	}
	return s, nil
}

func contentHash(lists ...[]types.Resource) (string, error) {
	h := sha256.New()
	for _, list := range lists {
		for _, m := range list {
			b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				return "", fmt.Errorf("hash snapshot: %w", err)
			}
			fmt.Fprintf(h, "%d\n", len(b))
			h.Write(b)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

func cluster(r Route) *clusterv3.Cluster {
	name := ListenerName(r.Port)
	return &clusterv3.Cluster{
		Name:                          name,
		ClusterDiscoveryType:          &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:                durationpb.New(5 * time.Second),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		CircuitBreakers:               unlimited(),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints: []*endpointv3.LocalityLbEndpoints{{
				LbEndpoints: []*endpointv3.LbEndpoint{{
					HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
						Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: r.Socket}}},
					}},
				}},
			}},
		},
	}
}

func listener(r Route, address string) (*listenerv3.Listener, error) {
	name := ListenerName(r.Port)
	tcp, err := anypb.New(&tcpproxyv3.TcpProxy{
		StatPrefix:       name,
		ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: name},
		// 0 turns Envoy's time-out of an hour off: what an idle connection means, the gateway knows.
		IdleTimeout: durationpb.New(0),
	})
	if err != nil {
		return nil, fmt.Errorf("create listener: %w", err)
	}
	return &listenerv3.Listener{
		Name: name,
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address:       address,
			PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(r.Port)},
			Ipv4Compat:    address == DualStack,
		}}},
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		// A port that another container of the pod has taken is an error, not half of the connections.
		EnableReusePort: wrapperspb.Bool(false),
		FilterChains: []*listenerv3.FilterChain{{
			Filters: []*listenerv3.Filter{{
				Name:       "envoy.filters.network.tcp_proxy",
				ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: tcp},
			}},
		}},
	}, nil
}
