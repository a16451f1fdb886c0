package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"cloister.dev/cloister/internal/oci"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/internal/registry"
)

// layoutPrefix begins the name of an image that lies in a folder.
const layoutPrefix = "oci-layout:"

// imageSource is where an image comes from. What it opens is verified by whoever reads it.
type imageSource interface {
	// manifest opens an index or an image manifest, blob a config or a layer.
	manifest(ctx context.Context, digest string) (io.ReadCloser, error)
	blob(ctx context.Context, digest string) (io.ReadCloser, error)
}

// openImage finds out which image a reference, or oci-layout:DIR, names: where it comes from, and the digest
// of its index or manifest.
func openImage(ctx context.Context, reference string, client registry.Client) (from imageSource, digest string, err error) {
	if dir, ok := strings.CutPrefix(reference, layoutPrefix); ok {
		layout := layoutSource(dir)
		digest, err := layout.only()
		if err != nil {
			return nil, "", fmt.Errorf("read OCI layout %s: %w", dir, err)
		}
		return layout, digest, nil
	}
	ref, err := client.Parse(reference)
	if err != nil {
		return nil, "", err
	}
	pinned, ok := ref.(name.Digest)
	if !ok {
		with, err := client.Pin(ctx, reference)
		if err != nil {
			return nil, "", err
		}
		if pinned, err = client.ParseDigest(with); err != nil {
			return nil, "", err
		}
	}
	return registrySource{client, pinned.Context()}, pinned.DigestStr(), nil
}

// layoutSource is the folder of an OCI layout (OCI image-spec, image-layout.md).
type layoutSource string

// only returns the digest of the one image of a layout.
func (l layoutSource) only() (string, error) {
	f, err := os.Open(filepath.Join(string(l), "index.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return "", errors.New("it has no index.json: name a folder in the layout of OCI images, as `skopeo copy docker://… oci:DIR` writes it")
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, oci.MaxManifest+1))
	if err != nil {
		return "", err
	}
	index, err := oci.ParseManifest(b)
	if err != nil {
		return "", fmt.Errorf("index.json: %w", err)
	}
	if index.Manifests == nil || len(*index.Manifests) != 1 {
		return "", errors.New("its index.json must name one image, or one index for several platforms: copy one into a layout of its own")
	}
	d := (*index.Manifests)[0]
	return d.Digest, d.Validate("its image")
}

func (l layoutSource) manifest(ctx context.Context, digest string) (io.ReadCloser, error) {
	return l.blob(ctx, digest)
}

func (l layoutSource) blob(_ context.Context, digest string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(l), "blobs", strings.Replace(digest, ":", "/", 1)))
}

// registrySource is a repository of a registry.
type registrySource struct {
	client     registry.Client
	repository name.Repository
}

func (r registrySource) manifest(ctx context.Context, digest string) (io.ReadCloser, error) {
	ref := r.repository.Digest(digest)
	d, err := remote.Get(ref, r.client.Options(ctx)...)
	if err != nil {
		return nil, errors.New(registry.Explain(ctx, ref, err))
	}
	return io.NopCloser(bytes.NewReader(d.Manifest)), nil
}

func (r registrySource) blob(ctx context.Context, digest string) (io.ReadCloser, error) {
	ref := r.repository.Digest(digest)
	l, err := remote.Layer(ref, r.client.Options(ctx)...)
	if err == nil {
		var body io.ReadCloser
		if body, err = l.Compressed(); err == nil {
			return body, nil
		}
	}
	return nil, errors.New(registry.Explain(ctx, ref, err))
}

// sealedImage is an image with everything but its layers in memory.
type sealedImage struct {
	from   imageSource
	top    topDescriptor // of its index or manifest
	small  map[string][]byte
	order  []string // of small: index, manifest, config
	layers []oci.Descriptor
}

// topDescriptor is an entry in a layout's index.json.
type topDescriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int    `json:"size"`
}

