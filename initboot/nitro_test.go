package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"cloister.dev/cloister/e2e/nitroemu"
	"cloister.dev/cloister/initboot/driver"
	"cloister.dev/cloister/initboot/driver/process"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/internal/vsockemu"
)

// nitroMemory is an enclave's memory in bytes, without podenv.NitroOverhead.
const nitroMemory = 128 << 20

// nitroNode is a node whose enclaves are processes, for so many pods.
func nitroNode(t *testing.T, pods int, change ...func(*nitroemu.Options)) *nitroemu.Node {
	t.Helper()
	nitroemu.HugePages(t, 2<<20, pods*(nitroMemory+podenv.NitroOverhead)/(2<<20))
	dir, err := os.MkdirTemp("/tmp", "n")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o := nitroemu.Options{Dir: dir, CPUs: 2 + 2*pods, Threads: 2, NUMANode: 1, Boot: func(ctx context.Context, e nitroemu.Enclave) {
		if err := runProcess(ctx, e); err != nil {
			t.Errorf("enclave %d: %v", e.CID, err)
		}
	}}
	for core := range pods {
		o.Pool = append(o.Pool, uint32(core+1), uint32(core+1+1+pods))
	}
	for _, f := range change {
		f(&o)
	}
	n, err := nitroemu.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		until(t, func() string {
			if free := n.FreeCPUs(); free != len(o.Pool) {
				return fmt.Sprintf("%d vCPUs of %d are free", free, len(o.Pool))
			}
			return ""
		})
		n.Close()
		if left, _ := filepath.Glob(filepath.Join(dir, "enclave-*")); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
	return n
}

// runProcess boots what was in an enclave's memory as the process driver does.
func runProcess(ctx context.Context, e nitroemu.Enclave) error {
	dir, err := os.MkdirTemp("/tmp", "e")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	image := driver.Image{EIF: filepath.Join(dir, "eif"), Memory: int64(e.Memory), Console: os.Stderr}
	if err := os.WriteFile(image.EIF, e.EIF, 0o600); err != nil {
		return err
	}
	p, err := process.Driver{Dir: dir}.Create(1)
	if err != nil {
		return err
	}
	defer p.Stop()
	// Its sockets are those of the node.
	sockets := filepath.Dir(strings.TrimPrefix(p.Target(), "unix://"))
	if err := errors.Join(os.Remove(sockets), os.Symlink(e.Folder, sockets)); err != nil {
		return err
	}
	if err := p.Start(ctx, image); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	stop := context.AfterFunc(ctx, func() { p.Stop() })
	defer stop()
	p.Wait()
	return nil
}

// startNitro runs initboot on a node.
func (p *pod) startNitro(t *testing.T, n *nitroemu.Node) {
	t.Helper()
	// As in a pod of Pod Security level restricted: it needs no root, but for the device.
	const uid = 65532
	if err := errors.Join(os.Chmod(p.shared, 0o755), os.Chown(p.dir, uid, uid)); err != nil {
		t.Fatal(err)
	}
	unprivileged := func(cmd *exec.Cmd) error {
		if err := os.Chown(p.path("run"), uid, uid); err != nil {
			return err
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		return n.Start(cmd)
	}
	p.env = append(slices.Clone(p.env), vsockemu.EnvNode+"="+string(n.Ports), podenv.EnvCPUs+"=2", podenv.EnvMemory+fmt.Sprintf("=%d", nitroMemory))
	p.start(t, unprivileged, "--driver=nitro")
}

// another is a pod of the same image and EIF.
func (p *pod) another(t *testing.T) *pod {
	t.Helper()
	other := *p
	var err error
	if other.dir, err = os.MkdirTemp("/tmp", "i"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(other.dir) })
	return &other
}

