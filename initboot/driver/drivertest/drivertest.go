// Package drivertest has a driver whose enclaves live in the test's process: with real hybrid sockets,
// heartbeat, control channel and signed documents, but no workload other than what the test says.
package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/internal/sealed"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// Workload is what an enclave does in its Run: it sends events and returns the exit code, or nil for a Run
// that fails. Ctx ends with Stop and with the enclave.
type Workload func(ctx context.Context, e *Enclave, send func(*channel.RunEvent) error) *channel.Exited

// Driver is a driver.Driver. Its fields must not be changed while it is used.
type Driver struct {
	// Dir is for sockets.
	Dir string
	// Workload of every enclave.
	Workload Workload
	// Boot, when set, is called instead of a successful start.
	Boot func(generation uint64) error
	// OtherEIF, when set, is what enclaves are really booted from.
	OtherEIF string
	// Probe, when set, answers probes.
	Probe func(*channel.ProbeRequest) *channel.ProbeResponse
	// Update, when set, answers updates of files.
	Update func(*channel.HostMount) error
	// Stats is what enclaves count.
	Stats *channel.StatsResponse

	signer *nsmdev.Signer

	mu       sync.Mutex
	enclaves []*Enclave
}

// New returns a driver for t.
func New(t testing.TB, w Workload) *Driver {
	t.Helper()
	cert, key, err := nsmdev.NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return &Driver{Dir: Dir(t), Workload: w, signer: signer}
}

// Dir returns a folder whose path is short enough for sockets (108 bytes, unix(7)).
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Until waits for a condition, for at most 30 s.
func Until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// WriteEIF writes a small EIF into a folder of the test and returns its path.
func WriteEIF(t testing.TB, cmdline string) string {
	t.Helper()
	return writeEIF(t, cmdline, []byte("second"))
}

// WriteSealedEIF writes a small EIF with a workload manifest and returns its path.
func WriteSealedEIF(t testing.TB, manifest []byte) string {
	t.Helper()
	var disk bytes.Buffer
	w := ramdisk.NewWriter(&disk)
	err := errors.Join(w.Folder(sealed.Dir, 0o755), w.File(sealed.Manifest, 0o444, bytes.NewReader(manifest), int64(len(manifest))), w.Close())
	if err != nil {
		t.Fatal(err)
	}
	return writeEIF(t, "quiet", disk.Bytes())
}

func writeEIF(t testing.TB, cmdline string, second []byte) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "test.eif"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = eif.Write(f, eif.Image{
		Arch: eif.X86_64, Kernel: bytes.NewReader([]byte("kernel")), Cmdline: cmdline,
		Ramdisks: []eif.Data{bytes.NewReader([]byte("first")), bytes.NewReader(second)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// Last returns the newest enclave, or nil.
func (d *Driver) Last() *Enclave {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.enclaves) == 0 {
		return nil
	}
	return d.enclaves[len(d.enclaves)-1]
}

// Create implements driver.Driver.
func (d *Driver) Create(generation uint64) (driver.Enclave, error) {
	e := &Enclave{d: d, Generation: generation, dir: filepath.Join(d.Dir, strconv.FormatUint(generation, 10))}
	e.ctx, e.end = context.WithCancelCause(context.Background())
	e.stopped, e.stop = context.WithCancel(e.ctx)
	if err := os.Mkdir(e.dir, 0o755); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.enclaves = append(d.enclaves, e)
	return e, nil
}

// Enclave is a driver.Enclave.
type Enclave struct {
	Generation uint64

	d     *Driver
	dir   string
	image driver.Image

	ctx     context.Context // ends with the enclave
	end     context.CancelCauseFunc
	stopped context.Context // ends with Stop, too
	stop    context.CancelFunc
	parts   sync.WaitGroup

	mu         sync.Mutex
	configured *channel.ConfigureRequest
	run        *channel.RunRequest
	stops      []*channel.StopRequest
}

// Stops returns the requests to Stop so far.
func (e *Enclave) Stops() []*channel.StopRequest {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]*channel.StopRequest(nil), e.stops...)
}

// Run returns the request to Run, or nil before.
func (e *Enclave) Run() *channel.RunRequest {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.run
}

func (e *Enclave) socket() string { return filepath.Join(e.dir, vsock.HybridName) }

// Target implements driver.Enclave.
func (e *Enclave) Target() string { return "unix://" + e.socket() }

// Listen implements driver.Enclave.
func (e *Enclave) Listen(port uint32) (net.Listener, error) {
	return net.Listen("unix", vsock.HostPath(e.socket(), port))
}

// Start implements driver.Enclave.
func (e *Enclave) Start(_ context.Context, image driver.Image) error {
	if e.d.Boot != nil {
		if err := e.d.Boot(e.Generation); err != nil {
			return err
		}
	}
	e.image = image
	c, err := net.Dial("unix", vsock.HostPath(e.socket(), channel.Port))
	if err != nil {
		return err
	}
	stop := context.AfterFunc(e.ctx, func() { c.Close() })
	e.parts.Go(func() {
		defer stop()
		err := channel.ServeEnclave(c, func(r grpc.ServiceRegistrar) { channel.RegisterEnclaveServer(r, server{e: e}) })
		e.end(fmt.Errorf("the control channel has ended: %v", err))
	})
	return nil
}

