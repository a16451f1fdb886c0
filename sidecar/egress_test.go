package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
)

// server listens on 127.0.0.1 and treats each connection as handle says.
func server(t *testing.T, handle func(*net.TCPConn)) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			}()
		}
	}()
	return l.Addr().String()
}

// egressPort waits until the sidecar has registered where it listens for the present generation.
func (p *pod) egressPort(t *testing.T) (state *podsock.EnclaveState) {
	t.Helper()
	eventually(t, func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		if state = p.state; state.GetEgressPort() == 0 {
			return errors.New("nothing registered")
		}
		return nil
	})
	return state
}

// out asks the sidecar for CONNECT to address, as the enclave of state does, or for something else. The
// body is sent as the enclave's direction of the stream.
func out(t *testing.T, state *podsock.EnclaveState, method, address string, body io.Reader) (status int, answer io.ReadCloser, err error) {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return vsock.Secret(state.GetSecret()).Dial(ctx, state.GetEgressPort(), func(ctx context.Context, port uint32) (net.Conn, error) {
			path := vsock.HostPath(strings.TrimPrefix(state.GetTarget(), "unix://"), port)
			return new(net.Dialer).DialContext(ctx, "unix", path)
		})
	}}
	conn, err := transport.NewClientConn(t.Context(), "http", address)
	if err != nil {
		return 0, nil, err
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	req := (&http.Request{Method: method, URL: &url.URL{Scheme: "http", Host: address}, Host: address, Header: http.Header{}, Body: io.NopCloser(body), ContentLength: -1}).WithContext(ctx)
	if method != http.MethodConnect {
		req.URL.Path = "/"
	}
	res, err := conn.RoundTrip(req)
	if err != nil {
		return 0, nil, err
	}
	return res.StatusCode, res.Body, nil
}

// answered is all that comes back.
func answered(t *testing.T, state *podsock.EnclaveState, address string, body io.Reader) (string, error) {
	t.Helper()
	status, answer, err := out(t, state, http.MethodConnect, address, body)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(answer)
	if status != http.StatusOK {
		return "", fmt.Errorf("status %d: %s", status, b)
	}
	return string(b), err
}

