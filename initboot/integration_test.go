package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/u-root/u-root/pkg/cpio"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

// pod is what the kubelet would make of an injected pod: initboot, and consoles one after the other.
type pod struct {
	dir, bin     string
	shared       string // folder of what several pods have in common
	env          []string
	kernel       string // folder of vmlinuz and modules; empty where the kernel is never booted
	measurements workload.MeasurementSet
	root         []byte // PEM
	initboot     *exec.Cmd
	log          *os.File
}

// build builds a package into a static binary and returns it.
func build(t *testing.T, out, pkg string, args ...string) {
	t.Helper()
	cmd := exec.Command("go", append(append([]string{"build", "-o", out}, args...), pkg)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, b)
	}
}

// newPod builds everything and starts initboot.
func newPod(t *testing.T) *pod {
	t.Helper()
	p := preparePod(t, "devnsm", "")
	p.start(t, (*exec.Cmd).Start)
	return p
}

// preparePod builds everything, initboot with tags, and the EIF around a kernel if there is one.
func preparePod(t *testing.T, tags, kernel string) *pod {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the process driver needs root")
	}
	dir, err := os.MkdirTemp("/tmp", "i") // a short path, for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &pod{dir: dir, shared: dir, bin: filepath.Join(dir, "initboot"), kernel: kernel}
	build(t, p.bin, ".", "-tags="+tags)
	build(t, filepath.Join(dir, "enclaved"), "cloister.dev/cloister/enclaved")
	build(t, filepath.Join(dir, "server"), "./testdata/workload")

	cert, key, err := nsmdev.NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	p.root = cert
	p.write(t, "root.pem", cert)
	p.write(t, "key.pem", key)
	ref := push(t, filepath.Join(dir, "server"))
	m := &workload.Manifest{
		APIVersion: workload.APIVersion,
		Image:      workload.Image{Digest: ref.DigestStr()},
		Env:        []workload.EnvVar{{Name: "GREETING", Value: "ahoy"}},
		Ports:      []workload.Port{{Port: 80}},
		Probes: &workload.Probes{
			Startup:   &workload.Probe{HTTP: &workload.HTTPGet{Port: 80}},
			Readiness: &workload.Probe{HTTP: &workload.HTTPGet{Port: 80, Path: "/nothing"}},
		},
	}
	manifest, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	eifs := p.writeEIF(t)
	p.measurements = workload.MeasurementSet{{
		PCR0: hex.EncodeToString(eifs.PCR0), PCR1: hex.EncodeToString(eifs.PCR1), PCR2: hex.EncodeToString(eifs.PCR2),
		PCR16: hex.EncodeToString(workload.PCR16(manifest)),
	}}

	p.env = []string{podenv.EnvManifest + "=" + string(manifest), podenv.EnvImage + "=" + ref.String(), podenv.EnvMemory + "=268435456"}
	return p
}

// start runs initboot, with more arguments if there are any.
func (p *pod) start(t *testing.T, run func(*exec.Cmd) error, args ...string) {
	t.Helper()
	var err error
	if p.log, err = os.Create(p.path("log")); err != nil {
		t.Fatal(err)
	}
	p.initboot = exec.Command(p.bin, append([]string{"serve", "--eif", filepath.Join(p.shared, "base.eif"), "--run-dir", p.path("run"), "--cache-dir", p.path("cache"),
		"--dev-keys", p.shared, "--plain-http-registries", "127.0.0.1"}, args...)...)
	p.initboot.Env = p.env
	p.initboot.Stdout, p.initboot.Stderr = p.log, p.log
	if err := os.Mkdir(p.path("run"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := run(p.initboot); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.initboot.Process.Kill()
		p.initboot.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(p.log.Name())
			t.Logf("log of initboot and enclave:\n%s", b)
		}
	})
}

