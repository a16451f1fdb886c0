package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionregv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"cloister.dev/cloister/internal/certs"
	"cloister.dev/cloister/webhook/admit"
	"cloister.dev/cloister/webhook/inject"
)

func TestConfigure(t *testing.T) {
	full := map[string]string{"DRIVER": "process", "INITBOOT_IMAGE": "i", "SIDECAR_IMAGE": "s", "POD_NAMESPACE": "n"}
	with := func(pairs ...string) map[string]string {
		env := maps.Clone(full)
		for i := 0; i < len(pairs); i += 2 {
			env[pairs[i]] = pairs[i+1]
		}
		return env
	}
	options := inject.Options{Driver: "process", InitbootImage: "i", SidecarImage: "s", HugePages: "2Mi"}
	plain, nitro, small := options, options, options
	plain.PlainHTTP = []string{"a:5000", "b"}
	nitro.Driver, nitro.HugePages, nitro.EnclaveCPUs, nitro.DeviceGroup = "nitro", "1Gi", true, 989
	small.Driver = "nitro"
	for name, tc := range map[string]struct {
		env     map[string]string
		args    []string
		options inject.Options
		want    string // part of the error
		name    string // of the configuration
	}{
		"environment":    {env: full, options: options, name: "00-cloister"},
		"a revision":     {env: full, args: []string{"-revision=canary"}, options: options, name: "00-cloister-canary"},
		"plain HTTP":     {env: full, args: []string{"-plain-http-registries=a:5000,b"}, options: plain, name: "00-cloister"},
		"flag wins":      {env: full, args: []string{"-driver=nitro"}, options: small, name: "00-cloister"},
		"nitro":          {env: with("DRIVER", "nitro", "HUGEPAGES", "1Gi", "ENCLAVE_CPUS", "true", "DEVICE_GROUP", "989"), options: nitro, name: "00-cloister"},
		"qemu":           {env: map[string]string{"DRIVER": "qemu"}, want: `there is no driver "qemu"`},
		"unknown driver": {env: map[string]string{"DRIVER": "proces"}, want: `there is no driver "proces"`},
		"no driver":      {want: `there is no driver ""`},
		"no images":      {env: map[string]string{"DRIVER": "process", "SIDECAR_IMAGE": "s", "POD_NAMESPACE": "n"}, want: "INITBOOT_IMAGE is empty"},
		"page size":      {env: with("DRIVER", "nitro", "HUGEPAGES", "4Ki"), want: "set HUGEPAGES to 2Mi or 1Gi"},
		"group's name":   {env: with("DEVICE_GROUP", "ne"), want: `DEVICE_GROUP is "ne"`},
		"vCPUs":          {env: with("ENCLAVE_CPUS", "4"), want: `ENCLAVE_CPUS is "4"`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := configure(tc.args, func(k string) string { return tc.env[k] })
			switch {
			case tc.want == "" && (err != nil || got.namespace != "n" || got.named(configuration) != tc.name || !reflect.DeepEqual(got.Options, tc.options)):
				t.Errorf("%+v, error %v", got, err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

func TestEndpoints(t *testing.T) {
	reg := prometheus.NewRegistry()
	h := admit.New(inject.Options{}, nil, nil, slog.New(slog.DiscardHandler), reg)
	check := &selfCheck{source: &certs.Source{Now: time.Now}}
	var draining atomic.Bool
	for name, tc := range map[string]struct {
		handler http.Handler
		method  string
		path    string
		code    int
		body    string
	}{
		"healthy":          {plainMux(check, &draining, reg), http.MethodGet, "/healthz", http.StatusOK, "ok"},
		"not ready":        {plainMux(check, &draining, reg), http.MethodGet, "/readyz", http.StatusServiceUnavailable, "not been issued yet"},
		"metrics":          {plainMux(check, &draining, reg), http.MethodGet, "/metrics", http.StatusOK, "injection_seconds_bucket"},
		"admission by GET": {admitMux(h, h), http.MethodGet, "/inject", http.StatusMethodNotAllowed, ""},
		"admission of nil": {admitMux(h, h), http.MethodPost, "/inject", http.StatusBadRequest, "send application/json"},
		"other path":       {admitMux(h, h), http.MethodPost, "/", http.StatusNotFound, ""},
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

// replica is the TLS side of a webhook.
type replica struct {
	now   time.Time
	check *selfCheck
	asked atomic.Int32
}

// newReplica serves handler, whose pods are those of the self check.
func newReplica(t *testing.T, handler admission.Handler) *replica {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), admissionregv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	r := &replica{now: time.Now()}
	source := &certs.Source{
		Client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(&admissionregv1.MutatingWebhookConfiguration{
			ObjectMeta: metav1.ObjectMeta{Name: configuration},
			Webhooks:   []admissionregv1.MutatingWebhook{{Name: "inject.cloister.dev"}},
		}).Build(),
		Namespace: "cloister-system", Secret: secret, Service: service, Target: certs.MutatingWebhook(configuration),
		Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return r.now },
	}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", tlsConfig(source))
	if err != nil {
		t.Fatal(err)
	}
	hook := &admission.Webhook{Handler: handler}
	s := server(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.asked.Add(1)
		hook.ServeHTTP(w, req)
	}))
	s.ErrorLog = log.New(io.Discard, "", 0)
	go s.Serve(listener)
	t.Cleanup(func() { s.Close() })
	r.check = &selfCheck{source: source, url: "https://" + listener.Addr().String() + selfPath}
	return r
}

// ready brings the certificates in step and checks.
func (r *replica) ready(t *testing.T) error {
	t.Helper()
	if err := r.check.source.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r.check.ready(t.Context())
}

func TestSelfCheck(t *testing.T) {
	options := inject.Options{Driver: inject.DriverProcess, InitbootImage: "i", SidecarImage: "s"}
	r := newReplica(t, admit.New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry()))
	if err := r.check.ready(t.Context()); err == nil {
		t.Error("ready without a certificate")
	}
	for range 3 {
		if err := r.ready(t); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.asked.Load(); n != 1 {
		t.Errorf("asked %d times about one certificate", n)
	}
	r.now = r.now.Add(17 * time.Hour) // a new certificate
	if err := r.ready(t); err != nil {
		t.Error(err)
	}
	if n := r.asked.Load(); n != 2 {
		t.Errorf("asked %d times about two certificates", n)
	}
}

func TestSelfCheckFails(t *testing.T) {
	for name, tc := range map[string]struct {
		answer admission.Response
		want   string
	}{
		"denied":       {admission.Denied("no"), "denied: no"},
		"not injected": {admission.Allowed(""), "not injected"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newReplica(t, admission.HandlerFunc(func(context.Context, admission.Request) admission.Response { return tc.answer }))
			for range 2 {
				if err := r.ready(t); err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("ready: %v", err)
				}
			}
			if n := r.asked.Load(); n != 2 {
				t.Errorf("asked %d times", n)
			}
		})
	}
	t.Run("another certificate", func(t *testing.T) {
		r := newReplica(t, admission.HandlerFunc(func(context.Context, admission.Request) admission.Response { return admission.Allowed("") }))
		other := newReplica(t, admission.HandlerFunc(nil))
		r.check.url = other.check.url
		if err := other.check.source.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := r.ready(t); err == nil || !strings.Contains(err.Error(), "unknown authority") {
			t.Errorf("ready: %v", err)
		}
	})
}

// TestLeaving: a client that keeps its connection is sent away by the answer, not by a closed connection.
func TestLeaving(t *testing.T) {
	var draining atomic.Bool
	s := httptest.NewServer(leaving(&draining, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })))
	t.Cleanup(s.Close)
	for _, leaves := range []bool{false, true} {
		draining.Store(leaves)
		resp, err := s.Client().Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.Close != leaves || resp.StatusCode != http.StatusOK {
			t.Errorf("draining %t: %s, close %t", leaves, resp.Status, resp.Close)
		}
	}
	w := httptest.NewRecorder()
	plainMux(newReplica(t, admission.HandlerFunc(nil)).check, &draining, prometheus.NewRegistry()).
		ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/readyz", nil))
	if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "ending") {
		t.Errorf("ready while it ends: %d %s", w.Code, w.Body)
	}
}
