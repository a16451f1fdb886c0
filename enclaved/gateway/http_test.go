package gateway_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/textproto"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/workload"
)

// seen is a request as the workload sees it.
type seen struct {
	Method, URI, Host, Proto string
	Header                   http.Header
	Body                     string
}

func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(seen{r.Method, r.RequestURI, r.Host, r.Proto, r.Header, string(body)})
}

func TestRequest(t *testing.T) {
	handler := http.HandlerFunc(echo)
	secure, plain := serveWorkload(t, handler), serveWorkload(t, handler)
	e := newEnclave(t, workload.Port{Port: secure}, workload.Port{Port: plain, Plaintext: true})
	for name, c := range map[string]struct {
		client *http.Client
		base   string
		scheme string
	}{
		"HTTP/1.1":           {client: e.client(t, secure, false), base: "https://app.example:8443", scheme: "https"},
		"HTTP/2":             {client: e.client(t, secure, true), base: "https://app.example:8443", scheme: "https"},
		"plaintext HTTP/1.1": {client: &http.Client{Transport: &http.Transport{DisableCompression: true}}, base: "http://" + e.addr(plain), scheme: "http"},
	} {
		t.Run(name, func(t *testing.T) {
			defer c.client.CloseIdleConnections()
			const uri = "/a%2Fb//c/%7E?x=1;y&z=%zz"
			req, err := http.NewRequestWithContext(t.Context(), "PATCH", c.base, strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			req.URL.Path, req.URL.RawPath = "/a/b//c/~", "/a%2Fb//c/%7E"
			req.URL.RawQuery = "x=1;y&z=%zz"
			req.Header = http.Header{
				"User-Agent":        {""},
				"X-Custom":          {"one", "two"},
				"X-Forwarded-For":   {"10.0.0.1"},
				"X-Forwarded-Proto": {"gopher"},
				"X-Forwarded-Host":  {"evil.example"},
				"Forwarded":         {"for=10.0.0.1"},
				"Cookie":            {"a=b; c=d"},
			}
			if c.client.Transport.(*http.Transport).Protocols == nil || c.client.Transport.(*http.Transport).Protocols.HTTP1() {
				req.Header["Connection"] = []string{"X-Hop"}
				req.Header["X-Hop"] = []string{"secret"}
				req.Header["Keep-Alive"] = []string{"timeout=5"}
				req.Header["Proxy-Authorization"] = []string{"Basic x"}
			}
			res, body := do(t, c.client, req)
			if res.StatusCode != 200 {
				t.Fatalf("got %d %q", res.StatusCode, body)
			}
			var got seen
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatal(err)
			}
			want := seen{
				Method: "PATCH", URI: uri, Host: strings.TrimPrefix(strings.TrimPrefix(c.base, "https://"), "http://"), Proto: "HTTP/1.1", Body: "body",
				Header: http.Header{
					"Content-Length":    {"4"},
					"X-Custom":          {"one", "two"},
					"Cookie":            {"a=b; c=d"},
					"X-Forwarded-Proto": {c.scheme},
				},
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestResponse(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/fields":
			h := w.Header()
			h["Content-Type"] = nil
			h.Add("Set-Cookie", "a=1")
			h.Add("Set-Cookie", "b=2")
			h.Set("Connection", "X-Hop")
			h.Set("X-Hop", "secret")
			h.Set("Location", "http://app.example/next")
			h["Date"] = []string{"Tue, 15 Nov 1994 08:12:31 GMT"}
			w.WriteHeader(http.StatusTemporaryRedirect)
			io.WriteString(w, "<html>not sniffed</html>")
		case "/hints":
			w.Header().Set("Link", "</style.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Del("Link")
			w.Header().Set("Content-Type", "text/plain")
			io.WriteString(w, "ok")
		case "/trailers":
			body, _ := io.ReadAll(r.Body)
			w.Header().Set("Trailer", "X-Announced")
			fmt.Fprintf(w, "%s %s", body, r.Trailer.Get("X-Request"))
			w.Header().Set("X-Announced", "1")
			w.Header().Set(http.TrailerPrefix+"X-Surprise", "2")
		case "/nothing":
			w.WriteHeader(http.StatusNoContent)
		case "/abort":
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "part")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}
	}))
	e := newEnclave(t, workload.Port{Port: port})
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			client := e.client(t, port, http2)
			res, body := get(t, client, url(port, "/fields"))
			want := http.Header{
				"Set-Cookie":     {"a=1", "b=2"},
				"Location":       {"http://app.example/next"},
				"Date":           {"Tue, 15 Nov 1994 08:12:31 GMT"},
				"Content-Length": {"24"},
			}
			if diff := cmp.Diff(want, res.Header); diff != "" || res.StatusCode != 307 || body != "<html>not sniffed</html>" {
				t.Errorf("got %d %q %s", res.StatusCode, body, diff)
			}

			if res, body := get(t, client, url(port, "/hints")); res.StatusCode != 200 || body != "ok" {
				t.Errorf("after early hints: got %d %q", res.StatusCode, body)
			}

			req, err := http.NewRequestWithContext(t.Context(), "POST", url(port, "/trailers"), io.MultiReader(strings.NewReader("body")))
			if err != nil {
				t.Fatal(err)
			}
			req.Trailer = http.Header{"X-Request": {"trailer"}}
			res, body = do(t, client, req)
			if body != "body trailer" {
				t.Errorf("request trailer: got %q", body)
			}
			if diff := cmp.Diff(http.Header{"X-Announced": {"1"}, "X-Surprise": {"2"}}, res.Trailer); diff != "" {
				t.Error(diff)
			}

			if res, body := get(t, client, url(port, "/nothing")); res.StatusCode != 204 || body != "" {
				t.Errorf("got %d %q", res.StatusCode, body)
			}

			// A part of an answer is not taken for the whole.
			req, err = http.NewRequestWithContext(t.Context(), "GET", url(port, "/abort"), nil)
			if err != nil {
				t.Fatal(err)
			}
			res, err = client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if all, err := io.ReadAll(res.Body); err == nil {
				t.Errorf("read %q without an error", all)
			}
		})
	}
}

