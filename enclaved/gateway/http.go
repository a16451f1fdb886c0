package gateway

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"cloister.dev/cloister/enclaved/vault"
)

const (
	// attestationPath is answered by the gateway itself.
	attestationPath = "/.well-known/cloister/attestation"
	// maxNonce is the largest nonce of a fresh document in bytes.
	maxNonce = 64

	// Idle connections to the workload are kept for less time than any usual server keeps them (2 s,
	// gunicorn): a request that is sent into a connection that the workload is closing would fail.
	upstreamIdle  = time.Second
	upstreamConns = 1024
)

// web is what an HTTP port has more than a tcp port: one server for each protocol, and the ways to the
// workload.
type web struct {
	port   *port
	h1, h2 *server

	proxy   *httputil.ReverseProxy
	http1   *http.Transport // to the workload
	grpc    *http.Transport // to the workload: HTTP/2 with prior knowledge
	forward string          // X-Forwarded-Proto
}

func newWeb(p *port, plaintext bool) *web {
	w := &web{port: p, forward: "https"}
	if plaintext {
		w.forward = "http"
	}
	w.h1 = newServer(func(p *http.Protocols) { p.SetHTTP1(true) }, w)
	w.h2 = newServer(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) }, w)
	w.http1 = w.transport(func(p *http.Protocols) { p.SetHTTP1(true) })
	w.grpc = w.transport(func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
	w.proxy = &httputil.ReverseProxy{
		Rewrite:        w.rewrite,
		Transport:      w,
		ErrorLog:       quiet,
		BufferPool:     bufferPool{},
		ModifyResponse: w.modify,
		ErrorHandler:   w.unavailable,
	}
	return w
}

func (w *web) transport(protocols func(*http.Protocols)) *http.Transport {
	d := net.Dialer{Timeout: dialTimeout}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", w.port.upstream)
		},
		Protocols:             new(http.Protocols),
		DisableCompression:    true, // bodies pass as they are
		MaxIdleConnsPerHost:   upstreamConns,
		IdleConnTimeout:       upstreamIdle,
		ExpectContinueTimeout: time.Second,
	}
	protocols(t.Protocols)
	return t
}

func (w *web) start() {
	w.h1.start()
	w.h2.start()
}

func (w *web) shutdown(ctx context.Context) {
	var both sync.WaitGroup
	both.Go(func() { w.h1.shutdown(ctx) })
	both.Go(func() { w.h2.shutdown(ctx) })
	both.Wait()
}

func (w *web) end() {
	w.http1.CloseIdleConnections()
	w.grpc.CloseIdleConnections()
}

func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	defer func() {
		if e := recover(); e != nil {
			if e != http.ErrAbortHandler {
				slog.Error("request handler panicked", "port", w.port.number, "stack", string(debug.Stack()))
			}
			panic(http.ErrAbortHandler) // the one that net/http does not log
		}
	}()
	switch {
	case r.Method == http.MethodConnect:
		rw.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
		w.answer(rw, r, http.StatusMethodNotAllowed, "The gateway opens no tunnels: CONNECT is not accepted.")
	case r.Method == "PRI":
		// net/http lets the preface of HTTP/2 through as if it were a request of HTTP/1.
		rw.Header().Set("Connection", "close")
		w.answer(rw, r, http.StatusHTTPVersionNotSupported, "HTTP/2 must be chosen in the TLS handshake (ALPN h2).")
	case r.URL.Path == attestationPath:
		w.attest(rw, r)
	default:
		w.pass(rw, r)
	}
}

// pass hands the request to the workload.
func (w *web) pass(rw http.ResponseWriter, r *http.Request) {
	w.strip(r)
	if w.port.authorize != nil {
		v := w.port.authorize(r)
		maps.Copy(rw.Header(), v.Response)
		if v.Status != 0 {
			w.refuse(rw, r, v)
			return
		}
		r = r.WithContext(context.WithValue(r.Context(), verdictKey{}, v))
	}
	defer w.port.gateway.request()()
	if w.port.observe != nil {
		watched := &watchedWriter{ResponseWriter: rw}
		end := w.port.observe(r, w.port.number)
		defer func() { end(watched.status) }()
		rw = watched
	}
	if r.ProtoMajor == 1 {
		// The workload may answer before it has the whole body.
		http.NewResponseController(rw).EnableFullDuplex()
		// WebSocket is the one protocol to upgrade to. HTTP/2 in particular would carry requests past
		// the gateway; a server may ignore the offer (RFC 9110, section 7.8).
		if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
			r.Header.Del("Upgrade")
		}
	}
	rw.Header()["Content-Type"] = nil // where the workload sends none, net/http must not guess one
	w.proxy.ServeHTTP(rw, r)
}

// rewrite changes what must differ; ReverseProxy has removed hop-by-hop fields, Forwarded and
// X-Forwarded-* of the client.
func (w *web) rewrite(r *httputil.ProxyRequest) {
	r.Out.URL.Scheme = "http"
	r.Out.URL.Host = w.port.upstream
	r.Out.URL.RawQuery = r.In.URL.RawQuery // also what Go's own parser would refuse
	r.Out.Host = r.In.Host
	r.Out.Trailer = r.In.Trailer // filled in when the body ends
	if v, ok := r.In.Context().Value(verdictKey{}).(*Verdict); ok {
		v.apply(r.Out.Header)
	}
	r.Out.Header.Set("X-Forwarded-Proto", w.forward)
}

