package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/internal/seccomp"
)

// Descriptors of a helper, behind the standard ones.
const (
	specFD = 3 + iota
	statusFD
	mntFD // of exec only, as those that follow
	ipcFD
	utsFD
)

// Helper does nothing in a program that was started by a person or a kernel. In a helper it never
// returns: the helper becomes its command, or says on its status descriptor why not.
func Helper() {
	if len(os.Args) != 2 {
		return
	}
	var enter func(*Spec) error
	switch os.Args[1] {
	case "workload":
		enter = newRoot
	case "exec":
		enter = joinNamespaces
	default:
		return
	}
	// Ids, capabilities and file system are the thread's; the command inherits this one's.
	runtime.LockOSThread()
	err := become(enter)
	e, ok := errors.AsType[*StartError](err)
	if !ok {
		e = &StartError{StatusFailed, err.Error()}
	}
	json.NewEncoder(os.NewFile(statusFD, "status")).Encode(e)
	os.Exit(e.Status)
}

// become prepares the process and executes the command. It returns only when that fails.
func become(enter func(*Spec) error) error {
	for fd := range utsFD + 1 {
		if fd >= specFD {
			unix.CloseOnExec(fd)
		}
	}
	var s Spec
	if err := json.NewDecoder(os.NewFile(specFD, "spec")).Decode(&s); err != nil {
		return fmt.Errorf("read what to run: %w", err)
	}
	// From here on the workload may see this process in /proc, and must not reach our program through
	// it (CVE-2019-5736). Only now: whoever started it had to open its namespaces first.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("protect the helper: %w", err)
	}
	unix.Umask(0)
	if err := enter(&s); err != nil {
		return err
	}
	unix.Umask(0o022)
	if err := unix.Chdir(s.Dir); err != nil {
		return fmt.Errorf("enter the working directory %s: %w", s.Dir, err)
	}
	if err := confine(&s); err != nil {
		return err
	}
	return execute(s.Args, s.Env)
}

// joinNamespaces enters those of the workload; this process has been born in its pid namespace.
func joinNamespaces(*Spec) error {
	// Threads share a file system, and such a process cannot change its mount namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the file system: %w", err)
	}
	for _, ns := range []struct{ fd, kind int }{{utsFD, unix.CLONE_NEWUTS}, {ipcFD, unix.CLONE_NEWIPC}, {mntFD, unix.CLONE_NEWNS}} {
		if err := unix.Setns(ns.fd, ns.kind); err != nil {
			return fmt.Errorf("enter the workload's namespaces: %w", err)
		}
	}
	return nil
}

// confine gives away everything that the command must not have. System calls go to this thread only:
// the others end when it executes the command.
func confine(s *Spec) error {
	// The command opens /dev/stdout again, as its own user. Pipes belong to whoever made them.
	for fd := 1; fd <= 2; fd++ {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
			continue
		}
		if err := unix.Fchown(fd, s.UID, s.GID); err != nil {
			return fmt.Errorf("give the output to the workload's user: %w", err)
		}
	}
	// Before CAP_SYS_ADMIN is gone.
	if err := seccomp.RefuseVsock(); err != nil {
		return err
	}
	var allowed uint64
	for _, c := range s.Capabilities {
		allowed |= 1 << c
	}
	for c := range 64 {
		if allowed&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err == unix.EINVAL {
			break // the kernel knows no more
		} else if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("drop ambient capabilities: %w", err)
	}
	if err := setIDs(s); err != nil {
		return err
	}
	if err := setCapabilities(s.UID == 0, allowed); err != nil {
		return err
	}
	if s.NoNewPrivileges {
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return fmt.Errorf("set no_new_privs: %w", err)
		}
	}
	return nil
}

func setIDs(s *Spec) error {
	groups := make([]uint32, len(s.Groups))
	for i, g := range s.Groups {
		groups[i] = uint32(g)
	}
	_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0)
	if errno != 0 {
		return fmt.Errorf("set supplementary groups: %w", errno)
	}
	gid, uid := uintptr(s.GID), uintptr(s.UID)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("set group %d: %w", s.GID, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("set user %d: %w", s.UID, errno)
	}
	return nil
}

// setCapabilities leaves root what is allowed and everybody else nothing, and nothing to inherit.
func setCapabilities(root bool, allowed uint64) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	if !root {
		allowed = 0
	}
	for i := range data {
		data[i].Permitted &= uint32(allowed >> (32 * i))
		data[i].Effective = data[i].Permitted
		data[i].Inheritable = 0
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("set capabilities: %w", err)
	}
	return nil
}

// execute looks a name without a slash up in PATH, as execvp(3) does, and executes it.
func execute(args, env []string) error {
	name := args[0]
	if strings.Contains(name, "/") {
		return startError(name, unix.Exec(name, args, env))
	}
	failure := error(unix.ENOENT)
	e := environment{env}
	paths, _ := e.get("PATH")
	for _, dir := range filepath.SplitList(paths) {
		if dir == "" {
			dir = "."
		}
		switch err := unix.Exec(filepath.Join(dir, name), args, env); err {
		case unix.ENOENT, unix.ENOTDIR:
		case unix.EACCES:
			failure = err // a later directory may have one that can be executed
		default:
			return startError(name, err)
		}
	}
	if failure == unix.ENOENT {
		return &StartError{StatusNotFound, fmt.Sprintf("%q was not found in the PATH of the workload", name)}
	}
	return startError(name, failure)
}

func startError(name string, err error) error {
	status := StatusNotExecutable
	if err == unix.ENOENT || err == unix.ENOTDIR {
		status = StatusNotFound
	}
	return &StartError{status, fmt.Sprintf("%q cannot be executed: %v", name, err)}
}
