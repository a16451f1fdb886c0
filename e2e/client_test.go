package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Any program reaches an enclave through `cloister proxy`, a client in another language needs nothing of
// ours, both send nothing to what was not measured, and `cloister status` lists the pod.
func TestClient(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app", "serve", "-listen", ":8080,:8081")
	pod.Spec.Containers[0].Ports = append(pod.Spec.Containers[0].Ports, corev1.ContainerPort{ContainerPort: 8081})
	pod.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nports: [{port: 8081, protocol: tcp}]\n"
	set, entry := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "app", 1)
	web := ns.forward(t, "pod/app", 8080)
	tunnel := ns.forward(t, "pod/app", 8081)
	wrong := entry
	wrong.PCR16 = flipDigit(entry.PCR16)
	wrongSet := setFile(t, wrong)
	requests := func(t *testing.T) string { t.Helper(); return c.answer(t, web, set, "/count") }

	t.Run("proxy", func(t *testing.T) {
		p := c.proxy(t, set, "--connect-to", web, "https://app.example")
		if got := plainGet(t, p.addr, "/echo?from-go"); got != "from-go" {
			t.Errorf("net/http: got %q", got)
		}
		for _, version := range []string{"--http1.1", "--http2-prior-knowledge"} {
			got := output(t, "curl", "-sS", version, "-w", " %{http_version}", "--data", "from-curl", "http://"+p.addr+"/echo")
			if want := map[string]string{"--http1.1": "from-curl 1.1", "--http2-prior-knowledge": "from-curl 2"}[version]; got != want {
				t.Errorf("curl %s: got %q, want %q", version, got, want)
			}
		}
		said := p.stop(t)
		if strings.Count(said, "verified  PCR16   "+entry.PCR16) != 1 || !strings.Contains(said, "DEVELOPMENT, not a real enclave") {
			t.Errorf("the proxy does not say, once, what it verified: %s", said)
		}
	})

	// A client may end its direction first and still gets the answer.
	t.Run("proxy of a tcp port", func(t *testing.T) {
		p := c.proxy(t, set, "--connect-to", tunnel, "tcp://app.example:8081")
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		body := strings.Repeat("x", 1<<20)
		fmt.Fprintf(conn, "POST /echo HTTP/1.1\r\nHost: app\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		conn.(*net.TCPConn).CloseWrite()
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if got, err := io.ReadAll(res.Body); err != nil || string(got) != body {
			t.Errorf("%d bytes came back of %d: %v", len(got), len(body), err)
		}
	})

	t.Run("proxy refuses", func(t *testing.T) {
		before := requests(t)
		for _, target := range [][2]string{{web, "https://app.example"}, {tunnel, "tcp://app.example:8081"}} {
			p := c.proxy(t, wrongSet, "--connect-to", target[0], target[1])
			conn, err := net.Dial("tcp", p.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			io.WriteString(conn, "GET /echo?secret HTTP/1.1\r\nHost: app\r\n\r\n")
			got, err := io.ReadAll(conn)
			var late net.Error
			if len(got) > 0 || errors.As(err, &late) && late.Timeout() {
				t.Errorf("%s: the client got %q, %v", target[1], got, err)
			}
			said := p.stop(t)
			if strings.Count(said, "\n") != 1 || !strings.HasPrefix(said, "refused ") || !strings.Contains(said, "PCR16 expected "+wrong.PCR16+", seen "+entry.PCR16) {
				t.Errorf("%s: not one line about the register: %s", target[1], said)
			}
		}
		if after := requests(t); after != before {
			t.Errorf("the workload counts %s requests, before it was %s", after, before)
		}
	})

	t.Run("status", func(t *testing.T) {
		r := c.cloister(t, "status", "-n", ns.name)
		if r.code != 0 {
			t.Fatalf("exit code %d: %s", r.code, r.stderr)
		}
		lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
		if len(lines) != 2 {
			t.Fatalf("not one pod under the heading: %s", r.stdout)
		}
		row := strings.Fields(lines[1])
		want := []string{ns.name, "app", "Running", "yes", "0", entry.PCR16[:12], "running"}
		if len(row) < len(want) || strings.Join(row[:len(want)], " ") != strings.Join(want, " ") {
			t.Errorf("the row is %q, want it to begin with %q", row, want)
		}
		if !strings.Contains(r.stderr, "for people") {
			t.Errorf("stderr does not say what the measurement is worth: %s", r.stderr)
		}

		r = c.cloister(t, "status", "-A", "-o", "json")
		var all struct {
			Pods []struct {
				Namespace, Pod, ClaimedPCR16, Enclave string
				Ready, Booted, Console                bool
			}
		}
		if err := json.Unmarshal([]byte(r.stdout), &all); err != nil {
			t.Fatalf("%v: %s", err, r.stdout)
		}
		found := 0
		for _, p := range all.Pods {
			if p.Namespace == ns.name {
				found++
				if p.Pod != "app" || p.ClaimedPCR16 != entry.PCR16 || p.Enclave != "running" || !p.Ready || !p.Booted || !p.Console {
					t.Errorf("got %+v", p)
				}
			}
		}
		if found != 1 {
			t.Errorf("%d pods of the namespace are listed: %s", found, r.stdout)
		}
	})

	t.Run("python", func(t *testing.T) {
		interpreter := strings.TrimSpace(output(t, "../hack/python.sh", "../docs/examples/python/requirements.txt"))
		ask := func(set string) (stdout, stderr string, err error) {
			var out, errs bytes.Buffer
			cmd := exec.CommandContext(t.Context(), interpreter, "../docs/examples/python/attested.py", set, c.root, web, "/echo?from-python")
			cmd.Stdout, cmd.Stderr = &out, &errs
			err = cmd.Run()
			return out.String(), errs.String(), err
		}
		if stdout, stderr, err := ask(set); err != nil || stdout != "from-python" || !strings.Contains(stderr, "DEVELOPMENT") {
			t.Errorf("the right set: %v, stdout %q, stderr %s", err, stdout, stderr)
		}
		before := requests(t)
		if stdout, stderr, err := ask(wrongSet); err == nil || stdout != "" || !strings.Contains(stderr, "no measurement matches") {
			t.Errorf("one digit is wrong: %v, stdout %q, stderr %s", err, stdout, stderr)
		}
		if after := requests(t); after != before {
			t.Errorf("the workload counts %s requests, before it was %s", after, before)
		}
	})
}

// localProxy is a running `cloister proxy`.
type localProxy struct {
	addr string
	cmd  *exec.Cmd
	rest *bufio.Reader // of its stderr
}

// proxy runs `cloister proxy` on a free port until stop or the end of the test.
func (c *cluster) proxy(t *testing.T, measurements string, args ...string) *localProxy {
	t.Helper()
	p := &localProxy{cmd: exec.CommandContext(t.Context(), c.cli, append([]string{
		"proxy", "--root", c.root, "--measurements", measurements, "--listen", "127.0.0.1:0"}, args...)...)}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.rest = bufio.NewReader(stderr)
	// "listening on 127.0.0.1:41234 for app.example:443"
	line, err := p.rest.ReadString('\n')
	fields := strings.Fields(line)
	if err != nil || len(fields) < 3 {
		t.Fatalf("cloister proxy says %q, %v", line, err)
	}
	p.addr = fields[2]
	return p
}

// stop ends the proxy as a service manager does. It returns what the proxy has said since it listened.
func (p *localProxy) stop(t *testing.T) string {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(p.rest)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Wait(); err != nil {
		t.Errorf("cloister proxy after SIGTERM: %v: %s", err, said)
	}
	return string(said)
}
