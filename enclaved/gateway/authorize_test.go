package gateway_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

func TestAuthorize(t *testing.T) {
	var asked, reached atomic.Int64
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		w.Header().Set("X-Answer", "workload")
		echo(w, r)
	}))
	e := newEnclaveWith(t, nsmtest.New(t), gateway.Config{
		Manifest: &workload.Manifest{Ports: []workload.Port{{Port: port}}},
		Reserved: []string{"x-user"},
		Authorize: func(r *http.Request) *gateway.Verdict {
			asked.Add(1)
			for name := range r.Header {
				if strings.Contains(strings.ToLower(name), "cloister") || strings.EqualFold(name, "x-user") {
					t.Errorf("it is asked about the client's own %s", name)
				}
			}
			switch r.URL.Path {
			case "/refused":
				return &gateway.Verdict{Status: 401, Body: "no", Response: http.Header{"Www-Authenticate": {"Bearer"}}}
			case "/elsewhere":
				return &gateway.Verdict{Status: 302, Response: http.Header{"Location": {"https://id.example/"}}}
			}
			return &gateway.Verdict{
				Set:      http.Header{"X-User": {"ada"}, "X-Cloister-Sub": {"1"}},
				Remove:   []string{"Authorization"},
				Response: http.Header{"X-Checked": {"yes"}},
			}
		},
	})
	forged := http.Header{
		"X-User": {"root"}, "X_user": {"root"}, "x.USER": {"root"}, "X-Cloister-Sub": {"root", "root"}, "X-Cloister_Sub": {"root"},
		"X-Cloister-Other": {"root"}, "Authorization": {"Bearer secret"}, "X-Users": {"kept"}, "User-Agent": {""},
	}
	for _, http2 := range []bool{false, true} {
		t.Run(fmt.Sprintf("HTTP/2 %t", http2), func(t *testing.T) {
			client := e.client(t, port, http2)
			do := func(path string) (*http.Response, string) {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://app.example"+path, strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				req.Header = forged.Clone()
				res, err := client.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				b, err := io.ReadAll(res.Body)
				if err != nil {
					t.Fatal(err)
				}
				return res, string(b)
			}
			reached.Store(0)
			counted, _ := e.Requests()
			res, body := do("/refused")
			if res.StatusCode != 401 || body != "no" || res.Header.Get("Www-Authenticate") != "Bearer" || res.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
				t.Errorf("refused: %d %v %q", res.StatusCode, res.Header, body)
			}
			if res, _ = do("/elsewhere"); res.StatusCode != 302 || res.Header.Get("Location") != "https://id.example/" {
				t.Errorf("sent elsewhere: %d %v", res.StatusCode, res.Header)
			}
			if n := reached.Load(); n != 0 {
				t.Errorf("%d refused requests have reached the workload", n)
			}
			if total, _ := e.Requests(); total != counted {
				t.Errorf("%d refused requests are counted as the workload's", total-counted)
			}
			res, body = do("/")
			if res.StatusCode != 200 || res.Header.Get("X-Checked") != "yes" || res.Header.Get("X-Answer") != "workload" {
				t.Errorf("passed: %d %v", res.StatusCode, res.Header)
			}
			var got seen
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatal(err)
			}
			want := http.Header{
				"Content-Length": {"4"}, "X-Cloister-Sub": {"1"}, "X-User": {"ada"}, "X-Users": {"kept"}, "X-Forwarded-Proto": {"https"},
			}
			if diff := cmp.Diff(want, got.Header); diff != "" {
				t.Errorf("headers (-want +got):\n%s", diff)
			}
			if got.Body != "body" {
				t.Errorf("body %q", got.Body)
			}
		})
	}
	// The gateway's own page is not the workload's.
	before := asked.Load()
	res, err := e.client(t, port, false).Get("https://app.example/.well-known/cloister/attestation?nonce=00")
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 || asked.Load() != before {
		t.Errorf("an attestation document: status %d", res.StatusCode)
	}
}

