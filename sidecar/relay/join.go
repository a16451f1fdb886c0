package relay

import (
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// stream is a connection of which one direction can end before the other: *net.UnixConn and the
// AF_VSOCK connections of github.com/mdlayher/vsock.
type stream interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

const bufferSize = 64 << 10

// buffers holds *[bufferSize]byte. A buffer is in use only from the moment at which a stream has data
// until they are written: a thousand idle connections need none.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// join carries bytes both ways between a and b until both directions have ended, one of the two is
// closed, or an error; then it closes both. The end of one direction is passed on alone.
func join(a, b stream) {
	var wg sync.WaitGroup
	var ended atomic.Int32
	carry := func(dst, src stream) {
		defer func() {
			a.Close()
			b.Close()
		}()
		if transfer(dst, src) != nil || dst.CloseWrite() != nil || ended.Add(1) == 2 {
			return
		}
		// The end of file may be that of src's direction only, or src is gone altogether; then it can
		// take no answer, and the other direction, which might stay silent for ever, ends too.
		awaitHangup(src)
	}
	wg.Go(func() { carry(a, b) })
	wg.Go(func() { carry(b, a) })
	wg.Wait()
}

// transfer copies until the end of src, which is no error. It reads only when dst has taken what was
// read before, so that a slow reader slows its writer down.
func transfer(dst net.Conn, src syscall.Conn) error {
	raw, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var (
			buf     *[bufferSize]byte
			n       int
			readErr error
		)
		if err := raw.Read(func(fd uintptr) bool {
			buf = buffers.Get().(*[bufferSize]byte)
			n, readErr = read(int(fd), buf[:])
			if errors.Is(readErr, unix.EAGAIN) {
				buffers.Put(buf) // not while it waits
				return false
			}
			return true
		}); err != nil {
			return err
		}
		if readErr == nil && n > 0 {
			_, readErr = dst.Write(buf[:n])
		}
		buffers.Put(buf)
		if readErr != nil || n == 0 {
			return readErr
		}
	}
}

func read(fd int, b []byte) (int, error) {
	for {
		n, err := unix.Read(fd, b)
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}

// awaitHangup returns when both directions of c have ended (POLLHUP, as unix_poll in net/unix/af_unix.c
// and vsock_poll in net/vmw_vsock/af_vsock.c report it) or c has been closed.
func awaitHangup(c syscall.Conn) {
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd)}} // POLLHUP and POLLERR come unasked
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
}
