package main

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"cloister.dev/cloister/internal/certs"
	"cloister.dev/cloister/webhook/admit"
	"cloister.dev/cloister/webhook/inject"
)

func TestConfigure(t *testing.T) {
	full := map[string]string{"DRIVER": "process", "INITBOOT_IMAGE": "i", "SIDECAR_IMAGE": "s", "POD_NAMESPACE": "n"}
	for name, tc := range map[string]struct {
		env   map[string]string
		args  []string
		plain []string // registries
		want  string   // part of the error
	}{
		"environment":    {env: full},
		"plain HTTP":     {env: map[string]string{"DRIVER": "process", "INITBOOT_IMAGE": "i", "SIDECAR_IMAGE": "s", "POD_NAMESPACE": "n", "PLAIN_HTTP_REGISTRIES": "a:5000,b"}, plain: []string{"a:5000", "b"}},
		"flag wins":      {env: full, args: []string{"-driver=nitro"}, want: "driver nitro is not built yet"},
		"qemu":           {env: map[string]string{"DRIVER": "qemu"}, want: "driver qemu is not built yet"},
		"unknown driver": {env: map[string]string{"DRIVER": "proces"}, want: `there is no driver "proces"`},
		"no driver":      {want: `there is no driver ""`},
		"no images":      {env: map[string]string{"DRIVER": "process", "SIDECAR_IMAGE": "s", "POD_NAMESPACE": "n"}, want: "INITBOOT_IMAGE is empty"},
	} {
		t.Run(name, func(t *testing.T) {
			options, namespace, err := configure(tc.args, func(k string) string { return tc.env[k] })
			switch {
			case tc.want == "" && (err != nil || namespace != "n" || !reflect.DeepEqual(options, inject.Options{Driver: "process", InitbootImage: "i", SidecarImage: "s", PlainHTTP: tc.plain})):
				t.Errorf("options %+v, namespace %q, error %v", options, namespace, err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestEndpoints(t *testing.T) {
	reg := prometheus.NewRegistry()
	h := admit.New(inject.Options{}, nil, slog.New(slog.DiscardHandler), reg)
	source := &certs.Source{Now: time.Now}
	for name, tc := range map[string]struct {
		handler http.Handler
		method  string
		path    string
		code    int
		body    string
	}{
		"healthy":          {plainMux(source, reg), http.MethodGet, "/healthz", http.StatusOK, "ok"},
		"not ready":        {plainMux(source, reg), http.MethodGet, "/readyz", http.StatusServiceUnavailable, "not been issued yet"},
		"metrics":          {plainMux(source, reg), http.MethodGet, "/metrics", http.StatusOK, "injection_seconds_bucket"},
		"admission by GET": {admitMux(h), http.MethodGet, "/inject", http.StatusMethodNotAllowed, ""},
		"admission of nil": {admitMux(h), http.MethodPost, "/inject", http.StatusOK, `"allowed":false`},
		"other path":       {admitMux(h), http.MethodPost, "/", http.StatusNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			tc.handler.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), tc.method, tc.path, nil))
			body, err := io.ReadAll(w.Result().Body)
			if err != nil {
				t.Fatal(err)
			}
			if w.Code != tc.code || !strings.Contains(string(body), tc.body) {
				t.Errorf("got %d %s", w.Code, body)
			}
		})
	}
}
