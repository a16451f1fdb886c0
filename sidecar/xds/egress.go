package xds

import (
	"fmt"
	"math"
	"net/http"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	dfpclusterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/clusters/dynamic_forward_proxy/v3"
	dfpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/common/dynamic_forward_proxy/v3"
	dfpfilterv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/dynamic_forward_proxy/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// EgressName is the name of the listener and of the cluster for what leaves the enclave.
const EgressName = "egress"

// Egress is what leaves the enclave: HTTP/2 CONNECT on a unix socket, to the endpoints and nothing else.
// There is a listener for it as soon as there are endpoints, whether there is anything to serve or not.
type Egress struct {
	Socket    string   // path
	Endpoints []string // "host:port"
}

// resolve says how names are resolved: both families, since the pod may have either, or both.
func (e Egress) resolve() *dfpv3.DnsCacheConfig {
	return &dfpv3.DnsCacheConfig{
		Name:            EgressName,
		DnsLookupFamily: clusterv3.Cluster_ALL,
		MaxHosts:        wrapperspb.UInt32(uint32(len(e.Endpoints))),
	}
}

// cluster is the dynamic forward proxy: its endpoints are what requests name.
func (e Egress) cluster() (*clusterv3.Cluster, error) {
	proxy, err := anypb.New(&dfpclusterv3.ClusterConfig{
		ClusterImplementationSpecifier: &dfpclusterv3.ClusterConfig_DnsCacheConfig{DnsCacheConfig: e.resolve()},
	})
	if err != nil {
		return nil, fmt.Errorf("create cluster: %w", err)
	}
	return &clusterv3.Cluster{
		Name:     EgressName,
		LbPolicy: clusterv3.Cluster_CLUSTER_PROVIDED,
		ClusterDiscoveryType: &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{
			Name: "envoy.clusters.dynamic_forward_proxy", TypedConfig: proxy,
		}},
		ConnectTimeout:                durationpb.New(5 * time.Second),
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		CircuitBreakers:               unlimited(),
	}, nil
}

// unlimited are circuit breakers that never open: Envoy's defaults of 1024 would be limits that nobody set.
func unlimited() *clusterv3.CircuitBreakers {
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections:     wrapperspb.UInt32(math.MaxUint32),
		MaxPendingRequests: wrapperspb.UInt32(math.MaxUint32),
		MaxRequests:        wrapperspb.UInt32(math.MaxUint32),
	}}}
}

func (e Egress) listener() (*listenerv3.Listener, error) {
	filter := func(name string, config proto.Message) (*hcmv3.HttpFilter, error) {
		c, err := anypb.New(config)
		return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: c}}, err
	}
	forward, err := filter("envoy.filters.http.dynamic_forward_proxy", &dfpfilterv3.FilterConfig{
		ImplementationSpecifier: &dfpfilterv3.FilterConfig_DnsCacheConfig{DnsCacheConfig: e.resolve()},
	})
	if err != nil {
		return nil, fmt.Errorf("create listener: %w", err)
	}
	router, err := filter("envoy.filters.http.router", &routerv3.Router{})
	if err != nil {
		return nil, fmt.Errorf("create listener: %w", err)
	}
	never := durationpb.New(0) // a time-out that is off
	manager, err := anypb.New(&hcmv3.HttpConnectionManager{
		StatPrefix:        EgressName,
		CodecType:         hcmv3.HttpConnectionManager_HTTP2,
		RouteSpecifier:    &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: e.routes()},
		HttpFilters:       []*hcmv3.HttpFilter{forward, router},
		UpgradeConfigs:    []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: http.MethodConnect}},
		StreamIdleTimeout: never,
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			IdleTimeout: never, // the enclave ends a connection with its only stream
		},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			AllowConnect:                true,
			InitialStreamWindowSize:     wrapperspb.UInt32(bufferLimit),
			InitialConnectionWindowSize: wrapperspb.UInt32(bufferLimit),
		},
	})
	if err != nil {
		return nil, fmt.Errorf("create listener: %w", err)
	}
	return &listenerv3.Listener{
		Name: EgressName,
		Address: &corev3.Address{Address: &corev3.Address_Pipe{
			Pipe: &corev3.Pipe{Path: e.Socket, Mode: 0o600},
		}},
		StatPrefix:                    EgressName,
		PerConnectionBufferLimitBytes: wrapperspb.UInt32(bufferLimit),
		FilterChains: []*listenerv3.FilterChain{{
			Filters: []*listenerv3.Filter{{
				Name:       "envoy.filters.network.http_connection_manager",
				ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: manager},
			}},
		}},
	}, nil
}

// routes let CONNECT to the endpoints pass and refuse everything else.
func (e Egress) routes() *routev3.RouteConfiguration {
	connect := func() *routev3.RouteMatch {
		return &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}}
	}
	everything := &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_Prefix{Prefix: "/"}}
	refuse := func(match *routev3.RouteMatch) *routev3.Route {
		return &routev3.Route{Match: match, Action: &routev3.Route_DirectResponse{DirectResponse: &routev3.DirectResponseAction{Status: http.StatusForbidden}}}
	}
	return &routev3.RouteConfiguration{
		Name: EgressName,
		VirtualHosts: []*routev3.VirtualHost{
			{
				Name:    "allowed",
				Domains: e.Endpoints,
				Routes: []*routev3.Route{
					{
						Match: connect(),
						Action: &routev3.Route_Route{Route: &routev3.RouteAction{
							ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: EgressName},
							UpgradeConfigs: []*routev3.RouteAction_UpgradeConfig{{
								UpgradeType: http.MethodConnect, ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{},
							}},
							Timeout: durationpb.New(0), IdleTimeout: durationpb.New(0),
						}},
					},
					refuse(everything),
				},
			},
			{Name: "refused", Domains: []string{"*"}, Routes: []*routev3.Route{refuse(connect()), refuse(everything)}},
		},
	}
}
