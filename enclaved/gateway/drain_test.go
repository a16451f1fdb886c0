package gateway_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

// Clients of all kinds move from one gateway to the next without a failed request.
func TestDrainUnderLoad(t *testing.T) {
	module := nsmtest.New(t)
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.NewResponseController(w).EnableFullDuplex()
		io.Copy(w, r.Body)
	}))
	var current atomic.Pointer[enclave]
	current.Store(newEnclaveOf(t, module.Next(), workload.Port{Port: port}))

	// A client of one connection at a time, or of a new one for each request.
	newClient := func(http2, keep bool) *http.Client {
		tr := &http.Transport{
			TLSClientConfig:   current.Load().config(t),
			DisableKeepAlives: !keep,
			MaxConnsPerHost:   1,
			Protocols:         new(http.Protocols),
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				return d.DialContext(ctx, "tcp", current.Load().addr(port))
			},
		}
		if http2 {
			tr.MaxConnsPerHost = 0 // requests share the connection
		}
		tr.Protocols.SetHTTP1(!http2)
		tr.Protocols.SetHTTP2(http2)
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr}
	}
	shared := newClient(true, true)
	type user struct {
		name   string
		client *http.Client
		rarely bool
		http2  bool
		served atomic.Int64
	}
	users := []*user{
		{name: "HTTP/1.1, new connections", client: newClient(false, false)},
		{name: "HTTP/2, new connections", client: newClient(true, false), http2: true},
		{name: "HTTP/2, one connection", client: newClient(true, true), http2: true},
		{name: "HTTP/1.1, rarely", client: newClient(false, true), rarely: true},
		{name: "HTTP/2, rarely", client: newClient(true, true), rarely: true, http2: true},
	}
	for range 2 {
		users = append(users,
			&user{name: "HTTP/1.1, one connection", client: newClient(false, true)},
			&user{name: "HTTP/2, shared connection", client: shared, http2: true})
	}

	stop := make(chan struct{})
	var load sync.WaitGroup
	defer load.Wait()
	defer close(stop)
	for _, u := range users {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				body := strings.Repeat("x", 1+n*997%100_000)
				var reader io.Reader = strings.NewReader(body)
				if !u.http2 {
					// A body that cannot be sent twice, so that a failed request is not hidden by another
					// try. Over HTTP/2 Go's client closes the body of a request that meets a GOAWAY before
					// it has a stream, and cannot go on without another; see TestGoAway for the rest.
					reader = io.MultiReader(reader)
				}
				req, err := http.NewRequest("POST", url(port, "/"), reader)
				if err != nil {
					t.Error(err)
					return
				}
				res, err := u.client.Do(req)
				if err != nil {
					t.Errorf("%s: request %d: %v", u.name, n, err)
					return
				}
				got, err := io.ReadAll(res.Body)
				res.Body.Close()
				if err != nil || res.StatusCode != 200 || string(got) != body {
					t.Errorf("%s: request %d: status %d, %d bytes of %d, %v", u.name, n, res.StatusCode, len(got), len(body), err)
					return
				}
				u.served.Add(1)
				if u.rarely {
					select {
					case <-stop:
						return
					case <-time.After(50 * time.Millisecond):
					}
				}
			}
		})
	}
	// progress waits until every user has been served n times more.
	progress := func(n int64) {
		t.Helper()
		for _, u := range users {
			until := u.served.Load() + n
			eventually(t, func() bool { return u.served.Load() >= until || t.Failed() })
		}
	}
	for range 2 {
		old := current.Load()
		next := newEnclaveOf(t, module.Next(), workload.Port{Port: port})
		progress(5)
		old.Drain()
		progress(5) // new connections still reach the one that drains
		current.Store(next)
		progress(2)
		accepted := old.accepted.Load()
		progress(2)
		if n := old.accepted.Load() - accepted; n > 0 {
			t.Errorf("%d new connections to the old gateway", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := old.Close(ctx); err != nil {
			t.Error(err)
		}
		cancel()
		if n := old.open.Load(); n != 0 {
			t.Errorf("%d connections open after Close", n)
		}
	}
	progress(5)
}

// A GOAWAY lets pass what is on its way: the client below opens a stream after it was sent.
func TestGoAway(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(echo))
	e := newEnclave(t, workload.Port{Port: port})
	begin := func(t *testing.T) (*tls.Conn, func(stream uint32)) {
		s := e.dial(t, port, "h2")
		io.WriteString(s, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
		s.Write(frame(0x4, 0, 0, nil)) // SETTINGS
		return s, func(stream uint32) {
			// HPACK: :method GET, :scheme https, :path /, :authority a; END_STREAM and END_HEADERS
			s.Write(frame(0x1, 0x5, stream, []byte{0x82, 0x87, 0x84, 0x41, 0x01, 'a'}))
		}
	}
	// until reads frames until one is as wanted, and refuses a GOAWAY that is not.
	until := func(t *testing.T, s *tls.Conn, typ byte, stream uint32) {
		t.Helper()
		for {
			gotType, flags, gotStream, payload, err := readFrame(s)
			if err != nil {
				t.Fatalf("wait for frame %d of stream %d: %v", typ, stream, err)
			}
			if gotType == 0x7 {
				if !bytes.Equal(payload, []byte{0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}) {
					t.Fatalf("GOAWAY with %x", payload)
				}
				if typ != 0x7 {
					t.Fatal("an early or a second GOAWAY")
				}
			}
			if gotType == typ && gotStream == stream && (typ != 0 || flags&1 != 0) {
				return
			}
		}
	}
	const data, goAway = 0x0, 0x7

	idle, request := begin(t)
	request(1)
	until(t, idle, data, 1) // the end of the answer
	unused, first := begin(t)
	until(t, unused, 0x4, 0) // SETTINGS

	e.Drain()
	until(t, idle, goAway, 0)
	request(3)
	until(t, idle, data, 3)
	request(5)
	until(t, idle, data, 5)

	// One that has not been served yet is asked too, and still served.
	until(t, unused, goAway, 0)
	first(1)
	until(t, unused, data, 1)
	// A new one is served first.
	later, request := begin(t)
	request(1)
	until(t, later, data, 1)
	until(t, later, goAway, 0)
	e.Drain() // again: nothing more to say
	request(3)
	until(t, later, data, 3)

	// Close names the streams that were served, as net/http does it.
	closed := make(chan error, 1)
	go func() { closed <- e.Close(context.Background()) }()
	for _, s := range []*tls.Conn{idle, unused, later} {
		for {
			typ, _, _, payload, err := readFrame(s)
			if err != nil {
				t.Fatalf("the connection ended without a GOAWAY: %v", err)
			}
			if typ == goAway {
				if binary.BigEndian.Uint32(payload[4:]) != 0 {
					t.Errorf("GOAWAY with %x", payload)
				}
				break
			}
		}
		s.Close()
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// frame is RFC 9113, section 4.1.
func frame(typ, flags byte, stream uint32, payload []byte) []byte {
	n := len(payload)
	b := []byte{byte(n >> 16), byte(n >> 8), byte(n), typ, flags}
	return append(binary.BigEndian.AppendUint32(b, stream), payload...)
}

func readFrame(r io.Reader) (typ, flags byte, stream uint32, payload []byte, err error) {
	var head [9]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return
	}
	payload = make([]byte, int(head[0])<<16|int(head[1])<<8|int(head[2]))
	_, err = io.ReadFull(r, payload)
	return head[3], head[4], binary.BigEndian.Uint32(head[5:]), payload, err
}

// An idle HTTP/1.1 connection stays usable until Close; its next answer asks the client to leave.
func TestDrainIdleHTTP1(t *testing.T) {
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	down := closedPort(t)
	e := newEnclave(t, workload.Port{Port: port}, workload.Port{Port: down})
	for name, c := range map[string]struct {
		port   uint32
		path   string
		status int
	}{
		"answer of the workload":        {port: port, path: "/", status: 200},
		"no answer of the workload":     {port: down, path: "/", status: 502},
		"attestation document":          {port: port, path: "/.well-known/cloister/attestation?nonce=00", status: 200},
		"refusal of the gateway itself": {port: port, path: "/.well-known/cloister/attestation", status: 400},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnclaveOf(t, e.module.Next(), workload.Port{Port: port}, workload.Port{Port: down})
			client := e.client(t, c.port, false)
			if res, _ := get(t, client, url(c.port, c.path)); res.StatusCode != c.status || res.Close {
				t.Fatalf("got %d, close %t", res.StatusCode, res.Close)
			}
			before := e.accepted.Load()
			e.Drain()
			if res, _ := get(t, client, url(c.port, c.path)); res.StatusCode != c.status || !res.Close {
				t.Errorf("got %d, close %t", res.StatusCode, res.Close)
			}
			if e.accepted.Load() != before {
				t.Error("the idle connection was not used")
			}
			if res, _ := get(t, client, url(c.port, c.path)); res.StatusCode != c.status || !res.Close {
				t.Errorf("got %d, close %t", res.StatusCode, res.Close)
			}
			if e.accepted.Load() != before+1 {
				t.Error("the client did not leave")
			}
		})
	}
}