// Both directions of a body flow at once, each byte as soon as it is there.
func TestStreaming(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		c.EnableFullDuplex()
		w.Header().Set("Content-Type", "text/event-stream")
		c.Flush()
		lines := bufio.NewScanner(r.Body)
		for lines.Scan() {
			fmt.Fprintf(w, "data: %s\n\n", lines.Text())
			c.Flush()
		}
	}))
	e := newEnclave(t, workload.Port{Port: port})
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			r, w := io.Pipe()
			req, err := http.NewRequestWithContext(t.Context(), "POST", url(port, "/"), r)
			if err != nil {
				t.Fatal(err)
			}
			res, err := e.client(t, port, http2).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			answers := bufio.NewReader(res.Body)
			for i := range 3 {
				fmt.Fprintf(w, "%d\n", i)
				event, err := answers.ReadString('\n')
				if want := fmt.Sprintf("data: %d\n", i); event != want || err != nil {
					t.Fatalf("got %q, %v", event, err)
				}
				answers.ReadString('\n')
			}
			w.Close()
			if rest, err := io.ReadAll(answers); len(rest) > 0 || err != nil {
				t.Errorf("got %q, %v at the end", rest, err)
			}
		})
	}
}

// An answer that comes before the end of the request's body arrives.
func TestEarlyAnswer(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		http.Error(w, "too much", http.StatusRequestEntityTooLarge)
	}))
	e := newEnclave(t, workload.Port{Port: port})
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			r, w := io.Pipe()
			defer w.Close()
			go w.Write(make([]byte, 1<<10))
			req, err := http.NewRequestWithContext(t.Context(), "POST", url(port, "/"), r)
			if err != nil {
				t.Fatal(err)
			}
			res, err := e.client(t, port, http2).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if body, _ := io.ReadAll(res.Body); res.StatusCode != 413 || string(body) != "too much\n" {
				t.Errorf("got %d %q", res.StatusCode, body)
			}
		})
	}
}