// readImage fetches what describes the image for a platform, "os/architecture", verifies it, and refuses what the
// enclave would refuse.
func readImage(ctx context.Context, from imageSource, digest, platform string) (*sealedImage, error) {
	image := &sealedImage{from: from, small: map[string][]byte{}}
	m, err := image.manifest(ctx, oci.Descriptor{Digest: digest, Size: -1})
	if err != nil {
		return nil, err
	}
	top := image.small[digest]
	var kind struct {
		MediaType string `json:"mediaType"`
	}
	if err := json.Unmarshal(top, &kind); err != nil {
		return nil, err
	}
	if kind.MediaType == "" { // optional in OCI manifests
		kind.MediaType = oci.MediaTypeManifest
		if m.Manifests != nil {
			kind.MediaType = oci.MediaTypeIndex
		}
	}
	image.top = topDescriptor{kind.MediaType, digest, len(top)}
	if m.Manifests != nil {
		d, err := m.Choose(platform)
		if err != nil {
			return nil, err
		}
		if m, err = image.manifest(ctx, d); err != nil {
			return nil, err
		}
		if m.Manifests != nil {
			return nil, errors.New("the image index names another index where an image was expected")
		}
	}
	config, err := image.read(ctx, from.blob, *m.Config, oci.MaxConfig)
	if err != nil {
		return nil, err
	}
	if _, err := oci.ParseConfig(config, platform, len(m.Layers)); err != nil {
		return nil, err
	}
	for i, l := range m.Layers {
		if l.Size > ramdisk.MaxFile {
			return nil, fmt.Errorf("layer %d of %d has %d bytes, and a file in a ramdisk has less than 4 GiB: split the layer, or use the base EIF", i+1, len(m.Layers), l.Size)
		}
	}
	image.layers = m.Layers
	return image, nil
}

func (s *sealedImage) manifest(ctx context.Context, d oci.Descriptor) (*oci.Manifest, error) {
	b, err := s.read(ctx, s.from.manifest, d, oci.MaxManifest)
	if err != nil {
		return nil, err
	}
	return oci.ParseManifest(b)
}

// read fetches and verifies something of at most limit bytes and keeps it.
func (s *sealedImage) read(ctx context.Context, open openFunc, d oci.Descriptor, limit int64) ([]byte, error) {
	b, err := readBlob(ctx, open, d, limit)
	if err != nil {
		return nil, err
	}
	s.small[d.Digest] = b
	s.order = append(s.order, d.Digest)
	return b, nil
}

// openFunc is a method of an imageSource.
type openFunc func(ctx context.Context, digest string) (io.ReadCloser, error)

// readBlob fetches and verifies something of at most limit bytes.
func readBlob(ctx context.Context, open openFunc, d oci.Descriptor, limit int64) ([]byte, error) {
	body, err := open(ctx, d.Digest)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", d.Digest, err)
	}
	defer body.Close()
	b, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", d.Digest, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s has more than %d bytes", d.Digest, limit)
	}
	sum := sha256.Sum256(b)
	return b, d.Verify(int64(len(b)), sum[:])
}

// fetchLayer fetches and verifies a layer into a file that is gone when it is closed.
func fetchLayer(ctx context.Context, from imageSource, d oci.Descriptor) (*os.File, error) {
	body, err := from.blob(ctx, d.Digest)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", d.Digest, err)
	}
	defer body.Close()
	f, err := temporary()
	if err != nil {
		return nil, err
	}
	h := sha256.New()
	n, err := io.Copy(interruptible{ctx, f}, io.TeeReader(io.LimitReader(body, d.Size+1), h))
	if err != nil {
		err = fmt.Errorf("fetch %s: %w", d.Digest, err)
	} else {
		err = d.Verify(n, h.Sum(nil))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// temporary makes a file in the folder for temporary files that is gone when it is closed.
func temporary() (*os.File, error) {
	f, err := os.CreateTemp("", "cloister-build-")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	return f, nil
}
