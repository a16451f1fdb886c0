// Package vm shows that the kernel of the base EIF boots in QEMU's nitro-enclave machine with enclaved's own
// beginning as its PID 1, and that vsock and the security module work there as everywhere.
//
// Hack/e2e-vm.sh builds what it needs and runs it. CLOISTER_VM_BYTES is how much goes each way, 64 MiB if unset.
package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/e2e/vm/stream"
	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/qemu"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// patience is longer than anything here takes on a slow machine without KVM.
const patience = 3 * time.Minute

// machine is a booted enclave.
type machine struct {
	driver.Enclave
	image string
}

// out is the folder where the scripts of hack/ leave what they built.
func out(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("CLOISTER_OUT")
	if dir == "" {
		t.Skip("CLOISTER_OUT is not set: run make e2e-vm, which builds QEMU and the kernel first")
	}
	return dir
}

// writeEIF makes an EIF of the base EIF's kernel and modules and of testdata/init.
func writeEIF(t *testing.T, out string) string {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "init")
	cmd := exec.Command("go", "build", "-o", program, "./testdata/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, b)
	}
	var disks [2]bytes.Buffer
	first := ramdisk.NewWriter(&disks[0])
	must(t, first.Folder("modules", 0o755))
	modules, err := filepath.Glob(filepath.Join(out, "kernel/modules/*.ko"))
	must(t, err)
	for _, m := range append(modules, program) {
		b, err := os.ReadFile(m)
		must(t, err)
		name, mode := "modules/"+filepath.Base(m), uint64(0o644)
		if m == program {
			name, mode = "init", 0o755
		}
		must(t, first.File(name, mode, bytes.NewReader(b), int64(len(b))))
	}
	must(t, first.Close())
	second := ramdisk.NewWriter(&disks[1]) // so that PCR2 is of something
	must(t, second.Folder("second", 0o755))
	must(t, second.Close())
	kernel, err := os.ReadFile(filepath.Join(out, "kernel/vmlinuz"))
	must(t, err)
	f, err := os.Create(filepath.Join(dir, "test.eif"))
	must(t, err)
	defer f.Close()
	_, err = eif.Write(f, eif.Image{
		Arch: eif.X86_64, Kernel: bytes.NewReader(kernel),
		Cmdline:  "reboot=k panic=-1 pci=off console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on quiet",
		Ramdisks: []eif.Data{bytes.NewReader(disks[0].Bytes()), bytes.NewReader(disks[1].Bytes())},
	})
	must(t, err)
	return f.Name()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// boot boots an enclave and waits for its init.
func boot(t *testing.T, image string) machine {
	t.Helper()
	out := out(t)
	dir, err := os.MkdirTemp("/tmp", "vm") // short enough for sockets
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	e, err := qemu.Driver{Dir: dir, Program: filepath.Join(out, "qemu/run"), Firmware: filepath.Join(out, "qemu/firmware")}.Create(1)
	must(t, err)
	t.Cleanup(func() { must(t, e.Stop()) })
	console, err := os.Create(filepath.Join(t.TempDir(), "console"))
	must(t, err)
	defer console.Close()
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(console.Name())
			t.Logf("console:\n%s", b)
		}
	})
	l, err := e.Listen(stream.ReadyPort)
	must(t, err)
	defer l.Close()
	begin := time.Now()
	must(t, e.Start(t.Context(), driver.Image{EIF: image, Memory: 256 << 20, Console: console}))
	must(t, l.(*net.UnixListener).SetDeadline(time.Now().Add(patience)))
	c, err := l.Accept()
	must(t, err)
	c.Close()
	t.Logf("booted in %s", time.Since(begin).Round(time.Millisecond))
	return machine{e, image}
}

