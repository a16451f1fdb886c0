package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// A pod that does not ask for an enclave, and one in a namespace that does not allow it, are created
// as they were submitted.
func TestLeftAlone(t *testing.T) {
	c := e2e(t)
	labelled, unlabelled := c.namespace(t, true), c.namespace(t, false)
	plain := c.appPod(t, "plain")
	plain.Annotations = map[string]string{"example.com/note": "not ours"}
	annotated := c.appPod(t, "annotated")

	reference := submit(t, unlabelled, plain)
	for name, tt := range map[string]struct {
		ns  *namespace
		pod *corev1.Pod
	}{
		"without annotation":        {labelled, plain},
		"in a namespace unlabelled": {unlabelled, annotated},
	} {
		t.Run(name, func(t *testing.T) {
			got := submit(t, tt.ns, tt.pod)
			if d := cmp.Diff(reference.Spec, got.Spec); d != "" {
				t.Errorf("the spec is not that of a pod that no webhook has seen (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.pod.Annotations, got.Annotations); d != "" {
				t.Errorf("annotations (-want +got):\n%s", d)
			}
			if d := cmp.Diff(tt.pod.Labels, got.Labels); d != "" {
				t.Errorf("labels (-want +got):\n%s", d)
			}
			if err := within(t, tt.pod.Spec, got.Spec); err != nil {
				t.Errorf("what was submitted is not there any more: %v", err)
			}
		})
	}

	// The comparison can fail: in a labelled namespace the annotated pod is another.
	if got := submit(t, labelled, annotated); cmp.Equal(reference.Spec, got.Spec) || within(t, annotated.Spec, got.Spec) == nil {
		t.Error("the annotated pod in a labelled namespace was left alone")
	}
}

// submit has the API server admit a pod, without making it.
func submit(t *testing.T, ns *namespace, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	got, err := ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// within reports what of a is not in b, in their JSON forms. The API server may add fields, but
// nothing to a list.
func within(t *testing.T, a, b any) error {
	t.Helper()
	return contains("", fields(t, a), fields(t, b))
}

func fields(t *testing.T, object any) (out map[string]any) {
	t.Helper()
	b, err := json.Marshal(object)
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func contains(path string, a, b any) error {
	switch a := a.(type) {
	case map[string]any:
		b, _ := b.(map[string]any)
		for k, v := range a {
			if err := contains(path+"."+k, v, b[k]); err != nil {
				return err
			}
		}
		return nil
	case []any:
		b, _ := b.([]any)
		if len(a) != len(b) {
			return fmt.Errorf("%s has %d elements, had %d", path, len(b), len(a))
		}
		for i, v := range a {
			if err := contains(fmt.Sprintf("%s[%d]", path, i), v, b[i]); err != nil {
				return err
			}
		}
		return nil
	}
	if !cmp.Equal(a, b) {
		return fmt.Errorf("%s is %v, was %v", path, b, a)
	}
	return nil
}

// What cannot be honoured is denied, every reason at once, each with a sentence.
func TestDenied(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	app := func(p *corev1.Pod) *corev1.Container { return &p.Spec.Containers[0] }
	mount := func(p *corev1.Pod, source corev1.VolumeSource) {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "data", VolumeSource: source})
		app(p).VolumeMounts = append(app(p).VolumeMounts, corev1.VolumeMount{Name: "data", MountPath: "/data"})
	}
	claim := corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data"}}
	preload := corev1.EnvVar{Name: "LD_PRELOAD", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "spec.nodeName"}}}
	tag := func(p *corev1.Pod) { app(p).Image = registryHost + "/testapp:e2e@sha256:short" }
	config := func(p *corev1.Pod, line string) {
		p.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n" + line + "\n"
	}

	for name, tt := range map[string]struct {
		change func(*corev1.Pod)
		want   []string // each in the answer
	}{
		"every reason at once": {func(p *corev1.Pod) {
			mount(p, claim)
			p.Annotations["cloister.dev/enclav"] = "app"
			tag(p)
			app(p).Env = []corev1.EnvVar{preload}
			config(p, "hostFiles: [/nowhere]")
			p.Spec.HostNetwork = true
		}, []string{"persistent volume claim", `cloister.dev/enclav`, "did you mean", "digest", "LD_PRELOAD", "hostFiles", "hostNetwork"}},
		"PVC":               {func(p *corev1.Pod) { mount(p, claim) }, []string{"persistent volume claim"}},
		"misspelt":          {func(p *corev1.Pod) { p.Annotations = map[string]string{"cloister.dev/enclav": "app"} }, []string{"cloister.dev/enclav", `did you mean "cloister.dev/enclave"`}},
		"missing container": {func(p *corev1.Pod) { p.Annotations["cloister.dev/enclave"] = "ap" }, []string{"cloister.dev/enclave", `"ap"`}},
		"only config":       {func(p *corev1.Pod) { config(p, "cpus: 2"); delete(p.Annotations, "cloister.dev/enclave") }, []string{"cloister.dev/enclave"}},
		"half a digest":     {tag, []string{"digest"}},
		"LD_PRELOAD":        {func(p *corev1.Pod) { app(p).Env = []corev1.EnvVar{preload} }, []string{"env LD_PRELOAD cannot be supplied by the host", "hostEnv"}},
		"hostPath": {func(p *corev1.Pod) {
			mount(p, corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}})
		}, []string{"hostPath"}},
		"Secret over the system's": {func(p *corev1.Pod) {
			mount(p, corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "s"}})
			app(p).VolumeMounts[0].MountPath = "/etc/ssl/certs"
		}, []string{"/etc/ssl/certs belongs to the system"}},
		"shared emptyDir": {func(p *corev1.Pod) {
			mount(p, corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}})
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "other", Image: "other", VolumeMounts: app(p).VolumeMounts})
		}, []string{"emptyDir data is shared with container other", "list /data in hostFiles"}},
		"host PID namespace": {func(p *corev1.Pod) { p.Spec.HostPID = true }, []string{"hostPID"}},
		"hook by TCP": {func(p *corev1.Pod) {
			app(p).Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt(8080)}}}
		}, []string{"preStop.tcpSocket"}},
		"terminal": {func(p *corev1.Pod) { app(p).TTY = true }, []string{"tty"}},
		"a pod too small": {func(p *corev1.Pod) {
			p.Spec.Resources = &corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")}}
		}, []string{"spec.resources.limits[memory]"}},
		"our port":        {func(p *corev1.Pod) { app(p).Ports[0].ContainerPort = 14021 }, []string{"14021"}},
		"UDP":             {func(p *corev1.Pod) { app(p).Ports[0].Protocol = corev1.ProtocolUDP }, []string{"only TCP"}},
		"privileged":      {func(p *corev1.Pod) { app(p).SecurityContext = &corev1.SecurityContext{Privileged: new(true)} }, []string{"privileged"}},
		"not built yet":   {func(p *corev1.Pod) { config(p, "debug: true") }, []string{"debug", "not built yet"}},
		"misspelt config": {func(p *corev1.Pod) { config(p, "memmory: 1Gi") }, []string{"memmory", `did you mean "memory"`}},
	} {
		t.Run(name, func(t *testing.T) {
			pod := c.appPod(t, "denied")
			tt.change(pod)
			_, err := c.kube.CoreV1().Pods(ns.name).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err == nil {
				t.Fatal("it was admitted")
			}
			if !strings.Contains(err.Error(), "denied the request") {
				t.Errorf("it was not the webhook that denied it: %v", err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the answer lacks %q: %v", want, err)
				}
			}
		})
	}
}
