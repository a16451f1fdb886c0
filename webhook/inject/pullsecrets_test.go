package inject

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
)

// TestPullSecretsAgain: a second pass follows the pod's pull secrets, which the API server adds from the
// service account to pods that were injected offline.
func TestPullSecretsAgain(t *testing.T) {
	secrets := func(names ...string) (list []corev1.LocalObjectReference) {
		for _, n := range names {
			list = append(list, corev1.LocalObjectReference{Name: n})
		}
		return list
	}
	for name, tc := range map[string]struct {
		pod    string
		change func(*corev1.PodSpec)
		ops    int
		denied string
	}{
		"nothing":             {pod: "image-pull-secrets", change: func(*corev1.PodSpec) {}},
		"name without a name": {pod: "deployment-as-written", change: func(s *corev1.PodSpec) { s.ImagePullSecrets = secrets("") }},
		"defaults": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) {
			mode := int32(420)
			volume(s, volumePullSecrets).Projected.DefaultMode = &mode
		}},
		"of the service account": {pod: "deployment-as-written", change: func(s *corev1.PodSpec) { s.ImagePullSecrets = secrets("a") }, ops: 2},
		"one more":               {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) { s.ImagePullSecrets = append(s.ImagePullSecrets, secrets("a")...) }, ops: 1},
		"others": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) {
			volume(s, volumePullSecrets).Projected.Sources[0].Secret.Name = "spy"
		}, ops: 1},
		"mount lost": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) {
			s.InitContainers[0].VolumeMounts = s.InitContainers[0].VolumeMounts[:3]
		}, ops: 1},
		"secrets lost": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) { s.ImagePullSecrets = nil }, denied: "volume cloister-pull-secrets is not what is injected"},
		"of the host": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) {
			volume(s, volumePullSecrets).VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{}}
		}, denied: "volume cloister-pull-secrets is not what is injected"},
		"mounted apart": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) { s.InitContainers[0].VolumeMounts[3].MountPath = "/x" }, denied: "spec.initContainers[0].volumeMounts[3]: Forbidden: it is not what is injected"},
		"given to others": {pod: "image-pull-secrets", change: func(s *corev1.PodSpec) {
			s.Containers = append(s.Containers, corev1.Container{Name: "spy", VolumeMounts: []corev1.VolumeMount{mountPullSecrets}})
		}, denied: "volume cloister-pull-secrets is only for what is injected"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injectedPod(t, tc.pod)
			tc.change(&pod.Spec)
			data, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			ops, _, errs := Patch(data, testOptions)
			if got := sentences(errs); (got == "") != (tc.denied == "") || !strings.Contains(got, tc.denied) || len(ops) != tc.ops {
				t.Errorf("operations %v, errors %q; want %d and %q", ops, got, tc.ops, tc.denied)
			}
			if tc.ops == 0 {
				return
			}
			var after corev1.Pod
			if err := decode(checkLaw(t, data, ops), &after); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(pullSecrets(&pod.Spec), volume(&after.Spec, volumePullSecrets)); diff != "" {
				t.Errorf("the volume (-want +got):\n%s", diff)
			}
		})
	}
}
