package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/seccomp"
	"cloister.dev/cloister/internal/vsock"
)

// childName is what this binary is called while it prepares an enclave.
const childName = "cloister-enclave"

// Descriptors that the parent passes.
const (
	configFD = 3
	errorFD  = 4
)

// init takes over when the parent started this binary to become an enclave. Nothing else of the
// program may run then, hence init.
func init() {
	if len(os.Args) != 1 || os.Args[0] != childName || os.Getpid() != 1 {
		return
	}
	// The parent-death signal belongs to a thread and is kept across execve only by the thread that
	// calls it. In init the goroutine is on the main thread, the one that was cloned.
	runtime.LockOSThread()
	// Also what this process may have inherited from whoever started it.
	err := unix.CloseRange(configFD, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		err = become(os.NewFile(configFD, "config"))
	}
	fmt.Fprintln(os.NewFile(errorFD, "error"), err)
	os.Exit(1)
}

// become turns this process into the enclave that the configuration describes. It returns only on
// failure.
func become(in io.Reader) error {
	b, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read configuration: %w", err)
	}
	var cfg config
	if err := json.Unmarshal(b, &cfg); err != nil { // empty when the parent has died
		return fmt.Errorf("read configuration: %w", err)
	}
	image, err := eif.Open(cfg.EIF)
	if err != nil {
		return err
	}
	cmdline, err := image.Cmdline()
	if err != nil {
		return err
	}
	// The sockets are on a file system that is about to be left; a detached copy of the mount is kept.
	sockets, err := unix.OpenTree(unix.AT_FDCWD, cfg.Sockets, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open folder of the sockets: %w", err)
	}
	if err := enterRoot(cfg.Root, cfg.Size); err != nil {
		return err
	}
	unix.Umask(0o022)
	// From here on there is nothing but an empty tmpfs to climb out to.
	root, err := os.OpenRoot("/")
	if err != nil {
		return err
	}
	for i, ramdisk := range image.Ramdisks() {
		if err := unpack(root, ramdisk.Open()); err != nil {
			return fmt.Errorf("unpack ramdisk %d of the EIF: %w", i+1, err)
		}
	}
	root.Close()
	image.Close()
	if err := mountAll(cmdline, sockets); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte("(none)")); err != nil { // a booted kernel's; the pod's name stays outside
		return fmt.Errorf("set host name: %w", err)
	}
	if err := seccomp.RefuseVsock(); err != nil {
		return err
	}
	err = unix.Exec("/init", []string{"/init"}, os.Environ())
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("the ramdisks of the EIF have no /init, or its interpreter is missing: build /init as a static binary")
	}
	return fmt.Errorf("execute the EIF's /init: %w", err)
}

// enterRoot makes a new tmpfs of at most size bytes the root and lets go of the old root.
func enterRoot(at string, size int64) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("cloister", at, "tmpfs", 0, fmt.Sprintf("mode=0755,size=%d", size)); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	// With both arguments alike the old root lies over the new one, and no folder for it is needed
	// (pivot_root(2), NOTES).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root file system: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root file system: %w", err)
	}
	return unix.Chdir("/")
}

// mountAll mounts what a booted kernel would offer, and the sockets.
func mountAll(cmdline string, sockets int) error {
	for _, m := range []struct {
		fstype, target string
		flags          uintptr
		data           string
	}{
		{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_RDONLY, ""},
		{"tmpfs", "/dev", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755,size=64k"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data)
		if err != nil && !(m.fstype == "sysfs" && errors.Is(err, unix.EPERM)) { // where the caller may not, nothing needs it
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if err := devices(); err != nil {
		return err
	}

	const source = "/dev/cmdline"
	if err := os.WriteFile(source, []byte(strings.TrimRight(cmdline, "\n")+"\n"), 0o444); err != nil {
		return err
	}
	if err := unix.Mount(source, "/proc/cmdline", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /proc/cmdline: %w", err)
	}
	if err := os.Remove(source); err != nil {
		return err
	}

	if err := os.MkdirAll(vsock.HybridDir, 0o700); err != nil {
		return err
	}
	if err := unix.MoveMount(sockets, "", unix.AT_FDCWD, vsock.HybridDir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s: %w", vsock.HybridDir, err)
	}
	return unix.Close(sockets)
}

// devices makes the device nodes and links that every program expects. Numbers are those of the
// kernel's Documentation/admin-guide/devices.txt.
func devices() error {
	for name, d := range map[string]struct{ major, minor uint32 }{
		"null": {1, 3}, "zero": {1, 5}, "full": {1, 7}, "random": {1, 8}, "urandom": {1, 9}, "tty": {5, 0},
	} {
		path := filepath.Join("/dev", name)
		if err := unix.Mknod(path, unix.S_IFCHR|0o666, int(unix.Mkdev(d.major, d.minor))); err != nil {
			return fmt.Errorf("create %s: %w", path, err)
		}
		if err := os.Chmod(path, 0o666); err != nil { // whatever the umask is
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join("/dev", name)); err != nil {
			return err
		}
	}
	return nil
}