// RoundTrip sends gRPC by HTTP/2, which it needs, and everything else by HTTP/1.1.
func (w *web) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.ProtoMajor == 2 && isGRPC(r.Header.Get("Content-Type")) {
		return w.grpc.RoundTrip(r)
	}
	return w.http1.RoundTrip(r)
}

// isGRPC reports whether a content type is that of gRPC over HTTP/2 ("application/grpc", "+proto" and
// so on after it); gRPC-Web, which HTTP/1.1 carries, is another.
func isGRPC(contentType string) bool {
	rest, ok := strings.CutPrefix(strings.ToLower(contentType), "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

func (w *web) modify(res *http.Response) error {
	// ReverseProxy passes on at once what has no known length, and the length is in the header anyway.
	// Without a body it must not: the header of a gRPC answer that is only trailers ends its stream.
	if res.ContentLength > 0 && res.Body != http.NoBody {
		res.ContentLength = -1
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		w.dismiss(res.Header, res.Request)
	}
	return nil
}

// dismiss asks an HTTP/1 client to leave with this answer, when the gateway drains.
func (w *web) dismiss(h http.Header, r *http.Request) {
	if r.ProtoMajor == 1 && w.port.gateway.draining.Load() {
		h.Set("Connection", "close")
	}
}

// unavailable answers a request that the workload did not answer. Its log has no detail beyond a
// refused connect: net/http's errors may quote the workload's answer.
func (w *web) unavailable(rw http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil { // the client has gone
		panic(http.ErrAbortHandler)
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		slog.Warn("connect to the workload", "port", w.port.number, "error", op)
		w.answer(rw, r, http.StatusBadGateway, fmt.Sprintf("The workload accepts no connection on port %d.", w.port.number))
		return
	}
	slog.Warn("the workload broke off a request", "port", w.port.number)
	w.answer(rw, r, http.StatusBadGateway, fmt.Sprintf("The workload on port %d broke the connection off before it answered.", w.port.number))
}

// attest answers GET /.well-known/cloister/attestation?nonce=<hexadecimal> with a fresh attestation
// document that carries the nonce of 1 to 64 bytes: application/cbor, COSE_Sign1 (RFC 9052).
func (w *web) attest(rw http.ResponseWriter, r *http.Request) {
	rw.Header().Set("Cache-Control", "no-store")
	if r.Method != http.MethodGet {
		rw.Header().Set("Allow", "GET")
		w.answer(rw, r, http.StatusMethodNotAllowed, "Ask for an attestation document with GET.")
		return
	}
	nonce, err := hex.DecodeString(parameter(r.URL.RawQuery, "nonce"))
	if err != nil || len(nonce) < 1 || len(nonce) > maxNonce {
		w.answer(rw, r, http.StatusBadRequest, fmt.Sprintf("The parameter nonce must be 1 to %d bytes in hexadecimal.", maxNonce))
		return
	}
	document, err := w.port.vault.FreshDocument(r.Context(), nonce)
	switch {
	case errors.Is(err, vault.ErrBusy):
		rw.Header().Set("Retry-After", "1")
		w.answer(rw, r, http.StatusServiceUnavailable, "Too many requests for an attestation document are waiting: try again.")
		return
	case err != nil && r.Context().Err() != nil: // the client has gone
		panic(http.ErrAbortHandler)
	case err != nil:
		slog.Error("make attestation document", "error", err)
		w.answer(rw, r, http.StatusInternalServerError, "The security module made no attestation document.")
		return
	}
	w.dismiss(rw.Header(), r)
	rw.Header().Set("Content-Type", "application/cbor")
	rw.Write(document)
}

// parameter returns the only value of a query parameter, or "".
func parameter(query, name string) string {
	values, err := url.ParseQuery(query)
	if err != nil || len(values[name]) != 1 {
		return ""
	}
	return values[name][0]
}

// answer is the gateway's own, in one sentence.
func (w *web) answer(rw http.ResponseWriter, r *http.Request, status int, sentence string) {
	w.dismiss(rw.Header(), r)
	http.Error(rw, sentence, status)
}

// watchedWriter remembers the status of an answer.
type watchedWriter struct {
	http.ResponseWriter
	status int
}

func (w *watchedWriter) WriteHeader(status int) {
	if w.status < 200 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *watchedWriter) Write(b []byte) (int, error) {
	if w.status < 200 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Hijack is called for one status only, which ReverseProxy writes to the connection itself.
func (w *watchedWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.status = http.StatusSwitchingProtocols
	return http.NewResponseController(w.ResponseWriter).Hijack()
}

// Unwrap is for http.ResponseController.
func (w *watchedWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// bufferPool lends the buffers that bodies are copied with.
type bufferPool struct{}

func (bufferPool) Get() []byte  { return buffers.Get().(*[bufferSize]byte)[:] }
func (bufferPool) Put(b []byte) { buffers.Put((*[bufferSize]byte)(b)) }
