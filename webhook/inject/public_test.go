package inject

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
)

// TestPublicPods holds the law on pods of public projects: each container in turn runs in an enclave. A
// denial must name a reason for a field that is there.
func TestPublicPods(t *testing.T) {
	files, err := filepath.Glob("../../../shared/vectors/pods/*.yaml")
	if err != nil || len(files) == 0 {
		t.Skip("the pods of public projects are not on this machine")
	}
	injected := 0
	for _, file := range files {
		pod := readPod(t, file)
		var p map[string]any
		if err := json.Unmarshal(pod, &p); err != nil {
			t.Fatal(err)
		}
		spec, ok := p["spec"].(map[string]any)
		if !ok {
			continue
		}
		containers, _ := spec["containers"].([]any)
		for _, c := range containers {
			c := c.(map[string]any)
			t.Run(filepath.Base(file)+"/"+c["name"].(string), func(t *testing.T) {
				image, _ := c["image"].(string)
				if !strings.Contains(image, "@") {
					c["image"] = image + "@sha256:" + strings.Repeat("ab", 32)
				}
				meta := p["metadata"].(map[string]any)
				annotations, _ := meta["annotations"].(map[string]any)
				if annotations == nil {
					annotations = map[string]any{}
				}
				annotations["cloister.dev/enclave"] = c["name"]
				meta["annotations"] = annotations
				data, err := json.Marshal(p)
				if err != nil {
					t.Fatal(err)
				}
				ops, _, errs := Patch(data, testOptions)
				if len(errs) > 0 {
					t.Log(sentences(errs))
					return
				}
				injected++
				checkLaw(t, data, ops)
			})
		}
	}
	if injected == 0 {
		t.Error("not one of them was injected")
	}
}
