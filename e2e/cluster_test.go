package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"cloister.dev/cloister/workload"
)

// registryHost is the registry inside the cluster, as pods name it.
const registryHost = "registry.cloister-registry.svc.cluster.local:5000"

// settings are what hack/e2e.sh has prepared; the cluster is that of KUBECONFIG.
type settings struct {
	cli   string // CLOISTER_BIN: the cloister binary
	eif   string // CLOISTER_EIF: the base EIF that the development initboot boots
	root  string // CLOISTER_ROOT: certificate of the development root
	key   string // CLOISTER_KEY: its key
	nginx string // CLOISTER_NGINX_IMAGE: image reference, by digest
	node  string // CLOISTER_NODE: the container that is the cluster's only node
}

// read takes the settings from the environment.
func (s *settings) read() error {
	for name, value := range map[string]*string{
		"CLOISTER_BIN": &s.cli, "CLOISTER_EIF": &s.eif, "CLOISTER_ROOT": &s.root, "CLOISTER_KEY": &s.key,
		"CLOISTER_NGINX_IMAGE": &s.nginx, "CLOISTER_NODE": &s.node,
	} {
		if *value = os.Getenv(name); *value == "" {
			return fmt.Errorf("%s is not set: run `make test-e2e`", name)
		}
	}
	return nil
}

// cluster is the cluster under test. It is set up once for all tests.
type cluster struct {
	settings
	kube kubernetes.Interface
	dir  string // of the binaries that were built
	app  v1.Image
}

var setUp = sync.OnceValues(func() (*cluster, error) {
	c := &cluster{}
	if err := c.read(); err != nil {
		return nil, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return nil, fmt.Errorf("read KUBECONFIG: %w", err)
	}
	config.QPS, config.Burst = 50, 100
	config.WarningHandler = rest.NoWarnings{} // every injected pod brings some
	if c.kube, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := c.build(ctx); err != nil {
		return nil, err
	}
	return c, c.push(ctx)
})

// e2e returns the cluster, or skips the test where there is none.
func e2e(t *testing.T) *cluster {
	t.Helper()
	if os.Getenv("CLOISTER_E2E") != "1" {
		t.Skip("end-to-end test: needs a cluster and CLOISTER_E2E=1, see `make test-e2e`")
	}
	c, err := setUp()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestMain(m *testing.M) {
	code := m.Run()
	if os.Getenv("CLOISTER_E2E") == "1" {
		if c, err := setUp(); err == nil {
			c.tidy()
		}
	}
	os.Exit(code)
}

// tidy removes what setUp has made outside the cluster's API.
func (c *cluster) tidy() {
	os.RemoveAll(c.dir)
	script := `rm -rf "$1"; ctr -n k8s.io images rm "$2"`
	if out, err := exec.Command("docker", "exec", c.node, "sh", "-c", script, "sh", nodeDir, localImage).CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "tidy up the node: %v: %s\n", err, out)
	}
}

// build compiles the tests' own programs and brings one of them to the node.
func (c *cluster) build(ctx context.Context) error {
	var err error
	if c.dir, err = os.MkdirTemp("", "cloister-e2e-"); err != nil {
		return err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", c.dir+"/", "./testapp", "./node")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the tests' programs: %w: %s", err, out)
	}
	binary, err := os.ReadFile(filepath.Join(c.dir, "node"))
	if err != nil {
		return err
	}
	return c.writeOnNode(ctx, nodeProgram, binary)
}

// localImage is the name of the workload's image on the node, for init containers: the node itself does
// not pull from the registry inside the cluster.
const localImage = "cloister.dev/testapp:e2e"

// push assembles the workload's image and pushes it to the registry inside the cluster and to the node.
func (c *cluster) push(ctx context.Context) error {
	binary, err := os.ReadFile(filepath.Join(c.dir, "testapp"))
	if err != nil {
		return err
	}
	if c.app, err = appImage(binary); err != nil {
		return fmt.Errorf("assemble image: %w", err)
	}
	tag, err := name.NewTag(localImage)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := tarball.Write(tag, c.app, &archive); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	load := exec.CommandContext(ctx, "docker", "exec", "-i", c.node, "ctr", "-n", "k8s.io", "images", "import", "-")
	load.Stdin = &archive
	if out, err := load.CombinedOutput(); err != nil {
		return fmt.Errorf("load image: %w: %s", err, out)
	}

	addr, stop, err := forward(ctx, "cloister-registry", "service/registry", 5000)
	if err != nil {
		return err
	}
	defer stop()
	ref, err := name.ParseReference(addr + "/testapp:e2e")
	if err != nil {
		return err
	}
	if err := remote.Write(ref, c.app, remote.WithContext(ctx)); err != nil {
		return fmt.Errorf("push %s: %w", ref, err)
	}
	return nil
}

// appRef is the reference of the workload's image in a registry.
func (c *cluster) appRef(t *testing.T, registry string) string {
	t.Helper()
	digest, err := c.app.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return registry + "/testapp@" + digest.String()
}

// nodeDir is the tests' folder on the node, nodeProgram package node's program in it.
const (
	nodeDir     = "/var/lib/cloister-e2e"
	nodeProgram = nodeDir + "/node"
)

