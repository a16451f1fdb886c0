package inject

import (
	"strings"
	"testing"
)

// FuzzFromYAML: no document makes it panic.
func FuzzFromYAML(f *testing.F) {
	f.Add([]byte("kind: List\nitems:\n- kind: Pod\n---\nkind: CronJob\n"))
	f.Fuzz(func(t *testing.T, docs []byte) {
		list, err := FromYAML(docs)
		if err != nil {
			return
		}
		for _, w := range list {
			Derive(&w.PodTemplate.ObjectMeta, &w.PodTemplate.Spec)
		}
	})
}

func TestFromYAML(t *testing.T) {
	list, err := FromYAML([]byte(`
apiVersion: v1
kind: Service
metadata: {name: web}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec: {template: {metadata: {annotations: {cloister.dev/enclave: a}}, spec: {containers: [{name: a}]}}}
---
# only a comment
---
apiVersion: v1
kind: List
items:
- {kind: Pod, metadata: {name: bare, labels: {x: z}}, spec: {containers: [{name: b}]}}
- {kind: CronJob, metadata: {name: nightly}, spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: c}]}}}}}}
`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, w := range list {
		got = append(got, w.Kind+"/"+w.Name+"/"+w.PodTemplate.Spec.Containers[0].Name)
	}
	if want := "Deployment/web/a Pod/bare/b CronJob/nightly/c"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if a := list[0].PodTemplate.Annotations["cloister.dev/enclave"]; a != "a" {
		t.Errorf("annotation %q", a)
	}
	if _, err := FromYAML([]byte("kind: Pod\nkind: Job\n")); err == nil {
		t.Error("a duplicate key passed")
	}
}
