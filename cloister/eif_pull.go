package main

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/oci"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/registry"
)

func newEIFPull() *cobra.Command {
	var t tags
	var output string
	cmd := &cobra.Command{
		Use:   "pull IMAGE --output FILE",
		Short: "Fetch an enclave image file that was pushed",
		Long: `Fetches the enclave image file in an image that "cloister eif push" has pushed, and prints the image's
name with its digest. Every byte is verified by digest, and the file is checked as "cloister eif inspect" does.

Credentials are those that "docker login" has stored.`,
		Example: `  cloister eif pull registry.example/app-eif@sha256:… --output app.eif`,
		Args:    exactly("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return errors.New("name the file to write with --output")
			}
			client := registry.Client{PlainHTTP: t.plain, Keychain: authn.DefaultKeychain}
			return failed(pullEIF(cmd.Context(), cmd.OutOrStdout(), args[0], output, client))
		},
	}
	cmd.Flags().StringVar(&output, "output", "", "write the enclave image to this `file`")
	t.addPlain(cmd.Flags())
	return cmd
}

func pullEIF(ctx context.Context, stdout io.Writer, image, output string, client registry.Client) error {
	from, digest, err := openImage(ctx, image, client)
	if err != nil {
		return fmt.Errorf("find image %s: %w", image, err)
	}
	layer, err := fetchEIFLayer(ctx, from, digest)
	if err != nil {
		return fmt.Errorf("pull %s: %w", image, err)
	}
	defer layer.Close()
	file, err := eifIn(layer)
	if err == nil {
		_, err = eif.NewReader(file, file.Size())
	}
	if err != nil {
		return fmt.Errorf("pull %s: %w", image, err)
	}
	err = replaceFile(ctx, output, func(w io.WriteSeeker) error {
		_, err := io.Copy(w, file)
		return err
	})
	if err != nil {
		return err
	}
	if !strings.Contains(image, "@") {
		image += "@" + digest
	}
	_, err = fmt.Fprintln(stdout, image)
	return err
}

// fetchEIFLayer fetches and verifies the layer of an image that holds an EIF.
func fetchEIFLayer(ctx context.Context, from imageSource, digest string) (*os.File, error) {
	raw, err := readBlob(ctx, from.manifest, oci.Descriptor{Digest: digest, Size: -1}, oci.MaxManifest)
	if err != nil {
		return nil, err
	}
	var kind struct {
		ArtifactType string `json:"artifactType"`
	}
	if err := json.Unmarshal(raw, &kind); err != nil {
		return nil, fmt.Errorf("decode image manifest: %w", err)
	}
	if kind.ArtifactType != eifArtifact {
		return nil, fmt.Errorf("it holds no enclave image: its artifact type is %q and not %q", kind.ArtifactType, eifArtifact)
	}
	m, err := oci.ParseManifest(raw)
	if err != nil {
		return nil, err
	}
	if len(m.Layers) != 1 || m.Layers[0].MediaType != string(types.OCIUncompressedLayer) {
		return nil, errors.New("an image that holds an enclave image has one layer, an uncompressed archive: push it with `cloister eif push`")
	}
	return fetchLayer(ctx, from, m.Layers[0])
}

// eifIn returns the only file of an archive, which must have the name that initboot looks for.
func eifIn(archive *os.File) (*io.SectionReader, error) {
	info, err := archive.Stat()
	if err != nil {
		return nil, err
	}
	whole := io.NewSectionReader(archive, 0, info.Size())
	entries := tar.NewReader(whole)
	h, err := entries.Next()
	if err != nil || h.Typeflag != tar.TypeReg || h.Name != podenv.EIFName {
		return nil, fmt.Errorf("its layer does not begin with a file %s: push it with `cloister eif push`", podenv.EIFName)
	}
	start, err := whole.Seek(0, io.SeekCurrent) // the archive's reader reads whole blocks and no further
	if err != nil {
		return nil, err
	}
	if _, err := entries.Next(); !errors.Is(err, io.EOF) {
		return nil, errors.New("its layer has more than one file: push it with `cloister eif push`")
	}
	return io.NewSectionReader(archive, start, h.Size), nil
}
