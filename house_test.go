// Package cloister holds the rules of the house: what may import what, and what a dependency needs.
package cloister

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "cloister.dev/cloister/"

// binaries are the folders that are built into a program of the same name.
var binaries = []string{"webhook", "initboot", "sidecar", "enclaved", "collector", "controller", "cloister"}

// shared are the packages of a binary that others may import, because they are pure.
var shared = []string{"webhook/inject", "webhook/annotation"}

// measured must stay small and free of Kubernetes: they run inside the enclave or at a client.
var measured = []string{"enclaved", "attestation", "eif", "workload", "internal/channel", "internal/vsock", "internal/nsm", "internal/cms"}

type goPackage struct {
	ImportPath string
	Standard   bool
	Imports    []string
	Deps       []string
}

func packages(t *testing.T) []goPackage {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Standard,Imports,Deps", "./...").Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Fatalf("go list: %s", exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	var list []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		list = append(list, p)
	}
}

// within tells whether p is folder or lies below it.
func within(p, folder string) bool { return p == folder || strings.HasPrefix(p, folder+"/") }

func TestImports(t *testing.T) {
	list := packages(t)
	if len(list) < 10 {
		t.Fatalf("only %d packages found", len(list))
	}
	for _, p := range list {
		own, ok := strings.CutPrefix(p.ImportPath, module)
		if !ok {
			continue
		}
		if base := path.Base(own); slices.Contains([]string{"util", "utils", "common", "helpers", "misc"}, base) {
			t.Errorf("%s: a package called %q says nothing of what it holds", own, base)
		}
		for _, m := range measured {
			if !within(own, m) {
				continue
			}
			for _, d := range p.Deps {
				if strings.HasPrefix(d, "k8s.io/") || strings.HasPrefix(d, "sigs.k8s.io/") {
					t.Errorf("%s depends on %s: nothing of Kubernetes may be measured or run at a client", own, d)
				}
			}
		}
		folder, _, _ := strings.Cut(own, "/")
		for _, i := range p.Imports {
			other, ok := strings.CutPrefix(i, module)
			if !ok {
				continue
			}
			otherFolder, _, _ := strings.Cut(other, "/")
			if otherFolder != folder && slices.Contains(binaries, otherFolder) && !slices.Contains(shared, other) {
				t.Errorf("%s imports %s: a binary's packages are its own", own, other)
			}
		}
		if slices.Contains(shared, own) {
			for _, i := range p.Imports {
				first, _, _ := strings.Cut(i, "/")
				allowed := !strings.Contains(first, ".") || strings.HasPrefix(i, module) || i == "sigs.k8s.io/yaml" || i == "sigs.k8s.io/json" || i == "go.yaml.in/yaml/v3" ||
					strings.HasPrefix(i, "k8s.io/api/") || strings.HasPrefix(i, "k8s.io/apimachinery/")
				if !allowed || slices.Contains([]string{"os", "net", "net/http", "os/exec", "io/fs"}, i) {
					t.Errorf("%s imports %s: it must stay pure", own, i)
				}
			}
		}
	}
}

// CONTRIBUTING.md says what each folder of a binary, of internal/ and of e2e/ is for.
func TestTree(t *testing.T) {
	b, err := os.ReadFile("CONTRIBUTING.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9]+)/` \\| (.*)$").FindAllStringSubmatch(string(b), -1) {
		rows[m[1]] = m[2]
	}
	for _, p := range packages(t) {
		parts := strings.Split(strings.TrimPrefix(p.ImportPath, module), "/")
		if len(parts) < 2 || slices.Contains(parts, "testdata") || !slices.Contains(append(binaries, "internal", "e2e"), parts[0]) {
			continue
		}
		if !strings.Contains(rows[parts[0]], "`"+parts[1]+"/`") {
			t.Errorf("CONTRIBUTING.md does not say what %s/%s is for", parts[0], parts[1])
		}
	}
}

// The package comment of e2e lists its tests, one file a promise.
func TestPromises(t *testing.T) {
	doc, err := os.ReadFile("e2e/doc.go")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("e2e/*_test.go")
	if err != nil || len(files) < 10 {
		t.Fatalf("only %d files found, %v", len(files), err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		promises := regexp.MustCompile(`(?m)^func Test[^(]*\(t \*testing\.T\)`).Match(b)
		if listed := strings.Contains(string(doc), "\t"+filepath.Base(file)+" "); promises != listed {
			t.Errorf("%s: it has tests: %t; e2e/doc.go lists it: %t", file, promises, listed)
		}
	}
}

// Each direct requirement of go.mod has one line in docs/dependencies.md that says why, and nothing else
// has one.
func TestDependencies(t *testing.T) {
	mod, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	required := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(string(mod), -1) {
		required[m[1]] = true
	}
	if len(required) < 10 {
		t.Fatalf("only %d requirements found", len(required))
	}
	said := map[string]bool{}
	// A line may speak of several modules, before its first colon.
	for _, line := range regexp.MustCompile("(?m)^- ([^:]*): ").FindAllStringSubmatch(string(doc), -1) {
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(line[1], -1) {
			if said[m[1]] {
				t.Errorf("docs/dependencies.md speaks of %s twice", m[1])
			}
			said[m[1]] = true
			if !required[m[1]] {
				t.Errorf("docs/dependencies.md speaks of %s, which go.mod does not require directly", m[1])
			}
		}
	}
	for m := range required {
		if !said[m] {
			t.Errorf("docs/dependencies.md does not say why %s: add a line", m)
		}
	}
}

// Every built-in plugin has the same files, and a README as a manual page has it.
func TestPluginFolders(t *testing.T) {
	folders, err := os.ReadDir("enclaved/plugins")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range folders {
		folder := path.Join("enclaved/plugins", f.Name())
		for _, file := range []string{"setup.go", "setup_test.go", f.Name() + ".go", f.Name() + "_test.go"} {
			if _, err := os.Stat(path.Join(folder, file)); err != nil {
				t.Error(err)
			}
		}
		readme, err := os.ReadFile(path.Join(folder, "README.md"))
		if err != nil {
			t.Error(err)
			continue
		}
		var got []string
		for _, m := range regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(string(readme), -1) {
			got = append(got, m[1])
		}
		if want := []string{"Name", "Description", "Syntax", "Examples", "Metrics", "Bugs"}; !slices.Equal(got, want) {
			t.Errorf("%s/README.md has the sections %q, want %q", folder, got, want)
		}
	}
}
