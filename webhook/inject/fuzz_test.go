package inject

import (
	"encoding/json"
	"path/filepath"
	"testing"

	"cloister.dev/cloister/webhook/inject/injecttest"
)

// FuzzPatch: whatever pod comes, Patch does not panic, its patch applies, and the second pass is empty.
func FuzzPatch(f *testing.F) {
	inputs, err := filepath.Glob("testdata/*/input.yaml")
	if err != nil || len(inputs) == 0 {
		f.Fatal(err, "no cases")
	}
	for _, input := range inputs {
		f.Add(readPod(f, input))
	}
	for _, pod := range injecttest.Vectors(f, "../..") {
		f.Add(pod)
	}
	f.Fuzz(func(t *testing.T, pod []byte) {
		// The API server sends what it has encoded itself, without duplicate keys.
		var any map[string]any
		if json.Unmarshal(pod, &any) != nil {
			t.Skip()
		}
		pod, err := json.Marshal(any)
		if err != nil {
			t.Skip()
		}
		ops, _, errs := Patch(pod, testOptions)
		if len(errs) > 0 {
			if len(ops) > 0 {
				t.Error("a denied pod has a patch")
			}
			return
		}
		if len(ops) > 0 {
			checkLaw(t, pod, ops)
		}
	})
}
