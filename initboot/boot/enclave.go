package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

const (
	// heartbeatTimeout is how long a started enclave may take to report on port 9000. With AF_VSOCK the
	// port is the node's, so another pod's boot waits that long at most.
	heartbeatTimeout = 20 * time.Second
	// configureTimeout bounds Configure, which measures the manifest and asks for one document.
	configureTimeout = 30 * time.Second
	// minPortDelay is how long the next try waits for port 9000 at least, and half of how long at most: the
	// tries of several pods drift apart.
	minPortDelay = 50 * time.Millisecond
	// endTimeout is how long the end of the control channel waits for the driver's word on why.
	endTimeout = 100 * time.Millisecond
)

// errClosed is why the context of an enclave ended that was stopped on purpose.
var errClosed = errors.New("the enclave was stopped")

// enclave is one generation.
type enclave struct {
	cfg        Config
	generation uint64

	// ctx ends with the enclave; its cause says why in a sentence.
	ctx  context.Context
	lose context.CancelCauseFunc

	undos        []func()
	measurements *eif.Measurements
	sealed       bool // the EIF has the workload manifest and takes none
	driver       driver.Enclave
	secret       vsock.Secret
	ports        *channel.HostPorts
	control      net.Listener
	client       channel.EnclaveClient
}

// step is one part of a boot.
type step struct {
	// name completes "cannot …" for people.
	name string
	// do registers with undo how to take back what it did, also what it did before it failed.
	do func(e *enclave) error
}

// steps of a boot, in order.
var steps = []step{
	{"read the configuration", (*enclave).checkConfig},
	{"check the enclave image", (*enclave).checkImage},
	{"prepare the enclave", (*enclave).prepare},
	{"open the enclave's host ports", (*enclave).openPorts},
	{"start the enclave", (*enclave).start},
	{"hear from the enclave", (*enclave).connect},
	{"hand over the workload manifest", (*enclave).configure},
}

func newEnclave(ctx context.Context, cfg Config, generation uint64) *enclave {
	e := &enclave{cfg: cfg, generation: generation, secret: vsock.NewSecret()}
	e.ctx, e.lose = context.WithCancelCause(ctx)
	return e
}

// boot does all steps, and tells progress of each as it begins. The caller must close e whatever
// happens.
func (e *enclave) boot(progress func(step string)) error {
	for _, s := range steps {
		progress(s.name)
		err := s.do(e)
		if e.ctx.Err() != nil { // then the step's own error is only a consequence
			err = context.Cause(e.ctx)
		}
		if err != nil {
			return fmt.Errorf("cannot %s: %w", s.name, err)
		}
	}
	return nil
}

// undo registers what close must do, in reverse order.
func (e *enclave) undo(f func()) { e.undos = append(e.undos, f) }

// close ends the enclave and takes back everything that was done for it.
func (e *enclave) close() {
	e.lose(errClosed)
	for _, f := range slices.Backward(e.undos) {
		f()
	}
	e.undos = nil
}

func (e *enclave) checkConfig() error { return e.cfg.Invalid }

// checkImage measures the EIF, and refuses one that asks for an NSM that cannot be had, that does not fit
// or that is sealed for another workload.
func (e *enclave) checkImage() error {
	image, err := eif.Open(e.cfg.EIF)
	if err != nil {
		return err
	}
	defer image.Close()
	cmdline, err := image.Cmdline()
	if err != nil {
		return err
	}
	if slices.Contains(strings.Fields(cmdline), "cloister.nsm=dev") && e.cfg.NSM == nil {
		return errors.New("the EIF's command line asks for the development NSM (cloister.nsm=dev), which a release of initboot does not have: use an EIF for the NSM device, or the initboot-dev image")
	}
	if err := e.checkSealed(image); err != nil {
		return err
	}
	var size int64
	for i, disk := range image.Ramdisks() {
		if i > 0 { // the memory of the first comes on top
			size += disk.Size
		}
	}
	if size > e.cfg.Memory {
		return fmt.Errorf("what is sealed in it has %d bytes, more than the enclave's memory of %d bytes: give the container more memory", size, e.cfg.Memory)
	}
	e.measurements, err = image.Measure()
	return err
}

// checkSealed compares the manifest in a sealed EIF with the pod's, which the other containers go by.
func (e *enclave) checkSealed(image *eif.Reader) error {
	manifest, err := ramdisk.Manifest(image)
	if errors.Is(err, ramdisk.ErrNotSealed) {
		return nil
	}
	if err != nil {
		return err
	}
	e.sealed = true
	if !bytes.Equal(manifest, e.cfg.Manifest) {
		return fmt.Errorf("the EIF is sealed with another workload manifest, of PCR16 %x, than this pod's, of PCR16 %x: build it from this pod with `cloister build -f`, or change the pod back",
			workload.PCR16(manifest), workload.PCR16(e.cfg.Manifest))
	}
	return nil
}

// image is what the enclave is booted from.
func (e *enclave) image() driver.Image {
	return driver.Image{EIF: e.cfg.EIF, Memory: e.cfg.Memory, Console: e.cfg.Console}
}

