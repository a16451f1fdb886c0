package inject

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/inject/injecttest"
	"cloister.dev/cloister/workload"
)

var update = flag.Bool("update", false, "rewrite testdata/*/{want.yaml,denied.txt}")

var testOptions = Options{
	Driver:        DriverProcess,
	InitbootImage: "cloister.dev/initboot@sha256:1111111111111111111111111111111111111111111111111111111111111111",
	SidecarImage:  "cloister.dev/sidecar@sha256:2222222222222222222222222222222222222222222222222222222222222222",
}

// apply returns the pod after the patch.
func apply(t *testing.T, pod []byte, ops []Op) []byte {
	t.Helper()
	data, err := json.Marshal(ops)
	if err != nil {
		t.Fatal(err)
	}
	p, err := jsonpatch.DecodePatch(data)
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.Apply(pod)
	if err != nil {
		t.Fatalf("the patch does not apply: %v\n%s", err, data)
	}
	return out
}

// checkLaw applies the patch of a pod and checks the law of this package: only additions outside of the
// console, and nothing to do in a second pass. It returns the pod after the patch.
func checkLaw(t *testing.T, pod []byte, ops []Op) []byte {
	t.Helper()
	return checkLawOf(t, testOptions, pod, ops)
}

// checkLawOf is checkLaw for another installation or namespace.
func checkLawOf(t *testing.T, opts Options, pod []byte, ops []Op) []byte {
	t.Helper()
	var index int
	for _, o := range ops {
		if _, err := fmt.Sscanf(o.Path, "/spec/containers/%d/", &index); err != nil && o.Op != "add" {
			t.Errorf("%s %s: only the console may lose something", o.Op, o.Path)
		}
	}
	out := apply(t, pod, ops)
	again, warnings, errs := Patch(out, opts)
	if len(errs) > 0 || len(again) > 0 || len(warnings) > 0 {
		t.Errorf("the second pass is not empty: %v, %q, %v", again, warnings, errs)
	}
	return out
}

func sentences(errs field.ErrorList) string {
	var b strings.Builder
	for _, e := range errs {
		fmt.Fprintln(&b, e.Error())
	}
	return b.String()
}

// caseOptions are testOptions with what testdata/<case>/options.yaml says.
func caseOptions(t testing.TB, dir string) Options {
	t.Helper()
	opts := injecttest.Options(t, dir, testOptions)
	if err := opts.Check(); err != nil {
		t.Fatal(err)
	}
	return opts
}

// TestGolden runs each testdata/<case>/input.yaml, a pod, through a first pass. A pod that is denied has
// its reasons in denied.txt, the others their warnings and the whole pod in want.yaml.
func TestGolden(t *testing.T) {
	inputs, err := filepath.Glob("testdata/*/input.yaml")
	if err != nil || len(inputs) < 20 {
		t.Fatalf("%d cases found, %v", len(inputs), err)
	}
	for _, input := range inputs {
		dir := filepath.Dir(input)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			pod, opts := readPod(t, input), caseOptions(t, dir)
			ops, warnings, errs := PatchTagged(t.Context(), pod, opts, injecttest.ResolveTag)
			if len(errs) > 0 {
				golden(t, dir, "denied.txt", "want.yaml", sentences(errs))
				return
			}
			for _, w := range warnings {
				if len(w) > 120 {
					t.Errorf("warning of %d bytes: %s", len(w), w)
				}
			}
			out, err := yaml.JSONToYAML(checkLawOf(t, opts, pod, ops))
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, w := range warnings {
				fmt.Fprintln(&b, "# Warning:", w)
			}
			golden(t, dir, "want.yaml", "denied.txt", b.String()+string(out))
		})
	}
}

func readPod(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func golden(t *testing.T, dir, name, other, got string) {
	t.Helper()
	file := filepath.Join(dir, name)
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(filepath.Join(dir, other)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v; the pod gave:\n%s", err, got)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs (-want +got), `go test ./webhook/inject -update` rewrites it:\n%s", file, diff)
	}
}

// derive returns the canonical manifest of a pod.
func derive(t *testing.T, pod []byte) string {
	t.Helper()
	var p corev1.Pod
	if err := decode(pod, &p); err != nil {
		t.Fatal(err)
	}
	m, _, _, errs := Derive(&p.ObjectMeta, &p.Spec)
	if len(errs) > 0 {
		t.Fatal(sentences(errs))
	}
	c, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	return string(c)
}

