package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
)

// Media types that decide how something is read (OCI image-spec, media-types.md, and Docker's image
// manifest version 2, schema 2).
const (
	ociManifest    = "application/vnd.oci.image.manifest.v1+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// compression by media type of a layer.
var compression = map[string]Compression{
	"application/vnd.oci.image.layer.v1.tar":            Uncompressed,
	"application/vnd.oci.image.layer.v1.tar+gzip":       Gzip,
	"application/vnd.oci.image.layer.v1.tar+zstd":       Zstd,
	"application/vnd.docker.image.rootfs.diff.tar":      Uncompressed,
	"application/vnd.docker.image.rootfs.diff.tar.gzip": Gzip,
	"application/vnd.docker.image.rootfs.diff.tar.zstd": Zstd,
}

// Limits of what is read into memory, in bytes, and of the number of layers.
const (
	maxManifest = 4 << 20 // what registries take (distribution, maxManifestBodySize)
	maxConfig   = 8 << 20
	maxLayers   = 256
)

// descriptor names a blob (OCI image-spec, descriptor.md).
type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	Platform  *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	} `json:"platform"`
}

var digestRE = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

func (d descriptor) validate(what string) error {
	if !digestRE.MatchString(d.Digest) {
		return fmt.Errorf("%s has the digest %q: only sha256 is supported", what, d.Digest)
	}
	if d.Size < 0 {
		return fmt.Errorf("%s has a negative size", what)
	}
	return nil
}

// manifest is an image manifest or an index, whichever of its lists is there.
type manifest struct {
	SchemaVersion int           `json:"schemaVersion"`
	Config        *descriptor   `json:"config"`
	Layers        []descriptor  `json:"layers"`
	Manifests     *[]descriptor `json:"manifests"`
}

// parseManifest reads what its digest has verified. The kind is told from the shape, never from a
// header of the host; a document that is both at once is refused (CVE-2021-41190).
func parseManifest(b []byte) (*manifest, error) {
	var m manifest
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
	if err := m.Config.validate("the image's config"); err != nil {
		return nil, err
	}
	if m.Config.Size > maxConfig {
		return nil, fmt.Errorf("the image's config has %d bytes, at most %d are supported", m.Config.Size, maxConfig)
	}
	for i, l := range m.Layers {
		if err := l.validate(fmt.Sprintf("layer %d", i+1)); err != nil {
			return nil, err
		}
		if _, ok := compression[l.MediaType]; !ok {
			return nil, fmt.Errorf("layer %d has the media type %q, which is not supported", i+1, l.MediaType)
		}
	}
	return &m, nil
}

// choose returns the image of an index for a platform, "os/architecture".
func (m *manifest) choose(platform string) (descriptor, error) {
	for _, d := range *m.Manifests {
		if d.MediaType != ociManifest && d.MediaType != dockerManifest {
			continue
		}
		if d.Platform != nil && d.Platform.OS+"/"+d.Platform.Architecture == platform {
			if err := d.validate("the image for " + platform); err != nil {
				return descriptor{}, err
			}
			if d.Size > maxManifest {
				return descriptor{}, fmt.Errorf("the image manifest for %s has %d bytes, at most %d are supported", platform, d.Size, maxManifest)
			}
			return d, nil
		}
	}
	return descriptor{}, fmt.Errorf("the image index has no image for %s", platform)
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

// configFile is the image's configuration.
type configFile struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Config       Config `json:"config"`
	RootFS       struct {
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

func parseConfig(b []byte, platform string, layers int) (*configFile, error) {
	var c configFile
	if err := json.Unmarshal(b, &c); err != nil {
		return nil, fmt.Errorf("decode the image's config: %w", err)
	}
	if p := c.OS + "/" + c.Architecture; p != platform {
		return nil, fmt.Errorf("the image is for %s, the enclave needs %s", p, platform)
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