// prepare does what can be done before the enclave's host ports are bound.
func (e *enclave) prepare() error {
	var err error
	if e.driver, err = e.cfg.Driver.Create(e.generation); err != nil {
		return err
	}
	e.undo(func() {
		if err := e.driver.Stop(); err != nil {
			e.cfg.Log.Error("stop enclave", "generation", e.generation, "error", err)
		}
	})
	if p, ok := e.driver.(driver.Preparer); ok {
		return p.Prepare(e.image())
	}
	return nil
}

// openPorts binds every port that the enclave will dial, before it can dial.
func (e *enclave) openPorts() error {
	if err := e.listenControl(); err != nil {
		return err
	}
	e.undo(func() { e.control.Close() })

	content, contentPort, err := e.listenAny()
	if err != nil {
		return err
	}
	server := &http.Server{
		Handler:           e.cfg.Content,
		ReadHeaderTimeout: 10 * time.Second,
		// Connections of the enclave that end in the middle are no news.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go server.Serve(content)
	e.undo(func() { server.Close() })
	e.ports = &channel.HostPorts{Content: contentPort}

	if e.cfg.NSM == nil {
		return nil
	}
	nsm, nsmPort, err := e.listenAny()
	if err != nil {
		return err
	}
	serve := e.cfg.NSM(e.measurements)
	go func() {
		for {
			c, err := nsm.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(e.ctx, func() { c.Close() })
			go func() {
				defer stop()
				defer c.Close()
				serve(c)
			}()
		}
	}()
	e.undo(func() { nsm.Close() })
	e.ports.Nsm = nsmPort
	return nil
}

// listenControl binds port 9000. With AF_VSOCK it is the node's, so another pod may be booting its enclave.
func (e *enclave) listenControl() (err error) {
	ctx, cancel := context.WithTimeout(e.ctx, heartbeatTimeout)
	defer cancel()
	for {
		if e.control, err = e.driver.Listen(channel.Port); err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("listen on port %d: %w", channel.Port, err)
		}
		select {
		case <-time.After(minPortDelay + rand.N(minPortDelay)):
		case <-ctx.Done():
			return fmt.Errorf("vsock port %d of the node was taken for %s: other pods boot their enclaves, or a process that is none of ours sits on it", channel.Port, heartbeatTimeout)
		}
	}
}

// listenAny listens on a free host port above all containerPorts, behind the enclave's secret.
func (e *enclave) listenAny() (net.Listener, uint32, error) {
	var err error
	for range 10 {
		port := vsock.FirstHostPort + rand.Uint32N(1<<31)
		var l net.Listener
		if l, err = e.driver.Listen(port); err == nil {
			return e.secret.Listen(l, port), port, nil
		}
	}
	return nil, 0, fmt.Errorf("listen on a free host port: %w", err)
}

func (e *enclave) start() error {
	if err := e.driver.Start(e.ctx, e.image()); err != nil {
		return err
	}
	go func() { e.lose(e.driver.Wait()) }()
	return nil
}

// connect takes the one connection on port 9000, which becomes the control channel.
func (e *enclave) connect() error {
	ctx, cancel := context.WithTimeout(e.ctx, heartbeatTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { e.control.Close() })
	c, err := e.control.Accept()
	stop()
	e.control.Close()
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("it did not connect to port %d within %s; what the driver shows of its console is in this log", channel.Port, heartbeatTimeout)
		}
		return err
	}
	stop = context.AfterFunc(e.ctx, func() { c.Close() })
	defer stop()
	var (
		client *grpc.ClientConn
		done   <-chan struct{}
	)
	if client, done, err = channel.NewClient(c); err != nil {
		return err
	}
	e.undo(func() { client.Close() })
	e.client = channel.NewEnclaveClient(client)
	go func() {
		<-done
		// The process of a dead enclave takes a moment longer, and knows more.
		select {
		case <-e.ctx.Done():
		case <-time.After(endTimeout):
			e.lose(errors.New("the enclave has closed its control channel"))
		}
	}()
	return nil
}

// configure hands over the manifest and compares the registers that the enclave shows. This is no
// trust decision, which is the clients'; it finds a wrong EIF or manifest before they do.
func (e *enclave) configure() error {
	ctx, cancel := context.WithTimeout(e.ctx, configureTimeout)
	defer cancel()
	request := &channel.ConfigureRequest{Secret: e.secret, Ports: e.ports}
	if !e.sealed {
		request.Manifest = e.cfg.Manifest
	}
	r, err := e.client.Configure(ctx, request)
	if err != nil {
		return errors.New(message(err))
	}
	doc, err := attestation.ParseUnverified(r.GetDocument())
	if err != nil {
		return err
	}
	for _, pcr := range []struct {
		index uint
		want  []byte
		of    string
	}{
		{0, e.measurements.PCR0, "the EIF"},
		{1, e.measurements.PCR1, "the EIF"},
		{2, e.measurements.PCR2, "the EIF"},
		{16, workload.PCR16(e.cfg.Manifest), "the workload manifest"},
	} {
		if got := doc.PCRs[pcr.index]; !bytes.Equal(got, pcr.want) {
			return fmt.Errorf("the enclave shows PCR%d %x, but %s gives %x", pcr.index, got, pcr.of, pcr.want)
		}
	}
	return nil
}
