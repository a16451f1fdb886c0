package nitro

import (
	"errors"
	"net"
	"sync"
	"time"
)

// maxHostCID is the highest context id that is no enclave's: that of the parent instance
// (NE_PARENT_VM_CID, drivers/virt/nitro_enclaves/ne_misc_dev.c).
const maxHostCID = 3

// listener listens on a port of the host, which every process of the node and every enclave can connect to. It
// takes each connection at once and closes those of strangers, so that they cannot fill the queue in which
// its own enclave's would wait.
type listener struct {
	net.Listener
	enclave *enclave
	port    uint32
	conns   chan net.Conn
	done    chan struct{}
	once    sync.Once

	mu      sync.Mutex
	waiting map[uint32]bool // context ids with a connection from before the start
}

func newListener(e *enclave, l net.Listener, port uint32) *listener {
	own := &listener{Listener: l, enclave: e, port: port, conns: make(chan net.Conn), done: make(chan struct{}), waiting: map[uint32]bool{}}
	go own.serve()
	return own
}

func (l *listener) serve() {
	for {
		c, err := l.Listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			l.Close()
			return
		}
		if err != nil {
			select {
			case <-l.done:
				return
			case <-time.After(10 * time.Millisecond): // out of descriptors: the next try may find one
			}
			continue
		}
		cid, err := l.enclave.driver.Transport.PeerCID(c)
		if err != nil || cid <= maxHostCID || !l.admit(cid) {
			l.enclave.driver.Log.Debug("a stranger's connection was refused", "port", l.port, "cid", cid, "error", err)
			c.Close()
			continue
		}
		go l.deliver(c, cid)
	}
}

// admit tells whether a connection may be the enclave's. Before the start, any enclave's may be, which connects
// once: the hypervisor starts it before the device says its context id.
func (l *listener) admit(cid uint32) bool {
	select {
	case <-l.enclave.hasCID:
		return cid == l.enclave.cid
	default:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.waiting[cid]
	l.waiting[cid] = true
	return !before
}

// deliver hands over a connection, if it is the enclave's.
func (l *listener) deliver(c net.Conn, cid uint32) {
	select {
	case <-l.enclave.hasCID:
	case <-l.done:
	}
	select {
	case <-l.done:
		c.Close()
		return
	default:
	}
	if cid != l.enclave.cid {
		c.Close()
		return
	}
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

// Accept returns the next connection of the enclave.
func (l *listener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close frees the port.
func (l *listener) Close() error {
	err := net.ErrClosed
	l.once.Do(func() {
		close(l.done)
		err = l.Listener.Close()
	})
	return err
}
