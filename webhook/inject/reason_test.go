package inject

import (
	"path/filepath"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

func TestReasonOf(t *testing.T) {
	for path, want := range map[string]Reason{
		"pod": Unreadable,
		"metadata.annotations[cloister.dev/config].memory": ConfigRefused,
		"metadata.annotations[cloister.dev/config]":        ConfigRefused,
		"metadata.annotations[cloister.dev/measurements]":  MeasurementsForged,
		"metadata.annotations[cloister.dev/enclav]":        AnnotationRefused,
		"spec.containers[0].image":                         ImageRefused,
		"spec.imagePullSecrets":                            ImageRefused,
		"spec.containers[0].env[3].valueFrom":              EnvironmentRefused,
		"spec.initContainers[0].env[CLOISTER_MANIFEST]":    EnvironmentRefused,
		"spec.containers[0].envFrom[0]":                    EnvironmentRefused,
		"spec.containers[0].volumeMounts[1]":               VolumeRefused,
		"spec.volumes":                                     VolumeRefused,
		"spec.containers[0].ports[0].containerPort":        PortRefused,
		"spec.containers[0].livenessProbe.tcpSocket":       ProbeOrHookRefused,
		"spec.containers[0].lifecycle.preStop":             ProbeOrHookRefused,
		"spec.containers[0].securityContext.privileged":    SecurityRefused,
		"spec.securityContext.sysctls[0]":                  SecurityRefused,
		"spec.resources":                                   ResourcesRefused,
		"spec.containers[0].name":                          ContainerRefused,
		"metadata.namespace":                               LevelRefused,
		"spec.hostNetwork":                                 PodRefused,
		"spec.nodeSelector[kubernetes.io/os]":              PodRefused,
	} {
		got, sentence := ReasonOf(&field.Error{Field: path})
		if got != want || sentence == "" {
			t.Errorf("%s: %s %q, want %s", path, got, sentence, want)
		}
	}
}

// TestReasonsAreUsed: each row of the table is of use.
func TestReasonsAreUsed(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*/denied.txt")
	if err != nil || len(inputs) == 0 {
		t.Fatal(inputs, err)
	}
	var seen []Reason
	for _, name := range inputs {
		dir := filepath.Dir(name)
		_, _, errs := Patch(readPod(t, filepath.Join(dir, "input.yaml")), caseOptions(t, dir))
		for _, e := range errs {
			r, _ := ReasonOf(e)
			seen = append(seen, r)
		}
	}
	for _, r := range reasons {
		if r.reason != Unreadable && !slices.Contains(seen, r.reason) {
			t.Errorf("no golden is denied for %s", r.reason)
		}
	}
}
