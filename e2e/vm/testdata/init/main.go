// Init is PID 1 of the enclaves of e2e/vm: it prepares itself as enclaved does and serves the tests.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"

	"cloister.dev/cloister/e2e/vm/stream"
	"cloister.dev/cloister/enclaved/supervise"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/vsock"
)

// open counts the connections that are served.
var open atomic.Int32

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "init:", err)
		supervise.End(1)
	}
}

func run() error {
	if _, err := supervise.Prepare(); err != nil {
		return err
	}
	guest, err := vsock.NewGuest()
	if err != nil {
		return err
	}
	for port, serve := range map[uint32]func(net.Conn) error{
		stream.EchoPort:   func(c net.Conn) error { _, err := io.Copy(c, c); return err },
		stream.SourcePort: source,
		stream.SinkPort:   func(c net.Conn) error { return stream.Sink(c) },
		stream.CountPort:  func(c net.Conn) error { return json.NewEncoder(c).Encode(open.Load()) },
		stream.DialPort:   func(c net.Conn) error { return dial(guest, c) },
		stream.NSMPort:    report,
		stream.EndPort:    func(net.Conn) error { supervise.End(0); return nil },
	} {
		l, err := guest.Listen(port)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					counted := port != stream.CountPort
					if counted {
						open.Add(1)
						defer open.Add(-1)
					}
					defer c.Close()
					if err := serve(c); err == nil {
						stream.CloseWrite(c)
						io.Copy(io.Discard, c)
					}
				}()
			}
		}()
	}
	c, err := guest.Dial(context.Background(), stream.ReadyPort)
	if err != nil {
		return err
	}
	c.Close()
	select {}
}

// source sends as many bytes as it is asked for.
func source(c net.Conn) error {
	var n uint64
	if err := binary.Read(c, binary.BigEndian, &n); err != nil {
		return err
	}
	return stream.Source(c, int64(n))
}

// dial connects to the port of the host that it is told, and moves bytes both ways.
func dial(guest vsock.Guest, c net.Conn) error {
	var port uint32
	if err := binary.Read(c, binary.BigEndian, &port); err != nil {
		return err
	}
	h, err := guest.Dial(context.Background(), port)
	if err != nil {
		_, err = fmt.Fprintf(c, "refused")
		return err
	}
	defer h.Close()
	go func() {
		io.Copy(h, c)
		stream.CloseWrite(h)
	}()
	_, err = io.Copy(c, h)
	return err
}

// report asks the security module for everything.
func report(c net.Conn) error {
	r, err := ask()
	if err != nil {
		r = &stream.Report{Error: err.Error()}
	}
	return json.NewEncoder(c).Encode(r)
}

func ask() (*stream.Report, error) {
	ctx := context.Background()
	provider, err := nsm.OpenDevice()
	if err != nil {
		return nil, err
	}
	defer provider.Close()
	module := nsm.New(provider)
	r := &stream.Report{}
	before, err := module.DescribeNSM(ctx)
	if err != nil {
		return nil, err
	}
	r.ModuleID, r.Digest, r.MaxPCRs, r.LockedBefore = before.ModuleID, string(before.Digest), before.MaxPCRs, before.LockedPCRs
	if r.Random, err = module.Random(ctx); err != nil {
		return nil, err
	}
	for i := range r.PCRs {
		if r.PCRs[i], _, err = module.DescribePCR(ctx, uint16(i)); err != nil {
			return nil, err
		}
	}
	// ExtendPCR and LockPCR of PCR16, and Attestation, as enclaved does them.
	v := vault.New(module)
	defer v.Close()
	if r.Document, err = v.Measure(ctx, []byte(stream.Manifest)); err != nil {
		return nil, err
	}
	if r.PCR16, r.PCR16Locked, err = module.DescribePCR(ctx, 16); err != nil {
		return nil, err
	}
	if _, err := module.ExtendPCR(ctx, 16, []byte("more")); err != nil {
		r.ExtendLocked = err.Error()
	}
	return r, nil
}
