package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// record takes the place of the socket through which the sidecar reaches the enclave, or of the socket
// args[1], in the folder args[0], passes everything on, and prints at the end what it saw, stream by
// stream.
func record(ctx context.Context, args []string) error {
	// The whole path of a pod's volume is longer than the address of a unix socket may be.
	if err := os.Chdir(args[0]); err != nil {
		return err
	}
	var mu sync.Mutex
	var streams []*bytes.Buffer
	tap := func(r io.Reader) io.Reader {
		mu.Lock()
		defer mu.Unlock()
		seen := &bytes.Buffer{}
		streams = append(streams, seen)
		return io.TeeReader(r, locked{&mu, seen})
	}
	socket := "vsock.sock"
	if len(args) > 1 {
		socket = args[1]
	}
	restore, err := interpose(socket, tap, tap)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	<-ctx.Done()
	if err := restore(); err != nil {
		return err
	}
	mu.Lock()
	defer mu.Unlock()
	for _, s := range streams {
		if _, err := s.WriteTo(os.Stdout); err != nil {
			return err
		}
	}
	return nil
}

// locked is a writer for one goroutine at a time.
type locked struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l locked) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// tamper takes the place of every socket that the enclave dials, in the folder args[0], and changes one
// bit in every 64 KiB of what the enclave gets: layers, but nothing shorter.
func tamper(ctx context.Context, args []string) error {
	if err := os.Chdir(args[0]); err != nil {
		return err
	}
	sockets, err := filepath.Glob("vsock.sock_*")
	if err != nil {
		return err
	}
	if len(sockets) == 0 {
		return errors.New("no host ports")
	}
	same := func(r io.Reader) io.Reader { return r }
	changed := func(r io.Reader) io.Reader { return &flipping{r: r} }
	for _, s := range sockets {
		restore, err := interpose(s, same, changed)
		if err != nil {
			return err
		}
		defer restore()
	}
	fmt.Println("ready", strings.Join(sockets, " "))
	<-ctx.Done()
	return nil
}

// flipping changes one bit in every 64 KiB.
type flipping struct {
	r io.Reader
	n int // bytes read
}

func (f *flipping) Read(b []byte) (int, error) {
	n, err := f.r.Read(b)
	for i := range n {
		if f.n++; f.n%(64<<10) == 0 {
			b[i] ^= 1
		}
	}
	return n, err
}

// interpose takes the place of a unix socket of the working folder and passes connections on to it,
// through a reader each way. Restore puts the socket back; connections stay.
func interpose(socket string, forth, back func(io.Reader) io.Reader) (restore func() error, err error) {
	hidden := "hidden-" + socket
	if err := os.Rename(socket, hidden); err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o666); err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			target, err := net.Dial("unix", hidden)
			if err != nil {
				c.Close()
				continue
			}
			pass := func(to, from net.Conn, through func(io.Reader) io.Reader) {
				defer to.Close()
				defer from.Close()
				io.Copy(to, through(from))
			}
			go pass(target, c, forth)
			go pass(c, target, back)
		}
	}()
	return func() error {
		l.Close() // removes its socket
		return os.Rename(hidden, socket)
	}, nil
}
