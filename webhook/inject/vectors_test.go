package inject

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/webhook/annotation"
)

// vectorPods returns pods of other projects, once for each of their containers: with our annotation on it
// and its image by digest. They are no part of the repository.
func vectorPods(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("../../../shared/vectors/pods/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	pods := map[string][]byte{}
	for _, file := range files {
		raw := readPod(t, file)
		var head corev1.Pod
		if err := decode(raw, &head); err != nil {
			t.Fatal(err)
		}
		for i, c := range head.Spec.Containers {
			var pod map[string]any
			if err := json.Unmarshal(raw, &pod); err != nil {
				t.Fatal(err)
			}
			meta := pod["metadata"].(map[string]any)
			annotations, _ := meta["annotations"].(map[string]any)
			if annotations == nil {
				annotations = map[string]any{}
				meta["annotations"] = annotations
			}
			annotations[annotation.Enclave] = c.Name
			image, _, _ := strings.Cut(c.Image, "@")
			pod["spec"].(map[string]any)["containers"].([]any)[i].(map[string]any)["image"] = image + "@sha256:" + strings.Repeat("ab", 32)
			b, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			pods[strings.TrimSuffix(filepath.Base(file), ".yaml")+"/"+c.Name] = b
		}
	}
	return pods
}

// TestVectors: pods as other projects write them are injected by the law, or denied with reasons, which
// `go test -v` shows.
func TestVectors(t *testing.T) {
	pods := vectorPods(t)
	if len(pods) == 0 {
		t.Skip("the pods of other projects, ../shared/vectors/pods beside this repository, are not there")
	}
	injected := 0
	for name, pod := range pods {
		t.Run(name, func(t *testing.T) {
			ops, _, errs := Patch(pod, testOptions)
			if len(errs) > 0 {
				t.Logf("denied:\n%s", sentences(errs))
				return
			}
			injected++
			checkLaw(t, pod, ops)
		})
	}
	if injected == 0 {
		t.Error("none was injected")
	}
}
