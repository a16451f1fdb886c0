package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/url"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

type proxy struct {
	trust
	listen string

	web      bool   // the URL says https
	upstream string // host:port of the URL
	verifier *attestation.Verifier
	set      workload.MeasurementSet
	log      *log.Logger

	mu   sync.Mutex
	seen map[string]bool // modules that were reported
}

func newProxy() *cobra.Command {
	var p proxy
	cmd := &cobra.Command{
		Use:   "proxy --measurements FILE [flags] URL",
		Short: "Open a local port that leads to an enclave that proves what it runs",
		Long: `Listens on a loopback address without TLS, for any program, and carries each connection to the enclave
over a connection of its own. It checks in that connection's TLS handshake that the other end is an
enclave with one of the given measurements. If not, it closes the program's connection, has passed on
nothing, and says why in one line on stderr.

https://HOST[:PORT] is a server of HTTP: a program that begins with HTTP/2 (h2c, as gRPC without TLS)
gets HTTP/2, every other one HTTP/1.1. Nothing is changed, so the Host header is the program's.
tcp://HOST:PORT is anything else. The end of one direction is passed on, the other stays open.

Whoever can use this machine's loopback can use the port.`,
		Example: `  cloister proxy --measurements measurements.json https://shop.example
  cloister proxy --measurements measurements.json --listen 127.0.0.1:6379 tcp://redis.shop.example:6379`,
		Args: exactly("URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := p.target(args[0]); err != nil {
				return err
			}
			if err := p.check(); err != nil {
				return err
			}
			addr, err := net.ResolveTCPAddr("tcp", p.listen)
			if err != nil {
				return fmt.Errorf("--listen takes HOST:PORT: %w", err)
			}
			if !addr.IP.IsLoopback() {
				return fmt.Errorf("--listen %s is no loopback address: what goes through this port is not encrypted, so it must not leave the machine; use 127.0.0.1:PORT", p.listen)
			}
			p.log = log.New(cmd.ErrOrStderr(), "", 0)
			return failed(p.run(cmd.Context(), addr))
		},
	}
	p.flags(cmd.Flags())
	cmd.Flags().StringVar(&p.listen, "listen", "127.0.0.1:8080", "loopback `HOST:PORT` to listen on; port 0 takes a free one")
	return cmd
}

// target reads the URL.
func (p *proxy) target(arg string) error {
	u, err := url.Parse(arg)
	if err != nil {
		return err
	}
	port := u.Port()
	switch {
	case u.Scheme != "https" && u.Scheme != "tcp", u.Hostname() == "", u.User != nil, u.Path != "" && u.Path != "/", u.RawQuery != "", u.Fragment != "":
		return fmt.Errorf("%s is neither https://HOST[:PORT] nor tcp://HOST:PORT", arg)
	case port == "" && u.Scheme == "tcp":
		return fmt.Errorf("%s names no port, and tcp has no usual one: write tcp://HOST:PORT", arg)
	case port == "":
		port = "443"
	}
	p.web, p.upstream = u.Scheme == "https", net.JoinHostPort(u.Hostname(), port)
	return nil
}

// run serves connections until ctx ends, and then closes those that are open.
func (p *proxy) run(ctx context.Context, addr *net.TCPAddr) error {
	var err error
	if p.verifier, p.set, err = p.load(); err != nil {
		return err
	}
	p.seen = map[string]bool{}
	l, err := net.ListenTCP("tcp", addr)
	if err != nil {
		return err
	}
	// Its end also ends the connections when accepting fails.
	ctx, cancel := context.WithCancel(ctx)
	var open sync.WaitGroup
	defer open.Wait()
	defer cancel()
	context.AfterFunc(ctx, func() { l.Close() })
	p.log.Printf("listening on %s for %s", l.Addr(), p.upstream)
	for {
		client, err := l.AcceptTCP()
		if ctx.Err() != nil {
			if err == nil {
				client.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept connection: %w", err)
		}
		open.Go(func() { p.serve(ctx, client) })
	}
}

// serve carries one connection. Nothing is written to either side before the enclave is verified.
func (p *proxy) serve(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	defer context.AfterFunc(ctx, func() { client.Close() })()
	in := bufio.NewReader(client)
	var protocols []string
	if p.web {
		// "PRI * HTTP/2.0" begins HTTP/2 (RFC 9113, section 3.4), and no other method begins so. An error
		// is left to the first real read.
		protocols = []string{"http/1.1"}
		if start, _ := in.Peek(3); string(start) == "PRI" {
			protocols = []string{"h2"}
		}
	}
	up, err := p.connect(ctx, protocols)
	if err != nil {
		if ctx.Err() == nil {
			p.log.Printf("refused %s: %v", client.RemoteAddr(), err)
		}
		return
	}
	defer up.Close()
	defer context.AfterFunc(ctx, func() { up.NetConn().Close() })()

	// A stream that breaks off is broken off on the other side too, so that nobody takes a part for the
	// whole: with a reset, and without TLS's close_notify.
	abort := func() {
		client.SetLinger(0)
		client.Close()
		up.NetConn().Close()
	}
	var sending sync.WaitGroup
	sending.Go(func() {
		if err := pass(up, in); err != nil {
			abort()
		}
	})
	if err := pass(client, up); err != nil {
		abort()
		if errors.Is(err, errCut) && ctx.Err() == nil {
			p.log.Printf("broken off %s: %v", client.RemoteAddr(), err)
		}
	}
	sending.Wait()
}

// connect makes a verified connection that offers the protocols.
func (p *proxy) connect(ctx context.Context, protocols []string) (*tls.Conn, error) {
	raw, err := p.dial(ctx, "tcp", p.upstream)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(p.upstream)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(raw, p.verifier.ClientConfig(&tls.Config{ServerName: host, NextProtos: protocols}))
	shaking, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := conn.HandshakeContext(shaking); err != nil {
		raw.Close()
		return nil, err
	}
	if err := p.report(conn); err != nil {
		raw.Close()
		return nil, err
	}
	return conn, nil
}

// report says once of each enclave what it has proven.
func (p *proxy) report(conn *tls.Conn) error {
	document, err := p.verifier.Document(conn.ConnectionState())
	if err != nil {
		return err
	}
	entry, err := p.set.Match(document.PCRs)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.seen[document.ModuleID] {
		p.seen[document.ModuleID] = true
		var lines strings.Builder
		printVerified(&lines, document, entry)
		p.log.Print(lines.String())
	}
	return nil
}

// pass copies until src ends, and then ends dst. It returns an error when src breaks off. When dst takes
// no more it just returns: what dst has sent before may still be on its way in the other direction.
func pass(dst interface {
	io.Writer
	CloseWrite() error
}, src io.Reader) error {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return nil
			}
		}
		if err == io.EOF {
			dst.CloseWrite()
			return nil
		}
		if err != nil {
			return err
		}
	}
}
