package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

// Names of the layout of a directory, which is the kubelet's (k8s.io/kubernetes/pkg/volume/util,
// AtomicWriter), for programs that watch ..data:
//
//	<mount>/..data          -> ..<generation>
//	<mount>/..<generation>/   the files
//	<mount>/<name>          -> ..data/<name>    for each first part of their paths
//
// An update makes a new generation and renames a link, so that it shows at once and as a whole.
const (
	dataLink = "..data"
	nextLink = "..data_next"
)

// Files are the mounts that the host supplies, each a directory or file of this enclave that is mounted
// read-only into the workload's root.
type Files struct {
	manifest *workload.Manifest
	dir      string

	mu    sync.Mutex
	rest  int            // size of everything but the mounts
	sizes map[string]int // by mount path, in bytes
}

// Write writes the mounts of v, which Check has accepted, below dir, which is made.
func Write(m *workload.Manifest, v *channel.HostValues, dir string) (*Files, error) {
	f := &Files{manifest: m, dir: dir, rest: size(v), sizes: map[string]int{}}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	for _, h := range v.GetMounts() {
		f.sizes[h.GetPath()] = mountSize(h)
		f.rest -= mountSize(h)
		source := f.Source(h.GetPath())
		var err error
		if isFile(h) {
			err = writeFile(source, h.GetFiles()[0])
		} else if err = f.makeDir(source, h.GetPath(), v.GetMounts()); err == nil {
			err = replace(source, h.GetFiles())
		}
		if err != nil {
			return nil, fmt.Errorf("write what the host supplies for %s: %w", h.GetPath(), err)
		}
	}
	return f, nil
}

// Source is the directory or file of the mount at path.
func (f *Files) Source(path string) string {
	return filepath.Join(f.dir, strconv.Itoa(slices.IndexFunc(f.manifest.Mounts, func(v workload.Mount) bool { return v.Path == path })))
}

// makeDir makes the directory of a mount, and in it what others of the manifest come to lie on, as the kubelet
// does: inside the workload it is read-only.
func (f *Files) makeDir(source, path string, all []*channel.HostMount) error {
	if err := os.Mkdir(source, 0o755); err != nil {
		return err
	}
	var files, dirs []string
	for _, w := range f.manifest.Mounts {
		i := slices.IndexFunc(all, func(h *channel.HostMount) bool { return h.GetPath() == w.Path })
		if w.Kind == workload.MountHost && isFile(all[i]) {
			files = append(files, w.Path)
		} else {
			dirs = append(dirs, w.Path)
		}
	}
	for _, s := range f.manifest.Secrets {
		files = append(files, s.File)
	}
	for _, p := range dirs {
		if below, ok := strings.CutPrefix(p, path+"/"); ok {
			if err := os.MkdirAll(filepath.Join(source, below), 0o755); err != nil {
				return err
			}
		}
	}
	for _, p := range files {
		if below, ok := strings.CutPrefix(p, path+"/"); ok {
			name := filepath.Join(source, below)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				return err
			}
		}
	}
	return nil
}

// Update replaces the files of one mount. What is refused changes nothing.
func (f *Files) Update(h *channel.HostMount) error {
	if err := CheckMount(f.manifest, h); err != nil {
		return err
	}
	if f.manifest.HostMount(h.GetPath()).SubPath != "" {
		return fmt.Errorf("the mount at %s has a subPath, and so never changes", h.GetPath())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.rest + mountSize(h)
	for path, n := range f.sizes {
		if path != h.GetPath() {
			all += n
		}
	}
	if all > workload.MaxHostValues {
		return fmt.Errorf("with the update of %s the host supplies %d bytes of variables and files, at most %d are accepted: use smaller ConfigMaps and Secrets", h.GetPath(), all, workload.MaxHostValues)
	}
	if err := replace(f.Source(h.GetPath()), h.GetFiles()); err != nil {
		return fmt.Errorf("write what the host supplies for %s: %w", h.GetPath(), err)
	}
	f.sizes[h.GetPath()] = mountSize(h)
	return nil
}

// replace makes files the content of dir. Only we write there.
func replace(dir string, files []*channel.HostFile) (err error) {
	old, err := os.Readlink(filepath.Join(dir, dataLink))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	next, err := os.MkdirTemp(dir, "..")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(next)
		}
	}()
	if err := os.Chmod(next, 0o755); err != nil {
		return err
	}
	links := map[string]bool{}
	for _, f := range files {
		first, _, _ := strings.Cut(f.GetPath(), "/")
		links[first] = true
		name := filepath.Join(next, filepath.FromSlash(f.GetPath()))
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := writeFile(name, f); err != nil {
			return err
		}
	}
	// Before anything shows: a mount may lie where a file shall be.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if links[e.Name()] && e.Type() != fs.ModeSymlink {
			return fmt.Errorf("file %q lies where the workload manifest has another mount", e.Name())
		}
	}
	link := filepath.Join(dir, nextLink)
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(filepath.Base(next), link); err != nil {
		return err
	}
	if err := os.Rename(link, filepath.Join(dir, dataLink)); err != nil {
		return err
	}
	// What follows is for names that come or go; the files behind all others have changed already.
	for name := range links {
		if err := os.Symlink(filepath.Join(dataLink, name), filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for _, e := range entries {
		if e.Type() == fs.ModeSymlink && e.Name() != dataLink && e.Name() != nextLink && !links[e.Name()] {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if old == "" {
		return nil
	}
	return os.RemoveAll(filepath.Join(dir, old))
}

// writeFile writes one file of root's.
func writeFile(name string, f *channel.HostFile) error {
	if err := os.WriteFile(name, f.GetData(), 0o600); err != nil {
		return err
	}
	if err := os.Chown(name, 0, int(f.GetGid())); err != nil {
		return err
	}
	return os.Chmod(name, fs.FileMode(f.GetMode())&fs.ModePerm)
}
