package logging

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

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
		builtin, config string
		unreachable     error
		redact          int    // expressions
		err             string // empty: valid
	}{
		"stdout":                {builtin: "stdout"},
		"stdout, redacted":      {builtin: "stdout", config: `{"redact":["a+","b"]}`, redact: 2},
		"otlp":                  {builtin: "otlp", config: config(nil)},
		"otlp, redacted":        {builtin: "otlp", config: config(map[string]any{"redact": []string{"a+"}}), redact: 1},
		"another builtin":       {builtin: "file", err: `no built-in plugin "file"`},
		"stdout with endpoint":  {builtin: "stdout", config: `{"endpoint":"otel.example:4317"}`, err: `unknown field "endpoint"`},
		"nothing for otlp":      {builtin: "otlp", err: "endpoint"},
		"endpoint without port": {builtin: "otlp", config: config(map[string]any{"endpoint": "otel.example"}), err: "endpoint"},
		"endpoint in enclave":   {builtin: "otlp", config: config(map[string]any{"endpoint": "127.0.0.1:4317"}), err: "means the enclave itself"},
		"no authority":          {builtin: "otlp", config: config(map[string]any{"ca": ""}), err: "ca must hold"},
		"no expression":         {builtin: "stdout", config: `{"redact":["("]}`, err: "redact[0] is not a regular expression"},
		"matches nothing":       {builtin: "otlp", config: config(map[string]any{"redact": []string{"a", "b*"}}), err: "redact[1] must match something"},
		"no list":               {builtin: "stdout", config: `{"redact":"a"}`, err: "cannot unmarshal"},
		"no exporter":           {builtin: "otlp", config: config(nil), unreachable: errors.New("no way"), err: "no way"},
	} {
		t.Run(name, func(t *testing.T) {
			m := workload.Plugin{Name: "log", Type: workload.PluginLogging, Builtin: c.builtin, Config: json.RawMessage(c.config)}
			e, source := &otlp.Exporter{}, &resource.Resource{}
			p, err := Setup(&m, true, source, func(to workload.OTLP) (*otlp.Exporter, error) {
				if to.Endpoint != "otel.example:4317" || to.CA != string(ca) {
					t.Errorf("it sends to %+v", to)
				}
				return e, c.unreachable
			})
			if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
				t.Fatalf("got %v, want %q", err, c.err)
			}
			if err != nil {
				return
			}
			if len(p.cfg.Redact) != c.redact {
				t.Errorf("it has %d expressions, want %d", len(p.cfg.Redact), c.redact)
			}
			if toServer := c.builtin == "otlp"; p.cfg.Silent != toServer || (p.cfg.Exporter == Exporter(e)) != toServer || (p.cfg.Resource == source) != toServer {
				t.Errorf("got %+v", p.cfg)
			}
		})
	}
	m := workload.Plugin{Name: "t", Type: workload.PluginTelemetry, Builtin: "otlp", Config: json.RawMessage(config(nil))}
	if _, err := Setup(&m, false, nil, nil); err == nil {
		t.Error("a telemetry plugin was set up")
	}
}
