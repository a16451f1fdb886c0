package admit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	admissionv1 "k8s.io/api/admission/v1"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/inject"
)

// options are those of package inject's goldens.
var options = inject.Options{
	Driver:        inject.DriverProcess,
	InitbootImage: "cloister.dev/initboot@sha256:" + strings.Repeat("1", 64),
	SidecarImage:  "cloister.dev/sidecar@sha256:" + strings.Repeat("2", 64),
}

// review sends one pod through HTTP, as the API server does for a dry run.
func review(t testing.TB, h *Handler, pod []byte) *admissionv1.AdmissionResponse {
	t.Helper()
	return send(t, h, pod, true)
}

func send(t testing.TB, h *Handler, pod []byte, dryRun bool) *admissionv1.AdmissionResponse {
	t.Helper()
	body := fmt.Appendf(nil, `{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u-1","kind":{"group":"","version":"v1","kind":"Pod"},"resource":{"group":"","version":"v1","resource":"pods"},"namespace":"payments","name":"app","operation":"CREATE","dryRun":%t,"userInfo":{},"object":%s,"oldObject":null,"options":null}}`, dryRun, pod)
	req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/inject", bytes.NewReader(body))
	req.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	h.HTTP().ServeHTTP(w, req)
	var out admissionv1.AdmissionReview
	if err := json.Unmarshal(w.Body.Bytes(), &out); err != nil {
		t.Fatalf("status %d: %v\n%s", w.Code, err, w.Body)
	}
	if out.Response.UID != "u-1" {
		t.Errorf("uid %q", out.Response.UID)
	}
	return out.Response
}

