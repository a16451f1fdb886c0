package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/enclaved/image/imagetest"
	"cloister.dev/cloister/internal/oci"
	"cloister.dev/cloister/workload"
)

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// registry is a content server. change may alter an answer, counting from 1 for each path.
type registry struct {
	content map[string][]byte
	change  func(path string, n int, body []byte) (status int, changed []byte)

	mu   sync.Mutex
	seen map[string]int
}

func (r *registry) add(t testing.TB, kind string, b []byte) oci.Descriptor {
	t.Helper()
	r.content["/"+kind+"/"+digestOf(b)] = b
	return oci.Descriptor{Digest: digestOf(b), Size: int64(len(b))}
}

func (r *registry) addJSON(t testing.TB, kind string, v any) oci.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return r.add(t, kind, b)
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.seen[req.URL.Path]++
	n := r.seen[req.URL.Path]
	r.mu.Unlock()
	b, ok := r.content[req.URL.Path]
	status := http.StatusOK
	if !ok {
		status, b = http.StatusNotFound, []byte("the image is not in the registry")
	}
	if r.change != nil {
		status, b = r.change(req.URL.Path, n, bytes.Clone(b))
	}
	w.WriteHeader(status)
	w.Write(b)
}

type object = map[string]any

// sample is an image of two layers behind an index of two platforms.
type sample struct {
	*registry
	index, manifest, arm, config oci.Descriptor
	layers                       []oci.Descriptor
}

