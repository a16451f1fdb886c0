package admit

import (
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"os"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// call is one HTTP request that can be sent again and again. What it allocates itself is small, and none of it is counted
// twice: the header of the answer and the reader of the body.
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

func BenchmarkReview(b *testing.B) {
	h := New(options, nil, nil, slog.New(slog.NewJSONHandler(io.Discard, nil)), prometheus.NewRegistry())
	for name, body := range map[string][]byte{"inject": reference(b), "skip": skipped(reference(b))} {
		c, server := newCall(b, body), h.HTTP()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.send(server)
			}
			b.SetBytes(int64(len(body)))
		})
	}
}
