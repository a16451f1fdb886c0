package e2e

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The workload's own output is what `kubectl logs` shows.
func TestLogs(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.nginxPod(t, "nginx")
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "nginx", 1)
	const page = "/a-page-that-is-not-there"
	if r := c.curl(t, ns.forward(t, "pod/nginx", 80), set, page); !strings.Contains(r.stdout, "404 Not Found") {
		t.Fatalf("nginx answers %q, %s", r.stdout, r.stderr)
	}
	eventually(t, time.Minute, "nginx's access log", func() (bool, string) {
		logs := ns.logs(t, "nginx", "nginx")
		return strings.Contains(logs, `"GET `+page+` HTTP/`), logs
	})
}

// execProbe asks every second whether a file exists and believes the first answer.
func execProbe(file string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"/testapp", "exists", file}}},
		PeriodSeconds: 1, FailureThreshold: 1,
	}
}

// tcpProbe asks every second whether somebody listens on a port, a name or a number.
func tcpProbe(port string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.Parse(port)}},
		PeriodSeconds: 1, FailureThreshold: 1,
	}
}

// Probes run inside the enclave and see what the workload does: a failing readiness probe takes the
// pod out of its Service, a failing liveness probe restarts the container.
func TestProbes(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	byHTTP := c.appPod(t, "http")
	byHTTP.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)
	byHTTP.Spec.Containers[0].LivenessProbe = httpProbe("/check/live", 8080)
	byExec := c.appPod(t, "exec")
	byExec.Spec.Containers[0].ReadinessProbe = execProbe("/ready")
	byExec.Spec.Containers[0].LivenessProbe = execProbe("/etc/motd")
	byOthers := c.appPod(t, "tcp-and-grpc", "serve", "-health", ":9000")
	byOthers.Spec.Containers[0].StartupProbe = tcpProbe("http")
	byOthers.Spec.Containers[0].ReadinessProbe = tcpProbe("7000")
	byOthers.Spec.Containers[0].LivenessProbe = &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9000, Service: new("live")}},
		PeriodSeconds: 1, FailureThreshold: 1,
	}
	for _, pod := range []*corev1.Pod{byHTTP, byExec, byOthers} {
		ns.create(t, pod)
	}

	for name, tt := range map[string]struct {
		pod                  *corev1.Pod
		ready, unready, dead string // paths to ask for
		readyFromStart       bool
	}{
		"http":         {pod: byHTTP, ready: "/mend/ready", unready: "/break/ready", dead: "/break/live", readyFromStart: true},
		"exec":         {pod: byExec, ready: "/touch?file=/ready", unready: "/remove?file=/ready", dead: "/remove?file=/etc/motd"},
		"tcp-and-grpc": {pod: byOthers, ready: "/listen?on=:7000", unready: "/unlisten?on=:7000", dead: "/break/live"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			set, _ := c.measure(t, tt.pod)
			phase := func(what string, ok func(*corev1.Pod) bool) {
				t.Helper()
				eventually(t, bootTime, what, func() (bool, string) {
					p := ns.pod(t, name)
					return ok(p), state(p)
				})
			}
			restarts := func(p *corev1.Pod) int32 { return container(p, "app").RestartCount }
			serving := func(p *corev1.Pod) bool { return container(p, sidecarContainer).Ready }

			phase("the workload serves", serving)
			addr := ns.forward(t, "pod/"+name, 8080)
			ask := func(path string) { t.Helper(); c.answer(t, addr, set, path) }
			if tt.readyFromStart {
				phase("ready", isReady)
			} else if p := ns.pod(t, name); isReady(p) {
				t.Errorf("ready although %s was not asked for", tt.ready)
			}
			ask(tt.ready)
			phase("ready", isReady)
			ask(tt.unready)
			phase("not ready", func(p *corev1.Pod) bool { return !isReady(p) })
			ask(tt.ready)
			phase("ready again", isReady)
			if n := restarts(ns.pod(t, name)); n != 0 {
				t.Errorf("%d restarts, but liveness never failed", n)
			}

			ask(tt.dead)
			phase("restarted", func(p *corev1.Pod) bool { return restarts(p) == 1 && serving(p) })
			// testapp ends with 0 when it is asked to. On a busy node the kubelet may forget the run before.
			if last := container(ns.pod(t, name), "app").LastTerminationState.Terminated; last != nil && last.ExitCode != 0 {
				t.Errorf("the first run ended with %+v, want exit code 0", last)
			}
			addr = ns.forward(t, "pod/"+name, 8080)
			ask(tt.ready)
			phase("ready after the restart", isReady)
		})
	}
}

// Delays and thresholds count from the start of the workload, not from that of the container: neither
// a slow image nor a slow workload is killed by a liveness probe with a short delay.
func TestSlowStart(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	slow, ready := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-delay", "5s")
	defer slow.stop(t)

	// The image comes after 10 s and more, the workload listens 6 s later. Its delay is 9 s.
	image := c.appPod(t, "slow-image", "serve", "-after", "6s")
	image.Spec.Containers[0].Image = c.appRef(t, c.nodeAddr(t)+":"+strings.TrimPrefix(ready, "ready "))
	image.Spec.Containers[0].LivenessProbe = httpProbe("/check/live", 8080)
	image.Spec.Containers[0].LivenessProbe.InitialDelaySeconds = 9
	image.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)

	// The workload listens after 20 s, its liveness delay is 1 s: the startup probe protects it.
	workload := c.appPod(t, "slow-workload", "serve", "-after", "20s")
	workload.Spec.Containers[0].StartupProbe = httpProbe("/check/up", 8080)
	workload.Spec.Containers[0].StartupProbe.FailureThreshold = 40
	workload.Spec.Containers[0].LivenessProbe = httpProbe("/check/live", 8080)
	workload.Spec.Containers[0].LivenessProbe.InitialDelaySeconds = 1
	workload.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)

	// Without a startup probe the same liveness probe ends it.
	unprotected := c.appPod(t, "unprotected", "serve", "-after", "60s")
	unprotected.Spec.Containers[0].LivenessProbe = httpProbe("/check/live", 8080)
	unprotected.Spec.Containers[0].LivenessProbe.InitialDelaySeconds = 1

	for _, pod := range []*corev1.Pod{image, workload, unprotected} {
		ns.create(t, pod)
	}
	eventually(t, bootTime, "liveness restarts the unprotected workload", func() (bool, string) {
		p := ns.pod(t, "unprotected")
		return len(p.Status.ContainerStatuses) == 1 && container(p, "app").RestartCount > 0, state(p)
	})
	for _, name := range []string{"slow-image", "slow-workload"} {
		p := ns.ready(t, name, 1)[0]
		if n := container(&p, "app").RestartCount; n != 0 {
			t.Errorf("%s was restarted %d times", name, n)
		}
	}
}
