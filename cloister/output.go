package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/pflag"
)

// format is what a command prints, text or json: the flag -o.
type format string

const (
	formatText format = "text"
	formatJSON format = "json"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

func (f *format) Set(s string) error {
	if s := format(s); s != formatText && s != formatJSON {
		return errors.New("write text or json")
	}
	*f = format(s)
	return nil
}

func (f *format) add(flags *pflag.FlagSet, usage string) {
	*f = formatText
	flags.VarP(f, "format", "o", usage)
}

// replaceFile makes the named file what write writes: all of it, or none if write fails or ctx ends. A
// file that is there keeps its permissions, and a new one has those that the umask leaves.
func replaceFile(ctx context.Context, name string, write func(io.WriteSeeker) error) (err error) {
	mode, keep := fs.FileMode(0o666), false
	if target, err := filepath.EvalSymlinks(name); err == nil {
		name = target
	}
	if info, err := os.Stat(name); err == nil {
		if !info.Mode().IsRegular() {
			return fmt.Errorf("write %s: it is not a regular file: name another", name)
		}
		mode, keep = info.Mode().Perm(), true
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+"."+rand.Text()), os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
	var p *fs.PathError
	if errors.As(err, &p) {
		err = p.Err // the name of the temporary file says nothing
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(interruptible{ctx, f}); err != nil {
		return err
	}
	if keep {
		if err := f.Chmod(mode); err != nil {
			return err
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}

// interruptible is a file that takes no more once ctx has ended.
type interruptible struct {
	ctx context.Context
	f   *os.File // not embedded: its other methods would write on
}

func (i interruptible) Write(b []byte) (int, error) {
	if err := i.ctx.Err(); err != nil {
		return 0, err
	}
	return i.f.Write(b)
}

func (i interruptible) Seek(offset int64, whence int) (int64, error) { return i.f.Seek(offset, whence) }
