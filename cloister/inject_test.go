package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/webhook/inject/injecttest"
)

// Images of the goldens in webhook/inject.
const (
	initbootImage = "cloister.dev/initboot@sha256:1111111111111111111111111111111111111111111111111111111111111111"
	sidecarImage  = "cloister.dev/sidecar@sha256:2222222222222222222222222222222222222222222222222222222222222222"
)

func callInject(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	return call(t, stdin, append([]string{"inject", "--initboot-image", initbootImage, "--sidecar-image", sidecarImage}, args...)...)
}

var installation = inject.Options{Driver: inject.DriverProcess, InitbootImage: initbootImage, SidecarImage: sidecarImage}

// injectAs injects as an installation does, in a namespace, with injecttest.ResolveTag in place of registries.
func injectAs(t *testing.T, options inject.Options, stdin string, output string) result {
	t.Helper()
	var out, errs bytes.Buffer
	i := injection{file: "-", output: output, options: options}
	if err := i.run(t.Context(), injecttest.ResolveTag, strings.NewReader(stdin), &out, &errs); err != nil {
		fmt.Fprintln(&errs, err)
		return result{1, out.String(), errs.String()}
	}
	return result{0, out.String(), errs.String()}
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wrapped puts a pod into the template of a Deployment, in a List.
func wrapped(t *testing.T, pod string) string {
	t.Helper()
	var p map[string]any
	if err := yaml.Unmarshal([]byte(pod), &p); err != nil {
		t.Fatal(err)
	}
	template := map[string]any{"metadata": p["metadata"], "spec": p["spec"]}
	b, err := yaml.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": []any{
		map[string]any{"apiVersion": "v1", "kind": "ConfigMap"},
		map[string]any{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": map[string]any{"name": "web"}, "spec": map[string]any{"template": template, "fieldOfTomorrow": 1}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestInjectGolden runs the webhook's goldens through the command: as a pod, as a patch, and as the
// template of a Deployment.
func TestInjectGolden(t *testing.T) {
	inputs, err := filepath.Glob("../webhook/inject/testdata/*/input.yaml")
	if err != nil || len(inputs) < 20 {
		t.Fatalf("%d cases found, %v", len(inputs), err)
	}
	for _, input := range inputs {
		dir := filepath.Dir(input)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			pod, options := read(t, input), injecttest.Options(t, dir, installation)
			got := injectAs(t, options, pod, outputYAML)
			if denied, err := os.ReadFile(filepath.Join(dir, "denied.txt")); err == nil {
				got.want(t, 1, strings.Split(strings.TrimSpace(string(denied)), "\n")...)
				if got.stdout != "" {
					t.Errorf("stdout is %q", got.stdout)
				}
				if lines := strings.Count(got.stderr, "\n"); lines != strings.Count(string(denied), "\n")+1 {
					t.Errorf("%d lines on stderr:\n%s", lines, got.stderr)
				}
				return
			}
			var warnings []string
			want := read(t, filepath.Join(dir, "want.yaml"))
			for strings.HasPrefix(want, "# ") {
				var w string
				w, want, _ = strings.Cut(strings.TrimPrefix(want, "# "), "\n")
				warnings = append(warnings, w)
			}
			got.want(t, 0, warnings...)
			if len(warnings) == 0 { // left alone: as it was written
				want = pod
			}
			if diff := cmp.Diff(want, got.stdout); diff != "" {
				t.Errorf("-o yaml (-want +got):\n%s", diff)
			}

			patch := injectAs(t, options, pod, outputPatch).stdout
			object, err := yaml.YAMLToJSON([]byte(pod))
			if err != nil {
				t.Fatal(err)
			}
			ops, _, _ := inject.PatchTagged(t.Context(), object, options, injecttest.ResolveTag)
			if ops == nil {
				ops = []inject.Op{}
			}
			b, err := json.Marshal(ops)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(b)+"\n", patch); diff != "" {
				t.Errorf("-o patch (-want +got):\n%s", diff)
			}

			list := wrapped(t, pod)
			injected := injectAs(t, options, list, outputYAML)
			injected.want(t, 0, warnings...)
			var have struct {
				Items []struct {
					Spec struct {
						Template        map[string]any `json:"template"`
						FieldOfTomorrow int            `json:"fieldOfTomorrow"`
					} `json:"spec"`
				} `json:"items"`
			}
			if err := yaml.Unmarshal([]byte(injected.stdout), &have); err != nil {
				t.Fatal(err)
			}
			var alone map[string]any
			if err := yaml.Unmarshal([]byte(want), &alone); err != nil {
				t.Fatal(err)
			}
			spec := have.Items[1].Spec
			if diff := cmp.Diff(map[string]any{"metadata": alone["metadata"], "spec": alone["spec"]}, spec.Template); diff != "" || spec.FieldOfTomorrow != 1 {
				t.Errorf("in a Deployment in a List (-want +got):\n%s", diff)
			}
			// The patch is one of the document that it was made from.
			applied(t, list, injectAs(t, options, list, outputPatch).stdout, injected.stdout)
			if again := injectAs(t, options, injected.stdout, outputYAML); again.code != 0 || again.stdout != injected.stdout || again.stderr != "" {
				t.Errorf("the second pass is not empty: %q\n%s", again.stderr, cmp.Diff(injected.stdout, again.stdout))
			}
		})
	}
}

