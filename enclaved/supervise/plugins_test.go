package supervise

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// pluginApp is the plugin of package plugin's tests.
func pluginApp(t *testing.T) []byte {
	t.Helper()
	program := filepath.Join(t.TempDir(), "app")
	build := exec.Command("go", "build", "-o", program, "../plugin/testdata/app")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the test's plugin: %v\n%s", err, out)
	}
	b, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A plugin's image comes as the workload's does; the plugin serves before the workload starts, decides on
// its requests and ends with the run.
func TestPlugin(t *testing.T) {
	e := newEnclave(t)
	port := freePort(t)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("serve", strconv.Itoa(int(port)), "204 No Content"))},
		Ports: []workload.Port{{Port: port}},
		Plugins: []workload.Plugin{{
			Name: "guard", Type: workload.PluginAuthentication, Required: true,
			Image: &workload.Image{Digest: e.addImageOf(t, pluginApp(t), cmdConfig())},
		}},
	})
	var steps []string
	done := false
	r := e.follow(t, func(r *result, ev *channel.RunEvent) {
		if p := ev.GetProgress(); p != nil {
			steps = append(steps, p.Step)
		}
		if done || !r.started || r.stdout != "serving\n" {
			return
		}
		done = true
		for path, want := range map[string]string{"/": "HTTP/1.1 204", "/deny": "HTTP/1.1 401"} {
			c := e.dialTLS(t, port)
			fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
			if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), want) {
				t.Errorf("%s: %q, %v, want %s", path, b, err, want)
			}
		}
		e.stopLater(t, 0, 0)
	})
	r.check(t, 137, "killed")
	said := strings.Join(steps, "\n")
	plugin, workload := strings.Index(said, "starting plugin guard"), strings.Index(said, "starting the workload")
	if !strings.Contains(said, "plugin guard: unpacking layer 1 of 1") || plugin < 0 || workload < plugin {
		t.Errorf("steps:\n%s", said)
	}
}

// Who stops a run need not wait for a plugin that never serves.
func TestPluginNeverServes(t *testing.T) {
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))},
		Plugins: []workload.Plugin{{
			Name: "guard", Type: workload.PluginAuthentication, Required: true,
			Image: &workload.Image{Digest: e.addImage(t, cmdConfig("exit", "5"))},
		}},
	})
	stopped := false
	r := e.follow(t, func(r *result, _ *channel.RunEvent) {
		// Until it has ended it is said not to serve yet.
		if !stopped && len(r.failures) > 0 && strings.Contains(r.failures[len(r.failures)-1], "ended with status 5") {
			stopped = true
			e.stopLater(t, 0, 0)
		}
	})
	r.check(t, 143, "stopped before")
	if r.started || !stopped {
		t.Errorf("got %+v", r)
	}
}
