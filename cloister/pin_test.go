package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/webhook/inject/injecttest"
)

// pushed stores an image team/app:1.2 in a registry of this process and returns its reference and digest.
func pushed(t *testing.T) (image, digest string) {
	t.Helper()
	t.Setenv("DOCKER_CONFIG", t.TempDir()) // nobody's credentials
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	image = s.Listener.Addr().String() + "/team/app:1.2"
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(10, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return image, d.String()
}

const plainLocal = "--plain-http-registries=127.0.0.1"

// TestPin: only the images of containers in enclaves change, and nothing else in the file.
func TestPin(t *testing.T) {
	image, digest := pushed(t)
	file := "--- # the first\r\n" + strings.ReplaceAll(`apiVersion: v1
kind: Pod          # é is one letter
metadata: {name: é, annotations: {cloister.dev/enclave: a}}
spec: {containers: [{name: "é", image: other:1}, {name: a, "image":   IMAGE , command: ["IMAGE"]}]}
`, "\n", "\r\n") + `---
# nothing here
---
kind: List
items:
- kind: Deployment
  metadata: {name: d}
  spec:
    template:
      metadata:
        annotations: { "cloister.dev/enclave": b }
      spec:
        initContainers:
          - image: IMAGE
            name: before
        containers:

          - name: b
            image: 'IMAGE'  # bump with care
- {"kind": "Job", "spec": {"template": {"metadata": {"annotations": {"cloister.dev/enclave": "c"}}, "spec": {"containers": [{"image": "IMAGE", "name": "c"}]}}}}
- kind: Job
  spec: {template: {metadata: {annotations: {cloister.dev/enclave: d}}, spec: {containers: [{name: d, image: x@DIGEST}]}}}
---
kind: Pod
spec: {containers: [{name: a, image: IMAGE}]}`
	file = strings.ReplaceAll(file, "DIGEST", digest)
	in := strings.ReplaceAll(file, "IMAGE", image)
	r := call(t, in, "pin", "-f", "-", plainLocal)
	r.want(t, 0, "-: Pod é: "+image+"@"+digest, "-: Deployment d: ", "-: Job : ")
	pinned := image + "@" + digest
	want := strings.NewReplacer(
		`"image":   IMAGE ,`, `"image":   `+pinned+` ,`,
		`'IMAGE'  #`, `'`+pinned+`'  #`,
		`{"image": "IMAGE"`, `{"image": "`+pinned+`"`,
		"IMAGE", image,
	).Replace(file)
	if diff := cmp.Diff(want, r.stdout); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	if again := call(t, r.stdout, "pin", "-f", "-"); again.code != 0 || again.stdout != r.stdout {
		t.Errorf("again: exit code %d: %s", again.code, again.stderr)
	}
}

func TestPinRefuses(t *testing.T) {
	image, _ := pushed(t)
	pod := "kind: Pod\nmetadata: {name: p, annotations: {cloister.dev/enclave: a}}\nspec: {containers: [{name: a, image: IMAGE}]}\n"
	for name, tt := range map[string]struct {
		in   string
		args []string
		code int
		want string
	}{
		"no file":      {args: []string{}, code: 2, want: "with -f"},
		"no YAML":      {in: "a: [", code: 1, want: "read YAML document 1"},
		"no such tag":  {in: strings.Replace(pod, "IMAGE", image+"3", 1), code: 1, want: "-: Pod p: image " + image + "3: its tag cannot be resolved"},
		"one of two":   {in: strings.Replace(pod, "IMAGE", image, 1) + "---\n" + strings.Replace(pod, "IMAGE", image+"3", 1), code: 1, want: "nothing was pinned"},
		"nonsense":     {in: strings.Replace(pod, "IMAGE", image+"@NONSENSE", 1), code: 1, want: "-: Pod p: image " + image + "@NONSENSE: it is neither NAME[:TAG] nor"},
		"half digest":  {in: strings.Replace(pod, "IMAGE", image+"@sha256:12", 1), code: 1, want: "it is neither"},
		"space":        {in: strings.Replace(pod, "IMAGE", "'a b'", 1), code: 1, want: "it is neither"},
		"no image":     {in: strings.Replace(pod, "IMAGE", "''", 1), code: 1, want: "it is neither"},
		"anchor":       {in: strings.Replace(pod, "IMAGE", "&i "+image, 1), code: 1, want: "line 3: write it out"},
		"alias":        {in: "x: &i " + image + "\n" + strings.Replace(pod, "IMAGE", "*i", 1), code: 1, want: "write it out where it is used"},
		"merge":        {in: "x: &i {image: " + image + "}\n" + strings.Replace(pod, "image: IMAGE", "<<: *i", 1), code: 1, want: "write it out where it is used"},
		"block scalar": {in: strings.Replace(pod, "{containers: [{name: a, image: IMAGE}]}", "\n  containers:\n  - name: a\n    image: >-\n      "+image, 1), code: 1, want: "write it out in one line"},
		"escapes":      {in: strings.Replace(pod, "IMAGE", `"`+strings.Replace(image, "a", `\x61`, 1)+`"`, 1), code: 1, want: "write it out in one line"},
	} {
		t.Run(name, func(t *testing.T) {
			args := tt.args
			if args == nil {
				args = []string{"-f", "-", plainLocal}
			}
			r := call(t, tt.in, append([]string{"pin"}, args...)...)
			r.want(t, tt.code, tt.want)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
}

// FuzzPin: whatever the file, what comes out has the same documents, and all their tags pinned.
func FuzzPin(f *testing.F) {
	for _, in := range []string{
		deployment, job, bad, "a: &x nginx\n---\n",
		"kind: Pod\nmetadata: {annotations: {cloister.dev/enclave: é}}\nspec: {containers: [{name: é, image: \"nginx\"}, {image: '1', name: a}]}",
		"--- # x\nkind: List\nitems:\n- kind: Pod\n  metadata: {annotations: {cloister.dev/enclave: a}}\n  spec:\n    containers:\n    - image: 'nginx:1' # y\n      name: a\n---\n",
	} {
		f.Add(in)
	}
	f.Fuzz(func(t *testing.T, in string) {
		var out, again bytes.Buffer
		p := pin{file: "-"}
		if p.run(t.Context(), injecttest.ResolveTag, strings.NewReader(in), &out, io.Discard) != nil {
			if out.Len() > 0 {
				t.Errorf("a failure prints %q", out.String())
			}
			return
		}
		refuse := func(_ context.Context, image string) (string, error) {
			t.Errorf("%s is not pinned in\n%s", image, out.String())
			return "", errors.New("refused")
		}
		if err := p.run(t.Context(), refuse, strings.NewReader(out.String()), &again, io.Discard); err != nil || again.String() != out.String() {
			t.Errorf("again: %v\n%s", err, again.String())
		}
	})
}

// TestResolve: whoever resolves a tag gets what the pinned file gets.
func TestResolve(t *testing.T) {
	image, digest := pushed(t)
	tagged := strings.Replace(deployment, "registry:5000/web:1.4.0@"+strings.Split(deployment, "@")[1][:71], image, 1)
	if !strings.Contains(tagged, "image: "+image+"\n") {
		t.Fatal(tagged)
	}
	pinned := call(t, tagged, "pin", "-f", "-", plainLocal)
	pinned.want(t, 0)
	base, _ := writeBase(t, eif.X86_64)
	a := call(t, tagged, "measure", "--eif", base, "-f", "-", "--pin", "resolve", plainLocal)
	a.want(t, 0, "measured as 1.2\n", "the tag of app is "+digest[:19]+"… now")
	b := call(t, pinned.stdout, "measure", "--eif", base, "-f", "-")
	b.want(t, 0, "measured as 1.2\n")
	if a.stdout != b.stdout {
		t.Errorf("measured\n%s\n%s", a.stdout, b.stdout)
	}
	call(t, tagged, "measure", "--eif", base, "-f", "-").want(t, 1, "name it by digest, as in registry/name@sha256:…, which `cloister pin -f FILE` does")

	c := callInject(t, tagged, "-f", "-", plainLocal)
	c.want(t, 0, "Warning: the tag of app is "+digest[:19])
	if d := callInject(t, pinned.stdout, "-f", "-", plainLocal); c.stdout != d.stdout || strings.Contains(d.stderr, "the tag of") {
		t.Errorf("injected (-tag +digest):\n%s\n%s", cmp.Diff(c.stdout, d.stdout), d.stderr)
	}
	callInject(t, tagged, "-f", "-", "--pin", "never", plainLocal).want(t, 1, "name it by digest")
}
