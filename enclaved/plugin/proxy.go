package plugin

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"
)

// connectTimeout bounds a connect through the proxy.
const connectTimeout = 30 * time.Second

// proxy serves HTTP CONNECT on a plugin's own socket: the plugin has no other network.
type proxy struct {
	allowed []string
	dial    Dial
}

// serve accepts until l is closed. Streams end with ctx.
func (p *proxy) serve(ctx context.Context, l net.Listener) {
	var conns sync.WaitGroup
	for {
		c, err := l.Accept()
		if err != nil {
			conns.Wait()
			return
		}
		conns.Go(func() { p.connect(ctx, c) })
	}
}

// connect answers one request and carries its stream.
func (p *proxy) connect(life context.Context, c net.Conn) {
	defer c.Close()
	defer context.AfterFunc(life, func() { c.Close() })()
	c.SetDeadline(time.Now().Add(connectTimeout))
	buffered := bufio.NewReader(c)
	r, err := http.ReadRequest(buffered)
	if err != nil {
		return
	}
	answer := func(status int, sentence string) {
		fmt.Fprintf(c, "HTTP/1.1 %d %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s\n",
			status, http.StatusText(status), len(sentence)+1, sentence)
	}
	switch {
	case r.Method != http.MethodConnect:
		answer(http.StatusMethodNotAllowed, "this socket takes CONNECT host:port only")
		return
	case !slices.Contains(p.allowed, r.RequestURI):
		answer(http.StatusForbidden, "the plugin may not connect to this: add it to its egress in the EnclaveConfig")
		return
	}
	ctx, cancel := context.WithTimeout(life, connectTimeout)
	up, err := p.dial(ctx, r.RequestURI)
	cancel()
	if err != nil {
		answer(http.StatusBadGateway, err.Error())
		return
	}
	defer up.Close()
	defer context.AfterFunc(life, func() { up.Close() })()
	if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
		return
	}
	c.SetDeadline(time.Time{})
	var both sync.WaitGroup
	both.Go(func() { carry(up, buffered, c) })
	both.Go(func() { carry(c, up, up) })
	both.Wait()
}

// carry copies src, which reads from of, to dst until it ends; a stream that breaks off ends both.
func carry(dst net.Conn, src io.Reader, of net.Conn) {
	_, err := io.Copy(dst, src)
	if half, ok := dst.(interface{ CloseWrite() error }); ok && err == nil {
		half.CloseWrite()
		return
	}
	dst.Close()
	of.Close()
}

// throughProxy dials by way of a proxy socket.
func throughProxy(socket string) Dial {
	return func(ctx context.Context, address string) (net.Conn, error) {
		if socket == "" {
			return nil, errors.New("this plugin has no way out")
		}
		var d net.Dialer
		c, err := d.DialContext(ctx, "unix", socket)
		if err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		r := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: address}, Host: address, Header: http.Header{"User-Agent": nil}}
		buffered := bufio.NewReader(c)
		res, err := roundTrip(c, buffered, r)
		if !stop() && err == nil {
			err = context.Cause(ctx)
		}
		if err == nil && buffered.Buffered() > 0 {
			err = errors.New("the proxy sent data before it was asked for any")
		}
		if err == nil && res.StatusCode != http.StatusOK {
			sentence, _ := io.ReadAll(io.LimitReader(res.Body, 1<<10))
			err = fmt.Errorf("connect to %s: %s", address, string(sentence[:max(0, len(sentence)-1)]))
		}
		if err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	}
}

func roundTrip(c net.Conn, buffered *bufio.Reader, r *http.Request) (*http.Response, error) {
	if err := r.Write(c); err != nil {
		return nil, err
	}
	return http.ReadResponse(buffered, r)
}
