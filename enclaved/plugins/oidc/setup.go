package oidc

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"cloister.dev/cloister/workload"
)

// Setup reads the plugin's configuration, a workload.OIDC. Dial is the way to the issuer.
func Setup(config json.RawMessage, dial func(ctx context.Context, address string) (net.Conn, error)) (*Plugin, error) {
	entry := workload.Plugin{Type: workload.PluginAuthentication, Builtin: "oidc", Config: config}
	c, err := entry.BuiltinConfig()
	if err != nil {
		return nil, fmt.Errorf("configuration of oidc: %w", err)
	}
	oidc := c.(*workload.OIDC)
	roots, err := oidc.Roots()
	if err != nil {
		return nil, err
	}
	client := &http.Client{
		Timeout: fetchTimeout,
		Transport: &http.Transport{
			DialContext:     func(ctx context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) },
			TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
			// Asked every few minutes: a connection is not worth keeping.
			DisableKeepAlives: true,
			ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("the issuer sends us elsewhere, which is not followed")
		},
	}
	return newPlugin(oidc, newKeySet(func(ctx context.Context) ([]key, error) { return fetchKeys(ctx, client, oidc.Issuer) }), time.Now), nil
}
