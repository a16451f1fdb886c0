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

	"github.com/u-root/u-root/pkg/cpio"

	"cloister.dev/cloister/eif"
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
	if err := ramdisk(&disk, program); err != nil {
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

// ramdisk writes a gzip-compressed newc archive with the program as /init. Both headers carry no
// time, and cpio's inode numbers count from zero.
func ramdisk(w io.Writer, program []byte) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	records := make([]cpio.Record, 0, len(folders)+1)
	for _, name := range folders {
		mode := uint64(0o755)
		if name == "tmp" {
			mode = 0o1777
		}
		records = append(records, cpio.Directory(name, mode))
	}
	records = append(records, cpio.StaticFile("init", string(program), 0o755))
	cpio.MakeAllReproducible(records)
	archive := cpio.Newc.Writer(z)
	if err := cpio.WriteRecords(archive, records); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(archive); err != nil {
		return err
	}
	return z.Close()
}
