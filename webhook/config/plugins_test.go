package config

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

func TestPlugins(t *testing.T) {
	const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	const image = "image: 'registry.example/guard:1@" + digest + "'"
	const entry = "name: guard, type: authentication, " + image
	guard := func(change func(*workload.Plugin)) Plugin {
		p := workload.Plugin{Name: "guard", Type: "authentication", Image: &workload.Image{Digest: digest}, Required: true}
		if change != nil {
			change(&p)
		}
		return Plugin{p, "registry.example/guard:1@" + digest}
	}
	for name, tc := range map[string]struct {
		plugin string // inside of {}
		want   Plugin
		errs   string // part of the only error
	}{
		"least":          {plugin: entry, want: guard(nil)},
		"not required":   {plugin: entry + ", required: false", want: guard(func(p *workload.Plugin) { p.Required = false })},
		"time-out":       {plugin: entry + ", timeout: 1.5s", want: guard(func(p *workload.Plugin) { p.TimeoutMs = 1500 })},
		"usual time-out": {plugin: entry + ", timeout: 200ms", want: guard(nil)},
		"way out":        {plugin: entry + ", egress: ['B.example:1', 'a.example:2']", want: guard(func(p *workload.Plugin) { p.Egress = []string{"a.example:2", "b.example:1"} })},
		"headers":        {plugin: entry + ", headers: [X-B, x-a, x-b]", want: guard(func(p *workload.Plugin) { p.Headers = []string{"x-a", "x-b"} })},
		"its own config": {plugin: entry + ", config: {b: 1.0, a: [x]}", want: guard(func(p *workload.Plugin) { p.Config = json.RawMessage(`{"a":["x"],"b":1}`) })},
		"empty config":   {plugin: entry + ", config: {}", want: guard(nil)},
		"nothing":        {plugin: "", errs: "needs a name and a type"},
		"misspelt":       {plugin: entry + ", tiemout: 1s", errs: `did you mean "timeout"?`},
		"by tag":         {plugin: "name: guard, type: authentication, image: 'guard:1'", errs: "name it by digest"},
		"no image":       {plugin: "name: guard, type: authentication", errs: "either builtin or an image"},
		"both":           {plugin: entry + ", builtin: oidc", errs: "either builtin or an image"},
		"unknown type":   {plugin: "name: guard, type: service, " + image, errs: `supported values: "authentication", "logging", "telemetry"`},
		"unknown":        {plugin: "name: guard, type: authentication, builtin: ldap", errs: `supported values: "oidc"`},
		"slow":           {plugin: entry + ", timeout: 11s", errs: `write a duration from "1ms" to "10s"`},
		"fast":           {plugin: entry + ", timeout: 1us", errs: `write a duration from "1ms" to "10s"`},
		"no unit":        {plugin: entry + ", timeout: 5", errs: "write a duration"},
		"config is text": {plugin: entry + ", config: x", errs: "it must be an object"},
		"no port":        {plugin: entry + ", egress: [a.example]", errs: "write host:port"},
	} {
		t.Run(name, func(t *testing.T) {
			got, errs := Parse(head+"plugins: [{"+tc.plugin+"}]", field.NewPath("config"))
			if tc.errs != "" {
				if len(errs) == 0 || !strings.Contains(errs.ToAggregate().Error(), tc.errs) || !strings.HasPrefix(errs[0].Field, "config.plugins[0]") {
					t.Errorf("errors %v, want one with %q", errs, tc.errs)
				}
				return
			}
			if len(errs) > 0 {
				t.Fatal(errs)
			}
			if diff := cmp.Diff([]Plugin{tc.want}, got.Plugins); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
