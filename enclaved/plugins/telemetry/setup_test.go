package telemetry

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

func TestSetup(t *testing.T) {
	ca, _, err := nsmdev.NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	config := func(change map[string]any) string {
		c := map[string]any{"endpoint": "otel.example:4317", "ca": string(ca)}
		for key, value := range change {
			c[key] = value
		}
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for name, c := range map[string]struct {
		config      string
		unreachable error
		err         string // empty: valid
	}{
		"valid":                 {config: config(nil)},
		"nothing":               {err: "endpoint"},
		"no object":             {config: "[]", err: "cannot unmarshal"},
		"unknown field":         {config: config(map[string]any{"redact": []string{"a"}}), err: `unknown field "redact"`},
		"endpoint without port": {config: config(map[string]any{"endpoint": "otel.example"}), err: "endpoint"},
		"endpoint in enclave":   {config: config(map[string]any{"endpoint": "localhost:4317"}), err: "means the enclave itself"},
		"no authority":          {config: config(map[string]any{"ca": "none"}), err: "ca must hold"},
		"no exporter":           {config: config(nil), unreachable: errors.New("no way"), err: "no way"},
	} {
		t.Run(name, func(t *testing.T) {
			m := workload.Plugin{Name: "t", Type: workload.PluginTelemetry, Builtin: "otlp", Config: json.RawMessage(c.config)}
			e := &otlp.Exporter{}
			p, err := Setup(&m, nil, nil, func(to workload.OTLP) (*otlp.Exporter, error) {
				if to.Endpoint != "otel.example:4317" || to.CA != string(ca) {
					t.Errorf("it sends to %+v", to)
				}
				return e, c.unreachable
			})
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Fatalf("got %v, want %q", err, c.err)
			}
			if err == nil && p.cfg.Exporter != Exporter(e) {
				t.Errorf("got %+v", p.cfg)
			}
		})
	}
	m := workload.Plugin{Name: "log", Type: workload.PluginLogging, Builtin: "stdout"}
	if _, err := Setup(&m, nil, nil, nil); err == nil {
		t.Error("a logging plugin was set up")
	}
}
