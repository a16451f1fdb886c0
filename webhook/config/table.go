package config

import (
	"encoding/json"
	"slices"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Field is one field of EnclaveConfig as people and the JSON Schema have it.
type Field struct {
	Key string
	// Type says for people what the value is.
	Type string
	// Default says for people what holds without it; empty where that is nothing.
	Default string
	// Sentence says for people what it does.
	Sentence string
	// Measured tells whether it is in the workload manifest and so in PCR16. What is not is the host's to change.
	Measured bool
	// Required is what an author without it is told; empty for a field that may be left out.
	Required string
	// Schema is the JSON Schema of the value.
	Schema Schema
	// Fields are those of the object that the value is, or of each object in its list.
	Fields []Field
}

// Schema is a JSON Schema (draft 2020-12).
type Schema map[string]any

// row is a Field with what reads it, which is nil for one that is not built yet.
type row[T any] struct {
	Field
	read func(r *reader, p *field.Path, raw json.RawMessage, into *T)
}

// table describes an object of the config: what reads it, the error about an unknown field, the docs and
// the JSON Schema all come from it.
type table[T any] struct {
	rows []row[T]
	// either are fields of which there must be exactly one; oneOf tells the author so.
	either []string
	oneOf  string
}

// read reads an object. It returns the fields that are there.
func (t *table[T]) read(r *reader, p *field.Path, raw json.RawMessage, into *T) (fields map[string]json.RawMessage, ok bool) {
	fields, ok = r.object(p, raw)
	if !ok {
		return nil, false
	}
	for i := range t.rows {
		if w := &t.rows[i]; w.Required != "" && fields[w.Key] == nil {
			r.errs = append(r.errs, field.Required(p.Child(w.Key), w.Required))
		}
	}
	for _, key := range sorted(fields) {
		i := slices.IndexFunc(t.rows, func(w row[T]) bool { return w.Key == key })
		switch {
		case i < 0:
			r.unknown(p.Child(key), key, t.keys())
		case t.rows[i].read == nil:
			r.errs = append(r.errs, field.Forbidden(p.Child(key), "this setting is not built yet: remove it"))
		default:
			t.rows[i].read(r, p.Child(key), fields[key], into)
		}
	}
	n := 0
	for _, key := range t.either {
		if _, ok := fields[key]; ok {
			n++
		}
	}
	if len(t.either) > 0 && n != 1 {
		r.errs = append(r.errs, field.Required(p, t.oneOf))
	}
	return fields, true
}

// readList reads a list of objects; those that are none are left out.
func (t *table[T]) readList(r *reader, p *field.Path, raw json.RawMessage, what string) []T {
	var list []json.RawMessage
	if !r.value(p, raw, &list, what) {
		return nil
	}
	var out []T
	for i, raw := range list {
		var entry T
		if _, ok := t.read(r, p.Index(i), raw, &entry); ok {
			out = append(out, entry)
		}
	}
	return out
}

// keys are those of fields.
func (t *table[T]) keys() []string {
	var keys []string
	for _, f := range t.fields() {
		keys = append(keys, f.Key)
	}
	return keys
}

// fields returns what is built.
func (t *table[T]) fields() []Field {
	var out []Field
	for _, w := range t.rows {
		if w.read != nil {
			out = append(out, w.Field)
		}
	}
	return out
}

func (t *table[T]) schema() Schema {
	properties, required := Schema{}, []string{}
	for _, f := range t.fields() {
		value := Schema{"description": f.Sentence}
		for k, v := range f.Schema {
			value[k] = v
		}
		properties[f.Key] = value
		if f.Required != "" {
			required = append(required, f.Key)
		}
	}
	out := Schema{"type": "object", "additionalProperties": false, "properties": properties, "required": required}
	if len(t.either) > 0 {
		var one []Schema
		for _, key := range t.either {
			one = append(one, Schema{"required": []string{key}})
		}
		out["oneOf"] = one
	}
	return out
}

// Fields are the fields of EnclaveConfig that are built.
func Fields() []Field { return configTable.fields() }

// JSONSchema is the schema of an EnclaveConfig. It accepts whatever Parse accepts, and refuses what is not
// of the right shape: a field that is unknown or missing, a value of another kind.
func JSONSchema() Schema {
	s := configTable.schema()
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = Kind
	s["description"] = "The annotation cloister.dev/config of a pod."
	return s
}

// Shapes of values.
var (
	text    = Schema{"type": "string"}
	boolean = Schema{"type": "boolean"}
	anyMap  = Schema{"type": "object"}
	textMap = Schema{"type": "object", "additionalProperties": text}
)

func choice(values ...string) Schema { return Schema{"type": "string", "enum": values} }

func whole(least, most int64) Schema {
	return Schema{"type": "integer", "minimum": least, "maximum": most}
}

func listOf(entry Schema) Schema { return Schema{"type": "array", "items": entry} }
