package workload

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/gowebpki/jcs"
)

// Types of a Plugin.
const (
	// PluginAuthentication decides on each HTTP request before the workload sees it. It is a process
	// that speaks Envoy's ext_authz (envoy.service.auth.v3.Authorization) over gRPC.
	PluginAuthentication = "authentication"
	// PluginLogging takes the workload's output. It is built in.
	PluginLogging = "logging"
	// PluginTelemetry takes metrics and traces. It is built in.
	PluginTelemetry = "telemetry"
)

// DefaultPluginTimeout is how long an authentication plugin may take for a request.
const DefaultPluginTimeout = 200 * time.Millisecond

// MaxPlugins is how many plugins a manifest may have.
const MaxPlugins = 16

const maxPluginTimeout = 10 * time.Second

// HeaderPrefix begins the names of headers that only the gateway and its plugins set: what a client
// sends under such a name never reaches the workload.
const HeaderPrefix = "x-cloister-"

// Plugin is something that runs in the enclave beside the workload. Authentication plugins are asked
// in the order of the manifest; the first that refuses a request decides.
type Plugin struct {
	// Name is a DNS label, unique in the manifest.
	Name string `json:"name"`
	// Type is one of the types above.
	Type string `json:"type"`
	// Builtin names a plugin that is part of the EIF, Image one that is not. Exactly one is set.
	Builtin string `json:"builtin,omitempty"`
	Image   *Image `json:"image,omitempty"`
	// Required makes requests fail while the plugin is down. Without it they pass unchecked. A request to
	// which a running plugin gives no answer fails in any case.
	Required bool `json:"required,omitempty"`
	// TimeoutMs is how long an authentication plugin may take for a request, in milliseconds; 0 means
	// DefaultPluginTimeout.
	TimeoutMs uint32 `json:"timeoutMs,omitempty"`
	// Egress is what the plugin may reach beside what its built-in config names, "host:port" as in
	// Manifest.Egress.
	Egress []string `json:"egress,omitempty"`
	// Headers are the request headers that a plugin of an Image sets, lower case, in ascending order.
	// What a client sends under these names is removed.
	Headers []string `json:"headers,omitempty"`
	// Config is a JSON object in its RFC 8785 form: for a built-in plugin that of its PluginConfig, for
	// others whatever they understand.
	Config json.RawMessage `json:"config,omitempty"`
}

// PluginConfig is what Plugin.Config holds for a built-in plugin.
type PluginConfig interface {
	// Validate reports everything that is wrong, joined, one sentence each.
	Validate() error
	// Endpoints are what the plugin must reach, as "host:port".
	Endpoints() []string
}

// builtins are the built-in plugins by type and name, with an empty config of each.
var builtins = map[string]map[string]func() PluginConfig{
	PluginAuthentication: {"oidc": func() PluginConfig { return &OIDC{} }},
	PluginLogging: {
		"otlp":   func() PluginConfig { return &LoggingOTLP{} },
		"stdout": func() PluginConfig { return &LoggingStdout{} },
	},
	PluginTelemetry: {"otlp": func() PluginConfig { return &TelemetryOTLP{} }},
}