func TestEgress(t *testing.T) {
	// Answers when it has seen the end of what it was sent.
	counter := server(t, func(c *net.TCPConn) {
		n, err := io.Copy(io.Discard, c)
		fmt.Fprintf(c, "%d bytes, %v", n, err)
	})
	// Ends first, without a look at what it was sent.
	const speech = 5 << 20
	speaker := server(t, func(c *net.TCPConn) { c.Write(make([]byte, speech)) })
	_, port, _ := net.SplitHostPort(counter)
	byName := "localhost:" + port
	other := server(t, func(c *net.TCPConn) { io.WriteString(c, "never") })
	closed := "127.0.0.1:1"

	r := start(t, counter, speaker, byName, closed, "missing.invalid:443")
	booted := phase(enclave(t, r.port, 1, "first"), podsock.EnclaveState_PHASE_BOOTED)
	r.pod.set(booted)
	state := r.pod.egressPort(t)

	for name, address := range map[string]string{"address": counter, "name": byName} {
		t.Run(name, func(t *testing.T) {
			eventually(t, func() error { // Envoy gets its listener a moment later
				got, err := answered(t, state, address, strings.NewReader("12345"))
				if err == nil && got != "5 bytes, <nil>" {
					t.Fatalf("got %q", got)
				}
				return err
			})
		})
	}
	t.Run("large", func(t *testing.T) {
		got, err := answered(t, state, counter, io.LimitReader(zeros{}, 20<<20))
		if err != nil || got != "20971520 bytes, <nil>" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	t.Run("target ends first", func(t *testing.T) {
		for range 5 {
			open, end := io.Pipe() // a client that never ends
			defer end.Close()
			status, answer, err := out(t, state, http.MethodConnect, speaker, open)
			if err != nil || status != http.StatusOK {
				t.Fatal(status, err)
			}
			// Envoy resets the stream after the last byte, which net/http may report instead of the end.
			if n, _ := io.Copy(io.Discard, slow{answer}); n != speech {
				t.Fatalf("heard %d bytes of %d", n, speech)
			}
		}
	})
	for name, tt := range map[string]struct {
		method, address string
		status          int
	}{
		"not in the list":      {http.MethodConnect, other, http.StatusForbidden},
		"another port":         {http.MethodConnect, "localhost:1", http.StatusForbidden},
		"not a tunnel":         {http.MethodGet, counter, http.StatusForbidden},
		"elsewhere, no tunnel": {http.MethodGet, other, http.StatusForbidden},
		"nobody listens":       {http.MethodConnect, closed, http.StatusServiceUnavailable},
		"name that is not":     {http.MethodConnect, "missing.invalid:443", http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			status, _, err := out(t, state, tt.method, tt.address, strings.NewReader(""))
			if err != nil || status != tt.status {
				t.Errorf("status %d, %v; want %d", status, err, tt.status)
			}
		})
	}
	t.Run("stranger", func(t *testing.T) {
		stranger := phase(state, state.GetPhase())
		stranger.EgressPort, stranger.Secret = state.GetEgressPort(), vsock.NewSecret()
		if got, err := answered(t, stranger, counter, strings.NewReader("")); err == nil {
			t.Errorf("somebody without the secret got %q", got)
		}
	})
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) {
	clear(b)
	return len(b), nil
}

// slow reads little at a time.
type slow struct{ r io.Reader }

func (s slow) Read(b []byte) (int, error) { return s.r.Read(b[:min(len(b), 4096)]) }

// Egress follows the enclave from its boot to its end, and no further.
func TestEgressPhases(t *testing.T) {
	echo := server(t, func(c *net.TCPConn) { io.Copy(c, c) })
	r := start(t, echo)
	first := enclave(t, r.port, 1, "first")
	r.pod.set(phase(first, podsock.EnclaveState_PHASE_BOOTED))
	state := r.pod.egressPort(t)
	pipe, w := io.Pipe()
	var answer io.ReadCloser
	eventually(t, func() (err error) {
		var status int
		if status, answer, err = out(t, state, http.MethodConnect, echo, pipe); err == nil && status != http.StatusOK {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	say := func(text string) {
		t.Helper()
		go io.WriteString(w, text)
		b := make([]byte, len(text))
		if _, err := io.ReadFull(answer, b); err != nil || string(b) != text {
			t.Fatalf("got %q, %v; want %q", b, err, text)
		}
	}
	say("booted")
	for _, p := range []podsock.EnclaveState_Phase{
		podsock.EnclaveState_PHASE_STARTING, podsock.EnclaveState_PHASE_RUNNING, podsock.EnclaveState_PHASE_DRAINING,
	} {
		next := phase(state, p)
		next.EgressPort = state.GetEgressPort()
		r.pod.set(next)
		say(p.String())
	}

	// A sidecar that comes in the middle listens where the enclave knows.
	r.stop()
	if err := <-r.ended; err != nil {
		t.Fatal(err)
	}
	r.serve(t)
	eventually(t, func() error {
		got, err := answered(t, state, echo, strings.NewReader("again"))
		if err == nil && got != "again" {
			t.Fatalf("got %q", got)
		}
		return err
	})
	r.pod.mu.Lock()
	n := len(r.pod.registered)
	r.pod.mu.Unlock()
	if n != 1 {
		t.Errorf("%d registrations in one generation", n)
	}

	ended := phase(first, podsock.EnclaveState_PHASE_ENDED)
	ended.Target = ""
	r.pod.set(ended)
	eventually(t, func() error {
		if _, err := answered(t, state, echo, strings.NewReader("late")); err == nil {
			return errors.New("the port outlives its enclave")
		}
		return nil
	})

	second := enclave(t, r.port, 2, "second")
	r.pod.set(phase(second, podsock.EnclaveState_PHASE_BOOTED))
	next := r.pod.egressPort(t)
	eventually(t, func() error {
		got, err := answered(t, next, echo, strings.NewReader("next"))
		if err == nil && got != "next" {
			t.Fatalf("got %q", got)
		}
		return err
	})
}

func TestParseEgress(t *testing.T) {
	for s, want := range map[string]int{"": 0, "[]": 0, `["a.example:1","[2001:db8::1]:2"]`: 2, `["a.example"]`: -1, "a:1": -1, `["*:1"]`: -1} {
		got, err := parseEgress(s)
		if (err != nil) != (want < 0) || err == nil && len(got) != want {
			t.Errorf("parseEgress(%s) = %v, %v; want %d", s, got, err, want)
		}
	}
}
