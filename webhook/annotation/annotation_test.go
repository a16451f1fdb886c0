package annotation

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

func TestRead(t *testing.T) {
	for name, tc := range map[string]struct {
		annotations map[string]string
		want        []string // part of each error, in order
	}{
		"only the name":   {annotations: map[string]string{Enclave: "app", "example.com/x": "y"}},
		"all":             {annotations: map[string]string{Enclave: "app", Config: "{apiVersion: cloister.dev/v1alpha1, kind: EnclaveConfig}", Measurements: "{}"}},
		"typo":            {annotations: map[string]string{Prefix + "enclav": "app"}, want: []string{`did you mean "cloister.dev/enclave"?`, "name the container"}},
		"capitals":        {annotations: map[string]string{"Cloister.dev/Enclave": "app"}, want: []string{`did you mean "cloister.dev/enclave"?`, "name the container"}},
		"typo beside it":  {annotations: map[string]string{Enclave: "app", Prefix + "confg": ""}, want: []string{`did you mean "cloister.dev/config"?`}},
		"far from all":    {annotations: map[string]string{Enclave: "app", Prefix + "rev": "1"}, want: []string{"known are cloister.dev/enclave"}},
		"not a name":      {annotations: map[string]string{Enclave: "App "}, want: []string{"write the name of one container"}},
		"bad config":      {annotations: map[string]string{Enclave: "app", Config: "x"}, want: []string{"write a mapping"}},
		"sorted":          {annotations: map[string]string{Enclave: "app", Prefix + "z": "", Prefix + "a": ""}, want: []string{"cloister.dev/a]", "cloister.dev/z]"}},
		"without enclave": {annotations: map[string]string{Measurements: "{}"}, want: []string{"name the container"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, errs := Read(tc.annotations, field.NewPath("annotations"))
			if len(errs) != len(tc.want) {
				t.Fatalf("errors %v, want %q", errs, tc.want)
			}
			for i, want := range tc.want {
				if !strings.Contains(errs[i].Error(), want) {
					t.Errorf("error %q, want %q in it", errs[i], want)
				}
			}
		})
	}
}

func TestAny(t *testing.T) {
	for key, want := range map[string]bool{Enclave: true, Prefix + "x": true, "Cloister.DEV/enclave": true, "cloister.dev": false, "x.cloister.dev/enclave": false} {
		if got := Any(map[string]string{key: ""}); got != want {
			t.Errorf("Any(%q) = %v", key, got)
		}
	}
}