func newSample(t testing.TB, edit func(config, manifest object)) *sample {
	t.Helper()
	s := &sample{registry: &registry{content: map[string][]byte{}, seen: map[string]int{}}}
	var layers, diffIDs []any
	for _, l := range [][]byte{archive(t, dir("etc"), file("etc/motd", "one")), archive(t, file("etc/motd", "two"))} {
		d := s.add(t, "blobs", l)
		s.layers = append(s.layers, d)
		layers = append(layers, object{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": d.Digest, "size": d.Size})
		diffIDs = append(diffIDs, d.Digest)
	}
	config := object{
		"os": "linux", "architecture": "amd64", "rootfs": object{"type": "layers", "diff_ids": diffIDs},
		"config": object{"Env": []string{"A=1"}, "Cmd": []string{"/bin/app"}, "User": "1:2", "WorkingDir": "/srv", "StopSignal": "SIGQUIT"},
	}
	manifest := object{"schemaVersion": 2, "layers": layers}
	if edit != nil {
		edit(config, manifest)
	}
	s.config = s.addJSON(t, "blobs", config)
	manifest["config"] = object{"digest": s.config.Digest, "size": s.config.Size}
	s.manifest = s.addJSON(t, "manifests", manifest)
	s.arm = s.addJSON(t, "manifests", object{"schemaVersion": 2, "config": object{}, "layers": []any{}})
	entry := func(d oci.Descriptor, mediaType, arch string) object {
		return object{"mediaType": mediaType, "digest": d.Digest, "size": d.Size, "platform": object{"os": "linux", "architecture": arch}}
	}
	s.index = s.addJSON(t, "manifests", object{"schemaVersion": 2, "manifests": []any{
		entry(s.manifest, "application/vnd.in-toto+json", "amd64"),
		entry(s.arm, oci.MediaTypeManifest, "arm64"),
		entry(s.manifest, oci.MediaTypeManifest, "amd64"),
	}})
	return s
}

// fetch gets the image, stopping with errStopped after the third failed try of any step.
func fetch(t testing.TB, s *sample, want workload.Image, limit int64) (config *Config, root string, failures []string, err error) {
	t.Helper()
	needRoot(t)
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	f := NewFetcher(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", server.Listener.Addr().String())
	}, func(step, failure string) {
		if failure != "" {
			failures = append(failures, failure)
			if len(failures) == 3 {
				cancel(errStopped)
			}
		}
	})
	f.wait = func(ctx context.Context, _ time.Duration) error { return context.Cause(ctx) }
	root = t.TempDir()
	config, err = f.Image(ctx, want, root, t.TempDir(), limit)
	return config, root, failures, err
}

var errStopped = errors.New("stopped")

func TestFetch(t *testing.T) {
	for name, want := range map[string]func(*sample) workload.Image{
		"by index":    func(s *sample) workload.Image { return workload.Image{Digest: s.index.Digest} },
		"by manifest": func(s *sample) workload.Image { return workload.Image{Digest: s.manifest.Digest} },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSample(t, nil)
			config, root, failures, err := fetch(t, s, want(s), plenty)
			if err != nil || len(failures) > 0 {
				t.Fatal(err, failures)
			}
			wantConfig := &Config{Env: []string{"A=1"}, Cmd: []string{"/bin/app"}, User: "1:2", WorkingDir: "/srv", StopSignal: "SIGQUIT"}
			if diff := cmp.Diff(wantConfig, config); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"40755 0:0 etc", "100644 0:0 etc/motd = two"}, list(t, root)); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFetchTriesAgain(t *testing.T) {
	s := newSample(t, nil)
	s.change = func(path string, n int, body []byte) (int, []byte) {
		switch {
		case strings.HasSuffix(path, s.layers[1].Digest) && n == 1:
			body[100] ^= 1
		case strings.HasSuffix(path, s.layers[1].Digest) && n == 2:
			return http.StatusBadGateway, []byte("the registry does\nnot answer")
		}
		return http.StatusOK, body
	}
	_, root, failures, err := fetch(t, s, workload.Image{Digest: s.index.Digest}, plenty)
	if err != nil {
		t.Fatal(err)
	}
	if len(failures) != 2 || !strings.Contains(failures[0], "other bytes") || !strings.Contains(failures[1], "the registry does not answer (status 502)") {
		t.Errorf("failures are %q", failures)
	}
	if diff := cmp.Diff([]string{"40755 0:0 etc", "100644 0:0 etc/motd = two"}, list(t, root)); diff != "" {
		t.Errorf("tree (-want +got):\n%s", diff)
	}
	if n := s.seen["/blobs/"+s.layers[0].Digest]; n != 1 {
		t.Errorf("the first layer was fetched %d times, want once", n)
	}
}

// TestFetchRefuses flips one byte, cuts and extends each thing that is fetched: nothing of it is used.
func TestFetchRefuses(t *testing.T) {
	things := map[string]func(*sample) oci.Descriptor{
		"index":       func(s *sample) oci.Descriptor { return s.index },
		"manifest":    func(s *sample) oci.Descriptor { return s.manifest },
		"config":      func(s *sample) oci.Descriptor { return s.config },
		"first layer": func(s *sample) oci.Descriptor { return s.layers[0] },
	}
	changes := map[string]func([]byte) []byte{
		"one byte":   func(b []byte) []byte { b[len(b)/2] ^= 0x20; return b },
		"shorter":    func(b []byte) []byte { return b[:len(b)-1] },
		"longer":     func(b []byte) []byte { return append(b, ' ') },
		"empty":      func([]byte) []byte { return nil },
		"a redirect": nil,
	}
	for thing, of := range things {
		for change, apply := range changes {
			t.Run(thing+", "+change, func(t *testing.T) {
				s := newSample(t, nil)
				bad := of(s).Digest
				s.change = func(path string, _ int, body []byte) (int, []byte) {
					if !strings.HasSuffix(path, bad) {
						return http.StatusOK, body
					}
					if apply == nil {
						return http.StatusFound, body
					}
					return http.StatusOK, apply(body)
				}
				_, root, failures, err := fetch(t, s, workload.Image{Digest: s.index.Digest}, plenty)
				if !errors.Is(err, errStopped) || len(failures) != 3 || !strings.Contains(failures[0], bad) {
					t.Errorf("got %v after %q, want refusals that name %s", err, failures, bad)
				}
				if got := list(t, root); len(got) > 0 {
					t.Errorf("unpacked: %q", got)
				}
			})
		}
	}
}

func TestFetchNotFound(t *testing.T) {
	s := newSample(t, nil)
	_, _, failures, err := fetch(t, s, workload.Image{Digest: "sha256:" + strings.Repeat("0", 64)}, plenty)
	if !errors.Is(err, errStopped) || !strings.Contains(strings.Join(failures, " "), "the image is not in the registry (status 404)") {
		t.Errorf("got %v after %q", err, failures)
	}
}

// TestUnusableImages are final: the bytes are those that were asked for.
func TestUnusableImages(t *testing.T) {
	tests := map[string]struct {
		edit     func(config, manifest object)
		platform string
		limit    int64
		want     string
	}{
		"other platform in the config":  {func(c, _ object) { c["architecture"] = "arm64" }, "", plenty, `the image is for "linux/arm64"`},
		"platform not in the index":     {nil, "linux/s390x", plenty, "no image for linux/s390x"},
		"too few diff_ids":              {func(c, _ object) { c["rootfs"] = object{"diff_ids": []string{}} }, "", plenty, "2 layers and 0 diff_ids"},
		"another diff_id":               {func(c, _ object) { d := c["rootfs"].(object)["diff_ids"].([]any); d[1] = d[0] }, "", plenty, "layer 2 of 2: unpacked it is"},
		"index and image at once":       {func(_, m object) { m["manifests"] = []any{} }, "", plenty, "at once"},
		"schema 1":                      {func(_, m object) { m["schemaVersion"] = 1 }, "", plenty, "schemaVersion 1"},
		"unknown compression":           {func(_, m object) { m["layers"].([]any)[0].(object)["mediaType"] = "x/y" }, "", plenty, `"x/y"`},
		"other digest algorithm":        {func(_, m object) { m["layers"].([]any)[0].(object)["digest"] = "sha512:00" }, "", plenty, "only sha256"},
		"compressed alone does not fit": {nil, "", 1000, "at least 8192 bytes unpacked and the enclave has 1000 bytes"},
		"unpacked does not fit":         {nil, "", 8000, "and the enclave has 8000 bytes"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s := newSample(t, test.edit)
			_, _, failures, err := fetch(t, s, workload.Image{Digest: s.index.Digest, Platform: test.platform}, test.limit)
			if err == nil || !strings.Contains(err.Error(), test.want) || len(failures) > 0 {
				t.Errorf("got %v after %q, want %q at once", err, failures, test.want)
			}
		})
	}
}

