package inject

import (
	"testing"

	"cloister.dev/cloister/webhook/inject/injecttest"
)

// TestVectors: pods as other projects write them are injected by the law, or denied with reasons, which
// `go test -v` shows.
func TestVectors(t *testing.T) {
	pods := injecttest.Vectors(t, "../..")
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