// dial connects to a port of the enclave.
func (m machine) dial(t *testing.T, port uint32) net.Conn {
	t.Helper()
	c, err := vsock.Dial(t.Context(), m.Target(), port)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	must(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

// idle waits until the enclave serves no connection any more.
func (m machine) idle(t *testing.T) {
	t.Helper()
	until(t, "no connection of the enclave is open", func() bool {
		c := m.dial(t, stream.CountPort)
		defer c.Close()
		n := -1
		if err := json.NewDecoder(c).Decode(&n); err != nil {
			t.Fatal(err)
		}
		return n == 0
	})
}

func TestVM(t *testing.T) {
	m := boot(t, writeEIF(t, out(t)))
	t.Run("bulk", m.bulk)
	t.Run("half-close", m.halfClose)
	t.Run("slow reader", m.slowReader)
	t.Run("connections", m.connections)
	t.Run("vanishing peers", m.vanishing)
	t.Run("refused", m.refused)
	t.Run("security module", m.securityModule)
	t.Run("end", m.end)
}

// bulk moves many bytes each way with a checksum.
func (m machine) bulk(t *testing.T) {
	n := int64(64 << 20)
	if s := os.Getenv("CLOISTER_VM_BYTES"); s != "" {
		var err error
		n, err = strconv.ParseInt(s, 10, 64)
		must(t, err)
	}
	rate := func(begin time.Time) string {
		return fmt.Sprintf("%.1f MB/s", float64(n)/1e6/time.Since(begin).Seconds())
	}
	begin := time.Now()
	c := m.dial(t, stream.SourcePort)
	must(t, c.SetDeadline(time.Now().Add(10*patience)))
	must(t, binary.Write(c, binary.BigEndian, uint64(n)))
	must(t, stream.Check(c, n))
	c.Close()
	t.Logf("from the enclave: %s", rate(begin))

	begin = time.Now()
	c = m.dial(t, stream.SinkPort)
	must(t, c.SetDeadline(time.Now().Add(10*patience)))
	h := sha256.New()
	must(t, stream.Source(io.MultiWriter(c, h), n))
	must(t, stream.CloseWrite(c))
	sum, err := io.ReadAll(c)
	must(t, err)
	c.Close()
	if !bytes.Equal(sum, h.Sum(nil)) {
		t.Errorf("the enclave has read something else: checksum %x, want %x", sum, h.Sum(nil))
	}
	t.Logf("to the enclave: %s", rate(begin))
	m.idle(t)
}

// halfClose lets one direction outlive the other.
func (m machine) halfClose(t *testing.T) {
	c := m.dial(t, stream.EchoPort)
	want := bytes.Repeat([]byte("0123456789abcdef"), 16<<10) // 256 KiB, all of it in buffers when the end is sent
	go func() {
		c.Write(want)
		stream.CloseWrite(c)
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %d bytes, %v, want the %d that were sent", len(got), err, len(want))
	}
	c.Close()
	m.idle(t)
}

// slowReader reads nothing until the enclave has sent all it may, and then everything.
func (m machine) slowReader(t *testing.T) {
	const n = 8 << 20
	c := m.dial(t, stream.SourcePort)
	must(t, binary.Write(c, binary.BigEndian, uint64(n)))
	other := m.dial(t, stream.EchoPort) // works while the first one stands still
	must(t, binary.Write(other, binary.BigEndian, uint64(1)))
	if _, err := io.ReadFull(other, make([]byte, 8)); err != nil {
		t.Error(err)
	}
	other.Close()
	must(t, stream.Check(c, n))
	c.Close()
	m.idle(t)
}

// connections opens a thousand, all at once, in each direction.
func (m machine) connections(t *testing.T) {
	const n = 1000
	l, err := m.Listen(70000)
	must(t, err)
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	for name, through := range map[string]bool{"to the enclave": false, "to the enclave and back to the host": true} {
		begin := time.Now()
		var all sync.WaitGroup
		failures := make(chan error, n)
		for i := range n {
			all.Go(func() {
				if err := m.echo(t, fmt.Sprintf("connection %d", i), through); err != nil {
					failures <- err
				}
			})
		}
		all.Wait()
		if len(failures) > 0 {
			t.Errorf("%s: %d of %d failed, for example: %v", name, len(failures), n, <-failures)
		}
		t.Logf("%s: %d connections in %s", name, n, time.Since(begin).Round(time.Millisecond))
		m.idle(t)
	}
}

// echo sends a text and wants it back.
func (m machine) echo(t *testing.T, text string, through bool) error {
	port := uint32(stream.EchoPort)
	if through {
		port = stream.DialPort
	}
	var c net.Conn
	var err error
	// The preamble's time is short for a thousand at once in an emulated machine.
	for range 10 {
		if c, err = vsock.Dial(t.Context(), m.Target(), port); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if through {
		if err := binary.Write(c, binary.BigEndian, uint32(70000)); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	if err := stream.CloseWrite(c); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err == nil && string(got) != text {
		err = fmt.Errorf("read %q, want %q", got, text)
	}
	return err
}

// vanishing peers leave nothing behind in the enclave: one that reads, one that is being written to, one that
// says nothing.
func (m machine) vanishing(t *testing.T) {
	source := m.dial(t, stream.SourcePort)
	must(t, binary.Write(source, binary.BigEndian, uint64(1<<40)))
	if _, err := io.ReadFull(source, make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	sink := m.dial(t, stream.SinkPort)
	if _, err := sink.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	silent := m.dial(t, stream.EchoPort)
	for _, c := range []net.Conn{source, sink, silent} {
		c.Close()
	}
	m.idle(t)
}

// refused ports are told at once, in both directions.
func (m machine) refused(t *testing.T) {
	if c, err := vsock.Dial(t.Context(), m.Target(), 7999); err == nil {
		c.Close()
		t.Error("a port without a listener was connected")
	}
	c := m.dial(t, stream.DialPort)
	must(t, binary.Write(c, binary.BigEndian, uint32(79999)))
	if got, err := io.ReadAll(c); string(got) != "refused" || err != nil {
		t.Errorf("the enclave was connected to a port of the host that nobody serves: %q, %v", got, err)
	}
}

// securityModule compares what /dev/nsm says with what is measured outside.
func (m machine) securityModule(t *testing.T) {
	c := m.dial(t, stream.NSMPort)
	var r stream.Report
	must(t, json.NewDecoder(c).Decode(&r))
	if r.Error != "" {
		t.Fatal(r.Error)
	}
	image, err := eif.Open(m.image)
	must(t, err)
	defer image.Close()
	want, err := image.Measure()
	must(t, err)
	for i, w := range [][]byte{want.PCR0, want.PCR1, want.PCR2} {
		if !bytes.Equal(r.PCRs[i], w) {
			t.Errorf("PCR%d is %x, want %x", i, r.PCRs[i], w)
		}
	}
	pcr16 := workload.PCR16([]byte(stream.Manifest))
	if !bytes.Equal(r.PCR16, pcr16) || !r.PCR16Locked {
		t.Errorf("PCR16 is %x, locked %t, want %x and locked", r.PCR16, r.PCR16Locked, pcr16)
	}
	if !strings.Contains(r.ExtendLocked, "refused ExtendPCR") {
		t.Errorf("a locked register was extended: %q", r.ExtendLocked)
	}
	if r.Digest != "SHA384" || r.MaxPCRs != 32 || r.ModuleID == "" || len(r.Random) == 0 || bytes.Equal(r.Random, make([]byte, len(r.Random))) {
		t.Errorf("the module describes itself as %q, digest %q, %d registers, and gave %d random bytes", r.ModuleID, r.Digest, r.MaxPCRs, len(r.Random))
	}
	var message []cbor.RawMessage // COSE_Sign1
	must(t, cbor.Unmarshal(r.Document, &message))
	var payload []byte
	must(t, cbor.Unmarshal(message[2], &payload))
	var doc struct {
		PCRs map[uint][]byte `cbor:"pcrs"`
	}
	must(t, cbor.Unmarshal(payload, &doc))
	if !bytes.Equal(doc.PCRs[0], want.PCR0) || !bytes.Equal(doc.PCRs[16], pcr16) {
		t.Errorf("the document has PCR0 %x and PCR16 %x", doc.PCRs[0], doc.PCRs[16])
	}
	// The emulated module signs nothing.
	var refusal *attestation.Error
	if _, err := attestation.Verify(r.Document, attestation.Options{}); !errors.As(err, &refusal) {
		t.Errorf("the emulated module's document was not refused: %v", err)
	} else {
		t.Logf("refused: %v", refusal)
	}
}

// end ends the enclave with a stream open.
func (m machine) end(t *testing.T) {
	c := m.dial(t, stream.EchoPort)
	// The enclave may be gone before it has accepted.
	if last, err := vsock.Dial(t.Context(), m.Target(), stream.EndPort); err == nil {
		defer last.Close()
	}
	if b, err := io.ReadAll(c); len(b) > 0 || err != nil {
		t.Errorf("the stream ended with %q, %v, want its end", b, err)
	}
	if err := m.Wait(); err == nil || err.Error() != "the enclave has powered off" {
		t.Errorf("Wait: %v", err)
	}
	if _, err := vsock.Dial(t.Context(), m.Target(), stream.EchoPort); err == nil {
		t.Error("an enclave that has ended was connected")
	}
}
