package plugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"golang.org/x/net/http/httpguts"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"cloister.dev/cloister/enclaved/gateway"
)

// Authorize asks the plugins in their order. The first that refuses decides; each sees the headers that
// those before it have set. A plugin that is not required is left out while it is down. One that runs and
// gives no answer is not: a client could bring that about with its request.
func (s *Set) Authorize(r *http.Request) *gateway.Verdict {
	all := &gateway.Verdict{Set: http.Header{}, Response: http.Header{}}
	for _, p := range s.plugins {
		v, err := p.check(r, all)
		switch {
		case err == nil:
			p.answered()
		case r.Context().Err() != nil: // the client has gone
			panic(http.ErrAbortHandler)
		default:
			p.failed(err)
			if p.manifest.Required || !errors.Is(err, errDown) {
				return &gateway.Verdict{
					Status:   http.StatusServiceUnavailable,
					Response: http.Header{"Retry-After": {"1"}},
					Body:     fmt.Sprintf("The plugin %s, which must check this request, gives no answer: try again.\n", p.manifest.Name),
				}
			}
			continue
		}
		if v.Status != 0 {
			return v
		}
		for name, values := range v.Set {
			all.Set[name] = values
		}
		for name, values := range v.Response {
			all.Response[name] = append(all.Response[name], values...)
		}
		all.Remove = append(all.Remove, v.Remove...)
	}
	return all
}

var errDown = errors.New("the plugin is down")

// check asks one plugin about r with the headers that before has set.
func (p *instance) check(r *http.Request, before *gateway.Verdict) (*gateway.Verdict, error) {
	conn := p.conn.Load()
	if conn == nil {
		return nil, errDown
	}
	ctx, cancel := context.WithTimeout(r.Context(), p.manifest.Timeout())
	defer cancel()
	res, err := authv3.NewAuthorizationClient(conn).Check(ctx, request(r, before))
	if err != nil {
		return nil, err
	}
	return p.verdict(res)
}

// answered and failed log when a plugin begins to fail, and when that is over.
func (p *instance) answered() {
	if p.failing.Load() && p.failing.CompareAndSwap(true, false) {
		slog.Info("the plugin answers again", "plugin", p.manifest.Name)
	}
}

func (p *instance) failed(err error) {
	if p.failing.CompareAndSwap(false, true) {
		slog.Warn("the plugin gives no answer to a request", "plugin", p.manifest.Name, "required", p.manifest.Required, "error", err)
	}
}

// request describes r as Envoy does (envoy.service.auth.v3.AttributeContext): the path with its query,
// headers in lower case with several values joined, pseudo-headers among them. What is no UTF-8, which a
// protobuf cannot carry, becomes "!".
func request(r *http.Request, before *gateway.Verdict) *authv3.CheckRequest {
	headers := make(map[string]string, len(r.Header)+4)
	for name, values := range r.Header {
		if slices.ContainsFunc(before.Remove, func(n string) bool { return strings.EqualFold(n, name) }) {
			continue
		}
		separator := ","
		if name == "Cookie" {
			separator = "; "
		}
		headers[strings.ToLower(name)] = plain(strings.Join(values, separator))
	}
	for name, values := range before.Set {
		headers[strings.ToLower(name)] = plain(strings.Join(values, ","))
	}
	// What goes to the workload, not decoded.
	method, path, host := plain(r.Method), plain(r.URL.RequestURI()), plain(r.Host)
	headers[":method"], headers[":path"], headers[":authority"] = method, path, host
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Request: &authv3.AttributeContext_Request{
			Time: timestamppb.New(time.Now()),
			Http: &authv3.AttributeContext_HttpRequest{
				Method: method, Path: path, Host: host, Protocol: r.Proto,
				Headers: headers, Size: r.ContentLength,
			},
		},
	}}
}

func plain(s string) string { return strings.ToValidUTF8(s, "!") }

// verdict reads a plugin's answer. One that cannot be honoured is an error.
func (p *instance) verdict(res *authv3.CheckResponse) (*gateway.Verdict, error) {
	v := &gateway.Verdict{Set: http.Header{}, Response: http.Header{}}
	if code := codes.Code(res.GetStatus().GetCode()); code != codes.OK {
		denied := res.GetDeniedResponse()
		v.Status, v.Body = int(denied.GetStatus().GetCode()), denied.GetBody()
		if v.Status == 0 {
			v.Status = http.StatusForbidden
		}
		if v.Status < 200 || v.Status > 599 {
			return nil, fmt.Errorf("the plugin refuses with the status %d", v.Status)
		}
		return v, addResponse(v.Response, denied.GetHeaders())
	}
	if res.GetDeniedResponse() != nil {
		return nil, errors.New("the plugin's answer says OK and how it is refused")
	}
	ok := res.GetOkResponse()
	if len(ok.GetQueryParametersToSet())+len(ok.GetQueryParametersToRemove()) > 0 {
		return nil, errors.New("the plugin changes the query, which is not supported")
	}
	for _, o := range ok.GetHeaders() {
		name, value := strings.ToLower(o.GetHeader().GetKey()), headerValue(o.GetHeader())
		if !slices.Contains(p.headers, name) {
			return nil, fmt.Errorf("the plugin sets the header %q, which its manifest entry does not list", name)
		}
		if !httpguts.ValidHeaderFieldValue(value) {
			return nil, fmt.Errorf("the plugin sets the header %q to what is no header value", name)
		}
		// The client's own value is gone already, so this is about several of one plugin's.
		if name := http.CanonicalHeaderKey(name); o.GetAppendAction() == corev3.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD {
			v.Set.Add(name, value)
		} else {
			v.Set.Set(name, value)
		}
	}
	for _, name := range ok.GetHeadersToRemove() {
		if !httpguts.ValidHeaderFieldName(name) || strings.EqualFold(name, "host") {
			return nil, fmt.Errorf("the plugin removes the header %q, which cannot be removed", name)
		}
		v.Remove = append(v.Remove, http.CanonicalHeaderKey(name))
	}
	return v, addResponse(v.Response, ok.GetResponseHeadersToAdd())
}

// framing are headers of an answer that say where it ends or what the connection does: the gateway's own.
var framing = []string{"Connection", "Content-Length", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// addResponse adds headers of the answer.
func addResponse(h http.Header, list []*corev3.HeaderValueOption) error {
	for _, o := range list {
		name, value := http.CanonicalHeaderKey(o.GetHeader().GetKey()), headerValue(o.GetHeader())
		if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) || slices.Contains(framing, name) {
			return fmt.Errorf("the plugin's answer has the header %q, which cannot be sent", name)
		}
		h.Add(name, value)
	}
	return nil
}

func headerValue(h *corev3.HeaderValue) string {
	if b := h.GetRawValue(); len(b) > 0 {
		return string(b)
	}
	return h.GetValue()
}
