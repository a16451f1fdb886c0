package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/oci"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/internal/registry"
	"cloister.dev/cloister/internal/sealed"
	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/workload"
)

// platforms of images by the architecture of an EIF.
var platforms = map[eif.Arch]string{eif.X86_64: "linux/amd64", eif.AArch64: "linux/arm64"}

type build struct {
	image, file, base, output string
	format                    format
	tags
}

func newBuild() *cobra.Command {
	var b build
	cmd := &cobra.Command{
		Use:   "build --image IMAGE|oci-layout:DIR [-f FILE] --base FILE --output FILE",
		Short: "Seal an image and its workload into an enclave image file",
		Long: `Makes a sealed EIF of an unmodified OCI image, without Docker and without root: kernel, command line and
enclaved are those of the base EIF, and a second ramdisk holds the workload manifest and the image. An
enclave of it takes neither from the host, and PCR2 pins both.

With -f the workload is that of the only pod template in the file with the annotation cloister.dev/enclave;
without, that of a pod with one container that names nothing but the image. Every byte of the image is
verified. The same image, workload and base give the same bytes, wherever and whenever they are built.

Credentials are those that "docker login" has stored. Layers pass through the folder for temporary files
($TMPDIR).`,
		Example: `  cloister build --image registry.example/app:1.4.0 -f deployment.yaml --base base.eif --output app.eif
  cloister measure --eif app.eif >measurements.json
  cloister eif push app.eif registry.example/app-eif:1.4.0`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := b.check(); err != nil {
				return err
			}
			return failed(b.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.image, "image", "", "`image` reference, by digest or tag, or oci-layout:DIR")
	f.VarP((*named)(&b.file), "filename", "f", "YAML or JSON `file` with the pod or its owner; - is standard input")
	f.StringVar(&b.base, "base", "", "base EIF `file`: /base.eif of the initboot image")
	f.StringVar(&b.output, "output", "", "write the sealed EIF to this `file`")
	b.addPlain(f)
	b.format.add(f, measurementsUsage)
	return cmd
}

func (b *build) check() error {
	switch {
	case b.image == "":
		return errors.New("name the image with --image: a reference, or oci-layout:DIR for one in a folder")
	case b.base == "":
		return errors.New("name the base EIF with --base: it is /base.eif in the initboot image, and `make run` leaves it in ~/.cache/cloister/out")
	case b.output == "":
		return errors.New("name the file to write with --output")
	}
	return nil
}

func (b *build) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer) error {
	base, err := eif.Open(b.base)
	if err != nil {
		return fmt.Errorf("read base EIF: %w", err)
	}
	defer base.Close()
	if n := len(base.Ramdisks()); n != 1 {
		return fmt.Errorf("%s is no base EIF: it has %d ramdisks and a base EIF has one", b.base, n)
	}
	client := registry.Client{PlainHTTP: b.plain, Keychain: authn.DefaultKeychain}
	from, digest, err := openImage(ctx, b.image, client)
	if err != nil {
		return fmt.Errorf("find image %s: %w", b.image, err)
	}
	manifest, plugins, err := b.workload(ctx, digest, platforms[base.Arch], stdin, stderr)
	if err != nil {
		return err
	}
	canonical, err := manifest.Canonical()
	if err != nil {
		return err
	}
	image, err := readImage(ctx, from, digest, platforms[base.Arch])
	if err != nil {
		return fmt.Errorf("read image %s: %w", b.image, err)
	}
	images := []*sealedImage{image}
	for _, reference := range plugins {
		from, digest, err := openImage(ctx, reference, client)
		if err == nil {
			image, err = readImage(ctx, from, digest, platforms[base.Arch])
		}
		if err != nil {
			return fmt.Errorf("read image %s of a plugin: %w", reference, err)
		}
		images = append(images, image)
	}

	disk, err := temporary()
	if err != nil {
		return err
	}
	defer disk.Close()
	if err := writeSealed(ctx, disk, canonical, images); err != nil {
		return err
	}
	size, err := disk.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	cmdline, err := base.Cmdline()
	if err != nil {
		return fmt.Errorf("read base EIF: %w", err)
	}
	metadata, err := b.metadata(base, digest)
	if err != nil {
		return err
	}
	var code *eif.Measurements
	err = replaceFile(ctx, b.output, func(w io.WriteSeeker) (err error) {
		code, err = eif.Write(w, eif.Image{
			Arch: base.Arch, Kernel: base.Kernel().Open(), Cmdline: cmdline, Metadata: metadata,
			Ramdisks: []eif.Data{base.Ramdisks()[0].Open(), io.NewSectionReader(disk, 0, size)},
		})
		return err
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(stderr, "%s: sealed with PCR16 %x\n", b.output, workload.PCR16(canonical))
	return printMeasurements(stdout, b.format, code)
}

// metadata describes the EIF for people. It has no time of its own: the same inputs give the same bytes.
func (b *build) metadata(base *eif.Reader, digest string) (*eif.Metadata, error) {
	m, err := base.Metadata()
	if err != nil {
		return nil, fmt.Errorf("read base EIF: %w", err)
	}
	if m == nil {
		m = &eif.Metadata{}
	}
	m.ImageName, m.ImageVersion = "cloister-sealed", digest
	m.BuildMetadata.BuildTool = "cloister"
	return m, nil
}

// workload returns the manifest to seal, for the image of that digest, and the references of its plugins' images.
func (b *build) workload(ctx context.Context, digest, platform string, stdin io.Reader, stderr io.Writer) (*workload.Manifest, []string, error) {
	if b.file == "" {
		m := &workload.Manifest{APIVersion: workload.APIVersion, Image: workload.Image{Digest: digest}}
		if platform != workload.DefaultPlatform {
			m.Image.Platform = platform
		}
		return m, nil, nil
	}
	// --image says which image a tag in the file stands for.
	resolve := func(_ context.Context, image string) (string, error) { return image + "@" + digest, nil }
	pods, refused, err := enclavePods(ctx, b.file, stdin, stderr, resolve)
	switch {
	case err != nil:
		return nil, nil, err
	case refused > 0:
		return nil, nil, errors.New("nothing was built: the webhook would deny what is listed above")
	case len(pods) == 0:
		return nil, nil, fmt.Errorf("%s: %w", b.file, errNoPod)
	case len(pods) > 1:
		return nil, nil, fmt.Errorf("%s has %d pod templates with the annotation %s, and a sealed EIF holds one workload: give each a file of its own", b.file, len(pods), annotation.Enclave)
	}
	p := pods[0]
	if p.manifest.Image.Digest != digest {
		return nil, nil, fmt.Errorf("%s: it runs the image %s, and --image has the digest %s: name the same image", p.what, p.image, digest)
	}
	if want := p.manifest.Image.Platform; want != platform && (want != "" || platform != workload.DefaultPlatform) {
		if want == "" {
			want = workload.DefaultPlatform
		}
		return nil, nil, fmt.Errorf("%s: it is for %s, and the base EIF for %s: set its nodeSelector kubernetes.io/arch, or use the other base EIF", p.what, want, platform)
	}
	for _, sentence := range p.warnings {
		fmt.Fprintf(stderr, "  %s\n", sentence)
	}
	values, errs := annotation.Read(p.template.Annotations, field.NewPath("metadata", "annotations"))
	if len(errs) > 0 {
		return nil, nil, errs.ToAggregate()
	}
	var plugins []string
	for _, plugin := range values.Config.Plugins {
		if plugin.Reference != "" {
			plugins = append(plugins, plugin.Reference)
		}
	}
	return p.manifest, plugins, nil
}

// writeSealed writes the second ramdisk of a sealed EIF: the manifest first, then the images as an OCI layout.
func writeSealed(ctx context.Context, w io.Writer, manifest []byte, images []*sealedImage) error {
	archive := ramdisk.NewWriter(w)
	file := func(name string, content []byte) error {
		return archive.File(name, 0o444, bytes.NewReader(content), int64(len(content)))
	}
	index := struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Manifests     []topDescriptor `json:"manifests"`
	}{SchemaVersion: 2, MediaType: oci.MediaTypeIndex}
	for _, image := range images {
		index.Manifests = append(index.Manifests, image.top)
	}
	raw, err := json.Marshal(index)
	if err != nil {
		return err
	}
	err = errors.Join(
		archive.Folder(sealed.Dir, 0o755), file(sealed.Manifest, manifest),
		archive.Folder(sealed.Image, 0o755), file(sealed.Image+"/oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)), file(sealed.Image+"/index.json", raw),
		archive.Folder(sealed.Image+"/blobs", 0o755), archive.Folder(sealed.Image+"/blobs/sha256", 0o755))
	if err != nil {
		return fmt.Errorf("write ramdisk: %w", err)
	}
	written := map[string]bool{} // images share layers
	blob := func(digest string) (name string, again bool) {
		again, written[digest] = written[digest], true
		return path.Join(sealed.Image, "blobs", strings.Replace(digest, ":", "/", 1)), again
	}
	for _, image := range images {
		for _, digest := range image.order {
			name, again := blob(digest)
			if again {
				continue
			}
			if err := file(name, image.small[digest]); err != nil {
				return fmt.Errorf("write ramdisk: %w", err)
			}
		}
		for i, l := range image.layers {
			name, again := blob(l.Digest)
			if again {
				continue
			}
			content, err := fetchLayer(ctx, image.from, l)
			if err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(image.layers), err)
			}
			err = archive.File(name, 0o444, content, l.Size)
			content.Close()
			if err != nil {
				return fmt.Errorf("write ramdisk: %w", err)
			}
		}
	}
	return archive.Close()
}
