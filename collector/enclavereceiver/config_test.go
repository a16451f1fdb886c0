package enclavereceiver

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/confmaptest"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload/signed"
)

func load(t *testing.T, file string) *Config {
	t.Helper()
	m, err := confmaptest.LoadConf(file)
	if err != nil {
		t.Fatal(err)
	}
	c := createDefaultConfig().(*Config)
	if err := m.Unmarshal(c); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestConfig(t *testing.T) {
	c := load(t, "testdata/config.yaml")
	if err := confmap.Validate(c); err != nil {
		t.Fatal(err)
	}
	if c.NetAddr.Endpoint != "0.0.0.0:4317" || c.MaxAge != attestation.DefaultMaxAge || c.Measurements != "measurements.json" || c.Root != "" {
		t.Errorf("got %+v", c)
	}
	if age := c.Keepalive.Get().ServerParameters.Get().MaxConnectionAge; age != connectionAge {
		t.Errorf("connections live %s", age)
	}
}

// A key that has no value does not count as none.
func TestEmptyKey(t *testing.T) {
	for _, value := range []any{nil, ""} {
		m := confmap.NewFromStringMap(map[string]any{"measurements": "m.json", "measurements_key": value})
		if err := m.Unmarshal(createDefaultConfig()); err == nil || !strings.Contains(err.Error(), "measurements_key is empty") {
			t.Errorf("%v: %v", value, err)
		}
	}
}

// Each bad configuration has a golden with its errors.
func TestConfigRefused(t *testing.T) {
	files, err := filepath.Glob("testdata/bad-*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no bad configurations", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			want, err := os.ReadFile(strings.TrimSuffix(file, "yaml") + "txt")
			if err != nil {
				t.Fatal(err)
			}
			got := confmap.Validate(load(t, file))
			if got == nil || got.Error() != strings.TrimSpace(string(want)) {
				t.Errorf("got  %v\nwant %s", got, want)
			}
		})
	}
}

// A signed set counts with the key of its signer alone, and with that key no other set does.
func TestSignedMeasurements(t *testing.T) {
	w := newWorld(t)
	plain, err := os.ReadFile(w.config.Measurements)
	if err != nil {
		t.Fatal(err)
	}
	set, err := signed.Parse(plain, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := newKey(t)
	envelope, err := signed.Sign(set, key)
	if err != nil {
		t.Fatal(err)
	}
	public := func(key *ecdsa.PrivateKey) []byte {
		der, err := x509.MarshalPKIXPublicKey(key.Public())
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	}
	for name, tt := range map[string]struct {
		set, key []byte
		want     string // in the error
	}{
		"plain":             {plain, nil, ""},
		"signed":            {envelope, public(key), ""},
		"plain with key":    {plain, public(key), "not signed, and with measurements_key only a signed one counts"},
		"signed, no key":    {envelope, nil, "set measurements_key"},
		"signed by another": {envelope, public(newKey(t)), "not that of the given key"},
		"no key in PEM":     {envelope, plain, "no PEM block"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			c := *w.config
			c.Measurements = filepath.Join(dir, "set.json")
			if err := os.WriteFile(c.Measurements, tt.set, 0o600); err != nil {
				t.Fatal(err)
			}
			if tt.key != nil {
				c.MeasurementsKey = filepath.Join(dir, "key.pem")
				if err := os.WriteFile(c.MeasurementsKey, tt.key, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			v, err := c.verifier()
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) || (v == nil) != (err != nil) {
				t.Errorf("got %v, %v, want %q", v, err, tt.want)
			}
		})
	}
}
