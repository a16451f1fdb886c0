// Init is an enclave's PID 1 for the driver's test: it looks around, reports on vsock port 9000 of its
// host, and then lives until it is killed, with a child that its death must take along.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
)

func main() {
	if len(os.Args) > 1 { // the child
		mark(os.Args[1])
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP)
		syscall.Pause()
	}
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if strings.Contains(string(cmdline), "test.exit=7") {
		os.Exit(7)
	}
	fmt.Println("hello from PID", os.Getpid())
	report := map[string]string{"cmdline": string(cmdline)}
	report["hostname"], _ = os.Hostname()
	report["env"] = strings.Join(os.Environ(), " ")
	for _, path := range []string{"/etc/ramdisk1", "/etc/ramdisk2", "/proc/1/comm"} {
		b, err := os.ReadFile(path)
		report[path] = strings.TrimSpace(string(b))
		if err != nil {
			report[path] = err.Error()
		}
	}
	entries, _ := os.ReadDir("/")
	for _, e := range entries {
		report["/"] += e.Name() + " "
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		n, _ := strconv.Atoi(fd.Name())
		target, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if n > 2 && target != "" && !strings.HasPrefix(target, "anon_inode:") { // the runtime's own, and the folder that is read
			report["fds"] += target + " "
		}
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		report["interfaces"] += i.Name + " "
	}
	if _, err := syscall.Socket(40, syscall.SOCK_STREAM, 0); errors.Is(err, syscall.EAFNOSUPPORT) {
		report["vsock"] = "refused"
	}
	if f, err := os.OpenFile("/dev/null", os.O_WRONLY, 0); err == nil {
		_, err = f.Write([]byte("x"))
		report["null"] = fmt.Sprint(err)
	}
	if f, err := os.Open("/dev/urandom"); err == nil {
		_, err = io.ReadFull(f, make([]byte, 8))
		report["urandom"] = fmt.Sprint(err)
	}
	_, name, _ := strings.Cut(strings.TrimSpace(string(cmdline)), "test.name=")
	child := exec.Command("/init", name)
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := child.Start(); err != nil {
		report["child"] = err.Error()
	}
	mark(name)
	l, err := net.Listen("unix", "/run/vsock/vsock.sock")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	defer l.Close()
	c, err := net.Dial("unix", "/run/vsock/vsock.sock_9000")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	json.NewEncoder(c).Encode(report)
	syscall.Pause()
}

// mark gives this process a name by which the test finds it among all of the machine.
func mark(name string) {
	if err := os.WriteFile("/proc/self/comm", []byte(name), 0o644); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
