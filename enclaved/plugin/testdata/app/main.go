// App is an authentication plugin that does what a request's path says, for tests of the frame.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
)

type app struct {
	authv3.UnimplementedAuthorizationServer
	frozen atomic.Bool
}

// health is frozen with its app.
type health struct {
	healthv1.UnimplementedHealthServer
	app *app
}

func (h health) Check(ctx context.Context, _ *healthv1.HealthCheckRequest) (*healthv1.HealthCheckResponse, error) {
	if h.app.frozen.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &healthv1.HealthCheckResponse{Status: healthv1.HealthCheckResponse_SERVING}, nil
}

func main() {
	var config struct {
		Silent bool   `json:"silent"` // never listens
		Link   string `json:"link"`   // puts a link in place of its socket
	}
	if err := json.Unmarshal([]byte(os.Getenv("CLOISTER_PLUGIN_CONFIG")), &config); err != nil {
		panic(err)
	}
	socket := os.Getenv("CLOISTER_PLUGIN_SOCKET")
	switch {
	case config.Silent:
		fmt.Println("waiting for nothing")
		time.Sleep(time.Hour)
	case config.Link != "":
		if err := os.Symlink(config.Link, socket); err != nil {
			panic(err)
		}
		time.Sleep(time.Hour)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		panic(err)
	}
	a, s := &app{}, grpc.NewServer()
	authv3.RegisterAuthorizationServer(s, a)
	healthv1.RegisterHealthServer(s, health{app: a})
	fmt.Println("serving")
	s.Serve(l)
}

// Check does what the path says.
func (a *app) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	http := r.GetAttributes().GetRequest().GetHttp()
	path, argument, _ := strings.Cut(http.GetPath(), "?")
	switch path {
	case "/deny":
		return denied(401, "no", header("www-authenticate", "Test"), header("x-reason", "because")), nil
	case "/deny/plainly":
		return &authv3.CheckResponse{Status: &status.Status{Code: 7}}, nil
	case "/deny/status":
		return denied(42, ""), nil
	case "/deny/header":
		return denied(403, "", header("content-length", "7")), nil
	case "/hang":
		<-ctx.Done()
		return nil, ctx.Err()
	case "/exit":
		fmt.Println("told to exit")
		os.Exit(3)
	case "/freeze":
		a.frozen.Store(true)
	case "/set":
		return passed(&authv3.OkHttpResponse{
			Headers:              []*corev3.HeaderValueOption{header("x-set", "0"), overwritten("X-Set", "1"), header("x-set", "2")},
			HeadersToRemove:      []string{"x-remove"},
			ResponseHeadersToAdd: []*corev3.HeaderValueOption{header("x-answer", "yes")},
		}), nil
	case "/set/unlisted":
		return passed(&authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{header("x-other", "1")}}), nil
	case "/set/value":
		return passed(&authv3.OkHttpResponse{Headers: []*corev3.HeaderValueOption{header("x-set", "a\r\nb: c")}}), nil
	case "/set/host":
		return passed(&authv3.OkHttpResponse{HeadersToRemove: []string{"Host"}}), nil
	case "/set/query":
		return passed(&authv3.OkHttpResponse{QueryParametersToRemove: []string{"a"}}), nil
	case "/see":
		b, _ := json.Marshal(map[string]any{"method": http.GetMethod(), "path": http.GetPath(), "host": http.GetHost(), "headers": http.GetHeaders(), "protocol": http.GetProtocol()})
		return denied(200, string(b)), nil
	case "/self":
		return denied(200, self()), nil
	case "/connect":
		return denied(200, connect(argument)), nil
	}
	return passed(&authv3.OkHttpResponse{}), nil
}

func denied(code int, body string, headers ...*corev3.HeaderValueOption) *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &status.Status{Code: 16}, HttpResponse: &authv3.CheckResponse_DeniedResponse{
		DeniedResponse: &authv3.DeniedHttpResponse{Status: &typev3.HttpStatus{Code: typev3.StatusCode(code)}, Body: body, Headers: headers},
	}}
}

func passed(ok *authv3.OkHttpResponse) *authv3.CheckResponse {
	return &authv3.CheckResponse{Status: &status.Status{}, HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: ok}}
}

func header(key, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: key, Value: value}}
}

func overwritten(key, value string) *corev3.HeaderValueOption {
	h := header(key, value)
	h.AppendAction = corev3.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD
	return h
}

// self is what the plugin finds around it.
func self() string {
	var up []string
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		if i.Flags&net.FlagUp != 0 {
			up = append(up, i.Name)
		}
	}
	root := os.WriteFile("/written", nil, 0o600)
	tmp := os.WriteFile("/tmp/written", nil, 0o600)
	status, _ := os.ReadFile("/proc/self/status")
	var capabilities string
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			capabilities = strings.TrimSpace(v)
		}
	}
	_, vsock := os.Stat("/run/vsock")
	b, _ := json.Marshal(map[string]any{
		"uid": os.Getuid(), "gid": os.Getgid(), "pid": os.Getpid(), "up": len(up), "root": root == nil, "tmp": tmp == nil,
		"capabilities": capabilities, "vsock": vsock == nil, "config": os.Getenv("CLOISTER_PLUGIN_CONFIG"),
	})
	return string(b)
}

// connect asks the proxy for address, sends a word and returns what comes.
func connect(address string) string {
	c, err := net.Dial("unix", os.Getenv("CLOISTER_PLUGIN_PROXY"))
	if err != nil {
		return err.Error()
	}
	defer c.Close()
	fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %[1]s\r\n\r\n", address)
	b := bufio.NewReader(c)
	res, err := http.ReadResponse(b, &http.Request{Method: http.MethodConnect})
	if err != nil {
		return err.Error()
	}
	if res.StatusCode != http.StatusOK {
		return res.Status
	}
	fmt.Fprint(c, "word")
	c.(*net.UnixConn).CloseWrite()
	all, _ := io.ReadAll(b)
	return string(all)
}
