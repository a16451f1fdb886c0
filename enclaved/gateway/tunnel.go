package gateway

import (
	"io"
	"log/slog"
	"net"
	"sync"
)

// bufferSize suits vsock, which is fastest with writes of 64 KiB (AWS c6i, published measurements).
const bufferSize = 64 << 10

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// duplex is a stream of which one direction can end before the other.
type duplex interface {
	net.Conn
	CloseWrite() error
}

// tunnel carries bytes between the workload and client, whose connection is c. The end of one direction
// is passed on and leaves the other open. A stream that breaks off is broken off on the other side too,
// so that nobody takes a part for the whole.
func (p *port) tunnel(c *conn, client duplex) {
	defer c.Close()
	defer p.gateway.request()()
	d := net.Dialer{Timeout: dialTimeout}
	dialed, err := d.DialContext(c.ctx, "tcp", p.upstream)
	if err != nil {
		if c.ctx.Err() == nil {
			slog.Warn("connect to the workload", "port", p.number, "error", err)
		}
		return
	}
	up := dialed.(*net.TCPConn)
	defer up.Close()
	var both sync.WaitGroup
	// Closing c without TLS's close_notify is what breaks the stream off.
	both.Go(func() { forward(up, client, c.cancel) })
	both.Go(func() { forward(client, up, c.cancel) })
	ended := make(chan struct{})
	go func() {
		both.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		if c.ctx.Err() == nil {
			return
		}
	case <-c.ctx.Done(): // broken off, or cut by Gateway.Close
	}
	up.SetLinger(0) // a reset, not an end
	up.Close()
	c.Close()
	<-ended
}

// forward copies until src ends, and ends dst. If src breaks off it calls abort. If dst takes no more
// the other direction goes on: what dst has sent before may still be on its way.
func forward(dst, src duplex, abort func()) {
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	for {
		n, err := src.Read(buf[:])
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if err == io.EOF {
			dst.CloseWrite()
			return
		}
		if err != nil {
			abort()
			return
		}
	}
}
