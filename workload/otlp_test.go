package workload

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"slices"
	"strings"
	"testing"
)

func authority(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestTelemetryPlugins(t *testing.T) {
	ca := authority(t)
	text := func(v any) json.RawMessage {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	otlp := text(map[string]any{"endpoint": "collector.example:4317", "ca": ca})
	logging := Plugin{Name: "logs", Type: PluginLogging, Builtin: "otlp"}
	telemetry := Plugin{Name: "telemetry", Type: PluginTelemetry, Builtin: "otlp"}
	stdout := Plugin{Name: "logs", Type: PluginLogging, Builtin: "stdout"}
	with := func(p Plugin, change func(*Plugin)) Plugin { change(&p); return p }
	for name, test := range map[string]struct {
		plugins []Plugin
		config  json.RawMessage
		logs    string
		want    string // empty: valid
	}{
		"both":              {[]Plugin{logging, telemetry}, otlp, "", ""},
		"console silent":    {[]Plugin{logging}, otlp, "otlp", ""},
		"redaction":         {[]Plugin{stdout}, text(map[string]any{"redact": []string{`(?i)token=\S+`}}), "", ""},
		"nothing to redact": {[]Plugin{stdout}, nil, "", ""},
		"no authority":      {[]Plugin{telemetry}, text(map[string]any{"endpoint": "collector.example:4317"}), "", "ca must hold the certificate"},
		"a key as ca":       {[]Plugin{telemetry}, text(map[string]any{"endpoint": "a.example:1", "ca": "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"}), "", "is not a certificate"},
		"more than a ca":    {[]Plugin{telemetry}, text(map[string]any{"endpoint": "a.example:1", "ca": ca + "-----BEGIN CERTIFICATE-----\nAAAA"}), "", "nothing else"},
		"no endpoint":       {[]Plugin{telemetry}, text(map[string]any{"ca": ca}), "", "endpoint"},
		"bad expression":    {[]Plugin{stdout}, text(map[string]any{"redact": []string{"("}}), "", "redact[0] is not a regular expression"},
		"matches nothing":   {[]Plugin{stdout}, text(map[string]any{"redact": []string{"a*"}}), "", "must match something"},
		"usual expressions": {[]Plugin{stdout}, text(map[string]any{"redact": []string{`\b(?:\d[ -]?){13,19}\b`, `eyJ[\w-]{8,}\.[\w-]+\.[\w-]*`, `[\pL\pN]{1,64}@\S{1,255}`}}), "", ""},
		"too large":         {[]Plugin{stdout}, text(map[string]any{"redact": []string{strings.Repeat(".{1000}", 20)}}), "", "redact[0] makes the expressions too large"},
		"too large at last": {[]Plugin{stdout}, text(map[string]any{"redact": slices.Repeat([]string{"a.{0,999}"}, 20)}), "", "redact[8] makes the expressions too large"},
		"large classes":     {[]Plugin{stdout}, text(map[string]any{"redact": []string{strings.Repeat(`\pL`, 1000)}}), "", "too large"},
		"too long":          {[]Plugin{stdout}, text(map[string]any{"redact": []string{strings.Repeat(".{1000}", 600)}}), "", "at most 4096 bytes"},
		"too many":          {[]Plugin{stdout}, text(map[string]any{"redact": slices.Repeat([]string{"("}, 65)}), "", "redact has 65 expressions"},
		"unknown field":     {[]Plugin{stdout}, otlp, "", "unknown field"},
		"two":               {[]Plugin{logging, with(logging, func(p *Plugin) { p.Name = "other" })}, otlp, "", "more than one plugin of type logging"},
		"required":          {[]Plugin{with(telemetry, func(p *Plugin) { p.Required = true })}, otlp, "", "never holds the workload up"},
		"logs to nowhere":   {[]Plugin{telemetry}, otlp, "otlp", "no logging plugin otlp"},
		"logs to console":   {[]Plugin{stdout}, nil, "otlp", "no logging plugin otlp"},
		"unknown logs":      {[]Plugin{logging}, otlp, "loki", `logs "loki"`},
	} {
		t.Run(name, func(t *testing.T) {
			m := &Manifest{APIVersion: APIVersion, Image: Image{Digest: "sha256:" + strings.Repeat("a", 64)}, Logs: test.logs}
			var err error
			for _, p := range test.plugins {
				if err == nil {
					err = p.SetConfig(test.config)
				}
				m.Plugins = append(m.Plugins, p)
			}
			if err == nil {
				_, err = m.Canonical()
			}
			switch {
			case test.want == "" && err != nil:
				t.Error(err)
			case test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)):
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}
