package strictjson

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// read takes {"a":"text","list":["text",…]}.
func read(in string) (out []string, err error) {
	dec := json.NewDecoder(strings.NewReader(in))
	text := func() error {
		s, err := String(dec, "a text")
		out = append(out, s)
		return err
	}
	err = Object(dec, "the whole", func(key string) error {
		switch key {
		case "a":
			return text()
		case "list":
			return Array(dec, key, text)
		}
		return fmt.Errorf("no field %q", key)
	})
	if err == nil {
		err = End(dec)
	}
	return out, err
}

func TestRead(t *testing.T) {
	for name, tt := range map[string]struct{ in, want, err string }{
		"all":              {in: ` {"list": ["b", "c"], "a": "d"} `, want: "b c d"},
		"nothing":          {in: `{}`},
		"empty list":       {in: `{"list":[]}`},
		"escaped name":     {in: `{"\u0061":"x"}`, want: "x"},
		"no input":         {in: "", err: "unexpected EOF"},
		"a list":           {in: "[]", err: "the whole must be a JSON object"},
		"null":             {in: "null", err: "the whole must be a JSON object"},
		"twice":            {in: `{"a":"x","a":"x"}`, err: `the whole has the field "a" twice`},
		"twice, escaped":   {in: `{"a":"x","\u0061":"x"}`, err: `the field "a" twice`},
		"another case":     {in: `{"A":"x"}`, err: `no field "A"`},
		"cut":              {in: `{"a":`, err: "unexpected EOF"},
		"cut in the list":  {in: `{"list":["x"`, err: "unexpected EOF"},
		"data that follow": {in: `{}{}`, err: "data follows"},
		"garbage":          {in: `{"a":"x"} x`, err: "data follows"},
		"number":           {in: `{"a":1}`, err: "a text must be a string that is not empty"},
		"empty":            {in: `{"list":[""]}`, err: "a text must be a string that is not empty"},
		"object for list":  {in: `{"list":{}}`, err: "list must be a JSON array"},
		"list in a list":   {in: `{"list":[[]]}`, err: "a text must be"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := read(tt.in)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || strings.Join(got, " ") != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}
