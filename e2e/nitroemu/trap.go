package nitroemu

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Call is a system call that waits for its answer. It is struct seccomp_notif (include/uapi/linux/seccomp.h).
type Call struct {
	id     uint64
	thread uint32
	_      uint32
	Nr     int32
	_      uint32
	_      uint64
	Args   [6]uint64
}

// Answer is what a system call returns: one of the four.
type Answer struct {
	// Continue has the kernel do it.
	Continue bool
	// Errno is its failure.
	Errno unix.Errno
	// File is a new descriptor of the process, with O_CLOEXEC. The file is closed.
	File *os.File
	// Value is its result.
	Value int64
}

// Read copies size bytes out of the process.
func (c *Call) Read(at uint64, size int) ([]byte, error) {
	b := make([]byte, size)
	return b, c.memory(os.O_RDONLY, func(f *os.File) error { _, err := f.ReadAt(b, int64(at)); return err })
}

// Write copies b into the process.
func (c *Call) Write(at uint64, b []byte) error {
	return c.memory(os.O_WRONLY, func(f *os.File) error { _, err := f.WriteAt(b, int64(at)); return err })
}

func (c *Call) memory(flag int, do func(*os.File) error) error {
	f, err := os.OpenFile(c.proc("mem"), flag, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return do(f)
}

// path reads a path out of the process, of at most 256 bytes: longer ones are none of ours.
func (c *Call) path(at uint64) string {
	const most = 256
	var b []byte
	for len(b) < most { // the next page may be missing
		n := int(min(4096-(at+uint64(len(b)))%4096, uint64(most-len(b))))
		more, err := c.Read(at+uint64(len(b)), n)
		if err != nil {
			return ""
		}
		if i := bytes.IndexByte(more, 0); i >= 0 {
			return string(append(b, more[:i]...))
		}
		b = append(b, more...)
	}
	return ""
}

// proc is a file of the process in /proc.
func (c *Call) proc(name string) string { return fmt.Sprintf("/proc/%d/%s", c.thread, name) }

// process returns the process id: threads of one process share their memory.
func (c *Call) process() (int, error) {
	b, err := os.ReadFile(c.proc("status"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(b), "\nTgid:")
	line, _, _ := strings.Cut(rest, "\n")
	return strconv.Atoi(strings.TrimSpace(line))
}

// Trap runs f on a thread of its own whose system calls of these numbers answer answers, and those of every
// process that f starts. An ioctl is handed over only if its number is of the device's. It returns when f has.
//
// The caller needs CAP_SYS_ADMIN.
func Trap(numbers []int, answer func(*Call) Answer, f func()) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine. The runtime makes no threads from one that is
		// locked, so none inherits the filter.
		runtime.LockOSThread()
		listener, err := install(filter(numbers))
		defer func() { done <- err }() // also when f ends the goroutine, as t.Fatal does
		if err != nil {
			return
		}
		go serve(listener, answer)
		f()
	}()
	return <-done
}

// filter hands over system calls of the numbers.
func filter(numbers []int) []unix.SockFilter {
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		and  = unix.BPF_ALU | unix.BPF_AND | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K

		// Offsets in struct seccomp_data, and the type of an ioctl in its number (asm-generic/ioctl.h).
		nr, arg1, ioctlType = 0, 24, 0xff00
	)
	p := []unix.SockFilter{{Code: load, K: nr}}
	for _, n := range numbers {
		if n == unix.SYS_IOCTL {
			continue
		}
		p = append(p, unix.SockFilter{Code: jeq, K: uint32(n), Jf: 1}, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	for _, n := range numbers {
		if n == unix.SYS_IOCTL {
			p = append(p,
				unix.SockFilter{Code: jeq, K: unix.SYS_IOCTL, Jf: 4},
				unix.SockFilter{Code: load, K: arg1},
				unix.SockFilter{Code: and, K: ioctlType},
				unix.SockFilter{Code: jeq, K: magic << 8, Jf: 1},
				unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF})
		}
	}
	return append(p, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
}

// install puts a filter on this thread and returns its listener.
func install(f []unix.SockFilter) (int, error) {
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	// The runtime's signals must not have a call handed over twice.
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return 0, fmt.Errorf("install seccomp filter: %w", errno)
	}
	return int(fd), nil
}

// serve answers until nothing with the filter runs any more.
func serve(listener int, answer func(*Call) Answer) {
	defer unix.Close(listener)
	for {
		p := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(p, -1); err != nil && err != unix.EINTR {
			slog.Error("wait for system calls", "error", err)
			return
		}
		if p[0].Revents&unix.POLLIN == 0 {
			if p[0].Revents != 0 {
				return
			}
			continue
		}
		c := &Call{}
		if errno := control(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(c)); errno != 0 {
			continue // the caller was killed meanwhile
		}
		go func() {
			if err := c.respond(listener, answer(c)); err != nil && !errors.Is(err, unix.ENOENT) { // killed
				slog.Error("answer system call", "nr", c.Nr, "error", err)
			}
		}()
	}
}

func (c *Call) respond(listener int, a Answer) error {
	if a.File != nil {
		defer a.File.Close()
		add := struct {
			id                        uint64
			flags, src, new, newFlags uint32
		}{c.id, unix.SECCOMP_ADDFD_FLAG_SEND, uint32(a.File.Fd()), 0, unix.O_CLOEXEC}
		if errno := control(listener, unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&add)); errno != 0 {
			return errno
		}
		return nil
	}
	r := struct {
		id    uint64
		val   int64
		errno int32
		flags uint32
	}{id: c.id, val: a.Value, errno: -int32(a.Errno)}
	if a.Continue {
		r.flags = unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE
	}
	if errno := control(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r)); errno != 0 {
		return errno
	}
	return nil
}

func control(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return errno
}
