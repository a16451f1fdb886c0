package xds

import (
	"encoding/json"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	cachev3 "github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

var update = flag.Bool("update", false, "write the golden files")

func TestSnapshot(t *testing.T) {
	two := []Route{{Port: 80, Socket: "/run/relay/80.sock"}, {Port: 8443, Socket: "/run/relay/8443.sock"}}
	tests := map[string]struct {
		routes    []Route
		address   string
		listening bool
		egress    Egress
	}{
		"idle":       {routes: two[:1], address: IPv4},
		"ipv4":       {routes: two[:1], address: IPv4, listening: true},
		"dual-stack": {routes: two, address: DualStack, listening: true},
		"no-ports":   {address: IPv4, listening: true},
		"egress":     {address: IPv4, egress: Egress{Socket: "/run/egress.sock", Endpoints: []string{"10.0.0.1:5432", "[2001:db8::1]:443", "example.org:443"}}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s, err := Snapshot(test.routes, test.egress, test.address, test.listening)
			if err != nil {
				t.Fatal(err)
			}
			got := render(t, s)
			golden := filepath.Join("testdata", name+".json")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("snapshot (-want +got):\n%s", diff)
			}
		})
	}
}

// render gives version, clusters and listeners as JSON. protojson varies its white space on purpose, so
// it is written again.
func render(t *testing.T, s *cachev3.Snapshot) []byte {
	t.Helper()
	out := map[string]any{"version": s.GetVersion(resource.ListenerType)}
	for field, typ := range map[string]string{"clusters": resource.ClusterType, "listeners": resource.ListenerType} {
		items := s.GetResources(typ)
		list := []any{}
		for _, name := range slices.Sorted(maps.Keys(items)) {
			b, err := protojson.Marshal(items[name].(proto.Message))
			if err != nil {
				t.Fatal(err)
			}
			var v any
			if err := json.Unmarshal(b, &v); err != nil {
				t.Fatal(err)
			}
			list = append(list, v)
		}
		out[field] = list
	}
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(b, '\n')
}

// The version changes with the content and with nothing else.
func TestSnapshotVersion(t *testing.T) {
	version := func(socket, address string, listening bool, endpoints ...string) string {
		s, err := Snapshot([]Route{{Port: 80, Socket: socket}}, Egress{"/e", endpoints}, address, listening)
		if err != nil {
			t.Fatal(err)
		}
		return s.GetVersion(resource.ClusterType)
	}
	base := version("/a", IPv4, true)
	if again := version("/a", IPv4, true); again != base {
		t.Errorf("equal snapshots have versions %s and %s", base, again)
	}
	for name, other := range map[string]string{
		"socket":    version("/b", IPv4, true),
		"address":   version("/a", DualStack, true),
		"listening": version("/a", IPv4, false),
		"endpoint":  version("/a", IPv4, true, "a:1"),
	} {
		if other == base {
			t.Errorf("another %s has the same version", name)
		}
	}
}
