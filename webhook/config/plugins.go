package config

import (
	"encoding/json"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

// Plugin is a plugin as its author wrote it.
type Plugin struct {
	// Plugin is what the workload manifest holds, without the platform of its image.
	workload.Plugin
	// Reference is the image with its repository, empty for a built-in plugin.
	Reference string
}

var imageRE = regexp.MustCompile(`^[^@\s]+@(sha256:[0-9a-f]{64})$`)

// Digest returns the digest of an image reference NAME[:TAG]@DIGEST, or "" for everything else.
func Digest(reference string) string {
	if m := imageRE.FindStringSubmatch(reference); m != nil {
		return m[1]
	}
	return ""
}

var pluginTable = table[Plugin]{
	either: []string{"builtin", "image"}, oneOf: "a plugin is either builtin or an image",
	rows: []row[Plugin]{
		{Field{
			Key: "name", Type: "DNS label", Required: needed, Measured: true, Schema: text,
			Sentence: "Name of the plugin, for logs and errors.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) { r.value(p, raw, &out.Name, "a name") }},
		{Field{
			Key: "type", Type: "`" + strings.Join(workload.PluginTypes(), "`, `") + "`", Required: needed, Measured: true, Schema: choice(workload.PluginTypes()...),
			Sentence: "What the plugin does.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) {
			if types := workload.PluginTypes(); r.value(p, raw, &out.Type, "one of "+strings.Join(types, ", ")) && !slices.Contains(types, out.Type) {
				r.errs = append(r.errs, field.NotSupported(p, out.Type, types))
			}
		}},
		{Field{
			Key: "builtin", Type: "text", Measured: true, Schema: text,
			Sentence: "Name of a plugin that is part of the EIF.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) {
			r.value(p, raw, &out.Builtin, "the name of a built-in plugin")
		}},
		{Field{
			Key: "image", Type: "`name@sha256:…`", Measured: true, Schema: text,
			Sentence: "Image of a plugin of your own. Its digest is measured, its repository is not.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) {
			out.Reference, out.Image = r.image(p, raw)
		}},
		{Field{
			Key: "required", Type: "boolean", Default: "`true` of `authentication`, else `false`", Measured: true, Schema: boolean,
			Sentence: "Whether requests fail while the plugin is down or pass unchecked.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) {
			r.value(p, raw, &out.Required, "true or false")
		}},
		{Field{
			Key: "timeout", Type: "duration, `1ms` to `10s`", Default: "`" + workload.DefaultPluginTimeout.String() + "`", Measured: true, Schema: text,
			Sentence: "How long an authentication plugin may take for a request.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) { out.TimeoutMs = r.timeout(p, raw) }},
		{Field{
			Key: "egress", Type: "list of `host:port`", Measured: true, Schema: listOf(text),
			Sentence: "What the plugin may reach, beside what a built-in one's `config` names.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) { out.Egress = r.egress(p, raw) }},
		{Field{
			Key: "headers", Type: "list of header names", Measured: true, Schema: listOf(text),
			Sentence: "Headers of requests that an image's plugin sets.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, out *Plugin) { out.Headers = r.headers(p, raw) }},
		{Field{
			Key: "config", Type: "mapping", Measured: true, Schema: anyMap,
			Sentence: "A built-in plugin's settings, or any mapping that yours understands.",
		}, func(*reader, *field.Path, json.RawMessage, *Plugin) {}}, // plugin reads it when the rest is known
	},
}

var pluginList = Schema{"type": "array", "items": pluginTable.schema(), "maxItems": workload.MaxPlugins}

const needed = "a plugin needs a name and a type"

// image reads an image reference with a digest.
func (r *reader) image(p *field.Path, raw json.RawMessage) (reference string, image *workload.Image) {
	if !r.value(p, raw, &reference, "an image reference") {
		return "", nil
	}
	digest := Digest(reference)
	if digest == "" {
		r.errs = append(r.errs, field.Invalid(p, reference, "the enclave must know which image it runs: name it by digest, as in registry/name@sha256:…"))
		return "", nil
	}
	return reference, &workload.Image{Digest: digest}
}

// plugins reads the list of plugins. What remains to be checked is checked with the whole manifest.
func (r *reader) plugins(p *field.Path, raw json.RawMessage) []Plugin {
	var list []json.RawMessage
	if !r.value(p, raw, &list, "a list of plugins") {
		return nil
	}
	// Each of them may be dear to check.
	if len(list) > workload.MaxPlugins {
		r.errs = append(r.errs, field.TooMany(p, len(list), workload.MaxPlugins))
		return nil
	}
	var out []Plugin
	for i, raw := range list {
		if plugin, ok := r.plugin(p.Index(i), raw); ok {
			out = append(out, plugin)
		}
	}
	return out
}

func (r *reader) plugin(p *field.Path, raw json.RawMessage) (out Plugin, ok bool) {
	before := len(r.errs)
	fields, ok := pluginTable.read(r, p, raw, &out)
	if !ok {
		return out, false
	}
	_, image := fields["image"]
	_, builtin := fields["builtin"]
	if names := workload.Builtins(out.Type); builtin && !image && len(names) > 0 && !slices.Contains(names, out.Builtin) {
		r.errs = append(r.errs, field.NotSupported(p.Child("builtin"), out.Builtin, names))
	}
	// Whoever names an authentication plugin wants requests to be checked: letting them pass while it is
	// down must be said.
	if _, ok := fields["required"]; !ok && out.Type == workload.PluginAuthentication {
		out.Required = true
	}
	if len(r.errs) > before {
		return out, false
	}
	config := p.Child("config")
	for _, err := range Unjoin(out.SetConfig(fields["config"])) {
		r.errs = append(r.errs, field.Invalid(config, field.OmitValueType{}, err.Error()))
	}
	return out, len(r.errs) == before
}

// timeout reads a duration in whole milliseconds; the default is left out.
func (r *reader) timeout(p *field.Path, raw json.RawMessage) uint32 {
	var text string
	if !r.value(p, raw, &text, `a duration such as "500ms"`) {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Millisecond || d > 10*time.Second || d%time.Millisecond != 0 {
		r.errs = append(r.errs, field.Invalid(p, text, `write a duration from "1ms" to "10s"`))
		return 0
	}
	if d == workload.DefaultPluginTimeout {
		return 0
	}
	return uint32(d.Milliseconds())
}

// headers reads names of headers in any order and case.
func (r *reader) headers(p *field.Path, raw json.RawMessage) []string {
	var raws []json.RawMessage
	if !r.value(p, raw, &raws, "a list of header names") {
		return nil
	}
	list := make([]string, len(raws))
	for i, raw := range raws {
		r.value(p.Index(i), raw, &list[i], "the name of a header")
		list[i] = strings.ToLower(list[i])
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// Unjoin returns the errors that errors.Join put together.
func Unjoin(err error) []error {
	var joined interface{ Unwrap() []error }
	switch {
	case err == nil:
		return nil
	case errors.As(err, &joined):
		return joined.Unwrap()
	}
	return []error{err}
}
