package config

import (
	"encoding/json"
	"path"
	"slices"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

// hostEnv reads names of variables that the host may supply although they are refused otherwise.
func (r *reader) hostEnv(p *field.Path, raw json.RawMessage) []string {
	return r.set(p, raw, "the name of a variable", asWritten, func(p *field.Path, name string) {
		if !workload.RefusedEnv(name) {
			r.errs = append(r.errs, field.Invalid(p, name, "the host may supply it without being named here: remove it"))
		}
	})
}

// hostFiles reads the mount paths of emptyDir volumes that other containers of the pod share.
func (r *reader) hostFiles(p *field.Path, raw json.RawMessage) []string {
	return r.set(p, raw, "the path of a mount", asWritten, func(p *field.Path, dir string) {
		if !path.IsAbs(dir) || path.Clean(dir) != dir {
			r.errs = append(r.errs, field.Invalid(p, dir, "write the absolute path of a mount, without a slash at its end"))
		}
	})
}

// asWritten is the normal form of texts that have only one.
func asWritten(text string) string { return text }

// set reads a list of texts in any order that are different once each is in its normal form.
func (r *reader) set(p *field.Path, raw json.RawMessage, what string, normal func(string) string, check func(*field.Path, string)) []string {
	var list []json.RawMessage
	if !r.value(p, raw, &list, "a list") {
		return nil
	}
	var out []string
	for i, raw := range list {
		p := p.Index(i)
		var text string
		if !r.value(p, raw, &text, what) {
			continue
		}
		if text = normal(text); slices.Contains(out, text) {
			r.errs = append(r.errs, field.Duplicate(p, text))
			continue
		}
		check(p, text)
		out = append(out, text)
	}
	slices.Sort(out)
	return out
}
