package e2e

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// terminated waits until a container of a pod that is not restarted has ended.
func (ns *namespace) terminated(t *testing.T, pod string) *corev1.ContainerStateTerminated {
	t.Helper()
	var ended *corev1.ContainerStateTerminated
	eventually(t, bootTime, pod+" ends", func() (bool, string) {
		p := ns.pod(t, pod)
		if len(p.Status.ContainerStatuses) > 0 {
			ended = container(p, "app").State.Terminated
		}
		return ended != nil, state(p)
	})
	return ended
}

// Hooks run inside, as the workload: postStart before it counts as started, preStop before its stop
// signal. What it leaves as its last word is its termination message, and the log of the run before is
// still there.
func TestHooks(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	hooks := c.appPod(t, "hooks")
	app := &hooks.Spec.Containers[0]
	uid := int64(1234)
	app.SecurityContext = &corev1.SecurityContext{RunAsUser: &uid}
	app.Env = []corev1.EnvVar{{Name: "NAME", Value: "hooked"}, {Name: "JOURNAL", Value: "/notes/journal"}, {Name: "LAST_WORD", Value: "/notes/last"}}
	app.TerminationMessagePath = "/notes/last"
	app.LivenessProbe, app.ReadinessProbe = httpProbe("/check/live", 8080), httpProbe("/check/ready", 8080)
	app.Lifecycle = &corev1.Lifecycle{
		PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/testapp", "note", "/notes/journal", "post $(NAME)"}}},
		PreStop:   &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/note?file=/notes/journal&text=pre", Port: intstr.FromString("http")}},
	}
	app.VolumeMounts = []corev1.VolumeMount{{Name: "notes", MountPath: "/notes"}}
	hooks.Spec.Volumes = []corev1.Volume{{Name: "notes", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}

	fails := c.appPod(t, "post-start-fails")
	fails.Spec.RestartPolicy = corev1.RestartPolicyNever
	fails.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/testapp", "exists", "/nowhere"}}}}

	word := c.appPod(t, "last-word", "exit", "7", "/dev/termination-log", "out of luck")
	word.Spec.RestartPolicy = corev1.RestartPolicyNever

	logs := c.appPod(t, "logs-on-error", "exit", "7")
	logs.Spec.RestartPolicy = corev1.RestartPolicyNever
	logs.Spec.Containers[0].TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError

	rule := c.appPod(t, "restart-rule")
	rule.Spec.RestartPolicy = corev1.RestartPolicyNever
	never := corev1.ContainerRestartPolicyNever
	rule.Spec.Containers[0].RestartPolicy = &never
	rule.Spec.Containers[0].RestartPolicyRules = []corev1.ContainerRestartRule{{
		Action:    corev1.ContainerRestartRuleActionRestart,
		ExitCodes: &corev1.ContainerRestartRuleOnExitCodes{Operator: corev1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
	}}

	all := c.appPod(t, "restart-all")
	all.Spec.RestartPolicy = corev1.RestartPolicyNever
	all.Spec.Containers[0].RestartPolicy = &never
	all.Spec.Containers[0].RestartPolicyRules = []corev1.ContainerRestartRule{{
		Action:    corev1.ContainerRestartRuleActionRestartAllContainers,
		ExitCodes: rule.Spec.Containers[0].RestartPolicyRules[0].ExitCodes,
	}}

	// Its hook would take the pod's whole grace period, which is longer than any wait of this test.
	short := c.appPod(t, "short-grace")
	long, brief := int64(3600), int64(6)
	short.Spec.TerminationGracePeriodSeconds = &long
	app = &short.Spec.Containers[0]
	app.LivenessProbe, app.ReadinessProbe = httpProbe("/check/live", 8080), httpProbe("/check/ready", 8080)
	app.LivenessProbe.TerminationGracePeriodSeconds = &brief
	app.Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/slow?for=1h", Port: intstr.FromString("http")}}}
	for _, pod := range []*corev1.Pod{hooks, fails, word, logs, rule, all, short} {
		ns.create(t, pod)
	}

	t.Run("around a run", func(t *testing.T) {
		t.Parallel()
		set, _ := c.measure(t, hooks)
		ns.ready(t, "hooks", 1)
		addr := ns.forward(t, "pod/hooks", 8080)
		const post = "post $(NAME) uid=1234 NAME=hooked\n"
		if got := c.answer(t, addr, set, "/read?file=/notes/journal"); got != post {
			t.Errorf("noted after the start: %q, want %q", got, post)
		}
		c.answer(t, addr, set, "/break/live")
		eventually(t, bootTime, "a restart", func() (bool, string) {
			p := ns.pod(t, "hooks")
			return container(p, "app").RestartCount == 1 && isReady(p), state(p)
		})
		eventually(t, bootTime, "the kubelet tells how the first run ended", func() (bool, string) {
			last := container(ns.pod(t, "hooks"), "app").LastTerminationState.Terminated
			return last != nil && last.ExitCode == 0 && last.Message == "so long", fmt.Sprint(last)
		})
		want := "testapp: stopping\ntestapp: journal\n" + post + "pre uid=1234 NAME=hooked\n"
		eventually(t, bootTime, "the log of the run before", func() (bool, string) {
			b, err := ns.kube.CoreV1().Pods(ns.name).GetLogs("hooks", &corev1.PodLogOptions{Container: "app", Previous: true}).DoRaw(t.Context())
			return err == nil && strings.HasSuffix(string(b), want), fmt.Sprintf("%q, %v, want %q at its end", b, err, want)
		})
	})
	t.Run("postStart fails", func(t *testing.T) {
		t.Parallel()
		ended := ns.terminated(t, "post-start-fails")
		if !strings.Contains(ended.Message, "the postStart hook failed, so the workload was stopped: exec hook: the command ended with status 1") {
			t.Errorf("termination message %q", ended.Message)
		}
		if got := ns.logs(t, "post-start-fails", "app"); !strings.Contains(got, "testapp: stopping") {
			t.Errorf("the workload was not asked to stop: %q", got)
		}
	})
	t.Run("termination message", func(t *testing.T) {
		t.Parallel()
		if ended := ns.terminated(t, "last-word"); ended.ExitCode != 7 || ended.Message != "out of luck" {
			t.Errorf("ended with %+v", ended)
		}
	})
	t.Run("the log instead", func(t *testing.T) {
		t.Parallel()
		if ended := ns.terminated(t, "logs-on-error"); ended.ExitCode != 7 || ended.Message != "testapp: started\n" {
			t.Errorf("ended with %+v", ended)
		}
	})
	t.Run("restart by exit code", func(t *testing.T) {
		t.Parallel()
		set, _ := c.measure(t, rule)
		for run, code := range []string{"42", "3"} {
			eventually(t, bootTime, "the workload serves", func() (bool, string) {
				p := ns.pod(t, "restart-rule")
				return isReady(p) && container(p, "app").RestartCount == int32(run), state(p)
			})
			c.answer(t, ns.forward(t, "pod/restart-rule", 8080), set, "/exit?code="+code)
		}
		eventually(t, bootTime, "the pod fails", func() (bool, string) {
			p := ns.pod(t, "restart-rule")
			return p.Status.Phase == corev1.PodFailed, state(p)
		})
		if app := container(ns.pod(t, "restart-rule"), "app"); app.State.Terminated.ExitCode != 3 || app.RestartCount != 1 {
			t.Errorf("ended with %+v, %d restarts", app.State.Terminated, app.RestartCount)
		}
	})
	t.Run("all containers restart", func(t *testing.T) {
		t.Parallel()
		set, _ := c.measure(t, all)
		serves := func(restarts int32) {
			t.Helper()
			eventually(t, bootTime, "the workload serves", func() (bool, string) {
				p := ns.pod(t, "restart-all")
				ok := isReady(p)
				for _, name := range []string{initbootContainer, sidecarContainer, "app"} {
					ok = ok && container(p, name).RestartCount == restarts
				}
				return ok, state(p)
			})
		}
		serves(0)
		c.answer(t, ns.forward(t, "pod/restart-all", 8080), set, "/exit?code=42")
		serves(1)
		if got := c.answer(t, ns.forward(t, "pod/restart-all", 8080), set, "/echo?again"); got != "again" {
			t.Errorf("answer %q", got)
		}
		ns.remove(t, "restart-all")
	})
	t.Run("a probe's own grace period", func(t *testing.T) {
		t.Parallel()
		set, _ := c.measure(t, short)
		ns.ready(t, "short-grace", 1)
		c.answer(t, ns.forward(t, "pod/short-grace", 8080), set, "/break/live")
		eventually(t, bootTime, "a restart", func() (bool, string) {
			p := ns.pod(t, "short-grace")
			return container(p, "app").RestartCount == 1 && isReady(p), state(p)
		})
		if last := container(ns.pod(t, "short-grace"), "app").LastTerminationState.Terminated; last != nil {
			t.Logf("the first run ended with %+v", last)
		}
		if err := ns.kube.CoreV1().Pods(ns.name).Delete(t.Context(), "short-grace", metav1.DeleteOptions{GracePeriodSeconds: &brief}); err != nil {
			t.Error(err)
		}
	})
}
