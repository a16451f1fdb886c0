// Package oidc is the built-in authentication plugin for OAuth 2.0 bearer tokens (RFC 6750) that are signed
// JWTs (RFC 7519, RFC 9068) of one OpenID Connect issuer. See README.md.
package oidc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/go-jose/go-jose/v4"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/workload"
)

// Plugin decides on requests by their bearer token.
type Plugin struct {
	authv3.UnimplementedAuthorizationServer
	config     *workload.OIDC
	algorithms []jose.SignatureAlgorithm
	claims     map[string]string // header to claim
	keys       *keySet
	now        func() time.Time
}

func newPlugin(c *workload.OIDC, keys *keySet, now func() time.Time) *Plugin {
	p := &Plugin{config: c, claims: claims(c), keys: keys, now: now}
	for _, a := range c.AcceptedAlgorithms() {
		p.algorithms = append(p.algorithms, jose.SignatureAlgorithm(a))
	}
	return p
}

// Run keeps the issuer's keys fresh until ctx ends. The plugin serves while it has some.
func (p *Plugin) Run(ctx context.Context, serving func(bool)) { p.keys.run(ctx, serving) }

// Check implements authv3.AuthorizationServer. It fails when the issuer's keys are not known: that is no
// decision about the token.
func (p *Plugin) Check(ctx context.Context, r *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	token, err := bearer(r.GetAttributes().GetRequest().GetHttp().GetHeaders()["authorization"])
	var claims map[string]json.RawMessage
	if err == nil {
		claims, err = p.verify(ctx, token)
	}
	var headers []*corev3.HeaderValueOption
	if err == nil {
		headers, err = p.headers(claims)
	}
	var refused *refusal
	switch {
	case err == nil:
		return &authv3.CheckResponse{
			Status:       &rpcstatus.Status{Code: int32(codes.OK)},
			HttpResponse: &authv3.CheckResponse_OkResponse{OkResponse: &authv3.OkHttpResponse{Headers: headers}},
		}, nil
	case errors.As(err, &refused):
		return p.deny(refused), nil
	}
	return nil, status.Error(codes.Unavailable, err.Error())
}

// headers hands the claims on. One that the token lacks has no header.
func (p *Plugin) headers(claims map[string]json.RawMessage) ([]*corev3.HeaderValueOption, error) {
	var out []*corev3.HeaderValueOption
	for _, name := range slices.Sorted(maps.Keys(p.claims)) {
		claim := claims[p.claims[name]]
		if claim == nil || string(claim) == "null" {
			continue
		}
		value, ok := headerOf(claim)
		if !ok {
			return nil, invalid("a claim of the token cannot be handed on as a header")
		}
		out = append(out, option(name, value))
	}
	return out, nil
}

// deny answers with a challenge (RFC 6750, section 3).
func (p *Plugin) deny(r *refusal) *authv3.CheckResponse {
	challenge := `Bearer realm="cloister"`
	if r.code != "" {
		challenge += fmt.Sprintf(`, error="%s", error_description="%s"`, r.code, r.description)
	}
	if len(p.config.Scopes) > 0 && r.code != "invalid_request" {
		challenge += fmt.Sprintf(`, scope="%s"`, strings.Join(p.config.Scopes, " "))
	}
	code := codes.Unauthenticated
	if r.status == 403 {
		code = codes.PermissionDenied
	}
	return &authv3.CheckResponse{
		Status: &rpcstatus.Status{Code: int32(code)},
		HttpResponse: &authv3.CheckResponse_DeniedResponse{DeniedResponse: &authv3.DeniedHttpResponse{
			Status:  &typev3.HttpStatus{Code: typev3.StatusCode(r.status)},
			Headers: []*corev3.HeaderValueOption{option("www-authenticate", challenge)},
			Body:    r.description + "\n",
		}},
	}
}

func option(name, value string) *corev3.HeaderValueOption {
	return &corev3.HeaderValueOption{Header: &corev3.HeaderValue{Key: name, Value: value}}
}
