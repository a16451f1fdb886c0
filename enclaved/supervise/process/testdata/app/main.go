// App is the workload of tests: it shows what a process finds around it.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "state":
		state()
	case "exit":
		n, _ := strconv.Atoi(os.Args[2])
		os.Exit(n)
	case "sleep":
		fmt.Println("sleeping")
		time.Sleep(time.Hour)
	case "deaf":
		signal.Notify(make(chan os.Signal, 1))
		fmt.Println("ready")
		time.Sleep(time.Hour)
	case "stop":
		c := make(chan os.Signal, 1)
		signal.Notify(c)
		fmt.Println("ready")
		for sig := range c {
			if sig != syscall.SIGURG {
				fmt.Println("got", sig)
				os.Exit(3)
			}
		}
	case "flood":
		n, _ := strconv.Atoi(os.Args[2])
		line := []byte(strings.Repeat("x", 1023) + "\n")
		for range n / len(line) {
			os.Stdout.Write(line)
		}
		fmt.Fprint(os.Stderr, "the last word")
	case "leave":
		// Leaves a child behind that holds the output.
		cmd := exec.Command("/app", "sleep")
		cmd.Stdout = os.Stdout
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
		}
	case "touch":
		if err := os.WriteFile(os.Args[2], nil, 0o600); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	case "append":
		f, err := os.OpenFile(os.Args[2], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			os.Exit(1)
		}
		fmt.Fprintln(f, os.Args[3], os.Getuid(), os.Getenv("NAME"))
	case "await":
		// Ends when a file is there.
		for {
			if _, err := os.Stat(os.Args[2]); err == nil {
				n, _ := strconv.Atoi(os.Args[3])
				os.Exit(n)
			}
			time.Sleep(time.Millisecond)
		}
	case "journal":
		// At the first signal it shows a file that others have appended to.
		c := make(chan os.Signal, 1)
		signal.Notify(c)
		fmt.Println("ready")
		os.WriteFile("/ready", nil, 0o600)
		for sig := range c {
			if sig != syscall.SIGURG {
				b, _ := os.ReadFile(os.Args[2])
				fmt.Printf("%s%s\n", b, sig)
				os.Exit(3)
			}
		}
	case "put":
		// Writes a text into files, tries to, and shows what is in others.
		for _, name := range os.Args[3:] {
			if to, ok := strings.CutPrefix(name, ">"); ok {
				fmt.Println(to, os.WriteFile(to, []byte(os.Args[2]), 0o600))
				continue
			}
			b, err := os.ReadFile(name)
			fmt.Println(name, string(b), err)
		}
	case "show":
		// Prints variables and files, with the files' modes.
		for _, name := range os.Args[2:] {
			if !strings.HasPrefix(name, "/") {
				fmt.Println(os.Getenv(name))
				continue
			}
			b, err := os.ReadFile(name)
			info, _ := os.Stat(name)
			fmt.Println(string(b), info.Mode(), err)
		}
	case "becomes":
		// Waits until a file has a content.
		for {
			if b, _ := os.ReadFile(os.Args[2]); string(b) == os.Args[3] {
				break
			}
			time.Sleep(time.Millisecond)
		}
	case "same":
		// Succeeds when it sees the workload as PID 1 and is somebody else with the same rights.
		comm, _ := os.ReadFile("/proc/1/cmdline")
		wd, _ := os.Getwd()
		if os.Getpid() == 1 || !strings.HasPrefix(string(comm), "/app\x00sleep") || wd != os.Args[2] || strconv.Itoa(os.Getuid()) != os.Args[3] || os.Getenv("NAME") != os.Args[4] {
			os.Exit(9)
		}
	case "visit":
		// Says something to each host and prints what it hears.
		for _, address := range os.Args[2:] {
			c, err := net.DialTimeout("tcp", address, 5*time.Second)
			if err != nil {
				fmt.Println(err)
				continue
			}
			fmt.Fprint(c, "hello")
			c.(*net.TCPConn).CloseWrite()
			heard, err := io.ReadAll(c)
			fmt.Printf("%s %v\n", heard, err)
		}
	case "serve":
		l, err := net.Listen("tcp", "127.0.0.1:"+os.Args[2])
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		signal.Notify(make(chan os.Signal, 1))
		fmt.Println("serving")
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			http.ReadRequest(bufio.NewReader(c))
			fmt.Fprintf(c, "HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", os.Args[3])
			c.Close()
		}
	}
}

type facts struct {
	PID          int
	UID, GID     int
	Groups       []int
	Env          []string
	Dir          string
	Hostname     string
	Capabilities string // effective, permitted, inheritable, bounding, ambient
	NoNewPrivs   string
	Umask        string
	Dev          []string
	Proc         []int // processes
	Root         []string
	Refused      map[string]string
	Hosts        string
}

// state prints facts as JSON through /dev/stdout.
func state() {
	f := facts{PID: os.Getpid(), UID: os.Getuid(), GID: os.Getgid(), Env: os.Environ(), Refused: map[string]string{}}
	f.Groups, _ = os.Getgroups()
	slices.Sort(f.Groups)
	f.Dir, _ = os.Getwd()
	f.Hostname, _ = os.Hostname()
	status, _ := os.ReadFile("/proc/self/status")
	caps := map[string]string{}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch {
		case strings.HasPrefix(name, "Cap"):
			n, _ := strconv.ParseUint(value, 16, 64)
			caps[name] = strconv.FormatUint(n, 16)
		case name == "NoNewPrivs":
			f.NoNewPrivs = value
		case name == "Umask":
			f.Umask = value
		}
	}
	f.Capabilities = strings.Join([]string{caps["CapEff"], caps["CapPrm"], caps["CapInh"], caps["CapBnd"], caps["CapAmb"]}, " ")
	f.Dev = names("/dev")
	f.Root = names("/")
	for _, n := range names("/proc") {
		if pid, err := strconv.Atoi(n); err == nil {
			f.Proc = append(f.Proc, pid)
		}
	}
	try := func(what string, err error) {
		if err == nil {
			f.Refused[what] = "allowed"
		} else {
			f.Refused[what] = err.Error()
		}
	}
	_, err := syscall.Socket(40, syscall.SOCK_STREAM, 0) // AF_VSOCK
	try("vsock", err)
	try("mount", syscall.Mount("tmpfs", "/mnt", "tmpfs", 0, ""))
	try("mknod", syscall.Mknod("/tmp/null", syscall.S_IFCHR|0o666, 1<<8|3))
	try("core_pattern", os.WriteFile("/proc/sys/kernel/core_pattern", []byte("x"), 0))
	try("write root", os.WriteFile("/new", nil, 0o600))
	try("write tmp", os.WriteFile("/tmp/new", nil, 0o600))
	try("write sys", os.WriteFile("/sys/new", nil, 0o600))
	try("dev null", os.WriteFile("/dev/null", []byte("x"), 0))
	try("unix socket", func() error { _, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0); return err }())
	hosts, _ := os.ReadFile("/etc/hosts")
	hostname, _ := os.ReadFile("/etc/hostname")
	resolv, err := os.ReadFile("/etc/resolv.conf")
	f.Hosts = fmt.Sprintf("%s%s%s%v", hosts, hostname, resolv, err)
	out, err := os.OpenFile("/dev/stdout", os.O_WRONLY, 0)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	json.NewEncoder(out).Encode(f)
}

func names(dir string) []string {
	paths, _ := filepath.Glob(dir + "/*")
	var names []string
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	return names
}