func TestLargeBodies(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		w.Header().Set("Content-Type", "application/octet-stream")
		io.Copy(w, r.Body)
	}))
	e := newEnclave(t, workload.Port{Port: port})
	const size = 16 << 20
	for name, http2 := range map[string]bool{"HTTP/1.1": false, "HTTP/2": true} {
		t.Run(name, func(t *testing.T) {
			sent, received := sha256.New(), sha256.New()
			source := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{}), size), sent)
			req, err := http.NewRequestWithContext(t.Context(), "PUT", url(port, "/"), source)
			if err != nil {
				t.Fatal(err)
			}
			res, err := e.client(t, port, http2).Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			n, err := io.Copy(received, res.Body)
			if err != nil || n != size || hex.EncodeToString(sent.Sum(nil)) != hex.EncodeToString(received.Sum(nil)) {
				t.Errorf("%d bytes came back of %d, or others: %v", n, size, err)
			}
		})
	}
}

func TestWorkloadDown(t *testing.T) {
	down := closedPort(t)
	broken := serveStreams(t, func(c *net.TCPConn) {})
	e := newEnclave(t, workload.Port{Port: down}, workload.Port{Port: broken})
	for port, want := range map[uint32]string{
		down:   fmt.Sprintf("The workload accepts no connection on port %d.\n", down),
		broken: fmt.Sprintf("The workload on port %d broke the connection off before it answered.\n", broken),
	} {
		for _, http2 := range []bool{false, true} {
			res, body := get(t, e.client(t, port, http2), url(port, "/"))
			if res.StatusCode != 502 || body != want || res.Header.Get("Content-Type") != "text/plain; charset=utf-8" {
				t.Errorf("got %d %v %q, want %q", res.StatusCode, res.Header, body, want)
			}
		}
	}
}

