package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/registry"
)

// eifArtifact is the artifact type of an image that holds an EIF.
const eifArtifact = "application/vnd.cloister.eif.v1"

func newEIFPush() *cobra.Command {
	var t tags
	cmd := &cobra.Command{
		Use:   "push FILE IMAGE",
		Short: "Push an enclave image file to a registry, for the field eif of pods",
		Long: `Pushes an enclave image file as an image of one layer, of the artifact type ` + eifArtifact + `, which
the kubelet mounts as an image volume, and prints the image's name with its digest. The same file has the
same digest wherever it is pushed.

Credentials are those that "docker login" has stored.`,
		Example: `  cloister eif push app.eif registry.example/app-eif:1.4.0`,
		Args:    exactly("FILE", "IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			client := registry.Client{PlainHTTP: t.plain, Keychain: authn.DefaultKeychain}
			return failed(pushEIF(cmd.Context(), cmd.OutOrStdout(), args[0], args[1], client))
		},
	}
	t.addPlain(cmd.Flags())
	return cmd
}

func pushEIF(ctx context.Context, stdout io.Writer, file, image string, client registry.Client) error {
	ref, err := client.Parse(image)
	if err != nil {
		return err
	}
	if _, ok := ref.(name.Digest); ok {
		return fmt.Errorf("%s has a digest, which follows from the file: name a tag, or nothing but the repository", image)
	}
	f, err := openData(file)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := eif.NewReader(f, f.Size())
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	layer, err := newEIFLayer(f)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	img, err := newEIFImage(layer, r.Arch)
	if err != nil {
		return err
	}
	if err := remote.Write(ref, img, client.Options(ctx)...); err != nil {
		return fmt.Errorf("push %s: %s", image, registry.Explain(ctx, ref, err))
	}
	digest, err := img.Digest()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, ref.Context().Digest(digest.String()))
	return err
}

// eifImage is an image with one layer. It implements partial.CompressedImageCore.
type eifImage struct {
	layer            partial.CompressedLayer
	config, manifest []byte
}

// newEIFImage makes the image of a layer that holds an EIF. Nothing else goes into it. The config is that of
// an ordinary image for one platform, since such an image is what container runtimes unpack (OCI image-spec,
// config.md).
func newEIFImage(layer partial.CompressedLayer, arch eif.Arch) (v1.Image, error) {
	of, err := partial.Descriptor(layer)
	if err != nil {
		return nil, err
	}
	os, architecture, _ := strings.Cut(platforms[arch], "/")
	type rootFS struct {
		Type    string    `json:"type"`
		DiffIDs []v1.Hash `json:"diff_ids"`
	}
	config, err := json.Marshal(struct {
		Architecture string   `json:"architecture"`
		OS           string   `json:"os"`
		Config       struct{} `json:"config"`
		RootFS       rootFS   `json:"rootfs"`
	}{Architecture: architecture, OS: os, RootFS: rootFS{"layers", []v1.Hash{of.Digest}}})
	if err != nil {
		return nil, err
	}
	hash, size, err := v1.SHA256(bytes.NewReader(config))
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal(v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.OCIManifestSchema1,
		ArtifactType:  eifArtifact,
		Config:        v1.Descriptor{MediaType: types.OCIConfigJSON, Digest: hash, Size: size},
		Layers:        []v1.Descriptor{*of},
	})
	if err != nil {
		return nil, err
	}
	return partial.CompressedToImage(&eifImage{layer, config, manifest})
}

func (i *eifImage) RawConfigFile() ([]byte, error)      { return i.config, nil }
func (i *eifImage) RawManifest() ([]byte, error)        { return i.manifest, nil }
func (i *eifImage) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// LayerByDigest returns the only layer; what is asked for comes from the manifest.
func (i *eifImage) LayerByDigest(v1.Hash) (partial.CompressedLayer, error) { return i.layer, nil }

// eifLayer is an archive of one file, read from where the file lies. It implements partial.CompressedLayer.
type eifLayer struct {
	header  []byte
	content eif.Data
	digest  v1.Hash
	size    int64 // bytes
}

func newEIFLayer(content eif.Data) (*eifLayer, error) {
	var header bytes.Buffer
	err := tar.NewWriter(&header).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: podenv.EIFName, Mode: 0o444, Size: content.Size()})
	if err != nil {
		return nil, err
	}
	l := &eifLayer{header: header.Bytes(), content: content}
	h := sha256.New()
	if l.size, err = io.Copy(h, l.open()); err != nil {
		return nil, err
	}
	l.digest, err = v1.NewHash(fmt.Sprintf("sha256:%x", h.Sum(nil)))
	return l, err
}

// open returns the archive: a header, the file, zeros up to a whole block, and two blocks of zeros (pax(1),
// ustar Interchange Format).
func (l *eifLayer) open() io.Reader {
	const block = 512
	end := make([]byte, (block-l.content.Size()%block)%block+2*block)
	return io.MultiReader(bytes.NewReader(l.header), io.NewSectionReader(l.content, 0, l.content.Size()), bytes.NewReader(end))
}

func (l *eifLayer) Digest() (v1.Hash, error)            { return l.digest, nil }
func (l *eifLayer) Compressed() (io.ReadCloser, error)  { return io.NopCloser(l.open()), nil }
func (l *eifLayer) Size() (int64, error)                { return l.size, nil }
func (l *eifLayer) MediaType() (types.MediaType, error) { return types.OCIUncompressedLayer, nil }
