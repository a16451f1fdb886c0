package content

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	client "cloister.dev/cloister/internal/registry"
)

// local reaches registries of this process.
var local = client.Client{PlainHTTP: []string{"127.0.0.1"}}

// upstream is a registry whose answers a test can change.
type upstream struct {
	*httptest.Server
	requests atomic.Int64
	change   atomic.Pointer[func(path string, body []byte) []byte]
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{}
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	u.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		change := u.change.Load()
		if r.Method != http.MethodGet || r.URL.Path == "/v2/" {
			inner.ServeHTTP(w, r)
			return
		}
		u.requests.Add(1)
		if change == nil {
			inner.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		inner.ServeHTTP(rec, r)
		body := (*change)(r.URL.Path, rec.Body.Bytes())
		for k, v := range rec.Header() {
			if k != "Content-Length" {
				w.Header()[k] = v
			}
		}
		w.WriteHeader(rec.Code)
		w.Write(body)
	}))
	t.Cleanup(u.Close)
	return u
}

// push stores img and returns its reference.
func (u *upstream) push(t *testing.T, img v1.Image) string {
	t.Helper()
	ref := strings.TrimPrefix(u.URL, "http://") + "/team/app"
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	d, err := name.NewDigest(ref + "@" + digest.String())
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(d, img); err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func image(t *testing.T) v1.Image {
	t.Helper()
	img, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func newServer(t *testing.T, image, cache string, memory int64) *Server {
	t.Helper()
	s, err := New(image, nil, local, "", cache, memory, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func get(s *Server, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	s.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func TestServe(t *testing.T) {
	u := newUpstream(t)
	img := image(t)
	ref := u.push(t, img)
	manifest, _ := img.RawManifest()
	m, _ := img.Manifest()
	dir := t.TempDir()

	for _, cached := range []bool{false, true} {
		s := newServer(t, ref, dir, 1<<20)
		w := get(s, "/blobs/"+m.Layers[0].Digest.String())
		if w.Code != http.StatusNotFound || !strings.Contains(w.Body.String(), "no manifest") {
			t.Errorf("a blob before its manifest: %d %s", w.Code, w.Body)
		}
		w = get(s, "/manifests/"+digestOf(manifest))
		if w.Code != http.StatusOK || !bytes.Equal(w.Body.Bytes(), manifest) || w.Header().Get("Content-Type") != string(m.MediaType) {
			t.Fatalf("manifest: %d %v %s", w.Code, w.Header(), w.Body)
		}
		for _, d := range append(m.Layers, m.Config) {
			w := get(s, "/blobs/"+d.Digest.String())
			if w.Code != http.StatusOK || digestOf(w.Body.Bytes()) != d.Digest.String() || w.Header().Get("Content-Length") != fmt.Sprint(d.Size) {
				t.Errorf("blob %s: %d, %d bytes", d.Digest, w.Code, w.Body.Len())
			}
		}
		if n := u.requests.Swap(0); (n == 0) != cached {
			t.Errorf("%d requests to the registry, cached: %v", n, cached)
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "sha256", "*"))
	if len(left) != 4 {
		t.Errorf("cache: %v", left)
	}
}

func TestIndex(t *testing.T) {
	u := newUpstream(t)
	img := image(t)
	ref := u.push(t, img)
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
	d, _ := index.Digest()
	tag, err := name.NewDigest(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(tag.Context().Digest(d.String()), index); err != nil {
		t.Fatal(err)
	}
	w := get(newServer(t, ref, t.TempDir(), 1<<20), "/manifests/"+d.String())
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/vnd.oci.image.index.v1+json" || digestOf(w.Body.Bytes()) != d.String() {
		t.Errorf("%d %v %s", w.Code, w.Header(), w.Body)
	}
}

func TestRefusals(t *testing.T) {
	flip := func(part string) func(string, []byte) []byte {
		return func(path string, b []byte) []byte {
			if strings.Contains(path, part) {
				b = bytes.Clone(b)
				b[len(b)/2] ^= 1
			}
			return b
		}
	}
	for name, tc := range map[string]struct {
		change func(path string, body []byte) []byte
		path   func(*v1.Manifest, string) string // what is asked for; else a layer
		memory int64
		code   int
		err    string
	}{
		"one wrong byte in a layer":    {change: flip("/blobs/"), code: 502, err: "sha256"},
		"one wrong byte in a manifest": {change: flip("/manifests/"), code: 502, err: "sha256", path: func(_ *v1.Manifest, d string) string { return "/manifests/" + d }},
		"a longer layer": {
			change: func(path string, b []byte) []byte {
				if strings.Contains(path, "/blobs/") {
					b = append(bytes.Clone(b), 0)
				}
				return b
			},
			code: 502, err: "cannot fetch",
		},
		"a layer that breaks off": {
			change: func(path string, b []byte) []byte {
				if strings.Contains(path, "/blobs/") {
					b = b[:len(b)/2]
				}
				return b
			},
			code: 502, err: "cannot fetch",
		},
		"an image that is not there": {
			path: func(*v1.Manifest, string) string { return "/manifests/sha256:" + strings.Repeat("0", 64) },
			code: 404, err: "is not found in its registry",
		},
		"a blob that nobody named": {
			path: func(*v1.Manifest, string) string { return "/blobs/sha256:" + strings.Repeat("0", 64) },
			code: 404, err: "no manifest",
		},
		"no digest": {
			path: func(*v1.Manifest, string) string { return "/blobs/latest" },
			code: 400, err: "digest",
		},
		"a way out of the cache": {
			path: func(*v1.Manifest, string) string { return "/blobs/sha256:..%2f..%2f..%2fetc%2fpasswd" },
			code: 400, err: "digest",
		},
		"too large": {
			path:   func(_ *v1.Manifest, d string) string { return "/manifests/" + d },
			memory: 1500, code: 502, err: "more than the enclave's memory of 1500 bytes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUpstream(t)
			img := image(t)
			ref := u.push(t, img)
			m, _ := img.Manifest()
			digest, _ := img.Digest()
			memory := tc.memory
			if memory == 0 {
				memory = 1 << 20
			}
			dir := t.TempDir()
			s := newServer(t, ref, dir, memory)
			if tc.change != nil {
				u.change.Store(&tc.change)
			}
			path := "/blobs/" + m.Layers[0].Digest.String()
			if tc.path != nil {
				path = tc.path(m, digest.String())
			} else if w := get(s, "/manifests/"+digest.String()); w.Code != http.StatusOK {
				t.Fatalf("manifest: %d %s", w.Code, w.Body)
			}
			w := get(s, path)
			body := strings.TrimSpace(w.Body.String())
			if w.Code != tc.code || !strings.Contains(body, tc.err) || strings.Contains(body, "\n") {
				t.Errorf("%d %q, want %d and %q in one line", w.Code, body, tc.code, tc.err)
			}
			if tc.change == nil {
				return
			}
			if left, _ := filepath.Glob(filepath.Join(dir, "sha256", "*")); len(left) > 1 {
				t.Errorf("cached: %v", left)
			}
			// The registry is well again.
			u.change.Store(nil)
			if w := get(s, path); w.Code != http.StatusOK {
				t.Errorf("again: %d %s", w.Code, w.Body)
			}
		})
	}
}

func TestCorruptCache(t *testing.T) {
	u := newUpstream(t)
	img := image(t)
	ref := u.push(t, img)
	m, _ := img.Manifest()
	digest, _ := img.Digest()
	dir := t.TempDir()
	s := newServer(t, ref, dir, 1<<20)
	path := "/blobs/" + m.Layers[0].Digest.String()
	get(s, "/manifests/"+digest.String())
	get(s, path)
	file := filepath.Join(dir, "sha256", m.Layers[0].Digest.Hex)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	b[10] ^= 1
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	u.requests.Store(0)
	if w := get(s, path); w.Code != http.StatusOK || digestOf(w.Body.Bytes()) != m.Layers[0].Digest.String() {
		t.Errorf("%d, %d bytes", w.Code, w.Body.Len())
	}
	if u.requests.Load() != 1 {
		t.Errorf("%d requests to the registry, want 1", u.requests.Load())
	}
}

func TestOneDownload(t *testing.T) {
	u := newUpstream(t)
	img := image(t)
	ref := u.push(t, img)
	m, _ := img.Manifest()
	digest, _ := img.Digest()
	s := newServer(t, ref, t.TempDir(), 1<<20)
	get(s, "/manifests/"+digest.String())
	const clients = 8
	release := make(chan struct{})
	var downloads atomic.Int64
	change := func(path string, b []byte) []byte {
		downloads.Add(1)
		<-release
		return b
	}
	u.change.Store(&change)
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			if w := get(s, "/blobs/"+m.Layers[0].Digest.String()); w.Code != http.StatusOK {
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
	}
	close(release)
	wg.Wait()
	// Who comes after the download finds it in the cache.
	if n := downloads.Load(); n != 1 {
		t.Errorf("%d downloads", n)
	}
}

func TestNew(t *testing.T) {
	digest := "@sha256:" + strings.Repeat("a", 64)
	for image, ok := range map[string]bool{
		"registry.example:5000/nginx" + digest: true,
		"registry.example/nginx:1.2" + digest:  true,
		"nginx" + digest:                       true,
		"nginx:latest":                         false,
		"nginx":                                false,
		"":                                     false,
	} {
		if _, err := New(image, nil, local, "", t.TempDir(), 1, slog.Default()); (err == nil) != ok {
			t.Errorf("%q: %v", image, err)
		}
	}
}

// A plugin's image comes from its own repository, through an index too, whatever the workload's is.
func TestPluginImage(t *testing.T) {
	own, other := newUpstream(t), newUpstream(t)
	ref := own.push(t, image(t))
	img := image(t)
	elsewhere, err := name.NewDigest(other.push(t, img))
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: img})
	d, _ := index.Digest()
	if err := remote.WriteIndex(elsewhere.Context().Digest(d.String()), index); err != nil {
		t.Fatal(err)
	}
	s, err := New(ref, []string{elsewhere.Context().Digest(d.String()).String()}, local, "", t.TempDir(), 1<<20, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	inner, _ := img.Digest()
	m, _ := img.Manifest()
	paths := []string{"/manifests/" + d.String(), "/manifests/" + inner.String(), "/blobs/" + m.Config.Digest.String()}
	for _, l := range m.Layers {
		paths = append(paths, "/blobs/"+l.Digest.String())
	}
	for _, path := range append(paths, "/manifests/"+ref[strings.Index(ref, "@")+1:]) {
		if w := get(s, path); w.Code != http.StatusOK {
			t.Errorf("%s: %d %s", path, w.Code, w.Body)
		}
	}
}
