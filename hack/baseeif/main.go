// Baseeif builds a base EIF: a kernel, a command line that names the security module, and one ramdisk
// whose /init is enclaved. Its bytes depend on the inputs alone. The measurements are printed as JSON.
package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/ramdisk"
)

// cmdline is what AWS's builder passes, without "nomodules": a distribution's kernel has its vsock
// and NSM drivers as modules.
const cmdline = "reboot=k panic=30 pci=off console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on"

// folders are what enclaved mounts over or writes to.
var folders = []string{"dev", "etc", "proc", "run", "sys", "tmp"}

func main() {
	kernel := flag.String("kernel", "", "bzImage `file`")
	version := flag.String("kernel-version", "", "what the metadata says of the kernel, as `text`")
	initFile := flag.String("init", "", "static `program` that becomes /init")
	nsm := flag.String("nsm", "device", "security `module`: device or dev")
	out := flag.String("o", "", "write the EIF to this `file`")
	flag.Parse()
	m, err := build(*kernel, *version, *initFile, *nsm, *out)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(m)
	}
	if err != nil {
		slog.Error("baseeif", "error", err)
		os.Exit(1)
	}
}

// build writes the EIF to the file out, which appears only when it is complete, and returns its
// measurements.
func build(kernel, version, initFile, nsm, out string) (*eif.Measurements, error) {
	if nsm != "device" && nsm != "dev" {
		return nil, fmt.Errorf("-nsm %q: want device or dev", nsm)
	}
	k, err := os.ReadFile(kernel)
	if err != nil {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	program, err := os.ReadFile(initFile)
	if err != nil {
		return nil, fmt.Errorf("read init: %w", err)
	}
	var disk bytes.Buffer
	if err := writeRamdisk(&disk, program); err != nil {
		return nil, fmt.Errorf("write ramdisk: %w", err)
	}
	f, err := os.Create(out + ".part")
	if err != nil {
		return nil, fmt.Errorf("create EIF: %w", err)
	}
	defer f.Close()
	m, err := eif.Write(f, eif.Image{
		Arch:    eif.X86_64,
		Kernel:  bytes.NewReader(k),
		Cmdline: cmdline + " cloister.nsm=" + nsm,
		Metadata: &eif.Metadata{
			ImageName:    "cloister-base",
			ImageVersion: "0",
			BuildMetadata: eif.BuildMetadata{
				BuildTime:       "1970-01-01T00:00:00Z",
				BuildTool:       "baseeif",
				OperatingSystem: "Linux",
				KernelVersion:   version,
			},
		},
		Ramdisks: []eif.Data{bytes.NewReader(disk.Bytes())},
	})
	if err != nil {
		return nil, fmt.Errorf("write EIF: %w", err)
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("write EIF: %w", err)
	}
	return m, os.Rename(f.Name(), out)
}

// writeRamdisk writes a gzip-compressed archive with the program as /init. Its gzip header carries no time.
func writeRamdisk(w io.Writer, program []byte) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	archive := ramdisk.NewWriter(z)
	for _, name := range folders {
		mode := uint64(0o755)
		if name == "tmp" {
			mode = 0o1777
		}
		if err := archive.Folder(name, mode); err != nil {
			return err
		}
	}
	if err := archive.File("init", 0o755, bytes.NewReader(program), int64(len(program))); err != nil {
		return err
	}
	if err := archive.Close(); err != nil {
		return err
	}
	return z.Close()
}
