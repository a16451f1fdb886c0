package gateway

import (
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// h2Conn is a connection that speaks HTTP/2, with TLS ended. It can ask the client to leave.
//
// net/http's own GOAWAY names the last stream that it has read, so a request that is on its way when it
// is sent is lost, and one whose body cannot be sent again fails. RFC 9113, section 6.8, has a GOAWAY
// with the greatest stream identifier for this: the client opens no more streams, and all it has opened
// are served. h2Conn sends that frame between two frames of net/http's.
type h2Conn struct {
	net.Conn // not a *tls.Conn: net/http must not take it for one
	since    time.Time
	asked    atomic.Bool // the client shall leave

	mu     sync.Mutex
	frames frames
	told   bool // GOAWAY has been sent
}

// stay is how long a new connection is kept in any case. A client that comes back to a gateway that
// drains must not lose each connection as soon as it has it: several requests that wait for one
// connection would take turns in dialling.
const stay = time.Second

// goAway is a GOAWAY frame with the greatest last stream identifier and NO_ERROR.
var goAway = []byte{0, 0, 8, 0x7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}

// speakHTTP2 makes an h2Conn of c, whose plaintext is stream.
func (c *conn) speakHTTP2(stream net.Conn) *h2Conn {
	h := &h2Conn{Conn: stream, since: time.Now()}
	c.gateway.mu.Lock()
	defer c.gateway.mu.Unlock()
	c.h2 = h
	if c.gateway.draining.Load() { // else Drain sees h
		h.leaveSoon()
	}
	return h
}

// leaveSoon asks the client to leave when the connection is no longer new. It does not wait.
func (c *h2Conn) leaveSoon() { time.AfterFunc(stay-time.Since(c.since), c.leave) }

// leave asks the client to leave. It waits while a client that does not read blocks a write.
func (c *h2Conn) leave() {
	c.asked.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tell() // a failed write shows to net/http too
}

// tell sends GOAWAY if that is due and the last frame is whole. c.mu is held.
func (c *h2Conn) tell() error {
	if c.told || !c.asked.Load() || !c.frames.between() {
		return nil
	}
	c.told = true
	_, err := c.Conn.Write(goAway)
	return err
}

func (c *h2Conn) Write(p []byte) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n < len(p) {
		if err := c.tell(); err != nil {
			return n, err
		}
		end := n
		for end < len(p) {
			end += c.frames.next(p[end:])
			if !c.told && c.asked.Load() {
				break // after this frame
			}
		}
		written, err := c.Conn.Write(p[n:end])
		n += written
		if err != nil {
			return n, err
		}
	}
	return n, c.tell()
}

// frames follows the frames in a stream of bytes (RFC 9113, section 4.1).
type frames struct {
	head  [9]byte
	have  int  // bytes of the head of the current frame
	rest  int  // bytes of its payload to come, when the head is whole
	begun bool // a whole frame has passed: the first one must be SETTINGS
	block bool // the field block goes on in the next frame, which must be CONTINUATION (section 4.3)
}

// next takes bytes from p up to the end of the current frame and returns how many.
func (f *frames) next(p []byte) (n int) {
	const (
		typeHeaders, typePushPromise, typeContinuation = 0x1, 0x5, 0x9
		flagEndHeaders                                 = 0x4
	)
	if f.have < len(f.head) {
		n = copy(f.head[f.have:], p)
		f.have += n
		if f.have < len(f.head) {
			return n
		}
		f.rest = int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2])
		switch f.head[3] {
		case typeHeaders, typePushPromise, typeContinuation:
			f.block = f.head[4]&flagEndHeaders == 0
		}
	}
	payload := min(f.rest, len(p)-n)
	f.rest -= payload
	n += payload
	if f.rest == 0 {
		f.have, f.begun = 0, true
	}
	return n
}

// between reports whether another frame may be inserted here.
func (f *frames) between() bool { return f.begun && f.have == 0 && !f.block }
