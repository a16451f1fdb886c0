package workload

import (
	"bytes"
	"encoding/json"
	"math/rand"
	"reflect"
	"testing"
	"testing/quick"

	"github.com/google/go-cmp/cmp"
	"github.com/gowebpki/jcs"
)

// detour is the RFC 8785 form by others.
func detour(t *testing.T, m any) string {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(m); err != nil {
		t.Fatal(err)
	}
	out, err := jcs.Transform(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// tame brings a random value into what a manifest can hold: integers below 2^53, plugins' configs that are
// JSON, keys that stay different in UTF-8.
func tame(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			tame(v.Elem())
		}
	case reflect.Int, reflect.Int64:
		v.SetInt(v.Int() % maxSafeInteger)
	case reflect.Struct:
		for i := range v.NumField() {
			tame(v.Field(i))
		}
	case reflect.Slice:
		if v.Type() == reflect.TypeFor[json.RawMessage]() {
			v.SetBytes([]byte(`{"b": 1.50, "a": [1e3, "\u20ac"], "B": null}`))
			return
		}
		for i := range v.Len() {
			tame(v.Index(i))
		}
	}
}

// TestCanonicalIsRFC8785 compares with an implementation by others, on random manifests.
func TestCanonicalIsRFC8785(t *testing.T) {
	r := rand.New(rand.NewSource(1)) //nolint:gosec // not for secrets
	for range 500 {
		v, ok := quick.Value(reflect.TypeFor[*Manifest](), r)
		if !ok {
			t.Fatal("a field of the manifest has a type of which there is no random value")
		}
		tame(v)
		m := v.Interface().(*Manifest)
		got, err := appendCanonical(nil, v)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(detour(t, m), string(got)); diff != "" {
			t.Fatalf("(-jcs +got):\n%s", diff)
		}
	}
	for name, m := range map[string]*Manifest{
		"full":    full(),
		"nothing": {},
		"texts":   {Args: []string{"", "\x00\x01\b\t\n\f\r\x1f\x7f\"\\/", "<&>\u2028\u2029", "€😀\ufb33", "\xff\xc3"}},
		"keys": {Secrets: []Secret{{EncryptionContext: map[string]string{
			"\u20ac": "1", "\r": "2", "\ufb33": "3", "1": "4", "😀": "5", "\u0080": "6", "ö": "7", "</script>": "8",
		}}}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := appendCanonical(nil, reflect.ValueOf(m))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(detour(t, m), string(got)); diff != "" {
				t.Errorf("(-jcs +got):\n%s", diff)
			}
		})
	}
	big := int64(maxSafeInteger) + 1
	if b, err := appendCanonical(nil, reflect.ValueOf(&Manifest{User: &User{UID: &big}})); err == nil {
		t.Errorf("an integer that JSON numbers do not hold gave %s", b)
	}
}

// Every type below Manifest has fields with a name in JSON and no option but omitempty: the encoder knows no more.
func TestCanonicalKnowsEveryTag(t *testing.T) {
	seen := map[reflect.Type]bool{}
	var walk func(reflect.Type)
	walk = func(typ reflect.Type) {
		switch typ.Kind() {
		case reflect.Pointer, reflect.Slice:
			walk(typ.Elem())
		case reflect.Struct:
			if seen[typ] {
				return
			}
			seen[typ] = true
			for i := range typ.NumField() {
				f := typ.Field(i)
				name, rest, _ := bytes.Cut([]byte(f.Tag.Get("json")), []byte(","))
				if len(name) == 0 || string(name) == "-" || f.Anonymous || !f.IsExported() || (len(rest) > 0 && string(rest) != "omitempty") {
					t.Errorf("%s.%s: appendStruct does not know the tag %q", typ, f.Name, f.Tag)
				}
				walk(f.Type)
			}
		}
	}
	walk(reflect.TypeFor[Manifest]())
	if len(seen) < 10 {
		t.Errorf("only %d types seen", len(seen))
	}
}
