// Package injecttest is what the tests of injection share: those of package inject, of the webhook, of the
// command line and of e2e run the same cases.
package injecttest

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/annotation"
)

// ResolveTag is an inject.Resolver that knows one digest for every tag, except of registries that are dead.
func ResolveTag(_ context.Context, image string) (string, error) {
	if strings.HasPrefix(image, "dead.example/") {
		return "", errors.New("its tag cannot be resolved: the registry dead.example does not answer in time")
	}
	return image + "@sha256:" + strings.Repeat("cd", 32), nil
}

// Options returns options, an inject.Options, with what options.yaml of a case's folder says, if it is there.
func Options[T any](t testing.TB, dir string, options T) T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "options.yaml"))
	if errors.Is(err, fs.ErrNotExist) {
		return options
	}
	if err == nil {
		err = yaml.UnmarshalStrict(data, &options)
	}
	if err != nil {
		t.Fatal(err)
	}
	return options
}

// Vectors returns pods of other projects as JSON, once for each of their containers: with our annotation on
// it and its image by digest. They lie beside the repository, whose root is given, and are no part of it: where
// they are not, there are none.
func Vectors(t testing.TB, root string) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(root, "../shared/vectors/pods/*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	pods := map[string][]byte{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		read := func() (pod object, containers []any) {
			if err := yaml.Unmarshal(text, &pod); err != nil {
				t.Fatal(err)
			}
			return pod, pod["spec"].(object)["containers"].([]any)
		}
		_, all := read()
		for i := range all {
			pod, containers := read()
			c := containers[i].(object)
			name, image := c["name"].(string), c["image"].(string)
			meta := pod["metadata"].(object)
			annotations, _ := meta["annotations"].(object)
			if annotations == nil {
				annotations = object{}
				meta["annotations"] = annotations
			}
			annotations[annotation.Enclave] = name
			image, _, _ = strings.Cut(image, "@")
			c["image"] = image + "@sha256:" + strings.Repeat("ab", 32)
			b, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			pods[strings.TrimSuffix(filepath.Base(file), ".yaml")+"/"+name] = b
		}
	}
	return pods
}