// TestLayout reads the image from a directory, once, and says at once what is wrong there.
func TestLayout(t *testing.T) {
	needRoot(t)
	blob := func(dir string, d oci.Descriptor) string {
		return filepath.Join(dir, "blobs", strings.Replace(d.Digest, ":", "/", 1))
	}
	change := func(t *testing.T, file string, by func([]byte) []byte) {
		t.Helper()
		b, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(file, by(b), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	tests := map[string]struct {
		spoil func(t *testing.T, dir string, s *sample)
		limit int64
		want  string // of the error; empty for none
	}{
		"whole": {nil, plenty, ""},
		// It would not if the compressed bytes counted.
		"barely fits":  {nil, 3*inodeSize + 2*pageSize, ""},
		"does not fit": {nil, inodeSize + pageSize, "unpacked and the enclave has 5120 bytes"},
		"no folder":    {func(t *testing.T, dir string, _ *sample) { os.RemoveAll(dir) }, plenty, "incomplete, it lacks the blob"},
		"no config":    {func(t *testing.T, dir string, s *sample) { os.Remove(blob(dir, s.config)) }, plenty, "incomplete, it lacks the blob"},
		"no layer":     {func(t *testing.T, dir string, s *sample) { os.Remove(blob(dir, s.layers[1])) }, plenty, "incomplete, it lacks the blob"},
		"flipped manifest": {func(t *testing.T, dir string, s *sample) {
			change(t, blob(dir, s.manifest), func(b []byte) []byte { b[10] ^= 1; return b })
		}, plenty, "other bytes"},
		"flipped layer": {func(t *testing.T, dir string, s *sample) {
			change(t, blob(dir, s.layers[1]), func(b []byte) []byte { b[600] ^= 1; return b })
		}, plenty, "other bytes"},
		"longer layer": {func(t *testing.T, dir string, s *sample) {
			change(t, blob(dir, s.layers[0]), func(b []byte) []byte { return append(b, 0) })
		}, plenty, "another size"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			s, dir, root := newSample(t, nil), t.TempDir(), t.TempDir()
			imagetest.Content(s.content).WriteLayout(t, dir)
			if test.spoil != nil {
				test.spoil(t, dir, s)
			}
			f := NewLayout(dir, func(_, failure string) {
				if failure != "" {
					t.Errorf("it tries again after: %s", failure)
				}
			})
			defer f.Close()
			config, err := f.Image(t.Context(), workload.Image{Digest: s.index.Digest}, root, "/nowhere", test.limit)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want %q", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if config.User != "1:2" {
				t.Errorf("config is %+v", config)
			}
			if diff := cmp.Diff([]string{"40755 0:0 etc", "100644 0:0 etc/motd = two"}, list(t, root)); diff != "" {
				t.Errorf("tree (-want +got):\n%s", diff)
			}
		})
	}
}

func TestSleepEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errStopped)
	if err := sleep(ctx, time.Hour); !errors.Is(err, errStopped) {
		t.Error(err)
	}
	if err := sleep(t.Context(), 0); err != nil {
		t.Error(err)
	}
}