// applied fails the test unless a patch makes want of a document.
func applied(t *testing.T, document, patch, want string) {
	t.Helper()
	before, err := yaml.YAMLToJSON([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	p, err := jsonpatch.DecodePatch([]byte(patch))
	if err != nil {
		t.Fatal(err)
	}
	after, err := p.Apply(before)
	if err != nil {
		t.Fatal(err)
	}
	if after, err = yaml.JSONToYAML(after); err != nil {
		t.Fatal(err)
	}
	var a, b any
	if err := yaml.Unmarshal(after, &a); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(want), &b); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b, a); diff != "" {
		t.Errorf("the patch gives another document (-want +got):\n%s", diff)
	}
}

// TestInjectDocuments: what is not injected stays as it was written, and one that is denied denies all.
func TestInjectDocuments(t *testing.T) {
	const comment = "# about the service\napiVersion: v1\nkind: Service # kept\nmetadata: {name: web}\n"
	stream := "---\n" + comment + "---\n" + deployment + "---\n# nothing\n---\nkind: Unknown\nspec: {template: 7}"
	r := callInject(t, stream, "-f", "-")
	r.want(t, 0, "-: Deployment web: Warning: the host can read")
	docs := strings.Split(strings.TrimPrefix(r.stdout, "---\n"), "---\n")
	if len(docs) != 4 || docs[0] != comment || docs[2] != "# nothing\n" || docs[3] != "kind: Unknown\nspec: {template: 7}\n" {
		t.Errorf("documents %q", docs)
	}
	if !strings.Contains(docs[1], "name: cloister-initboot") {
		t.Errorf("the Deployment was not injected:\n%s", docs[1])
	}
	// PCR16 is that of the raw file.
	image, _ := writeBase(t, eif.X86_64)
	measured := call(t, deployment, "measure", "--eif", image, "-f", "-")
	measured.want(t, 0)
	_, pcr, _ := strings.Cut(strings.TrimSpace(measured.stdout), `"PCR16":"`)
	if pcr = pcr[:96]; !strings.Contains(docs[1], pcr) {
		t.Errorf("PCR16 is not %s", pcr)
	}

	lines := strings.Split(callInject(t, stream, "-f", "-", "-o", "patch").stdout, "\n")
	if len(lines) != 4 || lines[0] != "[]" || !strings.HasPrefix(lines[1], `[{"op":"add","path":"/spec/template/metadata/annotations/cloister.dev~1measurements"`) || lines[2] != "[]" {
		t.Errorf("patches %q", lines)
	}

	r = callInject(t, deployment+"---\n"+bad, "-f", "-", "--pin", "never")
	r.want(t, 1, "-: Pod broken: ImageRefused: spec.containers[0].image: Invalid value", "nothing was injected")
	if r.stdout != "" {
		t.Errorf("stdout is %q", r.stdout)
	}
}

func TestInjectRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		args []string
		code int
		want string
	}{
		"no file":      {nil, 2, "with -f"},
		"no such file": {[]string{"-f", "/nonexistent"}, 1, "no such file"},
		"output":       {[]string{"-f", "-", "-o", "json"}, 2, "write yaml or patch"},
		"driver":       {[]string{"-f", "-", "--driver", "firecracker"}, 2, `there is no driver "firecracker"`},
		"huge pages":   {[]string{"-f", "-", "--driver", "nitro", "--hugepages", "4Ki"}, 2, "set HUGEPAGES to 2Mi or 1Gi"},
		"device group": {[]string{"-f", "-", "--driver", "nitro", "--device-group", "ne"}, 2, `DEVICE_GROUP is "ne"`},
		"initboot":     {[]string{"-f", "-", "--initboot-image", ""}, 2, "--initboot-image"},
		"sidecar":      {[]string{"-f", "-", "--sidecar-image", ""}, 2, "--sidecar-image"},
		"pin":          {[]string{"-f", "-", "--pin", "always"}, 2, "write resolve or never"},
		"no YAML":      {[]string{"-f", "-"}, 1, "read YAML document 1"},
		"no object":    {[]string{"-f", "-"}, 1, "read YAML document 1"},
	} {
		t.Run(name, func(t *testing.T) {
			stdin := "a: ["
			if name == "no object" {
				stdin = "7"
			}
			r := callInject(t, stdin, tt.args...)
			r.want(t, tt.code, tt.want)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
}
