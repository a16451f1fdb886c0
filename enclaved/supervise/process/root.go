package process

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/workload"
)

// What containers get in /dev (OCI runtime-spec, config-linux.md).
var (
	devices = map[string][2]uint32{ // major and minor
		"null": {1, 3}, "zero": {1, 5}, "full": {1, 7}, "random": {1, 8}, "urandom": {1, 9}, "tty": {5, 0},
	}
	deviceLinks = map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	}
)

// Paths of the kernel that containers do not see or cannot change (containerd, pkg/oci/spec.go).
// Without the second list root in the workload could name a program that the kernel runs as root
// outside (core_pattern).
var (
	maskedPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
	readOnlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// newRoot makes the unpacked image the root of this mount namespace, with everything around it that a
// container has, and leaves nothing of the old root.
func newRoot(s *Spec) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	binds, err := openBinds(s.Binds)
	if err != nil {
		return err
	}
	if err := unix.Mount(s.Root, s.Root, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the image: %w", err)
	}
	if err := unix.Chdir(s.Root); err != nil {
		return fmt.Errorf("enter the image: %w", err)
	}
	// The old root comes to lie above the new one, where it is taken away (pivot_root(2), notes).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("make the image the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the enclave's own root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("enter the image: %w", err)
	}
	// From here on every path and every link of the image is below its own root.
	if err := kernelMounts(); err != nil {
		return err
	}
	if err := writeFiles(s.Hosts); err != nil {
		return err
	}
	bind := func(i int) error {
		if err := attach(binds[i], s.Binds[i]); err != nil {
			return fmt.Errorf("mount %s: %w", s.Binds[i].Target, err)
		}
		return nil
	}
	bound, err := userMounts(s, bind)
	if err != nil {
		return err
	}
	for i := range s.Binds {
		if !bound[i] {
			if err := bind(i); err != nil {
				return err
			}
		}
	}
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return fmt.Errorf("make the working directory: %w", err)
	}
	flags := uintptr(unix.MS_NODEV)
	if s.ReadOnlyRoot {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|flags, ""); err != nil {
		return fmt.Errorf("restrict the root: %w", err)
	}
	if err := unix.Sethostname([]byte(hostname)); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	return nil
}

// openBinds clones the mounts of binds while their sources can be seen.
func openBinds(binds []Bind) ([]*os.File, error) {
	var out []*os.File
	for _, b := range binds {
		fd, err := unix.OpenTree(unix.AT_FDCWD, b.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return nil, fmt.Errorf("open %s: %w", b.Source, err)
		}
		out = append(out, os.NewFile(uintptr(fd), b.Source))
	}
	return out, nil
}

// attach mounts the cloned tree of a bind at its target, which is made.
func attach(tree *os.File, b Bind) error {
	defer tree.Close()
	target := b.Target
	i, err := tree.Stat()
	if err != nil {
		return err
	}
	dir := target
	if !i.IsDir() {
		dir = filepath.Dir(target)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if !i.IsDir() {
		// Left by an earlier start, or the image's own.
		f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o755)
		if err != nil {
			return err
		}
		f.Close()
	}
	if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if b.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	return unix.MountSetattr(unix.AT_FDCWD, target, 0, &attr)
}

