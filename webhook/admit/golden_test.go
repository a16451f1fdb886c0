package admit

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/inject/injecttest"
)

// TestGolden runs the goldens of package inject through HTTP.
func TestGolden(t *testing.T) {
	dirs, err := filepath.Glob("../inject/testdata/*/input.yaml")
	if err != nil || len(dirs) < 20 {
		t.Fatalf("%d cases found, %v", len(dirs), err)
	}
	for _, input := range dirs {
		dir := filepath.Dir(input)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			before := pod(t, filepath.Base(dir))
			options := injecttest.Options(t, dir, options)
			enforced := options.Enforced
			options.Enforced = "" // it is the namespace's, not the installation's
			h := New(options, injecttest.ResolveTag, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
			h.Enforced = func(string) string { return enforced }
			r := review(t, h, before)
			if denied, err := os.ReadFile(filepath.Join(dir, "denied.txt")); err == nil {
				oneLine := strings.NewReplacer("\n", "; ") // an error of YAML has several
				want := oneLine.Replace(strings.TrimSuffix(string(denied), "\n"))
				if diff := cmp.Diff(want, oneLine.Replace(r.Result.Message)); r.Allowed || diff != "" {
					t.Errorf("allowed %v, message (-want +got):\n%s", r.Allowed, diff)
				}
				return
			}
			if !r.Allowed {
				t.Fatal(r.Result.Message)
			}
			after := before
			if r.Patch != nil {
				p, err := jsonpatch.DecodePatch(r.Patch)
				if err != nil {
					t.Fatal(err)
				}
				if after, err = p.Apply(before); err != nil {
					t.Fatal(err)
				}
			}
			text, err := yaml.JSONToYAML(after)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, w := range r.Warnings {
				fmt.Fprintln(&b, "# Warning:", w)
			}
			want, err := os.ReadFile(filepath.Join(dir, "want.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), b.String()+string(text)); diff != "" {
				t.Errorf("the pod (-want +got):\n%s", diff)
			}
		})
	}
}
