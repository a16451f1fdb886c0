package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
)

// Defaults of AWS's builder for what it is not told.
const (
	defaultVersion = "1.0"
	unknown        = "Unknown"
)

type eifBuild struct {
	kernel, cmdline, cmdlineFile string
	ramdisks                     []string
	arch, metadata, output       string
	info                         eif.Metadata
	format                       format
	signing
}

func newEIFBuild() *cobra.Command {
	var b eifBuild
	cmd := &cobra.Command{
		Use:   "build --kernel FILE --cmdline TEXT --ramdisk FILE [--ramdisk FILE...] --output FILE",
		Short: "Make an enclave image file of a kernel, a command line and ramdisks",
		Long: `Makes an enclave image file: the bytes are those that AWS's builder makes of the same inputs and metadata.
The metadata (name, version, build time, ...) is not measured; without --build-time it holds the time, so
that two builds have the same measurements but not the same bytes.

The first ramdisk is measured in PCR1, all others in PCR2.`,
		Example: `  cloister eif build --kernel bzImage --cmdline-file cmdline.txt --ramdisk init.cpio.gz --ramdisk app.cpio.gz --output app.eif
  cloister eif build ... --sign-key key.pem --sign-cert cert.pem --output app.eif -o json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := b.check(cmd.Flags().Changed("cmdline")); err != nil {
				return err
			}
			return failed(b.run(cmd.Context(), cmd.OutOrStdout()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&b.kernel, "kernel", "", "bzImage (x86_64) or Image (aarch64) `file`")
	f.StringVar(&b.cmdline, "cmdline", "", "the kernel's command line, as `text`")
	f.StringVar(&b.cmdlineFile, "cmdline-file", "", "`file` with the kernel's command line")
	f.StringArrayVar(&b.ramdisks, "ramdisk", nil, fmt.Sprintf("cpio archive `file`, compressed or not; repeatable, up to %d times", eif.MaxRamdisks))
	f.StringVar(&b.arch, "arch", string(eif.X86_64), "`architecture`: x86_64 or aarch64")
	f.StringVar(&b.metadata, "metadata", "", "JSON `file` that becomes the custom metadata")
	f.StringVar(&b.info.ImageName, "name", "", "`name` of the image (default: that of the kernel's file)")
	f.StringVar(&b.info.ImageVersion, "version", defaultVersion, "`version` of the image")
	f.StringVar(&b.info.BuildMetadata.BuildTime, "build-time", "", "`time` of the build, RFC 3339 (default: now)")
	f.StringVar(&b.info.BuildMetadata.BuildTool, "build-tool", "cloister", "`name` of the build tool")
	f.StringVar(&b.info.BuildMetadata.BuildToolVersion, "build-tool-version", ownVersion(), "`version` of the build tool")
	f.StringVar(&b.info.BuildMetadata.OperatingSystem, "img-os", "Linux", "operating system of the image, as `text`")
	f.StringVar(&b.info.BuildMetadata.KernelVersion, "img-kernel", unknown, "version of the kernel, as `text`")
	f.StringVar(&b.output, "output", "", "write the enclave image to this `file`")
	b.signing.add(f)
	b.format.add(f, measurementsUsage)
	return cmd
}

// ownVersion is the version of this command.
func ownVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return unknown
}

// check reports errors of usage.
func (b *eifBuild) check(cmdline bool) error {
	switch {
	case b.kernel == "":
		return errors.New("name the kernel with --kernel")
	case cmdline == (b.cmdlineFile != ""):
		return errors.New("give the kernel's command line with one of --cmdline and --cmdline-file")
	case len(b.ramdisks) == 0:
		return errors.New("name the ramdisks with --ramdisk")
	case len(b.ramdisks) > eif.MaxRamdisks:
		return fmt.Errorf("there are %d ramdisks, but at most %d fit into an enclave image", len(b.ramdisks), eif.MaxRamdisks)
	case b.output == "":
		return errors.New("name the file to write with --output")
	case b.arch != string(eif.X86_64) && b.arch != string(eif.AArch64):
		return fmt.Errorf("there is no architecture %q: name x86_64 or aarch64", b.arch)
	}
	if _, err := time.Parse(time.RFC3339, b.info.BuildMetadata.BuildTime); b.info.BuildMetadata.BuildTime != "" && err != nil {
		return fmt.Errorf("--build-time takes a time like 2026-01-02T03:04:05Z: %w", err)
	}
	return b.signing.check()
}

func (b *eifBuild) run(ctx context.Context, stdout io.Writer) error {
	img := eif.Image{Arch: eif.Arch(b.arch), Cmdline: b.cmdline, Metadata: &b.info}
	if b.cmdlineFile != "" {
		text, err := os.ReadFile(b.cmdlineFile)
		if err != nil {
			return fmt.Errorf("read command line: %w", err)
		}
		img.Cmdline = string(text)
	}
	if b.info.ImageName == "" {
		b.info.ImageName = filepath.Base(b.kernel)
	}
	if b.info.BuildMetadata.BuildTime == "" {
		b.info.BuildMetadata.BuildTime = time.Now().UTC().Format(time.RFC3339)
	}
	var err error
	if b.metadata != "" {
		if b.info.CustomMetadata, err = os.ReadFile(b.metadata); err != nil {
			return fmt.Errorf("read metadata: %w", err)
		}
		if !json.Valid(b.info.CustomMetadata) {
			return fmt.Errorf("read metadata: %s is not JSON", b.metadata)
		}
	}
	if img.Signer, err = b.load(); err != nil {
		return err
	}
	kernel, err := openData(b.kernel)
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	defer kernel.Close()
	img.Kernel = kernel
	for _, name := range b.ramdisks {
		ramdisk, err := openData(name)
		if err != nil {
			return fmt.Errorf("read ramdisk: %w", err)
		}
		defer ramdisk.Close()
		img.Ramdisks = append(img.Ramdisks, ramdisk)
	}
	var code *eif.Measurements
	err = replaceFile(ctx, b.output, func(w io.WriteSeeker) (err error) {
		code, err = eif.Write(w, img)
		return err
	})
	if err != nil {
		return err
	}
	return printMeasurements(stdout, b.format, code)
}

// dataFile is a file as content of an EIF.
type dataFile struct {
	*os.File
	size int64
}

func (d dataFile) Size() int64 { return d.size }

// openData opens a regular file, whose size is known before it is read.
func openData(name string) (dataFile, error) {
	f, err := os.Open(name)
	if err != nil {
		return dataFile{}, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return dataFile{}, err
	}
	return dataFile{f, info.Size()}, nil
}