func pod(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile("../inject/testdata/" + name + "/input.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if data, err = yaml.YAMLToJSON(data); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestHandle(t *testing.T) {
	var logged bytes.Buffer
	reg := prometheus.NewRegistry()
	h := New(options, nil, nil, slog.New(slog.NewJSONHandler(&logged, nil)), reg)

	skipped := review(t, h, pod(t, "no-annotation-of-ours"))
	if !skipped.Allowed || skipped.Patch != nil || len(skipped.Warnings) > 0 || skipped.AuditAnnotations["result"] != "skipped" {
		t.Errorf("skipped: %+v", skipped)
	}

	input := pod(t, "everything-that-is-carried")
	injected := review(t, h, input)
	ops, warnings, _ := inject.Patch(input, options)
	want, err := json.Marshal(ops)
	if err != nil {
		t.Fatal(err)
	}
	if !injected.Allowed || *injected.PatchType != admissionv1.PatchTypeJSONPatch || injected.AuditAnnotations["result"] != "injected" {
		t.Errorf("injected: %+v", injected)
	}
	if diff := cmp.Diff(string(want), string(injected.Patch)); diff != "" {
		t.Errorf("patch (-want +got):\n%s", diff)
	}
	if !strings.HasPrefix(injected.AuditAnnotations["measurements"], `{"PCR16":"`) {
		t.Errorf("audited %q", injected.AuditAnnotations)
	}
	if diff := cmp.Diff(warnings, injected.Warnings); diff != "" {
		t.Errorf("warnings (-want +got):\n%s", diff)
	}

	input = pod(t, "denied-everything-at-once")
	denied := review(t, h, input)
	_, _, errs := inject.Patch(input, options)
	reason, _ := inject.ReasonOf(errs[0])
	if denied.Allowed || denied.Patch != nil || denied.Result.Code != http.StatusForbidden || denied.Result.Reason != "Invalid" {
		t.Errorf("denied: %+v", denied)
	}
	for _, want := range []string{"name it by digest", "a persistent volume claim"} {
		if !strings.Contains(denied.Result.Message, want) {
			t.Errorf("message lacks %q: %s", want, denied.Result.Message)
		}
	}
	if n := len(denied.Result.Details.Causes); denied.AuditAnnotations["reasons"] != fmt.Sprint(n) || denied.AuditAnnotations["reason"] != string(reason) || n < 40 {
		t.Errorf("%d causes, audited %q", n, denied.AuditAnnotations)
	}

	scrape := httptest.NewRecorder()
	promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(scrape, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	for _, want := range []string{
		`injections_total{reason="",result="injected"} 1`,
		`injections_total{reason="",result="skipped"} 1`,
		`injections_total{reason="` + string(reason) + `",result="denied"} 1`,
		`injection_seconds_count 3`,
	} {
		if !strings.Contains(scrape.Body.String(), want+"\n") {
			t.Errorf("the metrics lack %s:\n%s", want, scrape.Body)
		}
	}
	// Values of the environment may be secrets.
	if strings.Contains(logged.String(), "GREETING") || strings.Contains(logged.String(), "hello") {
		t.Errorf("the log tells what is in the pod: %s", &logged)
	}
}

// TestGarbage: what is not a pod is refused, whatever it is.
func TestGarbage(t *testing.T) {
	h := New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	for _, object := range []string{`[]`, `"x"`, `{"metadata":{"annotations":{"cloister.dev/enclave":5}}}`, `{"metadata":{"annotations":{"cloister.dev/enclave":"a"}},"spec":{"containers":{}}}`} {
		if r := review(t, h, []byte(object)); r.Allowed {
			t.Errorf("%s was allowed", object)
		}
	}
}

// TestClaimedLength: who says that much will come gets no memory before it has come.
func TestClaimedLength(t *testing.T) {
	h := New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry()).HTTP()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10 {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/inject", strings.NewReader("{}"))
		r.Header.Set("Content-Type", "application/json")
		r.ContentLength = maxReview
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 10*2*usualReview {
		t.Errorf("10 requests took %d bytes", n)
	}
}

// TestLargeReviews: of those only some are worked on at a time, and the usual ones do not wait for them.
func TestLargeReviews(t *testing.T) {
	h := New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry()).HTTP()
	serve := func(ctx context.Context, body io.Reader, length int64) int {
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/inject", body)
		r.Header.Set("Content-Type", "application/json")
		r.ContentLength = length
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Code
	}
	var slow sync.WaitGroup
	var bodies []*io.PipeWriter
	for i := range largeAtOnce {
		r, w := io.Pipe()
		bodies = append(bodies, w)
		length := int64(-1)
		if i > 0 {
			length = usualReview + 1
		}
		slow.Go(func() {
			if code := serve(t.Context(), r, length); code != http.StatusBadRequest {
				t.Errorf("a slow one got %d", code)
			}
		})
		if _, err := w.Write([]byte("{")); err != nil { // it has been let in
			t.Fatal(err)
		}
	}
	if code := serve(t.Context(), strings.NewReader("{"), 1); code != http.StatusBadRequest {
		t.Errorf("a small one got %d", code)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if code := serve(gone, strings.NewReader("{"), usualReview+1); code != http.StatusServiceUnavailable {
		t.Errorf("one too many got %d", code)
	}
	for _, w := range bodies {
		w.Close()
	}
	slow.Wait()
	if code := serve(t.Context(), strings.NewReader("{"), usualReview+1); code != http.StatusBadRequest {
		t.Errorf("one afterwards got %d", code)
	}
}

// TestNoReview: what is not an admission review of the version that is registered gets no answer that an API
// server could take for one.
func TestNoReview(t *testing.T) {
	const request = `"request":{"uid":"u","object":{}}`
	for name, tc := range map[string]struct{ contentType, body, want string }{
		"other type":    {"text/plain", `{}`, "send application/json"},
		"not JSON":      {"application/json", `{`, "decode request"},
		"nothing":       {"application/json", ``, "decode request"},
		"a list":        {"application/json", `[]`, "decode request"},
		"other version": {"application/json", `{"apiVersion":"admission.k8s.io/v1beta1","kind":"AdmissionReview",` + request + `}`, "admission.k8s.io/v1 "},
		"other kind":    {"application/json", `{"apiVersion":"admission.k8s.io/v1","kind":"Pod",` + request + `}`, "send an AdmissionReview"},
		"other case":    {"application/json", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","Request":{}}`, "with a request"},
		"no request":    {"application/json", `{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview"}`, "with a request"},
		"too large":     {"application/json", strings.Repeat(" ", maxReview+1), "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			h := New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
			r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/inject", strings.NewReader(tc.body))
			r.Header.Set("Content-Type", tc.contentType)
			w := httptest.NewRecorder()
			h.HTTP().ServeHTTP(w, r)
			if w.Code != http.StatusBadRequest || !strings.Contains(w.Body.String(), tc.want) {
				t.Errorf("status %d, %q, want 400 and %q", w.Code, w.Body, tc.want)
			}
		})
	}
}

// TestPanic: a panic of the decision refuses the pod and ends nothing else.
func TestPanic(t *testing.T) {
	h := New(options, func(context.Context, string) (string, error) { panic("resolver") }, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if r := review(t, h, pod(t, "image-by-tag")); r.Allowed || r.Result.Code != http.StatusInternalServerError {
		t.Errorf("%+v", r)
	}
}

func BenchmarkHandle(b *testing.B) {
	h := New(options, nil, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	for _, name := range []string{"deployment-completed-by-the-api-server", "no-annotation-of-ours"} {
		input := pod(b, name)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				review(b, h, input)
			}
		})
	}
}