func (p *pod) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pod) write(t *testing.T, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(p.path(name), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// writeEIF packs enclaved as the base EIF does.
func (p *pod) writeEIF(t *testing.T) *eif.Measurements {
	t.Helper()
	program, err := os.ReadFile(p.path("enclaved"))
	if err != nil {
		t.Fatal(err)
	}
	records := []cpio.Record{cpio.StaticFile("init", string(program), 0o755)}
	kernel := []byte("kernel")
	if p.kernel != "" {
		records = append(records, cpio.Directory("modules", 0o755))
		modules, _ := filepath.Glob(filepath.Join(p.kernel, "modules/*"))
		for _, m := range modules {
			b, err := os.ReadFile(m)
			if err != nil {
				t.Fatal(err)
			}
			records = append(records, cpio.StaticFile("modules/"+filepath.Base(m), string(b), 0o644))
		}
		if kernel, err = os.ReadFile(filepath.Join(p.kernel, "vmlinuz")); err != nil {
			t.Fatal(err)
		}
	}
	var disk bytes.Buffer
	archive := cpio.Newc.Writer(&disk)
	if err := errors.Join(cpio.WriteRecords(archive, records), cpio.WriteTrailer(archive)); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(p.path("base.eif"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := eif.Write(f, eif.Image{
		Arch: eif.X86_64, Kernel: bytes.NewReader(kernel), Cmdline: "quiet console=ttyS0 reboot=k panic=-1 pci=off random.trust_cpu=on cloister.nsm=dev",
		Ramdisks: []eif.Data{bytes.NewReader(disk.Bytes())},
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// push stores an image with one program in a registry of this process.
func push(t *testing.T, program string) name.Digest {
	t.Helper()
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "bin/server", Mode: 0o755, Size: int64(len(b))})
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer.Bytes())), nil })
	if err != nil {
		t.Fatal(err)
	}
	img, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	img, err = mutate.ConfigFile(img, &v1.ConfigFile{
		OS: "linux", Architecture: "amd64",
		RootFS: v1.RootFS{Type: "layers", DiffIDs: diffIDs(t, img)},
		Config: v1.Config{Entrypoint: []string{"server"}, Env: []string{"PATH=/bin"}, User: "1234:1234"},
	})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.NewDigest(strings.TrimPrefix(server.URL, "http://") + "/server@" + digest.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return ref
}

func diffIDs(t *testing.T, img v1.Image) []v1.Hash {
	t.Helper()
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return cfg.RootFS.DiffIDs
}

// until waits for a condition, which says why it does not hold.
func until(t *testing.T, ok func() string) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		why := ok()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within 60 s: %s", why)
		}
	}
}

// probe runs a probe command; it returns "" or the line that it printed.
func (p *pod) probe(args ...string) string {
	out, err := exec.Command(p.bin, append(append([]string{"probe"}, args...), "--socket", p.path("run/pod.sock"))...).CombinedOutput()
	if err == nil {
		return ""
	}
	return strings.TrimSpace(string(out)) + " (" + err.Error() + ")"
}

// running is a console.
type running struct {
	*exec.Cmd
	stdout, stderr bytes.Buffer
	probes         string // address
}

func (p *pod) console(t *testing.T) *running {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // a free port
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	r := &running{probes: l.Addr().String()}
	p.write(t, "termination-log", nil)
	r.Cmd = exec.Command(p.bin, "console", "--grace-period=10s", "--socket", p.path("run/pod.sock"), "--listen", r.probes, "--termination-log", p.path("termination-log"))
	r.Stdout, r.Stderr = &r.stdout, &r.stderr
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Process.Kill() })
	return r
}

// code waits for the console's end.
func (r *running) code(t *testing.T) int {
	t.Helper()
	kill := time.AfterFunc(60*time.Second, func() { r.Process.Kill() })
	defer kill.Stop()
	r.Wait()
	return r.ProcessState.ExitCode()
}

