package oidc

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"strings"
	"testing"
)

func TestSetup(t *testing.T) {
	ca := string(newIssuer(t).ca)
	config := func(change func(map[string]any)) string {
		c := map[string]any{"issuer": "https://id.example/realms/a", "audience": "shop", "ca": ca}
		change(c)
		b, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	tests := map[string]struct {
		config string
		err    string // empty: valid
	}{
		"least": {config(func(map[string]any) {}), ""},
		"everything": {config(func(c map[string]any) {
			c["scopes"] = []string{"a", "b"}
			c["algorithms"] = []string{"EdDSA", "PS256"}
			c["claims"] = map[string]string{"email": "x-user-email"}
		}), ""},
		"nothing":           {"", "issuer"},
		"not an object":     {"[]", "cannot unmarshal"},
		"unknown field":     {config(func(c map[string]any) { c["issuerr"] = "x" }), `unknown field "issuerr"`},
		"plain http":        {config(func(c map[string]any) { c["issuer"] = "http://id.example" }), "https URL"},
		"issuer with query": {config(func(c map[string]any) { c["issuer"] = "https://id.example/?a" }), "https URL"},
		"issuer is local":   {config(func(c map[string]any) { c["issuer"] = "https://localhost/" }), "means the enclave itself"},
		"no audience":       {config(func(c map[string]any) { delete(c, "audience") }), "audience is missing"},
		"no CA":             {config(func(c map[string]any) { delete(c, "ca") }), "no root certificates"},
		"CA is a key":       {config(func(c map[string]any) { c["ca"] = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n" }), "is not a certificate"},
		"CA and more":       {config(func(c map[string]any) { c["ca"] = ca + "more" }), "and nothing else"},
		"symmetric":         {config(func(c map[string]any) { c["algorithms"] = []string{"HS256"} }), `"HS256" is not one of`},
		"none":              {config(func(c map[string]any) { c["algorithms"] = []string{"none"} }), `"none" is not one of`},
		"not a scope":       {config(func(c map[string]any) { c["scopes"] = []string{"a b"} }), "is not a scope"},
		"header of HTTP":    {config(func(c map[string]any) { c["claims"] = map[string]string{"a": "host"} }), "cannot be set by a plugin"},
		"header twice":      {config(func(c map[string]any) { c["claims"] = map[string]string{"a": "x-cloister-sub"} }), "set twice"},
		"header in capital": {config(func(c map[string]any) { c["claims"] = map[string]string{"a": "X-A"} }), "lower case"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Setup(json.RawMessage(test.config), func(context.Context, string) (net.Conn, error) { return nil, errors.New("no way") })
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Errorf("got %v, want %q", err, test.err)
			}
		})
	}
}
