package e2e

import (
	"os/exec"
	"strings"
	"testing"
)

// An ephemeral container comes into an injected pod as into any, and what runs goes on. It is in the pod's network,
// where the workload's port speaks TLS to it as to everybody, and sees the processes of the container it targets,
// which is the console. A copy of the pod has an enclave of its own; it is denied when it has lost its annotations, when
// its processes are shared, or when the console has another image.
func TestDebug(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	before := ns.ready(t, "app", 1)[0]

	const name = "debugger"
	output(t, "kubectl", "-n", ns.name, "debug", "app", "--image="+localImage, "--image-pull-policy=Never",
		"--container="+name, "--target=app", "--", "/testapp", "serve", "-listen", ":9999")
	eventually(t, bootTime, "the ephemeral container runs", func() (bool, string) {
		p := ns.pod(t, "app")
		s := p.Status.EphemeralContainerStatuses
		return len(s) == 1 && s[0].State.Running != nil && strings.Contains(ns.logs(t, "app", name), "testapp: started"), state(p)
	})
	debugger := ns.forward(t, "pod/app", 9999)
	if got := plainGet(t, debugger, "/read?file=/proc/1/cmdline"); !strings.HasPrefix(got, "/initboot\x00console\x00") {
		t.Errorf("the first process of the targeted container is %q", got)
	}
	if got := plainGet(t, debugger, "/get?url=http://127.0.0.1:8080/echo?hello"); strings.Contains(got, "hello") {
		t.Errorf("the workload answers the debugger in the open: %q", got)
	}
	if got := c.answer(t, ns.forward(t, "pod/app", 8080), set, "/echo?hello"); got != "hello" {
		t.Errorf("answer %q", got)
	}
	after := ns.pod(t, "app")
	if !isReady(after) || len(after.Spec.Containers) != len(before.Spec.Containers) || len(after.Spec.InitContainers) != len(before.Spec.InitContainers) {
		t.Errorf("the pod is another: %s", state(after))
	}
	for _, s := range append(after.Status.InitContainerStatuses, after.Status.ContainerStatuses...) {
		if s.RestartCount != 0 {
			t.Errorf("%s was restarted", s.Name)
		}
	}

	for name, tt := range map[string]struct {
		args []string
		want string // in the denial; empty when it is to be admitted
	}{
		"copy":             {[]string{"--image=" + localImage, "--image-pull-policy=Never", "--", "/testapp", "exit", "0"}, "its annotations are gone"},
		"shared":           {[]string{"--keep-annotations", "--image=" + localImage, "--image-pull-policy=Never", "--", "/testapp", "exit", "0"}, "no container can see the processes of an enclave"},
		"other-image":      {[]string{"--keep-annotations", "--set-image=app=" + localImage}, "this installation injects"},
		"with-annotations": {[]string{"--keep-annotations", "--share-processes=false", "--image=" + localImage, "--image-pull-policy=Never", "--", "/testapp", "serve", "-listen", ":9999"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"-n", ns.name, "debug", "app", "--copy-to=" + name}, tt.args...)
			out, err := exec.CommandContext(t.Context(), "kubectl", args...).CombinedOutput()
			if tt.want != "" {
				if err == nil || !strings.Contains(string(out), tt.want) {
					t.Errorf("%v, %s, want %q", err, out, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			eventually(t, bootTime, "the copy's workload serves", func() (bool, string) {
				p := ns.pod(t, name)
				return isReady(p), state(p)
			})
			if got := c.answer(t, ns.forward(t, "pod/"+name, 8080), set, "/echo?copy"); got != "copy" {
				t.Errorf("answer %q", got)
			}
		})
	}
}