// get asks the workload through its gateway, as a client beyond the sidecar does, and returns the body
// and the server's public key.
func (p *pod) get(t *testing.T) (body string, key []byte) {
	t.Helper()
	root, err := attestation.ParseRoot(p.root)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := podsock.Dial(p.path("run/pod.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, why := state(t.Context(), podsock.NewPodClient(conn))
	if why != "" {
		t.Fatal(why)
	}
	raw, err := vsock.Secret(s.GetSecret()).Dial(t.Context(), 80, func(ctx context.Context, port uint32) (net.Conn, error) {
		return vsock.Dial(ctx, s.GetTarget(), port)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	verifier, err := attestation.NewVerifier(attestation.Options{Root: root, Measurements: p.measurements})
	if err != nil {
		t.Fatal(err)
	}
	c := tls.Client(raw, verifier.ClientConfig(&tls.Config{ServerName: "app", NextProtos: []string{"http/1.1"}}))
	if err := c.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n")
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(b), c.ConnectionState().PeerCertificates[0].RawSubjectPublicKeyInfo
}

// enclavePID returns the process id of the enclave's PID 1.
func (p *pod) enclavePID(t *testing.T) int {
	t.Helper()
	children, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", p.initboot.Process.Pid))
	for _, c := range children {
		b, _ := os.ReadFile(c)
		if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			return pid
		}
	}
	t.Fatal("initboot has no child")
	return 0
}

// TestPod is the life of a pod without Kubernetes: the real initboot, enclaved and console.
func TestPod(t *testing.T) { newPod(t).live(t) }

// TestVirtualPod is the same in a virtual machine, with the base EIF's kernel.
func TestVirtualPod(t *testing.T) {
	out := os.Getenv("CLOISTER_OUT")
	if out == "" {
		t.Skip("CLOISTER_OUT is not set: run make e2e-vm, which builds QEMU and the kernel first")
	}
	p := preparePod(t, "devnsm", filepath.Join(out, "kernel"))
	p.start(t, (*exec.Cmd).Start, "--driver=qemu", "--qemu="+filepath.Join(out, "qemu"))
	p.live(t)
}

func (p *pod) live(t *testing.T) {
	until(t, func() string { return p.probe("boot") })
	if why := p.probe("startup"); !strings.Contains(why, "has not been started yet") || strings.Contains(why, "\n") {
		t.Errorf("startup probe before the console: %q", why)
	}
	status := func(c *running, kind string) (int, string) {
		r, err := http.Get("http://" + c.probes + "/probe/" + kind)
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		b, _ := io.ReadAll(r.Body)
		return r.StatusCode, string(b)
	}

	c := p.console(t)
	until(t, func() string { return p.probe("startup") })
	body, firstKey := p.get(t)
	if !strings.HasPrefix(body, "HTTP/1.1 200") || !strings.HasSuffix(body, "hello from uid 1234 ahoy\n") {
		t.Errorf("answer: %q", body)
	}
	if code, text := status(c, "liveness"); code != 200 {
		t.Errorf("liveness: %d %q", code, text)
	}
	if code, text := status(c, "readiness"); code != 503 || !strings.Contains(text, "404") {
		t.Errorf("readiness: %d %q", code, text)
	}
	c.Process.Signal(syscall.SIGTERM)
	if code := c.code(t); code != 7 || c.stdout.String() != "listening\nbye\n" || c.stderr.String() != "to stderr\n" {
		t.Errorf("console: %d, %q, %q", code, c.stdout.String(), c.stderr.String())
	}

	c = p.console(t)
	until(t, func() string { return p.probe("startup") })
	_, secondKey := p.get(t)
	if bytes.Equal(firstKey, secondKey) {
		t.Error("the second enclave has the key of the first")
	}
	if err := syscall.Kill(p.enclavePID(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := c.code(t); code != 125 {
		t.Errorf("console of a dead enclave: %d", code)
	}
	message, _ := os.ReadFile(p.path("termination-log"))
	if !strings.Contains(string(message), "enclave was lost") {
		t.Errorf("termination message: %q", message)
	}

	c = p.console(t)
	until(t, func() string { return p.probe("startup") })
	p.get(t)
	c.Process.Kill() // the console dies, its enclave goes, another may come
	c.Wait()
	c = p.console(t)
	until(t, func() string {
		if why := p.probe("startup"); why != "" {
			return why
		}
		if code, text := status(c, "readiness"); code != 503 || !strings.Contains(text, "404") {
			return text
		}
		return ""
	})

	pid := p.enclavePID(t)
	p.initboot.Process.Signal(syscall.SIGTERM)
	if err := p.initboot.Wait(); err != nil {
		t.Errorf("initboot: %v", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("the enclave outlives initboot: %v", err)
	}
	if code := c.code(t); code != 125 {
		t.Errorf("console without initboot: %d", code)
	}
	message, _ = os.ReadFile(p.path("termination-log"))
	if string(message) != "the enclave was lost: initboot was told to shut down\n" {
		t.Errorf("termination message: %q", message)
	}
	if left, _ := filepath.Glob(p.path("run/vsock/*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
