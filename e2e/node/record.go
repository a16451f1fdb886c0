package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
)

// record takes the place of the socket through which the sidecar reaches the enclave, in the folder
// args[0], passes everything on, and prints at the end what it saw, stream by stream.
func record(ctx context.Context, args []string) error {
	const public, private = "vsock.sock", "vsock.real"
	// The whole path of a pod's volume is longer than the address of a unix socket may be.
	if err := os.Chdir(args[0]); err != nil {
		return err
	}
	if err := os.Rename(public, private); err != nil {
		return err
	}
	l, err := net.Listen("unix", public)
	if err != nil {
		return err
	}
	if err := os.Chmod(public, 0o666); err != nil {
		return err
	}
	fmt.Println("ready")
	context.AfterFunc(ctx, func() { l.Close() }) // removes its socket

	var mu sync.Mutex
	var streams []*bytes.Buffer
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			break
		}
		if err != nil {
			return err
		}
		target, err := net.Dial("unix", private)
		if err != nil {
			c.Close()
			continue
		}
		for _, way := range [][2]net.Conn{{c, target}, {target, c}} {
			seen := &bytes.Buffer{}
			streams = append(streams, seen)
			go func() {
				defer way[0].Close()
				defer way[1].Close()
				io.Copy(way[1], io.TeeReader(way[0], locked{&mu, seen}))
			}()
		}
	}
	if err := os.Rename(private, public); err != nil {
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
