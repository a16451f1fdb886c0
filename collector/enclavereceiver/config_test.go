package enclavereceiver

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.opentelemetry.io/collector/confmap"
	"go.opentelemetry.io/collector/confmap/confmaptest"

	"cloister.dev/cloister/attestation"
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