// TestReplicasAreEqual holds pods that differ only by what a cluster adds against the author's YAML.
func TestReplicasAreEqual(t *testing.T) {
	for want, same := range map[string][]string{
		"deployment-as-written":          {"deployment-completed-by-the-api-server", "eks-pod-identity-before-us", "limit-range", "istio-before-us", "linkerd-before-us", "image-pull-secrets"},
		"host-supplied-files-as-written": {"host-supplied-files"},
	} {
		raw := derive(t, readPod(t, filepath.Join("testdata", want, "input.yaml")))
		for _, s := range same {
			t.Run(s, func(t *testing.T) {
				if diff := cmp.Diff(raw, derive(t, readPod(t, filepath.Join("testdata", s, "input.yaml")))); diff != "" {
					t.Errorf("the manifest differs from that of %s (-want +got):\n%s", want, diff)
				}
			})
		}
	}
}

// TestManifest shows what an author's words become.
func TestManifest(t *testing.T) {
	got := derive(t, readPod(t, "testdata/everything-that-is-carried/input.yaml"))
	m, err := workload.Parse([]byte(got))
	if err != nil {
		t.Fatal(err)
	}
	i64 := func(n int64) *int64 { return &n }
	want := &workload.Manifest{
		APIVersion: workload.APIVersion,
		Image:      workload.Image{Digest: "sha256:" + strings.Repeat("ab", 32), Platform: "linux/arm64"},
		Command:    []string{"/bin/app", "$(GREETING)"},
		Args:       []string{"--price=$$5", "$(KUBERNETES_SERVICE_HOST)"},
		Env:        []workload.EnvVar{{Name: "GREETING", Value: "hello"}, {Name: "TWICE", Value: "$(GREETING) $(GREETING)"}, {Name: "EMPTY"}},
		WorkingDir: "/srv",
		User:       &workload.User{UID: i64(1000), GID: i64(2000), Groups: []int64{7, 3000, 4000}, NonRoot: true},
		Security:   &workload.Security{NoNewPrivileges: true, ReadOnlyRoot: true, DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN", "NET_BIND_SERVICE"}},
		Ports: []workload.Port{
			{Name: "web", Port: 8080},
			{Name: "db", Port: 5432, Protocol: workload.ProtocolTCP},
			{Port: 9090, Plaintext: true},
		},
		Probes: &workload.Probes{
			Startup:   &workload.Probe{Exec: &workload.Exec{Command: []string{"/bin/ready", "--all"}}},
			Liveness:  &workload.Probe{HTTP: &workload.HTTPGet{Port: 8080, Path: "/live", Headers: []workload.Header{{Name: "Host", Value: "app"}}}},
			Readiness: &workload.Probe{HTTP: &workload.HTTPGet{Port: 9090, Scheme: "HTTPS"}},
		},
		Mounts: []workload.Mount{
			{Path: "/tmp", Kind: workload.MountTmpfs},
			{Path: "/tmp/cache", Kind: workload.MountTmpfs, SizeLimit: 64 << 20, ReadOnly: true},
		},
	}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("manifest (-want +got):\n%s", diff)
	}
}

// TestTooLarge: what does not fit into one environment variable is denied with both sizes.
func TestTooLarge(t *testing.T) {
	pod := func(size int) []byte {
		return fmt.Appendf(nil, `{"metadata":{"annotations":{"cloister.dev/enclave":"a"}},"spec":{"containers":[{"name":"a","image":"x@sha256:%s","args":[%q]}]}}`,
			strings.Repeat("ab", 32), strings.Repeat("x", size))
	}
	fits := workload.MaxManifestSize - 400
	ops, _, errs := Patch(pod(fits), testOptions)
	if len(errs) > 0 {
		t.Fatal(sentences(errs))
	}
	checkLaw(t, pod(fits), ops)
	for _, size := range []int{workload.MaxManifestSize - 150, workload.MaxManifestSize} {
		_, _, errs := Patch(pod(size), testOptions)
		if got := sentences(errs); !strings.Contains(got, fmt.Sprint(workload.MaxManifestSize)) || len(errs) != 1 {
			t.Errorf("%d bytes: %s", size, got)
		}
	}
}

// TestEscape: the kubelet turns $$ into $ and leaves every other $ that begins no $(VAR).
func TestEscape(t *testing.T) {
	for value, want := range map[string]string{"": "", "a": "a", "$": "$$", "$(X)": "$$(X)", "$$(X)": "$$$$(X)", "a$b$": "a$$b$$"} {
		if got := escape(value); got != want {
			t.Errorf("escape(%q) = %q, want %q", value, got, want)
		}
		if got := unescape(want); got != value {
			t.Errorf("unescape(%q) = %q, want %q", want, got, value)
		}
	}
}
