package e2e

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// A Job ends as its workload does, and sidecar and initboot end with it.
func TestJobs(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	for name, code := range map[string]string{"zero": "0", "seven": "7"} {
		ns.create(t, job(c.appPod(t, name, "exit", code), corev1.RestartPolicyNever, 0))
	}
	for name, tt := range map[string]struct {
		condition string
		code      int32
		phase     corev1.PodPhase
	}{
		"zero":  {"complete", 0, corev1.PodSucceeded},
		"seven": {"failed", 7, corev1.PodFailed},
	} {
		t.Run(name, func(t *testing.T) {
			output(t, "kubectl", "-n", ns.name, "wait", "--for=condition="+tt.condition, "job/"+name, "--timeout="+bootTime.String())
			pods := ns.pods(t, name)
			if len(pods) != 1 {
				t.Fatalf("%d pods", len(pods))
			}
			p := &pods[0]
			if p.Status.Phase != tt.phase {
				t.Errorf("phase %s, want %s", p.Status.Phase, tt.phase)
			}
			app := container(p, "app")
			if app.State.Terminated == nil || app.State.Terminated.ExitCode != tt.code || app.RestartCount != 0 {
				t.Errorf("the workload's container: %+v, %d restarts; want exit code %d and none", app.State, app.RestartCount, tt.code)
			}
			if n := strings.Count(ns.logs(t, p.Name, "app"), "testapp: started"); n != 1 {
				t.Errorf("the workload ran %d times", n)
			}
			for _, name := range []string{initbootContainer, sidecarContainer} {
				if s := container(p, name); s.State.Terminated == nil || s.State.Terminated.ExitCode != 0 {
					t.Errorf("%s: %+v, want exit code 0", name, s.State)
				}
			}
		})
	}
}

// A Job whose workload fails twice and then succeeds is complete; each run has an enclave of its own.
func TestJobOnFailure(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	j := job(c.appPod(t, "work"), corev1.RestartPolicyOnFailure, 5)
	set, _ := c.measure(t, j)
	ns.create(t, j)
	for run, code := range []int{3, 3, 0} {
		var pod string
		eventually(t, bootTime, fmt.Sprintf("run %d", run+1), func() (bool, string) {
			pods := ns.pods(t, "work")
			if len(pods) != 1 {
				return false, fmt.Sprintf("%d pods", len(pods))
			}
			pod = pods[0].Name
			return isReady(&pods[0]) && container(&pods[0], "app").RestartCount == int32(run), state(&pods[0])
		})
		addr := ns.forward(t, "pod/"+pod, 8080)
		c.answer(t, addr, set, fmt.Sprintf("/exit?code=%d", code))
	}
	output(t, "kubectl", "-n", ns.name, "wait", "--for=condition=complete", "job/work", "--timeout="+bootTime.String())
	pods := ns.pods(t, "work")
	if len(pods) != 1 {
		t.Fatalf("%d pods, want the same one for all runs", len(pods))
	}
	app := container(&pods[0], "app")
	if last := app.LastTerminationState.Terminated; app.RestartCount != 2 || last == nil || last.ExitCode != 3 {
		t.Errorf("%d restarts, run before the last: %+v; want 2 and exit code 3", app.RestartCount, last)
	}
}
