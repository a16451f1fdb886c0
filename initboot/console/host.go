package console

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"cloister.dev/cloister/internal/channel"
	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/workload"
)

const (
	// dataLink is where a volume of the kubelet has its files (k8s.io/kubernetes/pkg/volume/util, AtomicWriter).
	dataLink = "..data"
	// settle is how long changes may go on before they are read.
	settle = 100 * time.Millisecond
	// maxDepth is how deep folders may lie in a mount; links can make circles.
	maxDepth = 32
	// attempts is how often files that change while they are read are read again.
	attempts = 5
)

var errTooMuch = fmt.Errorf("it is too much: all variables and files together can have %d bytes, and one mount %d files", workload.MaxHostValues, workload.MaxHostFiles)

// Supplied is what the kubelet has resolved in this container for the workload.
type Supplied struct {
	// Environ has entries "NAME=value", as os.Environ gives them.
	Environ []string
	// Mounts are paths, as podenv.EnvMounts lists them.
	Mounts []string
	// Poll is how often mounts are looked at where the kernel has no inotify instance left.
	Poll time.Duration

	watcher func() (*fsnotify.Watcher, error) // of tests; nil for inotify
}

// Values reads everything.
func (s *Supplied) Values() (*channel.HostValues, error) {
	v := &channel.HostValues{}
	total := 0
	for _, e := range s.Environ {
		name, value, _ := strings.Cut(e, "=")
		for _, l := range []struct {
			prefix string
			list   *[]*channel.Variable
		}{{podenv.EnvValue, &v.Env}, {podenv.EnvFrom, &v.EnvFrom}} {
			if own, ok := strings.CutPrefix(name, l.prefix); ok {
				if !utf8.ValidString(own) {
					return nil, fmt.Errorf("the name of a variable, %q, is not UTF-8", own)
				}
				*l.list = append(*l.list, &channel.Variable{Name: own, Value: []byte(value)})
				total += len(own) + len(value)
			}
		}
	}
	for _, p := range s.Mounts {
		r, err := readMount(p, workload.MaxHostValues-total)
		if err != nil {
			return nil, err
		}
		v.Mounts = append(v.Mounts, r.mount)
		total += r.size
	}
	return v, nil
}

// reading is one mount with its content at one time.
type reading struct {
	mount *channel.HostMount
	size  int // names and contents in bytes
	// folders are those in which a change can show, none for a mount that is a file.
	folders []string
}

// readMount reads the mount at p, of at most limit bytes.
func readMount(p string, limit int) (*reading, error) {
	var r *reading
	var err error
	for range attempts {
		r = &reading{mount: &channel.HostMount{Path: p}}
		if err = r.read(p, limit); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		// A file has gone since its folder was read.
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = errors.New("it, or a file in it, is not there")
	case errors.Is(err, fs.ErrPermission):
		err = fmt.Errorf("%w: give the pod an fsGroup, or the volume a defaultMode that lets others read", err)
	}
	if err != nil {
		return nil, fmt.Errorf("read what the host supplies at %s: %w", p, err)
	}
	return r, nil
}

func (r *reading) read(p string, limit int) error {
	i, err := os.Stat(p)
	if err != nil {
		return err
	}
	if !i.IsDir() {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		return r.add(f, "", limit)
	}
	root, err := os.OpenRoot(p)
	if err != nil {
		return err
	}
	defer root.Close()
	r.folders = []string{p}
	// One generation of a volume: what is under way beside it does not matter.
	switch data, err := root.OpenRoot(dataLink); {
	case err == nil:
		defer data.Close()
		return r.walk(data, "", limit, false, 0)
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return r.walk(root, "", limit, true, 0)
}

// walk reads a folder. Links are followed, as far as they stay below the mount.
func (r *reading) walk(root *os.Root, dir string, limit int, watch bool, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("folders lie more than %d deep", maxDepth)
	}
	f, err := root.Open(cleanDir(dir))
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	f.Close()
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		if strings.HasPrefix(name, "..") { // the kubelet's own
			continue
		}
		full := path.Join(dir, name)
		if !utf8.ValidString(full) {
			return fmt.Errorf("the file name %q is not UTF-8", full)
		}
		i, err := root.Stat(full)
		if err != nil {
			return err
		}
		switch {
		case i.IsDir():
			if watch {
				r.folders = append(r.folders, filepath.Join(r.mount.GetPath(), full))
			}
			if err := r.walk(root, full, limit, watch, depth+1); err != nil {
				return err
			}
		case i.Mode().IsRegular():
			f, err := root.Open(full)
			if err != nil {
				return err
			}
			if err := r.add(f, full, limit); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s is neither a file nor a folder", full)
		}
	}
	return nil
}

