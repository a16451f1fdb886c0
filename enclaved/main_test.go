package main

import (
	"bytes"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/enclaved/image/imagetest"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/internal/vsock"
	"cloister.dev/cloister/workload"
)

const (
	contentPort = 70001
	modulePort  = 70002
)

// boot starts enclaved as PID 1 of namespaces of its own on a root that holds nothing else, as a driver
// does, and returns the enclave's connection to port 9000, or nil when it has ended before.
// Ended is closed when PID 1 has ended; then the console may be read.
func boot(t *testing.T, dir, cmdline string) (c net.Conn, ended <-chan struct{}, console *bytes.Buffer) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: enclaved runs as PID 1 of namespaces")
	}
	root := filepath.Join(dir, "root")
	for _, d := range []string{"dev", "proc", "sys", "run/vsock"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build(t, filepath.Join(root, "init"), ".")
	if err := os.WriteFile(filepath.Join(dir, "cmdline"), []byte(cmdline), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", vsock.HostPath(filepath.Join(root, "run/vsock", vsock.HybridName), channel.Port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	console = &bytes.Buffer{}
	init := exec.Command("unshare", "--pid", "--mount", "--net", "--ipc", "--uts", "--fork", "--kill-child", "sh", "-ec", `
		mount --bind "$0/root" "$0/root"
		mount -t proc proc "$0/root/proc"
		mount --bind "$0/cmdline" "$0/root/proc/cmdline"
		mount -t tmpfs dev "$0/root/dev"
		mknod -m 666 "$0/root/dev/null" c 1 3
		mknod -m 666 "$0/root/dev/urandom" c 1 9
		exec chroot "$0/root" /init`, dir)
	init.Stdout, init.Stderr = console, console
	if err := init.Start(); err != nil {
		t.Fatal(err)
	}
	over := make(chan struct{})
	go func() {
		init.Wait()
		close(over)
	}()
	t.Cleanup(func() {
		init.Process.Kill() // unshare, and with it the enclave
		<-over
	})
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
	}()
	select {
	case c := <-accepted:
		return c, over, console
	case <-over:
		return nil, over, console
	}
}

func build(t *testing.T, program, dir string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-o", program, dir)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", dir, err, out)
	}
}

// newContent is a content server with one image, whose only file is the program.
func newContent(t *testing.T, program string) (h http.Handler, digest string) {
	t.Helper()
	app, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	content := imagetest.Content{}
	digest = content.Add(t, app, map[string]any{"Entrypoint": []string{"/app"}})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(content[r.URL.Path]) }), digest
}

// serveModule answers requests on each stream.
func serveModule(l net.Listener, module *nsmtest.Module) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			module.Serve(c)
		}()
	}
}

// TestEnclave is the whole life of an enclave with the program itself as PID 1.
func TestEnclave(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "m") // a socket's path has at most 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c, ended, console := boot(t, dir, "quiet cloister.nsm=dev\n")
	if c == nil {
		t.Fatalf("the enclave ended before it dialled:\n%s", console)
	}
	conn, done, err := channel.NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	enclave := channel.NewEnclaveClient(conn)

	secret := vsock.NewSecret()
	listen := func(port uint32) net.Listener {
		l, err := net.Listen("unix", vsock.HostPath(filepath.Join(dir, "root/run/vsock", vsock.HybridName), port))
		if err != nil {
			t.Fatal(err)
		}
		l = secret.Listen(l, port)
		t.Cleanup(func() { l.Close() })
		return l
	}
	program := filepath.Join(dir, "app")
	build(t, program, "./supervise/process/testdata/app")
	content, digest := newContent(t, program)
	go http.Serve(listen(contentPort), content)
	go serveModule(listen(modulePort), nsmtest.New(t))

	m := workload.Manifest{APIVersion: workload.APIVersion, Image: workload.Image{Digest: digest}, Args: []string{"state"}}
	canonical, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := enclave.Configure(t.Context(), &channel.ConfigureRequest{
		Manifest: canonical, Secret: secret, Ports: &channel.HostPorts{Content: contentPort, Nsm: modulePort},
	}); err != nil {
		t.Fatalf("Configure: %v", err)
	}
	s, err := enclave.Run(t.Context(), &channel.RunRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var output []byte
	for {
		ev, err := s.Recv()
		if err != nil {
			t.Fatalf("Run: %v", err)
		}
		output = append(output, ev.GetOutput().GetData()...)
		if exited := ev.GetExited(); exited != nil {
			if exited.GetCode() != 0 {
				t.Errorf("exited with %d, %q", exited.GetCode(), exited.GetMessage())
			}
			break
		}
	}
	var facts struct {
		PID  int
		Root []string
		Dev  []string
	}
	if err := json.Unmarshal(output, &facts); err != nil {
		t.Fatalf("%v: %q", err, output)
	}
	if facts.PID != 1 || strings.Join(facts.Root, " ") != "app dev etc proc sys" || strings.Contains(strings.Join(facts.Dev, " "), "nsm") {
		t.Errorf("the workload finds %+v", facts)
	}

	// The end of the control channel is the end of the enclave.
	conn.Close()
	<-done
	select {
	case <-ended:
		if t.Failed() {
			t.Logf("console:\n%s", console)
		}
	case <-time.After(30 * time.Second):
		t.Error("the enclave did not end with its control channel")
	}
}

// TestRefusesOtherModules: the measured command line decides, and nothing runs when it is unclear.
func TestRefusesOtherModules(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c, ended, console := boot(t, dir, "cloister.nsm=none\n")
	if c != nil {
		t.Fatal("the enclave dialled its host")
	}
	<-ended
	if !strings.Contains(console.String(), "cloister.nsm") {
		t.Errorf("console:\n%s", console)
	}
}
