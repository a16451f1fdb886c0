package dashboards

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write cloister.json")

func TestFile(t *testing.T) {
	want, err := Cloister().JSON()
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile("cloister.json", want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile("cloister.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(want, got) {
		t.Errorf("cloister.json is not what the code gives, run go test ./manifests/dashboards -update: %s", cmp.Diff(string(want), string(got)))
	}
}