func cleanDir(dir string) string {
	if dir == "" {
		return "."
	}
	return dir
}

// add reads f, which it closes.
func (r *reading) add(f *os.File, name string, limit int) error {
	defer f.Close()
	i, err := f.Stat()
	if err != nil {
		return err
	}
	if !i.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", f.Name())
	}
	rest := int64(limit - r.size - len(name))
	if i.Size() > rest || len(r.mount.Files) == workload.MaxHostFiles {
		return errTooMuch
	}
	var data bytes.Buffer
	data.Grow(int(i.Size()) + bytes.MinRead)
	if _, err := data.ReadFrom(io.LimitReader(f, rest+1)); err != nil {
		return err
	}
	if int64(data.Len()) > rest {
		return errTooMuch
	}
	h := &channel.HostFile{Path: name, Data: data.Bytes(), Mode: uint32(i.Mode().Perm())}
	if st, ok := i.Sys().(*syscall.Stat_t); ok {
		h.Gid = st.Gid
	}
	r.mount.Files = append(r.mount.Files, h)
	r.size += len(name) + data.Len()
	return nil
}

// sum tells whether two readings differ.
func sum(m *channel.HostMount) (out [sha256.Size]byte) {
	h := sha256.New()
	for _, f := range m.GetFiles() {
		fmt.Fprintf(h, "%q %o %d %d\n", f.GetPath(), f.GetMode(), f.GetGid(), len(f.GetData()))
		h.Write(f.GetData())
	}
	h.Sum(out[:0])
	return out
}

// Follow sends each mount whose files are no longer those of v to pod, until ctx ends. An update that fails
// as one does while there is no workload is tried again; one that is refused is not. Files that cannot be
// read are told once.
func (s *Supplied) Follow(ctx context.Context, v *channel.HostValues, pod podsock.PodClient) {
	for _, m := range v.GetMounts() {
		if files := m.GetFiles(); len(files) == 1 && files[0].GetPath() == "" {
			continue // a file of a subPath: the kubelet never changes it
		}
		go s.follow(ctx, m.GetPath(), sum(m), pod)
	}
}

func (s *Supplied) follow(ctx context.Context, p string, last [sha256.Size]byte, pod podsock.PodClient) {
	changes := s.newWatch()
	defer changes.close()
	told := ""
	for {
		r, err := readMount(p, workload.MaxHostValues)
		again := err == nil && changes.add(r.folders) // something may have changed before its folder was watched
		switch {
		case again:
		case err != nil:
			if told != err.Error() {
				if _, sent := pod.Update(ctx, &podsock.UpdateRequest{Problem: err.Error()}); sent == nil {
					told = err.Error()
				}
			}
		default:
			told = ""
			if now := sum(r.mount); now != last {
				_, err = pod.Update(ctx, &podsock.UpdateRequest{Mount: r.mount})
				if c := status.Code(err); err == nil || c == codes.InvalidArgument || c == codes.ResourceExhausted {
					last, err = now, nil
				}
			}
		}
		r = nil // not kept while nothing happens
		if again {
			continue
		}
		if err == nil && !changes.wait(ctx) || err != nil && !sleep(ctx, retry) {
			return
		}
	}
}

// watch waits for changes in folders.
type watch struct {
	inotify *fsnotify.Watcher // nil where the kernel has none left
	poll    time.Duration
}

func (s *Supplied) newWatch() *watch {
	w, watcher := &watch{poll: s.Poll}, fsnotify.NewWatcher
	if s.watcher != nil {
		watcher = s.watcher
	}
	if i, err := watcher(); err == nil {
		w.inotify = i
	}
	return w
}

func (w *watch) close() {
	if w.inotify != nil {
		w.inotify.Close()
		w.inotify = nil
	}
}

// add watches folders, and tells whether one of them was not watched until now.
func (w *watch) add(folders []string) (more bool) {
	if w.inotify == nil {
		return false
	}
	watched := w.inotify.WatchList()
	for _, f := range folders {
		if slices.Contains(watched, f) {
			continue
		}
		if err := w.inotify.Add(f); err != nil {
			w.close()
			return false
		}
		more = true
	}
	return more
}

// wait returns when something may have changed, or false when ctx has ended.
func (w *watch) wait(ctx context.Context) bool {
	if w.inotify == nil {
		return sleep(ctx, w.poll)
	}
	select {
	case <-ctx.Done():
		return false
	case <-w.inotify.Errors:
	case <-w.inotify.Events:
	}
	if !sleep(ctx, settle) {
		return false
	}
	for {
		select {
		case <-w.inotify.Errors:
		case <-w.inotify.Events:
		default:
			return true
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