// A stream that is open when the gateway drains goes on; the next call takes another connection.
func TestDrainGRPC(t *testing.T) {
	l := listenWorkload(t)
	server := grpc.NewServer()
	states := health.NewServer()
	healthpb.RegisterHealthServer(server, states)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	port := portOf(l)
	old := newEnclave(t, workload.Port{Port: port})
	next := newEnclaveOf(t, old.module.Next(), workload.Port{Port: port})
	var current atomic.Pointer[enclave]
	current.Store(old)

	conn, err := grpc.NewClient("passthrough:///app", grpc.WithTransportCredentials(credentials.NewTLS(old.config(t))),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", current.Load().addr(port))
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch, err := client.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	current.Store(next)
	old.Drain()
	eventually(t, func() bool {
		if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
		return next.accepted.Load() > 0
	})
	states.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	if res, err := watch.Recv(); err != nil || res.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("got %v, %v on the old stream", res, err)
	}
	cancel()
	eventually(t, func() bool { return old.open.Load() == 0 })
}

// What runs when Close is called has until the end of its context.
func TestCloseWaitsForRequests(t *testing.T) {
	arrived, proceed := make(chan struct{}), make(chan struct{})
	port := serveWorkload(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		<-proceed
		io.WriteString(w, "done")
	}))
	e := newEnclave(t, workload.Port{Port: port})
	results := make(chan error, 2)
	for _, http2 := range []bool{false, true} {
		client := e.client(t, port, http2)
		go func() {
			res, err := client.Get(url(port, "/"))
			if err == nil {
				var body []byte
				body, err = io.ReadAll(res.Body)
				res.Body.Close()
				if string(body) != "done" {
					err = fmt.Errorf("got %q, %v", body, err)
				}
			}
			results <- err
		}()
		<-arrived
	}
	closed := make(chan error, 1)
	go func() { closed <- e.Close(context.Background()) }()
	eventually(t, func() bool { // no new connection
		c, err := net.Dial("tcp", e.addr(port))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case err := <-closed:
		t.Errorf("Close did not wait: %v", err)
	default:
	}
	close(proceed)
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

// After that everything is cut: requests, upgraded connections, tunnels and unfinished handshakes.
func TestCloseCuts(t *testing.T) {
	web := serveStreams(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 64))
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		io.Copy(io.Discard, c)
	})
	hung := serveStreams(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	silence := make(chan struct{})
	defer close(silence)
	tunnel := serveStreams(t, func(c *net.TCPConn) {
		io.Copy(c, c)
		<-silence // neither data nor an end
	})
	e := newEnclave(t, workload.Port{Port: web}, workload.Port{Port: hung}, workload.Port{Port: tunnel, Protocol: workload.ProtocolTCP})

	socket := e.dial(t, web, "http/1.1")
	io.WriteString(socket, "GET / HTTP/1.1\r\nHost: app\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	io.ReadFull(socket, make([]byte, 32))
	bytes := e.dial(t, tunnel)
	io.WriteString(bytes, "x")
	io.ReadFull(bytes, make([]byte, 1))
	half := e.dial(t, tunnel)
	io.WriteString(half, "x")
	half.CloseWrite()
	io.ReadFull(half, make([]byte, 1))
	silent, err := net.Dial("tcp", e.addr(web))
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	var requests sync.WaitGroup
	for _, http2 := range []bool{false, true} {
		client := e.client(t, hung, http2)
		requests.Go(func() {
			if res, err := client.Get(url(hung, "/")); err == nil {
				res.Body.Close()
				t.Errorf("got %d", res.StatusCode)
			}
		})
	}
	eventually(t, func() bool { return e.accepted.Load() == 6 })

	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := e.Close(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connections") {
		t.Errorf("got %v", err)
	}
	if again := e.Close(t.Context()); !errors.Is(again, context.DeadlineExceeded) {
		t.Errorf("a second Close returned %v", again)
	}
	requests.Wait()
	for _, c := range []net.Conn{socket, bytes, half, silent} {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.ReadAll(c); errors.Is(err, context.DeadlineExceeded) {
			t.Error("a connection was left open")
		}
	}
	eventually(t, func() bool { return e.open.Load() == 0 })
}