// TestNitro runs initboot with the nitro driver as it is, but for its vsock, against an emulated device.
func TestNitro(t *testing.T) {
	p := preparePod(t, "devnsm,vsockemu", "")
	t.Run("life", func(t *testing.T) { testNitroLife(t, p.another(t)) })
	t.Run("failures", func(t *testing.T) { testNitroFailures(t, p.another(t)) })
	t.Run("four at once", func(t *testing.T) { testNitroNode(t, []*pod{p.another(t), p.another(t), p.another(t), p.another(t)}) })
}

// testNitroLife is the life of a pod.
func testNitroLife(t *testing.T, p *pod) {
	n := nitroNode(t, 1)
	p.startNitro(t, n)
	until(t, func() string { return p.probe("boot") })
	image, err := os.ReadFile(filepath.Join(p.shared, "base.eif"))
	if err != nil {
		t.Fatal(err)
	}
	first := n.Enclaves()[0]
	if !bytes.Equal(first.EIF, image) {
		t.Errorf("the enclave has another EIF, of %d bytes instead of %d", len(first.EIF), len(image))
	}
	if !slices.Contains(first.Ports, 9000) || first.Memory != nitroMemory+podenv.NitroOverhead || len(first.CPUs) != 2 || first.Debug {
		first.EIF = nil
		t.Errorf("the enclave: %+v", first)
	}

	c := p.console(t)
	until(t, func() string { return p.probe("startup") })
	if body, _ := p.get(t); !strings.HasSuffix(body, "hello from uid 1234 ahoy\n") {
		t.Errorf("answer: %q", body)
	}
	c.Process.Signal(syscall.SIGTERM)
	if code := c.code(t); code != 7 || c.stdout.String() != "listening\nbye\n" {
		t.Errorf("console: %d, %q", code, c.stdout.String())
	}

	c = p.console(t) // a second enclave
	until(t, func() string { return p.probe("startup") })
	p.get(t)
	until(t, func() string {
		for i, e := range n.Enclaves() {
			if closed := e.Calls[len(e.Calls)-1] == "close"; closed != (i == 0) {
				return fmt.Sprintf("enclave %d is closed: %v", e.CID, closed)
			}
		}
		return ""
	})
	// The first that comes to the end: initboot is killed, and closes nothing.
	p.initboot.Process.Kill()
	if code := c.code(t); code != 125 {
		t.Errorf("console without initboot: %d", code)
	}
}

// testNitroFailures: what goes wrong is said in a sentence, and tried again.
func testNitroFailures(t *testing.T, p *pod) {
	proceed := make(chan struct{})
	var creates, boots atomic.Int32
	n := nitroNode(t, 1, func(o *nitroemu.Options) {
		o.Fail = func(call string) syscall.Errno {
			if call == "NE_CREATE_VM" && creates.Add(1) == 1 {
				return nitroemu.ErrNoCPUsAvailableInPool
			}
			return 0
		}
		boot := o.Boot
		o.Boot = func(ctx context.Context, e nitroemu.Enclave) {
			if boots.Add(1) > 1 {
				<-proceed
				boot(ctx, e)
			}
		}
	})
	p.startNitro(t, n)
	for _, want := range []string{
		"cannot prepare the enclave: NE_CREATE_VM: no vCPU of the node's enclave pool is free (NE_ERR_NO_CPUS_AVAIL_IN_POOL): raise cpu_count",
		"the enclave has ended by itself",
	} {
		until(t, func() string {
			if got := p.probe("boot"); !strings.Contains(got, want) {
				return "probe boot says: " + got
			}
			return ""
		})
	}
	close(proceed)
	until(t, func() string { return p.probe("boot") })
}

