package supervise

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/vsock"
)

const (
	// selfPath is a read-only mount of this program, which helpers are started from: a workload that
	// gets hold of a helper's /proc/<pid>/exe cannot write to it (CVE-2019-5736).
	selfPath = "/run/enclaved"
	// workDir is a tmpfs for the image and what the workload writes to its root.
	workDir = "/run/workload"
	// moduleDir holds the kernel's modules in the ramdisk, of names as 00-virtio_mmio.ko.
	moduleDir = "/modules"
)

// System is what Prepare has found and made.
type System struct {
	Self   string // path of this program, for helpers
	Dir    string // where the image is unpacked
	Memory int64  // how much Dir may hold, in bytes
	// Module is "device" or "dev": the provider of the security module.
	Module string
	// Sealed is what came in the ramdisk; nil for a base EIF.
	Sealed *Sealed
}

// Prepare makes the surroundings that enclaved needs as PID 1: in a machine of its own a root that a
// workload can leave and the kernel's modules, everywhere /proc, /sys and /dev where nobody has
// mounted them, the loopback device, and a tmpfs for the image of all the memory that is left. /run and
// /tmp need no mount: the root is memory already.
func Prepare() (*System, error) {
	unix.Umask(0o022)
	if Virtual() {
		if err := coverRoot(); err != nil {
			return nil, err
		}
	}
	const strict = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		kind, target string
		flags        uintptr
	}{
		{"proc", "/proc", strict},
		{"sysfs", "/sys", strict | unix.MS_RDONLY},
		{"devtmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC},
	} {
		if err := mountOnce(m.kind, m.target, m.flags); err != nil {
			return nil, err
		}
	}
	for _, dir := range []string{"/run", "/tmp"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, fmt.Errorf("read the kernel's command line: %w", err)
	}
	s := &System{Self: selfPath, Dir: workDir}
	if s.Module, err = moduleOf(string(cmdline)); err != nil {
		return nil, err
	}
	if Virtual() {
		if err := loadModules(moduleDir, string(cmdline)); err != nil {
			return nil, err
		}
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	// As in containers; where /proc/sys is read-only, a driver's kernel decides.
	err = os.WriteFile("/proc/sys/net/ipv4/ip_unprivileged_port_start", []byte("0"), 0o644)
	if err != nil && !errors.Is(err, unix.EROFS) && !errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("open low ports to every user: %w", err)
	}
	if err := bindSelf(); err != nil {
		return nil, err
	}
	if s.Memory, err = freeMemory(); err != nil {
		return nil, err
	}
	if s.Sealed, err = readSealed("/"); err != nil {
		return nil, err
	}
	if s.Sealed != nil {
		s.Memory += s.Sealed.Size // which is free once the image is unpacked
	}
	if err := os.MkdirAll(workDir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("workload", workDir, "tmpfs", unix.MS_NODEV, fmt.Sprintf("mode=700,size=%d", s.Memory)); err != nil {
		return nil, fmt.Errorf("mount memory for the image: %w", err)
	}
	return s, nil
}

// Virtual reports whether the enclave is a machine of its own, and not a process of a driver's.
func Virtual() bool {
	_, err := os.Stat(vsock.HybridDir)
	return err != nil
}

// coverRoot lays a mount of the root over itself. It has the same files, but the kernel's own first root,
// on which an initial ramdisk is unpacked, can never be left (pivot_root(2), notes), as a workload leaves it.
func coverRoot() error {
	const at = "/run" // any folder: it is where the mount is made, not where it stays
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", at, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the root once more: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cover the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the root: %w", err)
	}
	return unix.Chdir("/")
}

// loadModules loads the kernel's modules in dir, in the order of their names, and lets no other follow. A
// kernel that needs none has no such folder.
func loadModules(dir, cmdline string) error {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), moduleParameters(e.Name(), cmdline), 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) { // EEXIST: it is built in
			return fmt.Errorf("load the kernel's module %s: %w", e.Name(), err)
		}
	}
	if err := os.WriteFile("/proc/sys/kernel/modules_disabled", []byte("1"), 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("close the kernel to further modules: %w", err)
	}
	return nil
}

// moduleParameters returns what the kernel's command line has for the module in a file. It gives that to
// drivers of its own; for others modprobe does it (kernel-parameters.rst). A hypervisor names an enclave's
// devices in this way: virtio_mmio.device=512@0xfeb00e00:12.
func moduleParameters(file, cmdline string) string {
	_, name, _ := strings.Cut(strings.TrimSuffix(file, ".ko"), "-")
	var parameters []string
	for _, f := range strings.Fields(cmdline) {
		if p, ok := strings.CutPrefix(f, name+"."); ok {
			parameters = append(parameters, p)
		}
	}
	return strings.Join(parameters, " ")
}

// mountOnce mounts a kernel's file system unless something is mounted there: a driver may have done it,
// and may have been allowed less than it wanted.
func mountOnce(kind, target string, flags uintptr) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, target, 0, 0, &st); err != nil {
		return fmt.Errorf("look at %s: %w", target, err)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return nil
	}
	err := unix.Mount(kind, target, kind, flags, "")
	if err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// loopbackUp sets the loopback device up, with its addresses.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set the loopback device up: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return fmt.Errorf("look at the loopback device: %w", err)
	}
	flags := ifr.Uint16()
	if flags&unix.IFF_UP != 0 {
		return nil
	}
	ifr.SetUint16(flags | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("set the loopback device up (a driver must give CAP_NET_ADMIN or do it itself): %w", err)
	}
	return nil
}

func bindSelf() error {
	f, err := os.OpenFile(selfPath, os.O_CREATE|os.O_RDONLY, 0o755)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount("/proc/self/exe", selfPath, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount this program for helpers: %w", err)
	}
	if err := unix.Mount("", selfPath, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return fmt.Errorf("protect this program: %w", err)
	}
	return nil
}

// freeMemory returns how much memory an image can take, in bytes. A driver's process sees the host's
// memory; what it may have is the size of its root.
func freeMemory() (int64, error) {
	if !Virtual() {
		var st unix.Statfs_t
		if err := unix.Statfs("/", &st); err != nil {
			return 0, fmt.Errorf("look for free memory: %w", err)
		}
		return int64(st.Bavail) * st.Bsize, nil
	}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("look for free memory: %w", err)
	}
	return memAvailable(string(b))
}

// memAvailable reads MemAvailable, which the kernel gives in kibibytes (proc_meminfo(5)).
func memAvailable(meminfo string) (int64, error) {
	for line := range strings.Lines(meminfo) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == "MemAvailable:" && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 52)
			if err != nil {
				return 0, fmt.Errorf("read MemAvailable: %w", err)
			}
			return n << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

// moduleOf reads from the measured command line which security module the enclave uses. There is no
// fallback from one to the other, so anything unclear is an error.
func moduleOf(cmdline string) (string, error) {
	module, seen := "device", false
	for _, f := range strings.Fields(cmdline) {
		v, ok := strings.CutPrefix(f, "cloister.nsm=")
		if !ok {
			continue
		}
		if seen || (v != "device" && v != "dev") {
			return "", fmt.Errorf("the kernel's command line must have at most one cloister.nsm, which is device or dev: %q", f)
		}
		module, seen = v, true
	}
	return module, nil
}

// End ends the enclave: every process of it, and then itself.
func End(status int) {
	unix.Kill(-1, unix.SIGKILL)
	if Virtual() {
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // RB_AUTOBOOT
	}
	os.Exit(status)
}
