package inject

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// FuzzFromYAML: no document makes it panic.
func FuzzFromYAML(f *testing.F) {
	f.Add([]byte("kind: List\nitems:\n- kind: Pod\n---\nkind: CronJob\n"))
	f.Fuzz(func(t *testing.T, docs []byte) {
		list, err := FromYAML(docs)
		if err != nil {
			return
		}
		for _, d := range list {
			for _, found := range d.Templates {
				if typed, err := found.Decode(); err == nil {
					Derive(&typed.ObjectMeta, &typed.Spec)
				}
			}
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
- {kind: Job, metadata: {generateName: once-}, spec: {template: {spec: {containers: [{name: d}]}}}}
- {kind: CronJob, metadata: {name: nightly}, spec: {jobTemplate: {spec: {template: {spec: {containers: [{name: c}]}}}}}}
`))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, d := range list {
		for _, found := range d.Templates {
			typed, err := found.Decode()
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, fmt.Sprintf("%d %s/%s%s %s %q", i, found.Kind, found.Name, found.At, typed.Spec.Containers[0].Name, typed.Annotations))
		}
	}
	want := []string{
		`1 Deployment/web/spec/template a map["cloister.dev/enclave":"a"]`,
		`3 Pod/bare/items/0 b map[]`,
		`3 Job/once-/items/1/spec/template d map[]`,
		`3 CronJob/nightly/items/2/spec/jobTemplate/spec/template c map[]`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("templates (-want +got):\n%s", diff)
	}
	if text := string(list[2].Text); text != "# only a comment\n" {
		t.Errorf("the text of a document is %q", text)
	}
	if _, err := FromYAML([]byte("kind: Pod\nkind: Job\n")); err == nil {
		t.Error("a duplicate key passed")
	}
}
