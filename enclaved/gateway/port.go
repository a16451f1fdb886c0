package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

const (
	// A client that does not finish its handshake or a request's header in time is cut off. Bodies
	// have no time limit.
	handshakeTimeout = 10 * time.Second
	headerTimeout    = 10 * time.Second
	// idleTimeout is longer than the 90 s after which Go's clients drop an idle connection themselves
	// (http.DefaultTransport), so that a client rarely sends into a connection that is being closed.
	idleTimeout = 5 * time.Minute
	// dialTimeout bounds a connect to the workload, which waits when its backlog is full.
	dialTimeout = 10 * time.Second
	// acceptPause keeps an accept that fails, for want of descriptors, from spinning.
	acceptPause = 10 * time.Millisecond
)

// port is one port of the manifest.
type port struct {
	gateway  *Gateway
	vault    Vault
	number   uint32
	upstream string // host:port of the workload
	tls      *tls.Config
	open     func(port uint32) (net.Listener, error)
	// authorize and reserved are Config's.
	authorize func(*http.Request) *Verdict
	observe   func(*http.Request, uint32) (end func(int))
	reserved  []string

	listener  net.Listener
	accepting sync.WaitGroup
	closed    chan struct{}  // closed when accepting ends
	streams   sync.WaitGroup // handshakes of HTTP connections, and tunnels

	web *web // nil for a tcp port
}

func newPort(g *Gateway, config Config, m workload.Port) (*port, error) {
	p := &port{
		gateway:   g,
		vault:     config.Vault,
		number:    m.Port,
		upstream:  net.JoinHostPort("127.0.0.1", strconv.FormatUint(uint64(m.Port), 10)),
		open:      config.Listen,
		authorize: config.Authorize,
		observe:   config.Observe,
		reserved:  config.Reserved,
		closed:    make(chan struct{}),
	}
	switch m.Protocol {
	case "", workload.ProtocolHTTP:
		p.web = newWeb(p, m.Plaintext)
	case workload.ProtocolTCP:
	default:
		return nil, fmt.Errorf("port %d: unknown protocol %q", m.Port, m.Protocol)
	}
	if !m.Plaintext {
		p.tls = serverConfig(config.Vault, p.web != nil)
	}
	return p, nil
}

// serverConfig is TLS 1.3 with the attested certificate and full handshakes only. For HTTP it chooses
// h2 or http/1.1. It never selects attestation.ALPN, which a client lists only to ask for the attested
// certificate.
func serverConfig(v Vault, web bool) *tls.Config {
	plain := &tls.Config{
		MinVersion:             tls.VersionTLS13,
		SessionTicketsDisabled: true,
		GetCertificate:         v.Certificate,
		// Small records cost more on vsock than they save.
		DynamicRecordSizingDisabled: true,
	}
	if !web {
		return plain
	}
	config := plain.Clone()
	config.NextProtos = []string{"h2", "http/1.1"}
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		// crypto/tls refuses a client that lists only what the server does not know. One that lists
		// nothing but attestation.ALPN has no protocol to choose: it gets HTTP/1.1, as without ALPN.
		others := func(name string) bool { return name != attestation.ALPN }
		if !slices.ContainsFunc(hello.SupportedProtos, others) {
			return plain, nil
		}
		return nil, nil
	}
	return config
}

func (p *port) listen() error {
	l, err := p.open(p.number)
	p.listener = l
	return err
}

func (p *port) start() {
	if p.web != nil {
		p.web.start()
	}
	p.accepting.Go(p.accept)
}

func (p *port) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			select {
			case <-p.closed:
				return
			case <-time.After(acceptPause):
			}
			if errors.Is(err, net.ErrClosed) {
				slog.Error("accept connection", "port", p.number, "error", err)
				return
			}
			continue
		}
		t := p.gateway.track(c, p.tls != nil)
		p.streams.Go(func() { p.serve(t) })
	}
}

// serve hands an HTTP connection to its server, or carries a tunnel until it ends.
func (p *port) serve(c *conn) {
	var stream duplex = c
	protocol := ""
	if p.tls != nil {
		t, err := p.handshake(c)
		if err != nil {
			c.Close()
			return
		}
		stream, protocol = t, t.ConnectionState().NegotiatedProtocol
	}
	switch {
	case p.web == nil:
		p.tunnel(c, stream)
	case protocol == "h2":
		p.web.h2.listener.deliver(c.speakHTTP2(stream))
	default:
		p.web.h1.listener.deliver(stream)
	}
}

// handshake does not log failures: anybody can cause them.
func (p *port) handshake(c *conn) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(c.ctx, handshakeTimeout)
	defer cancel()
	t := tls.Server(c, p.tls)
	err := t.HandshakeContext(ctx)
	var notTLS tls.RecordHeaderError
	if errors.As(err, &notTLS) && notTLS.Conn != nil && p.web != nil && looksLikeHTTP(notTLS.RecordHeader) {
		c.SetWriteDeadline(time.Now().Add(handshakeTimeout))
		io.WriteString(c, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n\r\nThis port speaks TLS: use https instead of http.\n")
	}
	return t, err
}

// looksLikeHTTP reports whether what should be a TLS record begins as a request does.
func looksLikeHTTP(head [5]byte) bool {
	return slices.Contains([]string{"GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "PATCH", "DELET", "PRI *"}, string(head[:]))
}

func (p *port) stopAccepting() {
	close(p.closed)
	if p.listener != nil {
		p.listener.Close()
	}
	p.accepting.Wait()
}

// shutdown ends gracefully what runs on the port, as long as ctx allows.
func (p *port) shutdown(ctx context.Context) {
	p.streams.Wait() // each ends with its connection at the latest
	if p.web != nil {
		p.web.shutdown(ctx)
	}
}

func (p *port) end() {
	if p.web != nil {
		p.web.end()
	}
}

// quiet is for net/http, whose messages may quote what a connection carries. Standard output and error
// of an enclave are read by its host.
var quiet = log.New(io.Discard, "", 0)

// server is an http.Server whose connections are accepted, and their TLS ended, by the port.
type server struct {
	http.Server
	listener *queue
	running  sync.WaitGroup
}

func newServer(protocols func(*http.Protocols), handler http.Handler) *server {
	s := &server{listener: newQueue()}
	s.Handler = handler
	s.Protocols = new(http.Protocols)
	protocols(s.Protocols)
	s.ReadHeaderTimeout = headerTimeout
	s.IdleTimeout = idleTimeout
	s.ErrorLog = quiet
	return s
}

func (s *server) start() { s.running.Go(func() { s.Serve(s.listener) }) }

func (s *server) shutdown(ctx context.Context) {
	if s.Shutdown(ctx) != nil {
		s.Close()
	}
	s.listener.Close() // Serve may not have begun
	s.running.Wait()
}

// queue is a net.Listener of connections that somebody else has accepted.
type queue struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newQueue() *queue {
	return &queue{conns: make(chan net.Conn), done: make(chan struct{})}
}

// deliver hands c to Accept, or closes it when the queue is closed.
func (q *queue) deliver(c net.Conn) {
	select {
	case q.conns <- c:
	case <-q.done:
		c.Close()
	}
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.conns:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

func (q *queue) Addr() net.Addr { return queueAddr{} }

type queueAddr struct{}

func (queueAddr) Network() string { return "gateway" }
func (queueAddr) String() string  { return "gateway" }
