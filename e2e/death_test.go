package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// handshake is a line of `node handshakes`.
type handshake struct {
	Start      time.Time
	Took       time.Duration
	Bytes      int
	Key, Error string
}

// Whatever dies, clients are never left hanging, never served by something else, and the pod serves
// again. A new enclave has a new TLS key.
func TestDeath(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	for name, tt := range map[string]struct {
		container, command string // whose process is killed
		console            int32  // exit code of the console; 0 if it stays
		message            bool   // the console says why
		initboot, sidecar  int32  // their restarts
	}{
		"enclave":  {initbootContainer, "/init", 125, true, 0, 0},
		"initboot": {initbootContainer, "/initboot serve", 125, true, 1, 0},
		"workload": {initbootContainer, "/testapp", 137, false, 0, 0},
		"console":  {"app", "/initboot console", 137, false, 0, 0},
		"sidecar":  {sidecarContainer, "/sidecar serve", 0, false, 0, 1},
		"envoy":    {sidecarContainer, "/envoy", 0, false, 0, 1},
	} {
		t.Run(name, func(t *testing.T) {
			pod := c.appPod(t, name)
			pod.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)
			ns.create(t, pod)
			defer ns.remove(t, name)
			before := ns.ready(t, name, 1)[0]
			clients, ready := c.start(t, "handshakes", before.Status.PodIP+":8080")
			oldKey := strings.TrimPrefix(ready, "ready ")
			pid := ns.pid(t, &before, tt.container, tt.command)
			c.onNode(t, `kill -KILL "$1"`, pid)
			killed := time.Now()

			if tt.console == 125 {
				eventually(t, 30*time.Second, "Ready=False", func() (bool, string) {
					p := ns.pod(t, name)
					return !isReady(p), state(p)
				})
			}
			restarts := int32(0)
			if tt.console != 0 {
				restarts = 1
			}
			var after *corev1.Pod
			eventually(t, bootTime, "the pod serves again", func() (bool, string) {
				after = ns.pod(t, name)
				return isReady(after) && container(after, "app").RestartCount == restarts &&
					container(after, initbootContainer).RestartCount == tt.initboot &&
					container(after, sidecarContainer).RestartCount == tt.sidecar, state(after)
			})
			if after.UID != before.UID {
				t.Error("another pod serves")
			}
			if tt.console != 0 {
				last := container(after, "app").LastTerminationState.Terminated
				if last == nil || last.ExitCode != tt.console || tt.message && last.Message == "" {
					t.Errorf("the console ended with %+v, want exit code %d (with a message: %t)", last, tt.console, tt.message)
				}
			}

			// Wait for what clients see now, then look at all that they have seen.
			again, ready := c.start(t, "handshakes", after.Status.PodIP+":8080")
			again.stop(t)
			newKey := strings.TrimPrefix(ready, "ready ")
			if (newKey == oldKey) != (tt.console == 0) {
				t.Errorf("the TLS key is the same: %t, want %t", newKey == oldKey, tt.console == 0)
			}
			check(t, clients.stop(t), killed, oldKey, newKey)
		})
	}
}

// check reads the handshakes around a death. The time until the new enclave serves must show in them,
// or the test has not seen the death.
func check(t *testing.T, lines []byte, killed time.Time, oldKey, newKey string) {
	t.Helper()
	var refused, served int
	for line := range strings.Lines(string(lines)) {
		var h handshake
		if err := json.Unmarshal([]byte(line), &h); err != nil {
			t.Fatal(err)
		}
		switch {
		case h.Start.Before(killed):
		case h.Key == newKey:
			served++
		case h.Key == oldKey && h.Key != "":
			t.Errorf("%s after the death the old key was shown", h.Start.Sub(killed))
		case h.Key != "":
			t.Errorf("%s after the death an unknown key was shown", h.Start.Sub(killed))
		case h.Took > time.Second || h.Start.Sub(killed) > time.Second && h.Bytes > 0:
			t.Errorf("%s after the death a client got %d bytes and was left for %s: %s", h.Start.Sub(killed), h.Bytes, h.Took, h.Error)
		default:
			refused++
		}
	}
	if refused == 0 || served == 0 {
		t.Errorf("clients were refused %d times and served %d times by what came after", refused, served)
	}
}
