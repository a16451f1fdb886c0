package workload

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var ciphertext = base64.StdEncoding.EncodeToString([]byte("what KMS has encrypted"))

func withSecrets(t *testing.T) *Manifest {
	return &Manifest{
		APIVersion: APIVersion, Image: Image{Digest: digest},
		Secrets: []Secret{
			{Name: "password", Ciphertext: ciphertext, Env: "DB_PASSWORD", EncryptionContext: map[string]string{"workload": "web"}},
			{Name: "token", Ciphertext: ciphertext, File: "/run/secrets/token"},
		},
		KMS: &KMS{Region: "eu-central-1", Certificate: &Certificate{Chain: authority(t), Key: ciphertext}},
		TLS: TLSKMS,
	}
}

func TestKMS(t *testing.T) {
	m := withSecrets(t)
	c, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(c)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(m, got); d != "" {
		t.Errorf("parsed manifest differs (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"kms.eu-central-1.amazonaws.com:443"}, m.Endpoints()); d != "" {
		t.Errorf("endpoints (-want +got):\n%s", d)
	}

	long := base64.StdEncoding.EncodeToString(make([]byte, maxCiphertext+1))
	for name, tt := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"secrets alone":          {func(m *Manifest) { m.KMS, m.TLS = nil, "" }, "need kms"},
		"tls alone":              {func(m *Manifest) { m.KMS, m.Secrets = nil, nil }, "need kms"},
		"kms alone":              {func(m *Manifest) { m.Secrets, m.TLS, m.KMS.Certificate = nil, "", nil }, "kms must be left out"},
		"tls without key":        {func(m *Manifest) { m.KMS.Certificate = nil }, "go together"},
		"certificate unused":     {func(m *Manifest) { m.TLS = "" }, "go together"},
		"unknown tls":            {func(m *Manifest) { m.TLS = "acme" }, `tls "acme"`},
		"no region":              {func(m *Manifest) { m.KMS.Region = "" }, "kms.region"},
		"http":                   {func(m *Manifest) { m.KMS.Endpoint = "http://kms.example" }, "must be https://"},
		"endpoint with a path":   {func(m *Manifest) { m.KMS.Endpoint = "https://kms.example/" }, "must be https://"},
		"default endpoint":       {func(m *Manifest) { m.KMS.Endpoint = "https://kms.eu-central-1.amazonaws.com" }, "left out"},
		"default port":           {func(m *Manifest) { m.KMS.Endpoint = "https://kms.example:443" }, "left out"},
		"endpoint in here":       {func(m *Manifest) { m.KMS.Endpoint = "https://127.0.0.1" }, "the enclave itself"},
		"ca":                     {func(m *Manifest) { m.KMS.CA = "Amazon" }, "kms.ca: give PEM"},
		"chain":                  {func(m *Manifest) { m.KMS.Certificate.Chain += "x" }, "chain: give PEM"},
		"key in the open":        {func(m *Manifest) { m.KMS.Certificate.Key = "-----BEGIN PRIVATE KEY-----" }, "key: it must be base64"},
		"name":                   {func(m *Manifest) { m.Secrets[0].Name = "A b" }, "lower case letters"},
		"name twice":             {func(m *Manifest) { m.Secrets[0].Name = "token" }, "listed twice"},
		"no base64":              {func(m *Manifest) { m.Secrets[0].Ciphertext = "c2VjcmV0=" }, "must be base64"},
		"two lines":              {func(m *Manifest) { m.Secrets[0].Ciphertext = ciphertext[:4] + "\n" + ciphertext[4:] }, "must be base64"},
		"no ciphertext":          {func(m *Manifest) { m.Secrets[0].Ciphertext = "" }, "must be base64"},
		"too long":               {func(m *Manifest) { m.Secrets[0].Ciphertext = long }, "at most 6144"},
		"env and file":           {func(m *Manifest) { m.Secrets[0].File = "/a" }, "exactly one of env and file"},
		"neither":                {func(m *Manifest) { m.Secrets[0].Env = "" }, "exactly one of env and file"},
		"env name":               {func(m *Manifest) { m.Secrets[0].Env = "A=B" }, "letters, digits and underscores"},
		"env of the pod":         {func(m *Manifest) { m.Env = []EnvVar{{Name: "DB_PASSWORD", Value: "x"}} }, "is in the pod too"},
		"same file":              {func(m *Manifest) { m.Secrets[0].Env, m.Secrets[0].File = "", "/run/secrets/token" }, "another secret"},
		"relative file":          {func(m *Manifest) { m.Secrets[1].File = "token" }, "absolute"},
		"file of the kernel":     {func(m *Manifest) { m.Secrets[1].File = "/proc/sys/kernel/core_pattern" }, "outside of /dev"},
		"file is a mount":        {func(m *Manifest) { m.Mounts = []Mount{{Path: "/run/secrets/token", Kind: MountTmpfs}} }, "path of a mount"},
		"context without a name": {func(m *Manifest) { m.Secrets[0].EncryptionContext[""] = "x" }, "empty name"},
	} {
		t.Run(name, func(t *testing.T) {
			m := withSecrets(t)
			tt.change(m)
			if _, err := m.Canonical(); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestKMSAddress(t *testing.T) {
	for text, want := range map[string]string{
		`{"region":"eu-central-1"}`:  "kms.eu-central-1.amazonaws.com:443",
		`{"region":"cn-north-1"}`:    "kms.cn-north-1.amazonaws.com.cn:443",
		`{"region":"us-gov-west-1"}`: "kms.us-gov-west-1.amazonaws.com:443",
		`{"region":"us-east-1","endpoint":"https://kms-fips.us-east-1.amazonaws.com"}`: "kms-fips.us-east-1.amazonaws.com:443",
		`{"region":"us-east-1","endpoint":"https://10.0.0.7:8443"}`:                    "10.0.0.7:8443",
	} {
		var k KMS
		if err := json.Unmarshal([]byte(text), &k); err != nil {
			t.Fatal(err)
		}
		m := &Manifest{APIVersion: APIVersion, Image: Image{Digest: digest}, KMS: &k, Secrets: []Secret{{Name: "a", Ciphertext: ciphertext, Env: "A"}}}
		if err := m.Validate(); err != nil || k.Address() != want {
			t.Errorf("%s: %q, %v; want %q", text, k.Address(), err, want)
		}
	}
}
