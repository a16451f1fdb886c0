package supervise

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/enclaved/image/imagetest"
	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// seal gives e an embedded manifest and an empty content server, and returns the manifest's bytes.
func seal(t *testing.T, e *enclave, m *workload.Manifest) []byte {
	t.Helper()
	m.APIVersion = workload.APIVersion
	canonical, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	e.mu.Lock()
	defer e.mu.Unlock()
	e.images.WriteLayout(t, dir)
	e.images = imagetest.Content{}
	e.served.cfg.Sealed = &Sealed{Manifest: canonical, Layout: dir}
	return canonical
}

// A sealed enclave measures and runs what is in it and nothing that the host has.
func TestSealed(t *testing.T) {
	e := newEnclave(t)
	m := &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "3"))}}
	canonical := seal(t, e, m)
	_, err := e.Configure(t.Context(), &channel.ConfigureRequest{Manifest: canonical, Secret: e.secret, Ports: &channel.HostPorts{Content: contentPort}})
	if err == nil || !strings.Contains(err.Error(), "takes none from the host") {
		t.Errorf("a manifest of the host's: %v", err)
	}
	configured, err := e.Configure(t.Context(), &channel.ConfigureRequest{Secret: e.secret, Ports: &channel.HostPorts{}})
	if err != nil {
		t.Fatal(err)
	}
	doc, err := attestation.ParseUnverified(configured.GetDocument())
	if err != nil {
		t.Fatal(err)
	}
	if got, want := doc.PCRs[16], workload.PCR16(canonical); !bytes.Equal(got, want) {
		t.Errorf("PCR16 is %x, want %x", got, want)
	}
	r := e.follow(t, nil)
	r.check(t, 3, "")
	if len(r.failures) > 0 {
		t.Errorf("failures: %q", r.failures)
	}
	if _, err := os.Stat(e.served.cfg.Sealed.Layout); !os.IsNotExist(err) {
		t.Errorf("the layers are still there: %v", err)
	}
}

// What is wrong in a sealed image stays wrong: nothing runs, and the host is asked for nothing.
func TestSealedBroken(t *testing.T) {
	for name, test := range map[string]struct {
		spoil     func(t *testing.T, s *Sealed)
		configure string // the error of Configure, else that of the run
		run       string
	}{
		"manifest of another form": {func(_ *testing.T, s *Sealed) { s.Manifest = append(s.Manifest, '\n') }, "in the enclave image cannot be used", ""},
		"empty manifest":           {func(_ *testing.T, s *Sealed) { s.Manifest = nil }, "in the enclave image cannot be used", ""},
		"no layers": {func(t *testing.T, s *Sealed) {
			if err := os.RemoveAll(s.Layout); err != nil {
				t.Fatal(err)
			}
		}, "", "incomplete, it lacks the blob"},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnclave(t)
			seal(t, e, &workload.Manifest{Image: workload.Image{Digest: e.addImage(t, cmdConfig("exit", "0"))}})
			test.spoil(t, e.served.cfg.Sealed)
			_, err := e.Configure(t.Context(), &channel.ConfigureRequest{Secret: e.secret, Ports: &channel.HostPorts{Content: contentPort}})
			if test.configure != "" {
				if err == nil || !strings.Contains(err.Error(), test.configure) {
					t.Errorf("Configure: %v, want %q", err, test.configure)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			r := e.follow(t, nil)
			r.check(t, 125, test.run)
			if r.started {
				t.Error("the workload was started")
			}
		})
	}
}

func TestReadSealed(t *testing.T) {
	write := func(t *testing.T, root, name, text string) {
		t.Helper()
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	root := t.TempDir()
	if s, err := readSealed(root); s != nil || err != nil {
		t.Errorf("a base image: %+v, %v", s, err)
	}
	write(t, root, "cloister/image/blobs/sha256/aa", "12345")
	if _, err := readSealed(root); err == nil || !strings.Contains(err.Error(), "incomplete") {
		t.Errorf("layers without a manifest: %v", err)
	}
	write(t, root, "cloister/manifest.json", "{}")
	s, err := readSealed(root)
	if err != nil {
		t.Fatal(err)
	}
	if string(s.Manifest) != "{}" || s.Layout != filepath.Join(root, "cloister/image") || s.Size != 5 {
		t.Errorf("got %+v", s)
	}
	if err := os.RemoveAll(s.Layout); err != nil {
		t.Fatal(err)
	}
	if _, err := readSealed(root); err == nil || !strings.Contains(err.Error(), "incomplete") {
		t.Errorf("a manifest without layers: %v", err)
	}
}
