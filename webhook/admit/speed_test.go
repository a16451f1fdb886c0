package admit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	kjson "sigs.k8s.io/json"
)

// call is one HTTP request that can be sent again and again, and takes its answer.
type call struct {
	request *http.Request
	body    []byte
	header  http.Header
	answer  bytes.Buffer
}

func newCall(t testing.TB, body []byte) *call {
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/inject", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.ContentLength = int64(len(body))
	return &call{request: r, body: body, header: http.Header{}}
}

func (c *call) Header() http.Header         { return c.header }
func (c *call) WriteHeader(int)             {}
func (c *call) Write(b []byte) (int, error) { return c.answer.Write(b) }

func (c *call) send(h http.Handler) {
	c.answer.Reset()
	c.request.Body = io.NopCloser(bytes.NewReader(c.body))
	h.ServeHTTP(c, c.request)
}

func reference(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/review.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func skipped(review []byte) []byte {
	return bytes.Replace(review, []byte("cloister.dev/enclave"), []byte("example.org/enclaves"), 1)
}

func quietHandler() http.Handler {
	return New(options, nil, nil, slog.New(slog.NewJSONHandler(io.Discard, nil)), prometheus.NewRegistry()).HTTP()
}

// decodeOnly is a server that does no more than decode the review and its pod, and list what is unknown in it.
func decodeOnly(t testing.TB) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		review, err := readReview(w, r)
		if err != nil {
			t.Fatal(err)
		}
		var pod corev1.Pod
		if unknown, err := kjson.UnmarshalStrict(review.Request.Object.Raw, &pod, kjson.DisallowUnknownFields); err != nil || len(unknown) > 0 {
			t.Fatal(unknown, err)
		}
	})
}

// TestAllocations: what one admission costs, from the body of the request to that of the answer, in
// allocations, which do not depend on the machine. Counted is everything in ServeHTTP, and the two
// allocations that make the request's body; TLS and the HTTP server are the same for every webhook.
func TestAllocations(t *testing.T) {
	for name, tc := range map[string]struct {
		body []byte
		most float64
	}{"inject": {reference(t), 350}, "skip": {skipped(reference(t)), 50}} {
		t.Run(name, func(t *testing.T) {
			c, server := newCall(t, tc.body), quietHandler()
			if n := testing.AllocsPerRun(100, func() { c.send(server) }); n > tc.most {
				t.Errorf("%.0f allocations, at most %.0f", n, tc.most)
			}
			if got := bytes.Contains(c.answer.Bytes(), []byte(`"patch":`)); got != (name == "inject") || !bytes.Contains(c.answer.Bytes(), []byte(`"allowed":true`)) {
				t.Errorf("answer %s", &c.answer)
			}
		})
	}
}

// withEnv adds variables of 6 to 9 bytes to the reference review.
func withEnv(t testing.TB, n int) []byte {
	t.Helper()
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `{"name":"V%d","value":"%d"},`, i, i)
	}
	const at = `"env":[`
	out := bytes.Replace(reference(t), []byte(at), []byte(at+b.String()), 1)
	if n > 0 && len(out) == len(reference(t)) {
		t.Fatal("the reference review has no env")
	}
	return out
}

// TestAllocationsOfEnv: variables cost their decoding and nothing else.
func TestAllocationsOfEnv(t *testing.T) {
	count := func(n int, server http.Handler) float64 {
		c := newCall(t, withEnv(t, n))
		return testing.AllocsPerRun(20, func() { c.send(server) })
	}
	few := count(10, quietHandler()) - count(10, decodeOnly(t))
	many := count(2000, quietHandler()) - count(2000, decodeOnly(t))
	// Buffers that grow to the size of the manifest and of the answer do so in steps.
	if many-few > 50 {
		t.Errorf("beyond decoding, %.0f allocations for 10 variables and %.0f for 2000", few, many)
	}
}

// TestManifestTooLarge: a pod whose manifest does not fit into one environment variable is denied, and the
// sentence has both sizes.
func TestManifestTooLarge(t *testing.T) {
	c := newCall(t, withEnv(t, 8000))
	c.send(quietHandler())
	var got admissionv1.AdmissionReview
	if err := json.Unmarshal(c.answer.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if r := got.Response; r.Allowed || !regexp.MustCompile(`\d{6} bytes.*131072`).MatchString(r.Result.Message) {
		t.Errorf("%+v", r)
	}
}

func BenchmarkReview(b *testing.B) {
	for name, body := range map[string][]byte{"inject": reference(b), "skip": skipped(reference(b)), "inject, 2000 variables": withEnv(b, 2000)} {
		c, server := newCall(b, body), quietHandler()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.send(server)
			}
		})
	}
}