// kernelMounts mounts /proc, /sys and /dev.
func kernelMounts() error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		switch i, err := os.Lstat(dir); {
		case errors.Is(err, fs.ErrNotExist):
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
		case err != nil:
			return err
		case !i.IsDir():
			return fmt.Errorf("the image's %s is not a directory", dir)
		}
	}
	const strict = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	mount := func(source, target, kind string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	if err := mount("proc", "/proc", "proc", strict, ""); err != nil {
		return err
	}
	// A driver that may not mount it gives no /sys: the workload finds an empty directory.
	if err := mount("sysfs", "/sys", "sysfs", strict|unix.MS_RDONLY, ""); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	if err := mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID|unix.MS_STRICTATIME, "mode=755,size=65536k"); err != nil {
		return err
	}
	for name, id := range devices {
		p := "/dev/" + name
		if err := unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(id[0], id[1]))); err != nil {
			return fmt.Errorf("make %s: %w", p, err)
		}
	}
	for name, target := range deviceLinks {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/dev/pts", "/dev/shm"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"); err != nil {
		return err
	}
	if err := mount("shm", "/dev/shm", "tmpfs", strict, "mode=1777,size=65536k"); err != nil {
		return err
	}
	for _, p := range maskedPaths {
		i, err := os.Lstat(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if i.IsDir() {
			err = mount("tmpfs", p, "tmpfs", strict|unix.MS_RDONLY, "nr_blocks=1,nr_inodes=1")
		} else {
			err = mount("/dev/null", p, "", unix.MS_BIND, "")
		}
		if err != nil {
			return err
		}
	}
	for _, p := range readOnlyPaths {
		if _, err := os.Lstat(p); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := mount(p, p, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
		if err := mount("", p, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|strict, ""); err != nil {
			return err
		}
	}
	return nil
}

// writeFiles writes what a container runtime puts over the image's own. There is no name service: what
// the manifest allows to be reached is in /etc/hosts.
func writeFiles(hosts []string) error {
	lines := append([]string{"127.0.0.1\tlocalhost " + hostname, "::1\tlocalhost ip6-localhost ip6-loopback"}, hosts...)
	files := map[string]string{
		"/etc/hostname":    hostname + "\n",
		"/etc/hosts":       strings.Join(lines, "\n") + "\n",
		"/etc/resolv.conf": "",
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return fmt.Errorf("make /etc: %w", err)
	}
	for name, content := range files {
		// A link of the image is replaced, not followed.
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// userMounts makes the mounts of the manifest, those above others first. It returns which binds are among
// them.
func userMounts(s *Spec, bind func(int) error) (bound map[int]bool, err error) {
	bound = map[int]bool{}
	mounts := slices.Clone(s.Mounts)
	slices.SortFunc(mounts, func(a, b workload.Mount) int { return cmp.Compare(a.Path, b.Path) })
	shared, err := sharedVolumes(s, mounts)
	if err != nil {
		return nil, err
	}
	for i, m := range mounts {
		if m.Kind == workload.MountHost {
			j := slices.IndexFunc(s.Binds, func(b Bind) bool { return b.Target == m.Path })
			if j < 0 {
				return nil, fmt.Errorf("nothing is there to mount at %s", m.Path)
			}
			if err := checkHostMount(m.Path, s.home()); err != nil {
				return nil, fmt.Errorf("mount %s: %w", m.Path, err)
			}
			if err := bind(j); err != nil {
				return nil, err
			}
			bound[j] = true
			continue
		}
		if err := os.MkdirAll(m.Path, 0o755); err != nil {
			return nil, fmt.Errorf("make the mount point %s: %w", m.Path, err)
		}
		if m.Volume != 0 {
			err = attachVolume(shared[i], m)
		} else {
			err = mountTmpfs(s, m, m.Path)
		}
		if err != nil {
			return nil, fmt.Errorf("mount a tmpfs at %s: %w", m.Path, err)
		}
	}
	return bound, nil
}

// checkHostMount refuses a mount of the host's over the system or the home directory, also at a path that a link
// of the image leads there.
func checkHostMount(target, home string) error {
	real, err := realPath(target)
	if err != nil {
		return err
	}
	if err := workload.CheckHostPath(real); err != nil {
		return err
	}
	return workload.CheckHostHome(real, home)
}

// home is the home directory. One that cannot be resolved is none that a program could use.
func (s *Spec) home() string {
	home, _ := (&environment{s.Env}).get("HOME")
	if !filepath.IsAbs(home) {
		home = filepath.Join(s.Dir, home)
	}
	home = filepath.Clean(home)
	if real, err := realPath(home); err == nil {
		return real
	}
	return home
}

// realPath is a clean path without links, of which the end need not exist.
func realPath(p string) (string, error) {
	rest := ""
	for dir := p; ; dir = filepath.Dir(dir) {
		real, err := filepath.EvalSymlinks(dir)
		if !errors.Is(err, fs.ErrNotExist) {
			return filepath.Join(real, rest), err
		}
		rest = filepath.Join(filepath.Base(dir), rest)
	}
}
