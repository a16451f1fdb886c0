package supervise

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

func execHook(args ...string) *workload.Hook {
	return &workload.Hook{Exec: &workload.Exec{Command: append([]string{"/app"}, args...)}}
}

func runUntilReady(t *testing.T, e *enclave, drain, grace time.Duration) *result {
	t.Helper()
	var stopped <-chan error
	r := e.follow(t, func(r *result, _ *channel.RunEvent) {
		if stopped == nil && r.started && r.stdout == "ready\n" {
			stopped = e.stopLater(t, drain, grace)
		}
	})
	if stopped != nil {
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}
	return r
}

// TestHooks: postStart ends before the workload counts as started, preStop before its stop signal; both
// run as the workload's user with its environment, and their words are not expanded.
func TestHooks(t *testing.T) {
	e := newEnclave(t)
	uid := int64(33)
	e.configure(t, &workload.Manifest{
		Image:  workload.Image{Digest: e.addImage(t, cmdConfig("journal", "/tmp/journal"))},
		Env:    []workload.EnvVar{{Name: "NAME", Value: "value"}},
		User:   &workload.User{UID: &uid},
		Mounts: []workload.Mount{{Path: "/tmp", Kind: workload.MountTmpfs}},
		Lifecycle: &workload.Lifecycle{
			PostStart:  execHook("append", "/tmp/journal", "post $(NAME)"),
			PreStop:    execHook("append", "/tmp/journal", "pre"),
			StopSignal: "SIGUSR1",
		},
	})
	r := runUntilReady(t, e, time.Millisecond, time.Minute)
	r.check(t, 3, "")
	if want := "ready\npost $(NAME) 33 value\npre 33 value\nuser defined signal 1\n"; r.stdout != want || len(r.failures) > 0 {
		t.Errorf("stdout %q, want %q; failures %q", r.stdout, want, r.failures)
	}
}

// TestHTTPHooks: any answer is success.
func TestHTTPHooks(t *testing.T) {
	asked := make(chan string, 2)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.Host + r.URL.Path + " " + r.UserAgent()
		w.WriteHeader(http.StatusTeapot)
	}))
	defer server.Close()
	port := uint32(server.Listener.Addr().(*net.TCPAddr).Port)
	get := func(path string) *workload.Hook {
		return &workload.Hook{HTTP: &workload.HTTPGet{Port: port, Path: path, Headers: []workload.Header{{Name: "Host", Value: "app"}}}}
	}
	e := newEnclave(t)
	e.configure(t, &workload.Manifest{
		Image:     workload.Image{Digest: e.addImage(t, cmdConfig("stop"))},
		Lifecycle: &workload.Lifecycle{PostStart: get("/post"), PreStop: get("/pre")},
	})
	r := runUntilReady(t, e, time.Millisecond, time.Minute)
	r.check(t, 3, "")
	if len(r.failures) > 0 {
		t.Errorf("failures %q", r.failures)
	}
	for _, want := range []string{"app/post kube-lifecycle/cloister", "app/pre kube-lifecycle/cloister"} {
		if got := <-asked; got != want {
			t.Errorf("asked for %q, want %q", got, want)
		}
	}
}

func TestHooksThatFail(t *testing.T) {
	tests := map[string]struct {
		args      []string
		lifecycle workload.Lifecycle
		code      int32
		message   string
		stdout    string
		failure   string
		started   bool
	}{
		"postStart stops the workload": {
			[]string{"journal", "/journal"}, workload.Lifecycle{PostStart: execHook("await", "/ready", "7"), PreStop: execHook("append", "/journal", "pre")},
			3, "the postStart hook failed, so the workload was stopped: exec hook: the command ended with status 7",
			"ready\npre 0 \nterminated\n", "status 7", false,
		},
		"the workload ends during postStart": {
			[]string{"exit", "5"}, workload.Lifecycle{PostStart: &workload.Hook{Sleep: 3600}}, 5, "", "", "", false,
		},
		"preStop takes too long": {
			[]string{"stop"}, workload.Lifecycle{PreStop: &workload.Hook{Sleep: 3600}},
			3, "", "ready\ngot terminated\n", "sleep hook: it did not end within 1s", true,
		},
		"preStop fails": {
			[]string{"stop"}, workload.Lifecycle{PreStop: execHook("exit", "1")},
			3, "", "ready\ngot terminated\n", "status 1", true,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t)
			e.configure(t, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig(test.args...))}, Lifecycle: &test.lifecycle})
			grace := time.Minute
			if strings.Contains(test.failure, "did not end") {
				grace = leastGrace // which leaves the hook the second before it
			}
			r := runUntilReady(t, e, time.Second, grace)
			r.check(t, test.code, test.message)
			if r.stdout != test.stdout || r.started != test.started {
				t.Errorf("stdout %q, started %t", r.stdout, r.started)
			}
			if got := strings.Join(r.failures, "; "); !strings.Contains(got, test.failure) || (got == "") != (test.failure == "") {
				t.Errorf("failures %q, want %q", got, test.failure)
			}
		})
	}
}

// TestTerminationMessage: what the workload leaves comes with its exit, wherever the pod wants it.
func TestTerminationMessage(t *testing.T) {
	for name, path := range map[string]string{"default": "", "in memory": "/tmp/last/word", "in the image": "/var/last"} {
		t.Run(name, func(t *testing.T) {
			uid, file := int64(33), path
			if file == "" {
				file = "/dev/termination-log"
			}
			e := newEnclave(t)
			e.configure(t, &workload.Manifest{
				Image: workload.Image{Digest: e.addImage(t, cmdConfig("put", strings.Repeat("x", 5000)+"the end", ">"+file))},
				User:  &workload.User{UID: &uid}, Security: &workload.Security{ReadOnlyRoot: true},
				Mounts:                 []workload.Mount{{Path: "/tmp", Kind: workload.MountTmpfs}},
				TerminationMessagePath: path,
			})
			r := e.follow(t, nil)
			r.check(t, 0, "")
			if got := string(r.exited.GetTerminationMessage()); len(got) != 4096 || !strings.HasSuffix(got, "xthe end") {
				t.Errorf("%d bytes that end with %q; stdout %q", len(got), got[max(0, len(got)-10):], r.stdout)
			}
		})
	}
	t.Run("logs stay inside", func(t *testing.T) {
		e := &Enclave{cfg: Config{Dir: t.TempDir()}, manifest: &workload.Manifest{}}
		if err := os.WriteFile(e.terminationFile(), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := string(e.terminationMessage()); got != "secret" {
			t.Errorf("got %q", got)
		}
		e.manifest.Logs = workload.LogsOTLP
		if got := e.terminationMessage(); len(got) > 0 {
			t.Errorf("got %q", got)
		}
	})
}
