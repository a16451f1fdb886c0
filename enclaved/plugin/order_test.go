package plugin

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/workload"
)

// What a manifest may name is part of this program, once and in one way.
func TestOrder(t *testing.T) {
	var want, got []string
	for _, pluginType := range workload.PluginTypes() {
		for _, name := range workload.Builtins(pluginType) {
			want = append(want, pluginType+" "+name)
		}
	}
	for _, b := range order {
		got = append(got, b.pluginType+" "+b.name)
		if (b.process == nil) == (b.inProcess == nil) {
			t.Errorf("%s %s must run in one way", b.pluginType, b.name)
		}
		if (b.process == nil) == (b.pluginType == workload.PluginAuthentication) {
			t.Errorf("%s %s: what strangers send is parsed in a process of its own, and nothing else is", b.pluginType, b.name)
		}
	}
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("built-in plugins (-of manifests +of the program):\n%s", diff)
	}
}

func TestInProcessRefusals(t *testing.T) {
	stdout := workload.Plugin{Name: "log", Type: workload.PluginLogging, Builtin: "stdout"}
	for name, plugins := range map[string][]workload.Plugin{
		"one that is not part of this program": {{Name: "log", Type: workload.PluginLogging, Builtin: "file"}},
		"two of a type":                        {stdout, stdout},
		"a config that is not valid":           {{Name: "log", Type: workload.PluginLogging, Builtin: "stdout", Config: []byte(`{"redact":["("]}`)}},
		"another type's config":                {stdout, {Name: "t", Type: workload.PluginTelemetry, Builtin: "otlp", Config: []byte(`{"redact":["a"]}`)}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := StartInProcess(InProcessConfig{Manifest: &workload.Manifest{Plugins: plugins}}); err == nil {
				t.Error("it started")
			}
		})
	}
	s, err := StartInProcess(InProcessConfig{Manifest: &workload.Manifest{Plugins: []workload.Plugin{stdout}}})
	if err != nil || s.Logging == nil || s.Telemetry != nil || s.Observe() != nil {
		t.Fatalf("%+v, %v", s, err)
	}
	s.Shutdown(t.Context())
}
