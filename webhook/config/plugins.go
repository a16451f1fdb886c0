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

var (
	pluginFields = []string{"name", "type", "builtin", "image", "required", "timeout", "egress", "headers", "config"}
	imageRE      = regexp.MustCompile(`^[^@\s]+@(sha256:[0-9a-f]{64})$`)
)

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
	fields, ok := r.object(p, raw)
	if !ok {
		return out, false
	}
	before := len(r.errs)
	for _, key := range sorted(fields) {
		p, raw := p.Child(key), fields[key]
		switch key {
		case "name":
			r.value(p, raw, &out.Name, "a name")
		case "type":
			if types := workload.PluginTypes(); r.value(p, raw, &out.Type, "one of "+strings.Join(types, ", ")) && !slices.Contains(types, out.Type) {
				r.errs = append(r.errs, field.NotSupported(p, out.Type, types))
			}
		case "builtin":
			r.value(p, raw, &out.Builtin, "the name of a built-in plugin")
		case "image":
			if !r.value(p, raw, &out.Reference, "an image reference") {
				continue
			}
			m := imageRE.FindStringSubmatch(out.Reference)
			if m == nil {
				r.errs = append(r.errs, field.Invalid(p, out.Reference, "the enclave must know which image it runs: name it by digest, as in registry/name@sha256:…"))
				continue
			}
			out.Image = &workload.Image{Digest: m[1]}
		case "required":
			r.value(p, raw, &out.Required, "true or false")
		case "timeout":
			out.TimeoutMs = r.timeout(p, raw)
		case "egress":
			out.Egress = r.egress(p, raw)
		case "headers":
			out.Headers = r.headers(p, raw)
		case "config":
		default:
			r.unknown(p, key, pluginFields)
		}
	}
	for _, key := range []string{"name", "type"} {
		if _, ok := fields[key]; !ok {
			r.errs = append(r.errs, field.Required(p.Child(key), "a plugin needs a name and a type"))
		}
	}
	_, image := fields["image"]
	_, builtin := fields["builtin"]
	if names := workload.Builtins(out.Type); image == builtin {
		r.errs = append(r.errs, field.Required(p, "a plugin is either builtin or an image"))
	} else if builtin && len(names) > 0 && !slices.Contains(names, out.Builtin) {
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
	var list []string
	if !r.value(p, raw, &list, "a list of header names") {
		return nil
	}
	for i := range list {
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