// A client cannot send what only the gateway sets by other ways: as a trailer, announced or not, or by
// naming it a hop-by-hop field, which would remove what the gateway has set.
func TestReservedHeaders(t *testing.T) {
	type result struct {
		Sub     []string
		Trailer []string
	}
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		out := result{Sub: r.Header["X-Cloister-Sub"]}
		for name := range r.Trailer {
			out.Trailer = append(out.Trailer, name)
		}
		slices.Sort(out.Trailer)
		json.NewEncoder(w).Encode(out)
	}))
	e := newEnclaveWith(t, nsmtest.New(t), gateway.Config{
		Manifest: &workload.Manifest{Ports: []workload.Port{{Port: port}}},
		Authorize: func(*http.Request) *gateway.Verdict {
			return &gateway.Verdict{Set: http.Header{"X-Cloister-Sub": {"1"}}}
		},
	})
	const chunked = "POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
	const body = "\r\n1\r\na\r\n0\r\n"
	for name, test := range map[string]struct {
		request string
		want    result
	}{
		"hop by hop":          {"GET / HTTP/1.1\r\nHost: x\r\nConnection: close, X-Cloister-Sub\r\n\r\n", result{Sub: []string{"1"}}},
		"announced trailer":   {chunked + "Trailer: X-Cloister-Sub, X-A\r\n" + body + "X-Cloister-Sub: 2\r\nX-A: 1\r\n\r\n", result{[]string{"1"}, []string{"X-A"}}},
		"unannounced trailer": {chunked + "Trailer: X-A\r\n" + body + "X-Cloister-Sub: 2\r\nx_cloister_sub: 2\r\nX-A: 1\r\n\r\n", result{[]string{"1"}, []string{"X-A"}}},
		"trailer alone":       {chunked + body + "X-Cloister-Sub: 2\r\n\r\n", result{Sub: []string{"1"}}},
	} {
		t.Run(name, func(t *testing.T) {
			c := e.dial(t, port, "http/1.1")
			io.WriteString(c, test.request)
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			var got result
			if err := json.NewDecoder(res.Body).Decode(&got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// What decides sees the headers that the workload will get: none that a client has made end at the gateway,
// and none that looks like a proxy's.
func TestHeadersOfTheHop(t *testing.T) {
	asked, got := make(chan http.Header, 1), make(chan http.Header, 1)
	port := serveWorkload(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header.Clone() }))
	e := newEnclaveWith(t, nsmtest.New(t), gateway.Config{
		Manifest: &workload.Manifest{Ports: []workload.Port{{Port: port}}},
		Authorize: func(r *http.Request) *gateway.Verdict {
			asked <- r.Header.Clone()
			return &gateway.Verdict{}
		},
		Observe: func(r *http.Request, _ uint32) func(int) {
			r.Header.Set("Traceparent", "mine")
			return func(int) {}
		},
	})
	c := e.dial(t, port, "http/1.1")
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nUser-Agent: x\r\nConnection: X-Tenant ,x-role,close\r\nConnection: Traceparent, TE\r\n"+
		"X-Tenant: a\r\nX-Role: reader\r\nX-Kept: 1\r\nTE: trailers\r\nTraceparent: theirs\r\n"+
		"Forwarded: for=10.0.0.1\r\nX-Forwarded-For: 10.0.0.1\r\nX_Forwarded_For: 10.0.0.1\r\nX_Forwarded_Proto: http\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 200 || !res.Close {
		t.Errorf("status %d, close %t", res.StatusCode, res.Close)
	}
	want := http.Header{"User-Agent": {"x"}, "Connection": {"Close, Te"}, "X-Kept": {"1"}, "Te": {"trailers"}}
	if diff := cmp.Diff(want, <-asked); diff != "" {
		t.Errorf("it is asked about (-want +got):\n%s", diff)
	}
	delete(want, "Connection")
	want["Traceparent"], want["X-Forwarded-Proto"] = []string{"mine"}, []string{"https"}
	if diff := cmp.Diff(want, <-got); diff != "" {
		t.Errorf("the workload gets (-want +got):\n%s", diff)
	}
}
