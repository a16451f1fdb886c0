package e2e

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Whatever the author changes about the workload changes PCR16; what does not belong to it does not.
func TestMeasuredChanges(t *testing.T) {
	c := e2e(t)
	base := func() *corev1.Pod {
		pod := c.appPod(t, "app")
		pod.Spec.Containers[0].Command = []string{"/testapp", "serve"}
		pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "COLOR", Value: "green"}}
		return pod
	}
	_, before := c.measure(t, deployment(base(), 1))
	for name, tt := range map[string]struct {
		change  func(*corev1.Pod)
		changes bool
	}{
		"command":   {func(p *corev1.Pod) { p.Spec.Containers[0].Command = []string{"/testapp", "exit", "0"} }, true},
		"args":      {func(p *corev1.Pod) { p.Spec.Containers[0].Args = []string{"-after", "1s"} }, true},
		"env value": {func(p *corev1.Pod) { p.Spec.Containers[0].Env[0].Value = "blue" }, true},
		"image": {func(p *corev1.Pod) {
			p.Spec.Containers[0].Image = c.nginx
		}, true},
		"pod name":  {func(p *corev1.Pod) { p.Name = "other" }, false},
		"resources": {func(p *corev1.Pod) { delete(p.Spec.Containers[0].Resources.Requests, corev1.ResourceCPU) }, false},
		"a default": {func(p *corev1.Pod) { p.Spec.Containers[0].ImagePullPolicy = corev1.PullIfNotPresent }, false},
	} {
		t.Run(name, func(t *testing.T) {
			pod := base()
			tt.change(pod)
			_, after := c.measure(t, deployment(pod, 1))
			if changed := after.PCR16 != before.PCR16; changed != tt.changes {
				t.Errorf("PCR16 changed: %t, want %t", changed, tt.changes)
			}
			if after.PCR0 != before.PCR0 {
				t.Error("PCR0 changed, but the EIF is the same")
			}
		})
	}
}

// Each replica attests what `cloister measure` says of the Deployment. In the middle of a rollout the
// old set refuses the new replica, the new one refuses the old, and a set with both takes both.
func TestMeasuredReplicas(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "COLOR", Value: "green"}}
	d := deployment(pod, 2)
	// One more pod comes, and none goes while the new one is not old enough: the rollout stands still.
	d.Spec.MinReadySeconds = 3600
	d.Spec.ProgressDeadlineSeconds = new(int32(7200))
	d.Spec.Strategy.RollingUpdate = nil
	set1, entry1 := c.measure(t, d)
	ns.create(t, d)
	first := ns.ready(t, "app", 2)
	for _, p := range first {
		if got := c.answer(t, ns.forward(t, "pod/"+p.Name, 8080), set1, "/env?name=COLOR"); got != "green" {
			t.Errorf("%s answers %q", p.Name, got)
		}
	}

	live, err := c.kube.AppsV1().Deployments(ns.name).Get(t.Context(), "app", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	live.Spec.Template.Spec.Containers[0].Env[0].Value = "blue"
	live.Spec.Strategy.RollingUpdate.MaxSurge = new(intstr.FromInt(1))
	live.Spec.Strategy.RollingUpdate.MaxUnavailable = new(intstr.FromInt(0))
	if _, err := c.kube.AppsV1().Deployments(ns.name).Update(t.Context(), live, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	d.Spec.Template.Spec.Containers[0].Env[0].Value = "blue"
	set2, entry2 := c.measure(t, d)
	entry1.Label, entry2.Label = "green", "blue"
	both := setFile(t, entry1, entry2)

	all := ns.ready(t, "app", 3)
	for _, p := range all {
		old := slices.ContainsFunc(first, func(f corev1.Pod) bool { return f.Name == p.Name })
		color, accepted, refused := "blue", set2, set1
		if old {
			color, accepted, refused = "green", set1, set2
		}
		addr := ns.forward(t, "pod/"+p.Name, 8080)
		for _, set := range []string{accepted, both} {
			if got := c.answer(t, addr, set, "/env?name=COLOR"); got != color {
				t.Errorf("%s answers %q, want %q", p.Name, got, color)
			}
		}
		if r := c.curl(t, addr, refused, "/env?name=COLOR"); r.code != 1 || r.stdout != "" {
			t.Errorf("%s (%s) with the other set: exit code %d, stdout %q", p.Name, color, r.code, r.stdout)
		}
	}
}
