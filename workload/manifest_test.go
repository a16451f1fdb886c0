package workload

import (
	"encoding/hex"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func ptr[T any](v T) *T { return &v }

var digest = "sha256:" + strings.Repeat("ab", 32)

func full() *Manifest {
	return &Manifest{
		APIVersion: APIVersion,
		Image:      Image{Digest: digest, Platform: "linux/arm64"},
		Command:    []string{"/bin/server", "--listen=$(ADDR)"},
		Args:       []string{"<&>", "\u2028", "ü"},
		Env:        []EnvVar{{Name: "B", Value: "2"}, {Name: "A"}},
		WorkingDir: "/srv",
		User:       &User{UID: ptr[int64](1000), GID: ptr[int64](0), Groups: []int64{5, 7}, NonRoot: true},
		Security:   &Security{NoNewPrivileges: true, ReadOnlyRoot: true, DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}},
		Ports:      []Port{{Name: "web", Port: 80}, {Port: 5432, Protocol: ProtocolTCP, Plaintext: true}},
		Probes: &Probes{
			Liveness:  &Probe{Exec: &Exec{Command: []string{"true"}}},
			Readiness: &Probe{HTTP: &HTTPGet{Port: 80, Path: "/ready", Scheme: "HTTPS", Headers: []Header{{"Host", "a"}}}},
		},
		Mounts: []Mount{{Path: "/tmp", Kind: MountTmpfs, SizeLimit: 1 << 20, ReadOnly: true}},
		Egress: []string{"10.0.0.1:80", "[2001:db8::1]:443", "example.org:443"},
	}
}

func TestCanonicalRoundTrip(t *testing.T) {
	for name, m := range map[string]*Manifest{
		"full":    full(),
		"minimal": {APIVersion: APIVersion, Image: Image{Digest: digest}},
	} {
		t.Run(name, func(t *testing.T) {
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
		})
	}
}