// Builtins returns the names of the built-in plugins of a type, in ascending order.
func Builtins(pluginType string) []string {
	var names []string
	for name := range builtins[pluginType] {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// PluginTypes returns the types that have a plugin, in ascending order.
func PluginTypes() []string {
	var types []string
	for t := range builtins {
		types = append(types, t)
	}
	slices.Sort(types)
	return types
}

// Timeout is how long the plugin may take for a request.
func (p *Plugin) Timeout() time.Duration {
	if p.TimeoutMs == 0 {
		return DefaultPluginTimeout
	}
	return time.Duration(p.TimeoutMs) * time.Millisecond
}

// BuiltinConfig decodes and validates the config of a built-in plugin, strictly.
func (p *Plugin) BuiltinConfig() (PluginConfig, error) {
	empty, ok := builtins[p.Type][p.Builtin]
	if !ok {
		return nil, fmt.Errorf("there is no built-in plugin %q of type %q", p.Builtin, p.Type)
	}
	c := empty()
	if err := decodeObject(p.Config, c); err != nil {
		return nil, err
	}
	return c, c.Validate()
}

// SetConfig sets Config from a JSON object as its author wrote it: a built-in plugin's is checked and
// values equal to their default are left out.
func (p *Plugin) SetConfig(raw json.RawMessage) error {
	p.Config = raw
	if p.Builtin != "" {
		c, err := p.BuiltinConfig()
		if err != nil {
			return err
		}
		if p.Config, err = json.Marshal(c); err != nil {
			return err
		}
	}
	canonical, err := canonicalObject(p.Config)
	p.Config = canonical
	return err
}

// Endpoints are all that the plugin may reach, as "host:port", in ascending order.
func (p *Plugin) Endpoints() []string {
	out := slices.Clone(p.Egress)
	if p.Builtin != "" {
		if c, err := p.BuiltinConfig(); err == nil {
			out = append(out, c.Endpoints()...)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// RequestHeaders are the headers that the plugin may set on a request, lower case.
func (p *Plugin) RequestHeaders() []string {
	if p.Builtin == "" {
		return p.Headers
	}
	if c, err := p.BuiltinConfig(); err == nil {
		if h, ok := c.(interface{ RequestHeaders() []string }); ok {
			return h.RequestHeaders()
		}
	}
	return nil
}

// PluginEndpoints are all that the plugins may reach, as "host:port", in ascending order.
func (m *Manifest) PluginEndpoints() []string {
	var out []string
	for i := range m.Plugins {
		out = append(out, m.Plugins[i].Endpoints()...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// decodeObject decodes exactly one JSON object without unknown fields; no object is an empty one.
func decodeObject(raw json.RawMessage, into any) error {
	if len(raw) == 0 {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("the object is followed by other data")
	}
	return nil
}

// canonicalObject returns the RFC 8785 form of a JSON object, nil for an empty one.
func canonicalObject(raw json.RawMessage) (json.RawMessage, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil || m == nil {
		return nil, errors.New("it must be an object")
	}
	if len(m) == 0 {
		return nil, nil
	}
	return jcs.Transform(raw)
}

var (
	pluginNameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	headerRE     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,126}[a-z0-9])?$`)
)

// kept are request headers that no plugin may set: those that say where a request ends or goes
// (RFC 9110, section 7.6.1), and what the plugins themselves look at.
var kept = []string{
	"authorization", "connection", "content-length", "cookie", "expect", "host", "keep-alive",
	"proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
}

// checkHeader says what is wrong with the name of a request header that a plugin shall set.
func checkHeader(name string) error {
	switch {
	case !headerRE.MatchString(name):
		return fmt.Errorf("the header %q must be of lower case letters, digits and dashes", name)
	case slices.Contains(kept, name):
		return fmt.Errorf("the header %q cannot be set by a plugin: choose another", name)
	}
	return nil
}

func ascending(list []string) bool {
	return slices.IsSorted(list) && len(slices.Compact(slices.Clone(list))) == len(list)
}

func (m *Manifest) validatePlugins(bad func(string, ...any), text func(string, ...string)) {
	if len(m.Plugins) > MaxPlugins {
		bad("there are %d plugins, at most %d are accepted", len(m.Plugins), MaxPlugins)
	}
	names, checked := map[string]bool{}, ""
	for i := range m.Plugins {
		p := &m.Plugins[i]
		if !pluginNameRE.MatchString(p.Name) {
			bad("plugin name %q must be of at most 63 lower case letters, digits and dashes", p.Name)
		}
		if names[p.Name] {
			bad("plugin name %q is listed twice", p.Name)
		}
		names[p.Name] = true
		p.validate(func(format string, args ...any) {
			bad("plugin %q: %s", p.Name, fmt.Sprintf(format, args...))
		})
		text("plugin "+p.Name, string(p.Config))
		if p.Type == PluginAuthentication {
			checked = p.Name
		}
	}
	for _, port := range m.Ports {
		if checked != "" && port.Protocol == ProtocolTCP {
			bad("port %d is a tcp port, whose bytes the authentication plugin %q cannot check: serve it as http or do not expose it", port.Port, checked)
		}
	}
}

func (p *Plugin) validate(bad func(string, ...any)) {
	if _, ok := builtins[p.Type]; !ok {
		bad("the type %q is not one of %s", p.Type, strings.Join(PluginTypes(), ", "))
		return
	}
	switch {
	case (p.Builtin == "") == (p.Image == nil):
		bad("it must have exactly one of builtin and image")
		return
	case p.Image != nil && p.Type != PluginAuthentication:
		bad("an image for the type %q is not built yet: name a builtin, one of %s", p.Type, strings.Join(Builtins(p.Type), ", "))
	case p.Image != nil:
		if !digestRE.MatchString(p.Image.Digest) {
			bad("image.digest %q is not sha256: and 64 hexadecimal digits", p.Image.Digest)
		}
		if s := p.Image.Platform; s != "" && (!platformRE.MatchString(s) || s == DefaultPlatform) {
			bad("image.platform %q must be os/architecture and left out for %s", s, DefaultPlatform)
		}
	case builtins[p.Type][p.Builtin] == nil:
		bad("there is no builtin %q, only %s", p.Builtin, strings.Join(Builtins(p.Type), ", "))
		return
	default:
		c, err := p.BuiltinConfig()
		if err != nil {
			bad("config: %v", err)
		} else if spelled, err := json.Marshal(c); err != nil {
			bad("config: %v", err)
		} else if want, err := canonicalObject(spelled); err != nil || !bytes.Equal(want, p.Config) {
			bad("config: a value equal to its default must be left out")
		}
	}
	if p.Type != PluginAuthentication && p.TimeoutMs != 0 {
		bad("timeoutMs is for the type %s only", PluginAuthentication)
	}
	if t := p.TimeoutMs; t != 0 && (p.Timeout() == DefaultPluginTimeout || p.Timeout() > maxPluginTimeout) {
		bad("timeoutMs %d must be at most %d and left out for %d", t, maxPluginTimeout.Milliseconds(), DefaultPluginTimeout.Milliseconds())
	}
	for _, e := range p.Egress {
		if _, _, err := ParseEndpoint(e); err != nil {
			bad("egress %q: %v", e, err)
		}
	}
	if p.Builtin != "" && len(p.Headers) > 0 {
		bad("headers are for an image only: a built-in plugin's config says which it sets")
	}
	for _, h := range p.Headers {
		if err := checkHeader(h); err != nil {
			bad("headers: %v", err)
		}
	}
	if !ascending(p.Egress) || !ascending(p.Headers) {
		bad("egress and headers must be in ascending order without duplicates")
	}
	if canonical, err := canonicalObject(p.Config); err != nil {
		bad("config: %v", err)
	} else if !bytes.Equal(canonical, p.Config) {
		bad("config must be in its RFC 8785 form and left out when it is empty")
	}
}
