// Package host takes in what the host supplies to the workload: variables and files. Nothing enters that
// the workload manifest does not list, nor anything that could mean more to the workload than its author
// allowed. Values never stand in an error.
package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"strings"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/workload"
)

const (
	// maxVariable is the longest string of an environment in bytes (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h).
	maxVariable = 128 << 10
	// maxName is the longest name of a file in bytes (NAME_MAX, include/uapi/linux/limits.h), maxPath that of a path.
	maxName = 255
	maxPath = 4096
)

// Env are variables that the host supplies.
type Env struct {
	// Listed are variables of the manifest's env; one that the kubelet left unset is not there.
	Listed map[string]string
	// From are those of envFrom.
	From map[string]string
}

// Check returns the variables in v, or everything that is wrong with v, joined, one sentence each.
func Check(m *workload.Manifest, v *channel.HostValues) (Env, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	env := Env{Listed: map[string]string{}, From: map[string]string{}}
	listed := map[string]bool{}
	for _, e := range m.Env {
		if e.Host {
			listed[e.Name] = true
		}
	}
	for _, e := range v.GetEnv() {
		if name := e.GetName(); !listed[name] {
			bad("env %q is supplied by the host and not listed in the workload manifest", name)
		}
		if err := add(env.Listed, e); err != nil {
			errs = append(errs, err)
		}
	}
	for _, e := range v.GetEnvFrom() {
		if err := m.CheckHostEnv(e.GetName()); !m.EnvFrom {
			bad("env %q is supplied by the host, and the workload manifest has no envFrom", e.GetName())
		} else if err != nil {
			errs = append(errs, fmt.Errorf("envFrom: %w", err))
		}
		if err := add(env.From, e); err != nil {
			errs = append(errs, fmt.Errorf("envFrom: %w", err))
		}
	}

	seen := map[string]bool{}
	for _, h := range v.GetMounts() {
		if seen[h.GetPath()] {
			bad("the mount at %s is supplied twice", h.GetPath())
		}
		seen[h.GetPath()] = true
		if err := CheckMount(m, h); err != nil {
			errs = append(errs, err)
		}
	}
	for _, w := range m.Mounts {
		if w.Kind == workload.MountHost && !seen[w.Path] {
			bad("the host supplies nothing for the mount at %s, which the workload manifest lists", w.Path)
		}
	}
	if n := size(v); n > workload.MaxHostValues {
		bad("the host supplies %d bytes of variables and files, at most %d are accepted: use smaller ConfigMaps and Secrets", n, workload.MaxHostValues)
	}
	if err := errors.Join(errs...); err != nil {
		return Env{}, err
	}
	return env, nil
}

// add keeps a variable whose name has been judged.
func add(env map[string]string, v *channel.Variable) error {
	name, value := v.GetName(), v.GetValue()
	_, twice := env[name]
	switch {
	case twice:
		return fmt.Errorf("env %q is supplied twice", name)
	case bytes.IndexByte(value, 0) >= 0:
		return fmt.Errorf("env %q has a value with a NUL byte, which no variable can hold: mount it as a file", name)
	case len(name)+len("=")+len(value)+1 > maxVariable:
		return fmt.Errorf("env %q makes a variable of %d bytes and the kernel takes at most %d: mount it as a file", name, len(name)+len("=")+len(value)+1, maxVariable)
	}
	env[name] = string(value)
	return nil
}

// CheckMount reports everything that is wrong with the files of one mount, joined, one sentence each.
func CheckMount(m *workload.Manifest, h *channel.HostMount) error {
	w := m.HostMount(h.GetPath())
	if w == nil {
		return fmt.Errorf("a mount at %q is supplied by the host and not listed in the workload manifest", h.GetPath())
	}
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("the mount at %s: %s", w.Path, fmt.Sprintf(format, args...)))
	}
	if n := len(h.GetFiles()); n > workload.MaxHostFiles {
		bad("it has %d files, at most %d are accepted", n, workload.MaxHostFiles)
		return errors.Join(errs...)
	}
	files, dirs := map[string]bool{}, map[string]bool{}
	for _, f := range h.GetFiles() {
		name := f.GetPath()
		switch {
		case isFile(h):
			if w.SubPath == "" {
				bad("it is a file, which only a mount with subPath can be")
			}
		case checkName(name) != nil:
			bad("file %q: %v", name, checkName(name))
		case files[name]:
			bad("file %q is supplied twice", name)
		}
		files[name] = true
		for dir := path.Dir(name); dir != "." && !dirs[dir]; dir = path.Dir(dir) {
			dirs[dir] = true
		}
		if f.GetMode()&^uint32(fs.ModePerm) != 0 {
			bad("file %q: mode %#o has more than permissions", name, f.GetMode())
		}
		if f.GetGid() > math.MaxInt32 {
			bad("file %q: group %d is out of range", name, f.GetGid())
		}
	}
	for name := range files {
		if dirs[name] {
			bad("%q is both a file and a directory", name)
		}
	}
	return errors.Join(errs...)
}

// isFile tells whether a mount is itself a file.
func isFile(h *channel.HostMount) bool {
	return len(h.GetFiles()) == 1 && h.GetFiles()[0].GetPath() == ""
}

// checkName says what is wrong with the path of a file below its mount. Names that begin with ".." are
// those of the layout; see Files.
func checkName(name string) error {
	if !fs.ValidPath(name) || name == "." || strings.ContainsRune(name, 0) {
		return errors.New("it must be a relative path without . and ..")
	}
	if len(name) > maxPath/2 {
		return fmt.Errorf("its path has %d bytes, at most %d are accepted", len(name), maxPath/2)
	}
	for part := range strings.SplitSeq(name, "/") {
		if strings.HasPrefix(part, "..") {
			return errors.New("names that begin with .. are kept for updates")
		}
		if len(part) > maxName {
			return fmt.Errorf("a name has %d bytes, at most %d are accepted", len(part), maxName)
		}
	}
	return nil
}

// size counts names and values, in bytes.
func size(v *channel.HostValues) int {
	n := 0
	for _, list := range [][]*channel.Variable{v.GetEnv(), v.GetEnvFrom()} {
		for _, e := range list {
			n += len(e.GetName()) + len(e.GetValue())
		}
	}
	for _, h := range v.GetMounts() {
		n += mountSize(h)
	}
	return n
}

func mountSize(h *channel.HostMount) int {
	n := 0
	for _, f := range h.GetFiles() {
		n += len(f.GetPath()) + len(f.GetData())
	}
	return n
}
