// Package imagetest makes small images for tests, in the forms in which a content server and a sealed EIF have them.
package imagetest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
)

// Content is what a content server has, by the paths that package image asks for.
type Content map[string][]byte

// WriteLayout writes everything into the blobs of an OCI layout (OCI image-spec, image-layout.md).
func (c Content) WriteLayout(t testing.TB, dir string) {
	t.Helper()
	for name, b := range c {
		file := filepath.Join(dir, "blobs", strings.Replace(path.Base(name), ":", "/", 1))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Add adds an image of one uncompressed layer, whose only file is /app with mode 0755, and returns the
// digest of its manifest. Config is the image's (OCI image-spec, config.md), for example
// {"Entrypoint": ["/app"]}.
func (c Content) Add(t testing.TB, app []byte, config map[string]any) (digest string) {
	t.Helper()
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	w.WriteHeader(&tar.Header{Name: "app", Mode: 0o755, Size: int64(len(app))})
	w.Write(app)
	if err := w.Close(); err != nil { // which remembers the errors of both
		t.Fatal(err)
	}
	add := func(kind string, b []byte) map[string]any {
		sum := sha256.Sum256(b)
		digest := "sha256:" + hex.EncodeToString(sum[:])
		c["/"+kind+"/"+digest] = b
		return map[string]any{"digest": digest, "size": len(b), "mediaType": "application/vnd.oci.image.layer.v1.tar"}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	l := add("blobs", layer.Bytes())
	configuration := add("blobs", encode(map[string]any{
		"os": "linux", "architecture": "amd64", "config": config,
		"rootfs": map[string]any{"diff_ids": []any{l["digest"]}},
	}))
	m := add("manifests", encode(map[string]any{"schemaVersion": 2, "config": configuration, "layers": []any{l}}))
	return m["digest"].(string)
}
