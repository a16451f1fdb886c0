// Baseeif builds a base EIF: a kernel, a command line that names the security module, and one ramdisk
// with the kernel's modules, whose /init is enclaved. Its bytes depend on the inputs alone. The measurements are printed as JSON.
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
	"path"
	"path/filepath"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/ramdisk"
)

// cmdline is what AWS's builder passes, without "nomodules": a distribution's kernel has its vsock
// and NSM drivers as modules.
const cmdline = "reboot=k panic=30 pci=off console=ttyS0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd random.trust_cpu=on"

// folders are what enclaved mounts over or writes to, and that of the kernel's modules.
var folders = []string{"dev", "etc", "modules", "proc", "run", "sys", "tmp"}

// input names the files that an EIF is made of.
type input struct {
	kernel, version string // bzImage, and what the metadata says of it
	modules         string // folder of the kernel's modules, or empty for none
	program         string // becomes /init
	nsm             string // device or dev
}

func main() {
	var in input
	flag.StringVar(&in.kernel, "kernel", "", "bzImage `file`")
	flag.StringVar(&in.version, "kernel-version", "", "what the metadata says of the kernel, as `text`")
	flag.StringVar(&in.modules, "modules", "", "`folder` of kernel modules, which enclaved loads in the order of their names")
	flag.StringVar(&in.program, "init", "", "static `program` that becomes /init")
	flag.StringVar(&in.nsm, "nsm", "device", "security `module`: device or dev")
	out := flag.String("o", "", "write the EIF to this `file`")
	flag.Parse()
	m, err := build(in, *out)
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
func build(in input, out string) (*eif.Measurements, error) {
	if in.nsm != "device" && in.nsm != "dev" {
		return nil, fmt.Errorf("-nsm %q: want device or dev", in.nsm)
	}
	k, err := os.ReadFile(in.kernel)
	if err != nil {
		return nil, fmt.Errorf("read kernel: %w", err)
	}
	modules, err := readModules(in.modules)
	if err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	program, err := os.ReadFile(in.program)
	if err != nil {
		return nil, fmt.Errorf("read init: %w", err)
	}
	var disk bytes.Buffer
	if err := writeRamdisk(&disk, modules, program); err != nil {
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
		Cmdline: cmdline + " cloister.nsm=" + in.nsm,
		Metadata: &eif.Metadata{
			ImageName:    "cloister-base",
			ImageVersion: "0",
			BuildMetadata: eif.BuildMetadata{
				BuildTime:       "1970-01-01T00:00:00Z",
				BuildTool:       "baseeif",
				OperatingSystem: "Linux",
				KernelVersion:   in.version,
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

// module is a file of a kernel's module.
type module struct {
	name    string
	content []byte
}

// readModules reads the kernel's modules in a folder.
func readModules(dir string) ([]module, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	modules := make([]module, len(entries))
	for i, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		modules[i] = module{e.Name(), b}
	}
	return modules, nil
}

// writeRamdisk writes a gzip-compressed archive with the modules, where supervise.Prepare looks for them, and
// the program as /init. Its gzip header carries no time.
func writeRamdisk(w io.Writer, modules []module, program []byte) error {
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
	for _, m := range modules {
		if err := archive.File(path.Join("modules", m.name), 0o644, bytes.NewReader(m.content), int64(len(m.content))); err != nil {
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
