package workload_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/workload"
)

func pluginManifest(plugins ...workload.Plugin) *workload.Manifest {
	return &workload.Manifest{
		APIVersion: workload.APIVersion, Image: workload.Image{Digest: "sha256:" + strings.Repeat("a", 64)},
		Ports: []workload.Port{{Port: 80}}, Plugins: plugins,
	}
}

// Whatever changes about a plugin changes what is measured, and comes back from it.
func TestPlugins(t *testing.T) {
	image := &workload.Image{Digest: "sha256:" + strings.Repeat("b", 64)}
	guard := workload.Plugin{Name: "guard", Type: workload.PluginAuthentication, Image: image}
	for name, change := range map[string]func(*workload.Plugin){
		"nothing":  func(*workload.Plugin) {},
		"name":     func(p *workload.Plugin) { p.Name = "g" },
		"image":    func(p *workload.Plugin) { p.Image = &workload.Image{Digest: "sha256:" + strings.Repeat("c", 64)} },
		"platform": func(p *workload.Plugin) { p.Image = &workload.Image{Digest: image.Digest, Platform: "linux/arm64"} },
		"required": func(p *workload.Plugin) { p.Required = true },
		"time-out": func(p *workload.Plugin) { p.TimeoutMs = 1000 },
		"egress":   func(p *workload.Plugin) { p.Egress = []string{"a.example:1", "b.example:1"} },
		"headers":  func(p *workload.Plugin) { p.Headers = []string{"x-a", "x-b"} },
		"config":   func(p *workload.Plugin) { p.Config = json.RawMessage(`{"a":1}`) },
	} {
		t.Run(name, func(t *testing.T) {
			p := guard
			change(&p)
			m := pluginManifest(p)
			b, err := m.Canonical()
			if err != nil {
				t.Fatal(err)
			}
			before, err := pluginManifest(guard).Canonical()
			if err != nil {
				t.Fatal(err)
			}
			if (string(b) == string(before)) != (name == "nothing") {
				t.Errorf("measured as %s", b)
			}
			got, err := workload.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(m, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestBadPlugins(t *testing.T) {
	image := &workload.Image{Digest: "sha256:" + strings.Repeat("b", 64)}
	with := func(change func(*workload.Plugin)) *workload.Manifest {
		p := workload.Plugin{Name: "guard", Type: workload.PluginAuthentication, Image: image}
		change(&p)
		return pluginManifest(p)
	}
	tcp := with(func(*workload.Plugin) {})
	tcp.Ports[0].Protocol = workload.ProtocolTCP
	guard := workload.Plugin{Name: "guard", Type: workload.PluginAuthentication, Image: image}
	for name, tc := range map[string]struct {
		manifest *workload.Manifest
		want     string
	}{
		"no name":            {with(func(p *workload.Plugin) { p.Name = "" }), "plugin name"},
		"a path as name":     {with(func(p *workload.Plugin) { p.Name = "../x" }), "plugin name"},
		"name twice":         {pluginManifest(guard, guard), "listed twice"},
		"too many":           {pluginManifest(make([]workload.Plugin, 17)...), "at most 16"},
		"unknown type":       {with(func(p *workload.Plugin) { p.Type = "service" }), "is not one of"},
		"neither":            {with(func(p *workload.Plugin) { p.Image = nil }), "exactly one of"},
		"both":               {with(func(p *workload.Plugin) { p.Builtin = "oidc" }), "exactly one of"},
		"image of logging":   {with(func(p *workload.Plugin) { p.Type = workload.PluginLogging }), "is not built yet"},
		"unknown builtin":    {with(func(p *workload.Plugin) { p.Image, p.Builtin = nil, "ldap" }), `no builtin "ldap"`},
		"builtin's config":   {with(func(p *workload.Plugin) { p.Image, p.Builtin = nil, "oidc" }), "audience is missing"},
		"digest":             {with(func(p *workload.Plugin) { p.Image = &workload.Image{Digest: "latest"} }), "image.digest"},
		"usual platform":     {with(func(p *workload.Plugin) { p.Image = &workload.Image{Digest: image.Digest, Platform: "linux/amd64"} }), "left out"},
		"usual time-out":     {with(func(p *workload.Plugin) { p.TimeoutMs = 200 }), "left out for 200"},
		"endless":            {with(func(p *workload.Plugin) { p.TimeoutMs = 10_001 }), "at most 10000"},
		"egress":             {with(func(p *workload.Plugin) { p.Egress = []string{"a"} }), "host:port"},
		"egress unsorted":    {with(func(p *workload.Plugin) { p.Egress = []string{"b.example:1", "a.example:1"} }), "ascending order"},
		"header of HTTP":     {with(func(p *workload.Plugin) { p.Headers = []string{"content-length"} }), "cannot be set by a plugin"},
		"header in capitals": {with(func(p *workload.Plugin) { p.Headers = []string{"X-A"} }), "lower case"},
		"header twice":       {with(func(p *workload.Plugin) { p.Headers = []string{"x-a", "x-a"} }), "without duplicates"},
		"config is a list":   {with(func(p *workload.Plugin) { p.Config = json.RawMessage("[]") }), "must be an object"},
		"config is empty":    {with(func(p *workload.Plugin) { p.Config = json.RawMessage("{}") }), "left out when it is empty"},
		"config's order":     {with(func(p *workload.Plugin) { p.Config = json.RawMessage(`{"b":1,"a":1}`) }), "RFC 8785"},
		"config's key twice": {with(func(p *workload.Plugin) { p.Config = json.RawMessage(`{"a":1,"a":2}`) }), "config"},
		"unchecked tcp port": {tcp, "cannot check"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tc.manifest.Validate(); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}
