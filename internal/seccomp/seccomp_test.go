package seccomp

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain is also the filtered process: a filter cannot be taken off again.
func TestMain(m *testing.M) {
	if os.Getenv("SECCOMP_TEST_CHILD") == "" {
		os.Exit(m.Run())
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	if err := RefuseVsock(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	try := func(name string, got error, want unix.Errno) {
		if want == 0 && got != nil || want != 0 && !errors.Is(got, want) {
			fmt.Printf("%s: got %v, want %d\n", name, got, want)
		}
	}
	socket := func(domain int) error {
		fd, err := unix.Socket(domain, unix.SOCK_STREAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
	syscall := func(nr uintptr) error {
		if _, _, errno := unix.Syscall(nr, 0, 0, 0); errno != 0 {
			return errno
		}
		return nil
	}
	try("vsock", socket(unix.AF_VSOCK), unix.EAFNOSUPPORT)
	try("unix", socket(unix.AF_UNIX), 0)
	try("inet", socket(unix.AF_INET), 0)
	try("io_uring", syscall(unix.SYS_IO_URING_SETUP), unix.ENOSYS)
	try("x32 getpid", syscall(x32|39), unix.ENOSYS)
	try("getpid", syscall(unix.SYS_GETPID), 0)
	// Other threads and children have the filter too.
	done := make(chan error)
	go func() { done <- socket(unix.AF_VSOCK) }()
	try("vsock in a goroutine", <-done, unix.EAFNOSUPPORT)
	if os.Getenv("SECCOMP_TEST_CHILD") == "1" {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = []string{"SECCOMP_TEST_CHILD=2"}
		out, err := cmd.CombinedOutput()
		fmt.Print(string(out))
		if err != nil {
			fmt.Println("child:", err)
		}
	}
	os.Exit(0)
}

func TestRefuseVsock(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"SECCOMP_TEST_CHILD=1"}
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "" {
		t.Errorf("%v: %s", err, out)
	}
}
