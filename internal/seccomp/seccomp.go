package seccomp

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (include/uapi/linux/seccomp.h); both architectures are little-endian,
// so the low half of an argument comes first.
const (
	offNr   = 0
	offArch = 4
	offArg0 = 16
)

// x32 is the bit that marks system calls of the x32 ABI (arch/x86/include/uapi/asm/unistd.h,
// __X32_SYSCALL_BIT).
const x32 = 0x40000000

// filter answers socket(AF_VSOCK, …) with EAFNOSUPPORT, as a kernel without vsock does. The ways
// around it answer ENOSYS: system calls of another ABI (32-bit programs reach sockets through
// socketcall, whose arguments a filter cannot see) and io_uring, which makes sockets without the
// system call. Programs fall back from io_uring, since container runtimes refuse it too.
func filter() []unix.SockFilter {
	const (
		load = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		jeq  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jge  = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret  = unix.BPF_RET | unix.BPF_K

		refuse = unix.SECCOMP_RET_ERRNO
	)
	return []unix.SockFilter{
		0: {Code: load, K: offArch},
		1: {Code: jeq, K: nativeArch, Jf: 8},
		2: {Code: load, K: offNr},
		3: {Code: jge, K: x32, Jt: 6},
		4: {Code: jeq, K: unix.SYS_IO_URING_SETUP, Jt: 5},
		5: {Code: jeq, K: unix.SYS_SOCKET, Jf: 2},
		6: {Code: load, K: offArg0},
		7: {Code: jeq, K: unix.AF_VSOCK, Jt: 1},
		8: {Code: ret, K: unix.SECCOMP_RET_ALLOW},
		9: {Code: ret, K: refuse | uint32(unix.EAFNOSUPPORT)},

		10: {Code: ret, K: refuse | uint32(unix.ENOSYS)},
	}
}

// RefuseVsock makes socket(AF_VSOCK, …) fail with EAFNOSUPPORT in every thread of this process and in
// all its descendants, for good. It also refuses io_uring and system calls of another ABI, with ENOSYS.
//
// The caller needs CAP_SYS_ADMIN or must have set no_new_privs, as seccomp(2) says; it fails with
// EACCES otherwise.
func RefuseVsock() error {
	f := filter()
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return fmt.Errorf("install seccomp filter against AF_VSOCK: %w", errno)
	}
	return nil
}
