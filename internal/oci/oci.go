// Package oci reads what describes an image: indexes, manifests and configs (OCI image-spec 1.1, and
// Docker's image manifest version 2, schema 2). The enclave and the command that builds a sealed EIF
// share it, so that what would be refused inside is refused before.
package oci

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
)

// Media types that decide how something is read (OCI image-spec, media-types.md, and Docker's image
// manifest version 2, schema 2).
const (
	MediaTypeManifest       = "application/vnd.oci.image.manifest.v1+json"
	MediaTypeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	MediaTypeIndex          = "application/vnd.oci.image.index.v1+json"
)

// Compression is how a layer's archive is compressed.
type Compression int

// The compressions of layers.
const (
	Uncompressed Compression = iota
	Gzip
	Zstd
)

// Layers is the compression of a layer by its media type.
var Layers = map[string]Compression{
	"application/vnd.oci.image.layer.v1.tar":            Uncompressed,
	"application/vnd.oci.image.layer.v1.tar+gzip":       Gzip,
	"application/vnd.oci.image.layer.v1.tar+zstd":       Zstd,
	"application/vnd.docker.image.rootfs.diff.tar":      Uncompressed,
	"application/vnd.docker.image.rootfs.diff.tar.gzip": Gzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd": Zstd,
}

// Limits of what is read into memory, in bytes, and of the number of layers.
const (
	MaxManifest = 4 << 20 // what registries take (distribution, maxManifestBodySize)
	MaxConfig   = 8 << 20
	maxLayers   = 256
)

// Descriptor names a blob (OCI image-spec, descriptor.md).
type Descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	Platform  *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	} `json:"platform,omitempty"`
}

// Verify compares what was received with what was named; a size below 0 is not known.
func (d Descriptor) Verify(size int64, sum []byte) error {
	if d.Size >= 0 && size != d.Size {
		return fmt.Errorf("%s came with another size than the %d bytes it is named with: it was refused", d.Digest, d.Size)
	}
	if got := "sha256:" + hex.EncodeToString(sum); got != d.Digest {
		return fmt.Errorf("%s came with other bytes, whose digest is %s: they were refused", d.Digest, got)
	}
	return nil
}

var digestRE = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// Validate checks the digest's form and the size of what a document calls by that name.
func (d Descriptor) Validate(what string) error {
	if !digestRE.MatchString(d.Digest) {
		return fmt.Errorf("%s has the digest %q: only sha256 is supported", what, d.Digest)
	}
	if d.Size < 0 {
		return fmt.Errorf("%s has a negative size", what)
	}
	return nil
}

// Manifest is an image manifest or an index, whichever of its lists is there.
type Manifest struct {
	SchemaVersion int           `json:"schemaVersion"`
	Config        *Descriptor   `json:"config"`
	Layers        []Descriptor  `json:"layers"`
	Manifests     *[]Descriptor `json:"manifests"`
}

// ParseManifest reads what its digest has verified. The kind is told from the shape, never from a
// header of the host; a document that is both at once is refused (CVE-2021-41190).
func ParseManifest(b []byte) (*Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("decode image manifest: %w", err)
	}
	isIndex, isImage := m.Manifests != nil, m.Config != nil || m.Layers != nil
	switch {
	case m.SchemaVersion != 2:
		return nil, fmt.Errorf("the image manifest has schemaVersion %d, only 2 is supported: push the image again with a current tool", m.SchemaVersion)
	case isIndex && isImage:
		return nil, errors.New("the image manifest is an index and an image at once")
	case isIndex:
		return &m, nil
	case m.Config == nil || len(m.Layers) == 0:
		return nil, errors.New("the image manifest has no config or no layers")
	case len(m.Layers) > maxLayers:
		return nil, fmt.Errorf("the image has %d layers, at most %d are supported", len(m.Layers), maxLayers)
	}
	if err := m.Config.Validate("the image's config"); err != nil {
		return nil, err
	}
	if m.Config.Size > MaxConfig {
		return nil, fmt.Errorf("the image's config has %d bytes, at most %d are supported", m.Config.Size, MaxConfig)
	}
	for i, l := range m.Layers {
		if err := l.Validate(fmt.Sprintf("layer %d", i+1)); err != nil {
			return nil, err
		}
		if _, ok := Layers[l.MediaType]; !ok {
			return nil, fmt.Errorf("layer %d has the media type %q, which is not supported", i+1, l.MediaType)
		}
	}
	return &m, nil
}

// Choose returns the image of an index for a platform, "os/architecture".
func (m *Manifest) Choose(platform string) (Descriptor, error) {
	for _, d := range *m.Manifests {
		if d.MediaType != MediaTypeManifest && d.MediaType != MediaTypeDockerManifest {
			continue
		}
		if d.Platform != nil && d.Platform.OS+"/"+d.Platform.Architecture == platform {
			if err := d.Validate("the image for " + platform); err != nil {
				return Descriptor{}, err
			}
			if d.Size > MaxManifest {
				return Descriptor{}, fmt.Errorf("the image manifest for %s has %d bytes, at most %d are supported", platform, d.Size, MaxManifest)
			}
			return d, nil
		}
	}
	return Descriptor{}, fmt.Errorf("the image index has no image for %s", platform)
}

// Config is what an image says about how it is run (OCI image-spec, config.md).
type Config struct {
	// Env has entries "NAME=value".
	Env        []string `json:"Env"`
	Entrypoint []string `json:"Entrypoint"`
	Cmd        []string `json:"Cmd"`
	// User is "user", "uid", or one of them with ":group" or ":gid"; empty for root.
	User       string `json:"User"`
	WorkingDir string `json:"WorkingDir"`
	// StopSignal is "SIGNAME", "NAME" or a number; empty for SIGTERM.
	StopSignal string `json:"StopSignal"`
}

// ConfigFile is the image's configuration.
type ConfigFile struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Config       Config `json:"config"`
	RootFS       struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// ParseConfig reads the config of an image of so many layers that must be for the platform, "os/architecture".
func ParseConfig(b []byte, platform string, layers int) (*ConfigFile, error) {
	var c ConfigFile
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("decode the image's config: %w", err)
	}
	if p := c.OS + "/" + c.Architecture; p != platform {
		return nil, fmt.Errorf("the image is for %q, the enclave needs %q", p, platform)
	}
	if len(c.RootFS.DiffIDs) != layers {
		return nil, fmt.Errorf("the image has %d layers and %d diff_ids in its config", layers, len(c.RootFS.DiffIDs))
	}
	for _, d := range c.RootFS.DiffIDs {
		if !digestRE.MatchString(d) {
			return nil, fmt.Errorf("the image's config has the diff_id %q: only sha256 is supported", d)
		}
	}
	return &c, nil
}