// testNitroNode: pods boot at once on a node, where a process that is none of ours sits on port 9000, then
// connects to it first, and tries every port of every enclave.
func testNitroNode(t *testing.T, all []*pod) {
	pods := len(all)
	n := nitroNode(t, pods)

	squatter, err := n.Ports.Listen(9000)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		p.startNitro(t, n)
	}
	until(t, func() string { // each has its enclave, but for the port
		for _, p := range all {
			if s := p.state(t); s.GetProgress().GetStep() != "open the enclave's host ports" {
				return "state: " + s.String()
			}
		}
		return ""
	})
	if made := n.Enclaves(); len(made) != pods {
		t.Errorf("%d enclaves were made", len(made))
	} else {
		for _, e := range made {
			if e.CID != 0 {
				t.Errorf("enclave %d was started without the port", e.CID)
			}
		}
	}
	squatter.Close()

	// Strangers keep connecting to port 9000, silent ones and talking ones.
	ctx, cancel := context.WithCancel(t.Context())
	var strangers sync.WaitGroup
	defer strangers.Wait()
	defer cancel()
	answered := make(chan []byte, 1)
	strangers.Go(func() {
		for ctx.Err() == nil {
			c, err := n.Ports.Dial(vsockemu.HostCID, 9000)
			if err != nil {
				time.Sleep(time.Millisecond)
				continue
			}
			c.Write([]byte{0xB7})
			strangers.Go(func() {
				defer c.Close()
				if b, _ := io.ReadAll(c); len(b) > 0 {
					select {
					case answered <- b:
					default:
					}
				}
			})
		}
	})

	for _, p := range all {
		until(t, func() string { return p.probe("boot") })
	}
	cancel()
	strangers.Wait()
	select {
	case b := <-answered:
		t.Errorf("a stranger was answered with %q", b)
	default:
	}

	seen := map[string]bool{}
	for _, p := range all {
		p.console(t)
		until(t, func() string { return p.probe("startup") })
		p.get(t) // its own enclave's answer, by its own secret
		s := p.state(t)
		seen[s.GetTarget()] = true
		for _, other := range all {
			if other == p {
				continue
			}
			// A secret of another pod, and none.
			_, err := vsock.Secret(other.state(t).GetSecret()).Dial(t.Context(), 80, func(ctx context.Context, port uint32) (net.Conn, error) {
				return vsock.Dial(ctx, s.GetTarget(), port)
			})
			if !errors.Is(err, vsock.ErrProof) {
				t.Errorf("the port of another pod's enclave: %v", err)
			}
		}
	}
	if len(seen) != pods {
		t.Errorf("%d targets: %v", len(seen), seen)
	}
	// What initboot offers to its enclave it offers to no other, and to no process of the node, even to one that
	// knows the secret.
	ports, err := n.Ports.Ports()
	if err != nil || len(ports) < 2*pods { // content and development NSM of each
		t.Fatalf("ports %v, %v", ports, err)
	}
	cids := []uint32{vsockemu.HostCID}
	for _, e := range n.Enclaves() {
		cids = append(cids, e.CID)
	}
	for _, port := range ports {
		var taken []uint32
		for _, p := range all {
			s := p.state(t)
			for _, cid := range cids {
				c, err := vsock.Secret(s.GetSecret()).Dial(t.Context(), port, func(_ context.Context, port uint32) (net.Conn, error) {
					return n.Ports.Dial(cid, port)
				})
				if err != nil {
					continue
				}
				c.Close()
				taken = append(taken, cid)
				if s.GetTarget() != n.Ports.Target(cid) {
					t.Errorf("port %d takes the secret of %s from context id %d", port, s.GetTarget(), cid)
				}
			}
		}
		if len(taken) != 1 {
			t.Errorf("port %d takes connections of the context ids %v", port, taken)
		}
	}
	for _, p := range all {
		p.initboot.Process.Signal(syscall.SIGTERM)
		var exit *exec.ExitError
		if err := p.initboot.Wait(); errors.As(err, &exit) {
			t.Errorf("initboot: %v", err)
		}
	}
}

// state returns what initboot says of its enclave.
func (p *pod) state(t *testing.T) *podsock.EnclaveState {
	t.Helper()
	conn, err := podsock.Dial(p.path("run/pod.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, why := state(t.Context(), podsock.NewPodClient(conn))
	if why != "" {
		return &podsock.EnclaveState{}
	}
	return s
}