// Kill ends the enclave as if its PID 1 had died, with the sentence that Wait returns.
func (e *Enclave) Kill(why string) { e.end(errors.New(why)) }

// Wait implements driver.Enclave.
func (e *Enclave) Wait() error {
	<-e.ctx.Done()
	return context.Cause(e.ctx)
}

// Ended is closed with the enclave's end.
func (e *Enclave) Ended() <-chan struct{} { return e.ctx.Done() }

// Stop implements driver.Enclave.
func (e *Enclave) Stop() error {
	e.end(errors.New("stopped by its driver"))
	e.parts.Wait()
	return os.RemoveAll(e.dir)
}

// DialHost connects to a host port that asks for the secret, as enclaved does.
func (e *Enclave) DialHost(ctx context.Context, port func(*channel.HostPorts) uint32) (net.Conn, error) {
	e.mu.Lock()
	r := e.configured
	e.mu.Unlock()
	return vsock.Secret(r.GetSecret()).Dial(ctx, port(r.GetPorts()), func(ctx context.Context, p uint32) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", vsock.HostPath(e.socket(), p))
	})
}

// server is the enclave's end of the control channel.
type server struct {
	channel.UnimplementedEnclaveServer
	e *Enclave
}

func (s server) Configure(_ context.Context, r *channel.ConfigureRequest) (*channel.ConfigureResponse, error) {
	e := s.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.configured != nil {
		return nil, status.Error(codes.FailedPrecondition, "configured twice")
	}
	e.configured = r
	path := e.image.EIF
	if e.d.OtherEIF != "" {
		path = e.d.OtherEIF
	}
	image, err := eif.Open(path)
	if err != nil {
		return nil, err
	}
	defer image.Close()
	m, err := image.Measure()
	if err != nil {
		return nil, err
	}
	manifest := r.GetManifest()
	if embedded, err := ramdisk.Manifest(image); err == nil {
		if manifest != nil {
			return nil, status.Error(codes.InvalidArgument, "sealed, and a manifest was sent")
		}
		manifest = embedded
	}
	if _, err := workload.Parse(manifest); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	doc, err := e.d.signer.Sign(nsmdev.Document{
		ModuleID: "i-test-enc" + strconv.FormatUint(e.Generation, 10), Timestamp: time.Now(),
		PCRs: map[uint][]byte{0: m.PCR0, 1: m.PCR1, 2: m.PCR2, 16: workload.PCR16(manifest)},
	})
	return &channel.ConfigureResponse{Document: doc}, err
}

func (s server) Run(r *channel.RunRequest, stream channel.Enclave_RunServer) error {
	s.e.mu.Lock()
	s.e.run = r
	s.e.mu.Unlock()
	exited := s.e.d.Workload(s.e.stopped, s.e, stream.Send)
	if s.e.ctx.Err() != nil { // a dead enclave says nothing: its connection breaks
		<-stream.Context().Done()
		return stream.Context().Err()
	}
	if exited == nil {
		return status.Error(codes.Internal, "the test's workload has no exit code")
	}
	return stream.Send(&channel.RunEvent{Event: &channel.RunEvent_Exited{Exited: exited}})
}

func (s server) Probe(_ context.Context, r *channel.ProbeRequest) (*channel.ProbeResponse, error) {
	return s.e.d.Probe(r), nil
}

func (s server) Update(_ context.Context, r *channel.UpdateRequest) (*channel.UpdateResponse, error) {
	return &channel.UpdateResponse{}, s.e.d.Update(r.GetMount())
}

func (s server) Stats(context.Context, *channel.StatsRequest) (*channel.StatsResponse, error) {
	return s.e.d.Stats, nil
}

func (s server) Stop(_ context.Context, r *channel.StopRequest) (*channel.StopResponse, error) {
	s.e.mu.Lock()
	s.e.stops = append(s.e.stops, r)
	s.e.mu.Unlock()
	s.e.stop()
	return &channel.StopResponse{}, nil
}

// Started is the event of a workload that has been started.
func Started() *channel.RunEvent {
	return &channel.RunEvent{Event: &channel.RunEvent_Started{Started: &channel.Started{}}}
}

// Output is the event of bytes that the workload printed.
func Output(stream channel.Output_Stream, data string) *channel.RunEvent {
	return &channel.RunEvent{Event: &channel.RunEvent_Output{Output: &channel.Output{Stream: stream, Data: []byte(data)}}}
}

// Progress is the event of a step, with why the last try failed.
func Progress(step, err string) *channel.RunEvent {
	return &channel.RunEvent{Event: &channel.RunEvent_Progress{Progress: &channel.Progress{Step: step, Error: err}}}
}