// The form and the register are contracts: a change here means that every measurement set that a client
// holds becomes worthless.
func TestCanonicalIsFixed(t *testing.T) {
	m := &Manifest{
		APIVersion: APIVersion,
		Image:      Image{Digest: digest},
		Args:       []string{"<&>", "ü"},
		Env:        []EnvVar{{Name: "K", Value: "v"}},
		Ports:      []Port{{Port: 80}},
	}
	c, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"apiVersion":"cloister.dev/v1alpha1","args":["<&>","ü"],"env":[{"name":"K","value":"v"}],"image":{"digest":"` + digest + `"},"ports":[{"port":80}]}`
	if string(c) != want {
		t.Errorf("canonical form\n got %s\nwant %s", c, want)
	}
	// printf '%s' "$want" | sha384sum, then printf '%096d' 0 with that digest, as bytes, through sha384sum.
	const pcr16 = "4ba0c200926bb35851629b1b9afce26d55f8bf7e8aeb0945002a5531b5beecdf4e29c05e802a268667b7fe5eeea14764"
	if got := hex.EncodeToString(PCR16(c)); got != pcr16 {
		t.Errorf("PCR16 %s, want %s", got, pcr16)
	}
}

func TestParseRefuses(t *testing.T) {
	ok := `{"apiVersion":"cloister.dev/v1alpha1","image":{"digest":"` + digest + `"}}`
	if _, err := Parse([]byte(ok)); err != nil {
		t.Fatal(err)
	}
	image := `"image":{"digest":"` + digest + `"}`
	for name, c := range map[string]string{
		"empty":            ``,
		"space":            ` ` + ok,
		"trailing newline": ok + "\n",
		"trailing value":   ok + "{}",
		"other order":      `{` + image + `,"apiVersion":"cloister.dev/v1alpha1"}`,
		"unknown field":    `{"apiVersion":"cloister.dev/v1alpha1",` + image + `,"kind":"x"}`,
		"duplicate field":  `{"apiVersion":"cloister.dev/v1alpha1","apiVersion":"cloister.dev/v1alpha1",` + image + `}`,
		"field by case":    `{"ApiVersion":"cloister.dev/v1alpha1",` + image + `}`,
		"escaped letter":   `{"apiVersion":"cloister.dev/v1alph\u0061` + `1",` + image + `}`,
		"spelled default":  `{"apiVersion":"cloister.dev/v1alpha1","args":[],` + image + `}`,
		"null":             `{"apiVersion":"cloister.dev/v1alpha1","args":null,` + image + `}`,
		"float":            `{"apiVersion":"cloister.dev/v1alpha1",` + image + `,"ports":[{"port":80.0}]}`,
		"beyond 2^53":      `{"apiVersion":"cloister.dev/v1alpha1",` + image + `,"mounts":[{"kind":"tmpfs","path":"/t","sizeLimit":9007199254740993}]}`,
		"other version":    `{"apiVersion":"cloister.dev/v1",` + image + `}`,
		"lone surrogate":   `{"apiVersion":"cloister.dev/v1alpha1","args":["\ud800"],` + image + `}`,
		"too large":        `{"apiVersion":"cloister.dev/v1alpha1","args":["` + strings.Repeat("a", MaxManifestSize) + `"],` + image + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			if m, err := Parse([]byte(c)); err == nil {
				t.Errorf("parsed as %+v", m)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"digest":              {func(m *Manifest) { m.Image.Digest = "nginx:1" }, "image.digest"},
		"default platform":    {func(m *Manifest) { m.Image.Platform = "linux/amd64" }, "image.platform"},
		"env name":            {func(m *Manifest) { m.Env[0].Name = "A=B" }, "env name"},
		"NUL":                 {func(m *Manifest) { m.Args[0] = "a\x00b" }, "NUL"},
		"relative workingDir": {func(m *Manifest) { m.WorkingDir = "srv" }, "workingDir"},
		"uid":                 {func(m *Manifest) { m.User.UID = ptr[int64](-1) }, "id -1"},
		"groups":              {func(m *Manifest) { m.User.Groups = []int64{7, 5} }, "user.groups"},
		"root and nonRoot":    {func(m *Manifest) { m.User.UID = ptr[int64](0) }, "nonRoot"},
		"empty user":          {func(m *Manifest) { m.User = &User{} }, "user must be left out"},
		"empty security":      {func(m *Manifest) { m.Security = &Security{} }, "security must be left out"},
		"capability":          {func(m *Manifest) { m.Security.AddCapabilities = []string{"SYS_ADMIN"} }, "SYS_ADMIN"},
		"port 0":              {func(m *Manifest) { m.Ports[0].Port = 0 }, "port 0"},
		"port twice":          {func(m *Manifest) { m.Ports[1].Port = 80 }, "port 80 is listed twice"},
		"protocol":            {func(m *Manifest) { m.Ports[0].Protocol = "http" }, "protocol"},
		"two probe handlers":  {func(m *Manifest) { m.Probes.Liveness.HTTP = &HTTPGet{Port: 1} }, "exactly one"},
		"no probe":            {func(m *Manifest) { m.Probes = &Probes{} }, "probes must be left out"},
		"probe path":          {func(m *Manifest) { m.Probes.Readiness.HTTP.Path = "/" }, "path"},
		"mount over root":     {func(m *Manifest) { m.Mounts[0].Path = "/" }, "mount path"},
		"mount climbs":        {func(m *Manifest) { m.Mounts[0].Path = "/a/../b" }, "mount path"},
		"egress":              {func(m *Manifest) { m.Egress[2] = "https://example.org" }, "egress \"https://example.org\": write host:port"},
		"egress order":        {func(m *Manifest) { m.Egress[0] = "z:1" }, "ascending order"},
		"egress twice":        {func(m *Manifest) { m.Egress[1] = m.Egress[0] }, "without duplicates"},
		"mount kind":          {func(m *Manifest) { m.Mounts[0].Kind = "hostPath" }, "kind"},
	} {
		t.Run(name, func(t *testing.T) {
			m := full()
			c.change(m)
			if err := m.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
			if _, err := m.Canonical(); err == nil {
				t.Error("Canonical accepted it")
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	c, _ := full().Canonical()
	f.Add(c)
	c, _ = lively().Canonical()
	f.Add(c)
	f.Add([]byte(`{"apiVersion":"cloister.dev/v1alpha1","image":{"digest":"` + digest + `"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := Parse(b)
		if err != nil {
			return
		}
		again, err := m.Canonical()
		if err != nil || string(again) != string(b) {
			t.Errorf("accepted %q, whose canonical form is %q, %v", b, again, err)
		}
	})
}
