package config

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

const head = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n"

var digits = strings.Repeat("ab", 32)

func TestParse(t *testing.T) {
	for name, tc := range map[string]struct {
		doc  string
		want *EnclaveConfig
		errs string // part of the only error
	}{
		"empty":                {doc: head, want: &EnclaveConfig{}},
		"JSON":                 {doc: `{"apiVersion":"cloister.dev/v1alpha1","kind":"EnclaveConfig","cpus":4}`, want: &EnclaveConfig{CPUs: 4}},
		"memory":               {doc: head + "memory: 1.5Gi", want: &EnclaveConfig{Memory: 3 << 29}},
		"memory in bytes":      {doc: head + "memory: 1048576", want: &EnclaveConfig{Memory: 1 << 20}},
		"ports":                {doc: head + "ports: [{port: 80}, {name: db, protocol: tcp, plaintext: true}]", want: &EnclaveConfig{Ports: []Port{{Port: 80}, {Name: "db", Protocol: "tcp", Plaintext: true}}}},
		"no document":          {doc: "", errs: "write a mapping"},
		"a list":               {doc: "[]", errs: "write a mapping"},
		"duplicate":            {doc: head + "cpus: 1\ncpus: 2", errs: "already set"},
		"an alias":             {doc: head + "x: &a [b]\ny:\n- *a", errs: "line 5 has the alias *a: write out what it stands for"},
		"an alias to merge":    {doc: head + "x: &a {b: c}\ny: {<<: *a}", errs: "has the alias *a"},
		"many plugins":         {doc: head + "plugins:\n" + strings.Repeat("- {}\n", 17), errs: "config.plugins: Too many: 17: must have at most 16 items"},
		"no kind":              {doc: "apiVersion: cloister.dev/v1alpha1", errs: "config.kind: Required value: write kind: EnclaveConfig"},
		"wrong apiVersion":     {doc: "apiVersion: v1\nkind: EnclaveConfig", errs: `supported values: "cloister.dev/v1alpha1"`},
		"misspelt":             {doc: head + "memmory: 1Gi", errs: `did you mean "memory"?`},
		"other case":           {doc: head + "Memory: 1Gi", errs: `config.Memory: Forbidden: there is no such field, did you mean "memory"?`},
		"far from all":         {doc: head + "replicas: 1", errs: "known are apiVersion, kind, memory, cpus, ports, egress, eif, hostEnv, hostFiles, kms, logs, pin, plugins, secrets, serviceAccountToken, tls"},
		"near what is not":     {doc: head + "debugs: true", errs: "there is no such field, known are apiVersion"},
		"not built":            {doc: head + "nsm: true", errs: "config.nsm: Forbidden: this setting is not built yet"},
		"eif":                  {doc: head + "eif: r.example:5000/app:1@sha256:" + digits, want: &EnclaveConfig{EIF: "r.example:5000/app:1@sha256:" + digits}},
		"eif by tag":           {doc: head + "eif: r.example/app:1", errs: "which `cloister eif push` prints"},
		"eif by another hash":  {doc: head + "eif: r.example/app@sha512:" + digits, errs: "which `cloister eif push` prints"},
		"eif of nothing":       {doc: head + "eif: ''", errs: "which `cloister eif push` prints"},
		"eif is a list":        {doc: head + "eif: []", errs: "config.eif: Invalid value: write an image reference"},
		"egress":               {doc: head + "egress: ['b.example:443', 'A.example:443', '10.0.0.1:80', '[2001:DB8::1]:80']", want: &EnclaveConfig{Egress: []string{"10.0.0.1:80", "[2001:db8::1]:80", "a.example:443", "b.example:443"}}},
		"no egress":            {doc: head + "egress: []", want: &EnclaveConfig{}},
		"egress twice":         {doc: head + "egress: ['a:1', 'A:1']", errs: "config.egress[1]: Duplicate value"},
		"egress without port":  {doc: head + "egress: [example.org]", errs: "config.egress[0]: Invalid value: \"example.org\": write host:port"},
		"egress is a URL":      {doc: head + "egress: ['https://example.org:443']", errs: "write host:port"},
		"egress to everything": {doc: head + "egress: ['*.example.org:443']", errs: "wildcards are not built yet"},
		"egress is a number":   {doc: head + "egress: [80]", errs: "config.egress[0]: Invalid value: write host:port"},
		"host":                 {doc: head + "hostEnv: [PATH, LD_PRELOAD]\nhostFiles: [/shared]\nserviceAccountToken: true", want: &EnclaveConfig{HostEnv: []string{"LD_PRELOAD", "PATH"}, HostFiles: []string{"/shared"}, ServiceAccountToken: true}},
		"hostEnv for nothing":  {doc: head + "hostEnv: [DB_HOST]", errs: `config.hostEnv[0]: Invalid value: "DB_HOST": the host may supply it without being named here`},
		"hostEnv twice":        {doc: head + "hostEnv: [PATH, PATH]", errs: "config.hostEnv[1]: Duplicate value"},
		"hostFiles relative":   {doc: head + "hostFiles: [shared]", errs: "write the absolute path of a mount"},
		"hostFiles a number":   {doc: head + "hostFiles: [1]", errs: "config.hostFiles[0]: Invalid value: write the path of a mount"},
		"token of words":       {doc: head + "serviceAccountToken: yes please", errs: "write true or false"},
		"misspelt, not built":  {doc: head + "hostFile: []", errs: `did you mean "hostFiles"?`},
		"secrets": {
			doc: head + "secrets: [{name: a, ciphertext: \"YWJj\\n ZGVm\", env: A, encryptionContext: {workload: web}}, {name: b, ciphertext: YWJj, file: /b, encryptionContext: {}}]",
			want: &EnclaveConfig{Secrets: []workload.Secret{
				{Name: "a", Ciphertext: "YWJjZGVm", Env: "A", EncryptionContext: map[string]string{"workload": "web"}}, {Name: "b", Ciphertext: "YWJj", File: "/b"},
			}},
		},
		"kms": {
			doc:  head + "tls: kms\nkms: {region: eu-central-1, endpoint: 'https://kms.eu-central-1.amazonaws.com', certificate: {chain: c, key: YWJj}}",
			want: &EnclaveConfig{TLS: "kms", KMS: &workload.KMS{Region: "eu-central-1", Certificate: &workload.Certificate{Chain: "c", Key: "YWJj"}}},
		},
		"kms elsewhere":         {doc: head + "kms: {region: eu-central-1, endpoint: 'https://kms.example', ca: x}", want: &EnclaveConfig{KMS: &workload.KMS{Region: "eu-central-1", Endpoint: "https://kms.example", CA: "x"}}},
		"tls by default":        {doc: head + "tls: ephemeral", want: &EnclaveConfig{}},
		"tls not built":         {doc: head + "tls: acme", errs: "acme is not built yet"},
		"unknown tls":           {doc: head + "tls: none", errs: `supported values: "ephemeral", "kms"`},
		"misspelt secret":       {doc: head + "secrets: [{nme: a}]", errs: `did you mean "name"?`},
		"misspelt kms":          {doc: head + "kms: {regio: a}", errs: `did you mean "region"?`},
		"misspelt certificate":  {doc: head + "kms: {certificate: {keys: a}}", errs: `did you mean "key"?`},
		"context of numbers":    {doc: head + "secrets: [{encryptionContext: {a: 1}}]", errs: "config.secrets[0].encryptionContext: Invalid value: write a mapping"},
		"no memory":             {doc: head + "memory: 0", errs: "write a quantity"},
		"endless memory":        {doc: head + "memory: 1Ei", errs: "at most 1Ti"},
		"memory of words":       {doc: head + "memory: much", errs: "write a quantity"},
		"null":                  {doc: head + "cpus: null", errs: "write a whole number"},
		"no cpus":               {doc: head + "cpus: 0", errs: "from 1 to 512"},
		"port is a string":      {doc: head + "ports: [{port: '80'}]", errs: "config.ports[0].port: Invalid value: write a port number"},
		"port 0":                {doc: head + "ports: [{port: 0}]", errs: "from 1 to 65535"},
		"two documents":         {doc: head + "---\n" + head + "memory: 1Gi", errs: "it has 2 YAML documents"},
		"neither port nor name": {doc: head + "ports: [{protocol: tcp}]", errs: "by either port or name"},
		"both":                  {doc: head + "ports: [{port: 1, name: a}]", errs: "by either port or name"},
		"misspelt port field":   {doc: head + "ports: [{port: 1, plaintex: true}]", errs: `did you mean "plaintext"?`},
		"plaintext of words":    {doc: head + "ports: [{port: 1, plaintext: 'yes'}]", errs: "write true or false"},
		"port is a number":      {doc: head + "ports: [80]", errs: "config.ports[0]: Invalid value: write a mapping"},
	} {
		t.Run(name, func(t *testing.T) {
			got, errs := Parse(tc.doc, field.NewPath("config"))
			if tc.errs != "" {
				if len(errs) != 1 || !strings.Contains(errs[0].Error(), tc.errs) {
					t.Errorf("errors %v, want one with %q", errs, tc.errs)
				}
				return
			}
			if len(errs) > 0 {
				t.Fatal(errs)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseReportsAllErrors(t *testing.T) {
	_, errs := Parse("memory: x\ncpus: y\neif: z\nfoo: 1", field.NewPath("config"))
	if len(errs) != 6 {
		t.Errorf("%d errors: %v", len(errs), errs)
	}
}

func TestNearest(t *testing.T) {
	known := []string{"memory", "cpus", "ports"}
	for word, want := range map[string]string{"memroy": "memory", "cpu": "cpus", "port": "ports", "ports": "ports", "": "", "banana": "", "memory-limit": ""} {
		if got := Nearest(word, known); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", word, got, want)
		}
	}
	long := strings.Repeat("a", 254)
	if got := Nearest(long, []string{long}); got != "" {
		t.Errorf("a word longer than any name is compared")
	}
	if got := Nearest(long[1:], []string{long, long[2:]}); got != long[2:] {
		t.Errorf("Nearest to a long name = %q", got)
	}
}

// FuzzParse: a config is either refused with a reason or within its limits.
func FuzzParse(f *testing.F) {
	f.Add(head + "memory: 1Gi\ncpus: 2\nports: [{port: 80, plaintext: true}]")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, doc string) {
		c, errs := Parse(doc, field.NewPath("config"))
		if (c == nil) == (len(errs) == 0) {
			t.Fatalf("config %v, errors %v", c, errs)
		}
		if c != nil && (c.Memory < 0 || c.Memory > MaxMemory || c.CPUs < 0 || c.CPUs > MaxCPUs) {
			t.Errorf("out of range: %+v", c)
		}
	})
}
