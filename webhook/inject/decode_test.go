package inject

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/webhook/inject/injecttest"
)

// TestMentionsUs: only a pod that cannot have an annotation or a container of ours is passed over unread.
func TestMentionsUs(t *testing.T) {
	for pod, want := range map[string]bool{
		`{}`: false,
		`{"metadata":{"annotations":{"example.org/x":"y"}}}`:              false,
		`{"metadata":{"annotations":{"cloister.dev/enclave":"a"}}}`:       true,
		`{"metadata":{"annotations":{"CLOISTER.dev/x":""}}}`:              true,
		`{"metadata":{"annotations":{"\u0063loister.dev/enclave":"a"}}}`:  true,
		`{"metadata":{"annotations":{"clo\u0069ster.dev\/enclave":"a"}}}`: true,
		`{"spec":{"initContainers":[{"name":"cloister-initboot"}]}}`:      true,
		`cloiste`: false,
	} {
		if got := mentionsUs([]byte(pod)); got != want {
			t.Errorf("%s: %v", pod, got)
		}
	}
	for _, key := range []string{`cloister.dev/enclave`, `\u0063loister.dev/enclave`, `Cloister.dev\/x`, `cl\u006Fister.dev/x`} {
		if ops, _, errs := Patch(fmt.Appendf(nil, `{"metadata":{"annotations":{"%s":"a"}},"spec":{}}`, key), testOptions); len(errs) == 0 {
			t.Errorf("an annotation written %s passes, with %v", key, ops)
		}
	}
}

// TestOneUnknownField: a pod with a field that this version does not know becomes what it would without, and the field
// survives. What is written from the decoded pod and what is taken over as it stands must not differ.
func TestOneUnknownField(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*/input.yaml")
	if err != nil || len(inputs) < 20 {
		t.Fatalf("%d cases found, %v", len(inputs), err)
	}
	const future = "aFieldOfAnotherVersion"
	for _, input := range inputs {
		t.Run(filepath.Base(filepath.Dir(input)), func(t *testing.T) {
			pod := readPod(t, input)
			ops, _, errs := PatchTagged(t.Context(), pod, testOptions, injecttest.ResolveTag)
			if len(errs) > 0 || len(ops) == 0 {
				t.Skip("it is not injected")
			}
			with := change(t, pod, func(c map[string]any) { c[future] = map[string]any{"n": 1.0} })
			opsWith, _, errs := PatchTagged(t.Context(), with, testOptions, injecttest.ResolveTag)
			if len(errs) > 0 {
				t.Fatal(sentences(errs))
			}
			after := change(t, apply(t, with, opsWith), func(c map[string]any) {
				if c[future] == nil && c["name"] != Initboot && c["name"] != Sidecar {
					t.Errorf("container %v has lost it", c["name"])
				}
				delete(c, future)
			})
			if diff := cmp.Diff(decoded(t, apply(t, pod, ops)), decoded(t, after)); diff != "" {
				t.Errorf("(-without +with):\n%s", diff)
			}
		})
	}
}

// TestAtOnce: what all patches share is only read. The race detector sees a write.
func TestAtOnce(t *testing.T) {
	pod := readPod(t, "testdata/everything-that-is-carried/input.yaml")
	for _, driver := range []Options{testOptions, {Driver: DriverNitro, HugePages: "2Mi", DeviceGroup: 7, InitbootImage: "a", SidecarImage: "b"}} {
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				ops, _, errs := Patch(pod, driver)
				if _, err := json.Marshal(ops); err != nil || len(errs) > 0 {
					t.Error(err, sentences(errs))
				}
			})
		}
		group.Wait()
	}
}

func decoded(t *testing.T, data []byte) (v map[string]any) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// change changes each of spec.containers.
func change(t *testing.T, pod []byte, f func(container map[string]any)) []byte {
	t.Helper()
	v := decoded(t, pod)
	for _, c := range v["spec"].(map[string]any)["containers"].([]any) {
		f(c.(map[string]any))
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestManyUnknownFields: a field of a probe or hook is found behind more unknown fields than a decoder lists.
func TestManyUnknownFields(t *testing.T) {
	pod := readPod(t, "testdata/hooks-and-stop-signal/input.yaml")
	for _, action := range []string{"startupProbe", "livenessProbe", "readinessProbe", "lifecycle"} {
		for _, many := range []int{0, 99, 100, 200} {
			of := change(t, pod, func(c map[string]any) {
				for i := range many {
					c[fmt.Sprintf("aField%d", i)] = 1.0 // before all others, as Go writes objects
				}
				known := map[string]any{"exec": map[string]any{"command": []any{"true"}}}
				if action == "lifecycle" {
					known = map[string]any{"preStop": known}
				}
				known["aFieldOfAnotherVersion"] = 1.0
				c[action] = known
			})
			_, _, errs := Patch(of, testOptions)
			if len(errs) != 1 || !strings.Contains(errs[0].Detail, `unknown field "`+action+`.aFieldOfAnotherVersion"`) {
				t.Errorf("%s behind %d others: %v", action, many, errs)
			}
		}
	}
}