// What could be read in two ways does not reach the workload.
func TestSmuggling(t *testing.T) {
	var reached atomic.Int32
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reached.Add(1)
		w.Header().Set("X-Seen", fmt.Sprintf("%s %d %q %q", r.Method, r.ContentLength, r.TransferEncoding, r.Header.Get("Upgrade")))
	}))
	e := newEnclave(t, workload.Port{Port: port})
	for name, c := range map[string]struct {
		request string
		status  int
		seen    string
	}{
		"two lengths":            {request: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", status: 400},
		"negative length":        {request: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", status: 400},
		"signed length":          {request: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +4\r\n\r\nabcd", status: 400},
		"unknown coding":         {request: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", status: 501},
		"two codings":            {request: "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", status: 501},
		"space before the colon": {request: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 4\r\n\r\nabcd", status: 400},
		"two hosts":              {request: "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", status: 400},
		"no host":                {request: "GET / HTTP/1.1\r\n\r\n", status: 400},
		"CONNECT":                {request: "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", status: 405},
		"HTTP/2 preface":         {request: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", status: 505},
		// The coding wins and the length is not passed on (RFC 9112, section 6.3).
		"length and coding": {request: "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", status: 200, seen: `POST -1 ["chunked"] ""`},
		"upgrade to h2c":    {request: "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", status: 200, seen: `GET 0 [] ""`},
	} {
		t.Run(name, func(t *testing.T) {
			before := reached.Load()
			s := e.dial(t, port)
			io.WriteString(s, c.request)
			res, err := http.ReadResponse(bufio.NewReader(s), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			if res.StatusCode != c.status || res.Header.Get("X-Seen") != c.seen {
				t.Errorf("got %d and seen as %q", res.StatusCode, res.Header.Get("X-Seen"))
			}
			if (reached.Load() > before) != (c.status == 200) {
				t.Errorf("%d requests reached the workload", reached.Load()-before)
			}
		})
	}
}

func TestPlainRequestOnTLSPort(t *testing.T) {
	port := serveWorkload(t, http.NotFoundHandler())
	e := newEnclave(t, workload.Port{Port: port})
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, body := get(t, client, "http://"+e.addr(port)+"/")
	if res.StatusCode != 400 || body != "This port speaks TLS: use https instead of http.\n" {
		t.Errorf("got %d %q", res.StatusCode, body)
	}
}

func TestWebSocket(t *testing.T) {
	port := serveStreams(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		req, err := http.ReadRequest(r)
		if err != nil || !strings.EqualFold(req.Header.Get("Upgrade"), "websocket") || req.Header.Get("Connection") != "Upgrade" || req.Host != "app" {
			io.WriteString(c, "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: "+req.Header.Get("Sec-WebSocket-Key")+"\r\n\r\nfirst")
		io.Copy(c, r)
	})
	e := newEnclave(t, workload.Port{Port: port})
	s := e.dial(t, port, "http/1.1")
	io.WriteString(s, "GET /chat HTTP/1.1\r\nHost: app\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: key\r\n\r\n")
	r := bufio.NewReader(s)
	head := textproto.NewReader(r)
	line, err := head.ReadLine()
	if err != nil || line != "HTTP/1.1 101 Switching Protocols" {
		t.Fatalf("got %q, %v", line, err)
	}
	header, err := head.ReadMIMEHeader()
	if err != nil || header.Get("Sec-WebSocket-Accept") != "key" {
		t.Errorf("got %v, %v", header, err)
	}
	for _, want := range []string{"first", "again", "again"} {
		got := make([]byte, len(want))
		if _, err := io.ReadFull(r, got); err != nil || string(got) != want {
			t.Fatalf("got %q, %v", got, err)
		}
		io.WriteString(s, "again")
	}
}

func TestGRPC(t *testing.T) {
	l := listenWorkload(t)
	server := grpc.NewServer()
	states := health.NewServer()
	healthpb.RegisterHealthServer(server, states)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	port := portOf(l)
	e := newEnclave(t, workload.Port{Port: port})

	conn, err := grpc.NewClient("passthrough:///"+e.addr(port), grpc.WithTransportCredentials(credentials.NewTLS(e.config(t))))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	var trailer metadata.MD
	res, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}, grpc.Trailer(&trailer))
	if err != nil || res.Status != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("got %v, %v", res, err)
	}
	if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "unknown"}); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}

	watch, err := client.Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING} {
		res, err := watch.Recv()
		if err != nil || res.Status != want {
			t.Fatalf("got %v, %v, want %v", res, err, want)
		}
		states.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	}

	server.Stop()
	if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v from a workload that is down", err)
	}
}

// Requests counts what the workload gets, and what it has not answered yet.
func TestRequests(t *testing.T) {
	arrived, answer := make(chan struct{}), make(chan struct{})
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/wait" {
			close(arrived)
			<-answer
		}
	}))
	tcp := serveStreams(t, func(c *net.TCPConn) { io.Copy(c, c) })
	e := newEnclave(t, workload.Port{Port: port}, workload.Port{Port: tcp, Protocol: workload.ProtocolTCP})
	want := func(total, inflight uint64) {
		t.Helper()
		gotTotal, gotInflight := e.Requests()
		if gotTotal != total || gotInflight != inflight {
			t.Errorf("%d requests, %d under way, want %d and %d", gotTotal, gotInflight, total, inflight)
		}
	}
	client := e.client(t, port, false)
	get(t, client, url(port, "/.well-known/cloister/attestation?nonce=00"))
	want(0, 0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		get(t, client, url(port, "/wait"))
	}()
	<-arrived
	want(1, 1)
	c := e.dial(t, tcp)
	io.WriteString(c, "x")
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	want(2, 2)
	close(answer)
	<-done
	c.CloseWrite()
	io.ReadAll(c)
	// The gateway counts the end after the client has seen it.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, inflight := e.Requests(); inflight == 0 {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d requests are still under way", inflight)
		}
	}
	want(2, 0)
}