// writeOnNode writes a file on the node.
func (c *cluster) writeOnNode(ctx context.Context, path string, content []byte) error {
	cmd := exec.CommandContext(ctx, "docker", "exec", "-i", c.node, "sh", "-c", `mkdir -p "${1%/*}" && cat >"$1.part" && chmod 755 "$1.part" && mv "$1.part" "$1"`, "sh", path)
	cmd.Stdin = bytes.NewReader(content)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("write %s on the node: %w: %s", path, err, out)
	}
	return nil
}

// onNode runs a shell command on the node and returns its output.
func (c *cluster) onNode(t *testing.T, script string, args ...string) string {
	t.Helper()
	return output(t, "docker", append([]string{"exec", c.node, "sh", "-ec", script, "sh"}, args...)...)
}

// running is a program of package node that runs on the node until stop.
type running struct {
	cmd   *exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
	err   bytes.Buffer
}

// start runs package node's program on the node and returns it with its ready line.
func (c *cluster) start(t *testing.T, args ...string) (*running, string) {
	t.Helper()
	r := &running{cmd: exec.Command("docker", append([]string{"exec", "-i", c.node, nodeProgram}, args...)...)}
	r.cmd.Stderr = &r.err
	stdin, err := r.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.stdin, r.out = stdin, bufio.NewReader(stdout)
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if r.stdin.Close() == nil { // a test that failed before stop
			io.Copy(io.Discard, r.out)
			r.cmd.Wait()
		}
	})
	line, err := r.out.ReadString('\n')
	if err != nil {
		t.Fatalf("%s is not ready: %v: %s", args[0], err, r.err.String())
	}
	return r, strings.TrimSpace(line)
}

// stop ends the program and returns what it printed after its ready line.
func (r *running) stop(t *testing.T) []byte {
	t.Helper()
	if err := r.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(r.out)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.cmd.Wait(); err != nil {
		t.Fatalf("%v: %s", err, r.err.String())
	}
	return out
}

// output runs a command that must succeed and returns its standard output.
func output(t *testing.T, command string, args ...string) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(t.Context(), command, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", command, strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// forward opens a port of a pod or Service on 127.0.0.1 and returns its address.
func forward(ctx context.Context, namespace, target string, port int) (addr string, stop func(), err error) {
	cmd := exec.CommandContext(ctx, "kubectl", "port-forward", "-n", namespace, target, fmt.Sprintf(":%d", port))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	// "Forwarding from 127.0.0.1:41234 -> 8080"
	line, err := bufio.NewReader(stdout).ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) < 3 {
		stop()
		return "", nil, fmt.Errorf("forward port %d of %s: %s", port, target, stderr.String())
	}
	go io.Copy(io.Discard, stdout)
	return fields[2], stop, nil
}

// result is the end of one run of the cloister binary.
type result struct {
	code           int
	stdout, stderr string
}

// cloister runs the cloister binary.
func (c *cluster) cloister(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, c.cli, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("cloister %s: %v", strings.Join(args, " "), err)
	}
	if ctx.Err() != nil {
		t.Fatalf("cloister %s: no end after 30 s: %s", strings.Join(args, " "), stderr.String())
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// curl asks the enclave at addr for path with `cloister curl`.
func (c *cluster) curl(t *testing.T, addr, measurements, path string, more ...string) result {
	t.Helper()
	args := append([]string{"curl", "--root", c.root, "--measurements", measurements, "--connect-to", addr}, more...)
	return c.cloister(t, append(args, "https://app.example"+path)...)
}

// answer is curl's body; the request must succeed.
func (c *cluster) answer(t *testing.T, addr, measurements, path string) string {
	t.Helper()
	r := c.curl(t, addr, measurements, path)
	if r.code != 0 {
		t.Fatalf("cloister curl %s: exit code %d: %s", path, r.code, r.stderr)
	}
	return r.stdout
}

// measure writes what `cloister measure` says of object to a file and returns it with its only entry.
func (c *cluster) measure(t *testing.T, object any) (file string, entry workload.Measurement) {
	t.Helper()
	source := writeFile(t, "object.yaml", toYAML(t, object))
	r := c.cloister(t, "measure", "-f", source, "--eif", c.eif)
	if r.code != 0 {
		t.Fatalf("cloister measure: exit code %d: %s", r.code, r.stderr)
	}
	set, err := workload.ParseMeasurements([]byte(r.stdout))
	if err != nil {
		t.Fatalf("cloister measure printed %q: %v", r.stdout, err)
	}
	if len(set) != 1 {
		t.Fatalf("cloister measure printed %d entries for one workload: %s", len(set), r.stdout)
	}
	return writeFile(t, "measurements.json", []byte(r.stdout)), set[0]
}

// setFile writes a measurement set of the entries to a file.
func setFile(t *testing.T, entries ...workload.Measurement) string {
	t.Helper()
	b, err := json.Marshal(workload.MeasurementSet(entries))
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "set.json", b)
}

func writeFile(t *testing.T, name string, content []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// eventually calls f until it reports true. It fails the test after the given time, with the last
// thing that f said.
func eventually(t *testing.T, within time.Duration, what string, f func() (ok bool, seen string)) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, seen := f()
		if ok {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not after %s; last seen: %s", what, within, seen)
		}
	}
}

// plainGet asks for a page without TLS.
func plainGet(t *testing.T, addr, path string) string {
	t.Helper()
	r, err := http.Get("http://" + addr + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// listen returns a listener on 127.0.0.1 that handle serves until the test ends.
func listen(t *testing.T, handle func(net.Conn)) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c)
		}
	}()
	return l.Addr().String()
}
