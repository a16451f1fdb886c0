package process

import (
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/host"
	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/workload"
)

// hostname is the name of every enclave: a pod's name is no part of the manifest.
const hostname = "enclave"

// defaultPath is the PATH of an image that sets none (containerd, pkg/oci/spec.go).
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Spec is the process of a workload and what it finds around it.
type Spec struct {
	Args []string `json:"args"`
	// Env has entries "NAME=value", each name once.
	Env    []string `json:"env"`
	Dir    string   `json:"dir"`
	UID    int      `json:"uid"`
	GID    int      `json:"gid"`
	Groups []int    `json:"groups"` // supplementary, GID included
	// Capabilities are numbers (include/uapi/linux/capability.h): the bounding set, and what uid 0 has.
	Capabilities    []int `json:"capabilities"`
	NoNewPrivileges bool  `json:"noNewPrivileges"`
	ReadOnlyRoot    bool  `json:"readOnlyRoot"`
	// Mounts of the kind host have a bind for their path.
	Mounts []workload.Mount `json:"mounts"`
	// MountSize is the size in bytes of a mount that has no limit of its own.
	MountSize int64 `json:"mountSize"`
	// Binds are files and directories from outside that the command finds in its root.
	Binds []Bind `json:"binds,omitempty"`
	// NoNetwork gives the command a network of its own, without any device that is up.
	NoNetwork bool `json:"noNetwork,omitempty"`
	// Hosts are lines of /etc/hosts besides the enclave's own.
	Hosts []string `json:"hosts"`
	// StopSignal asks the workload to end.
	StopSignal unix.Signal `json:"stopSignal"`

	// Root is the directory with the unpacked image.
	Root string `json:"root"`
	// literals are the manifest's variables as they are written, which commands of probes refer to.
	literals map[string]string
}

// Bind is a file or directory of the enclave that is mounted at Target, an absolute path, without setuid
// programs and devices.
type Bind struct {
	Source   string `json:"source"`
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
}

// NewSpec combines a manifest with the configuration of its image, which is unpacked in root, as a
// container runtime does for the kubelet. Memory is what a mount without a limit may take, in bytes.
// Supplied are the variables of the host, as the manifest lists them.
func NewSpec(m *workload.Manifest, c *image.Config, root string, memory int64, supplied host.Env) (*Spec, error) {
	s := &Spec{Root: root, Mounts: m.Mounts, MountSize: memory, literals: map[string]string{}}
	env := environment{}
	env.set(defaultPath)
	env.set("HOSTNAME=" + hostname)
	for _, e := range c.Env {
		env.set(e)
	}
	// The order is the kubelet's: envFrom before env (pkg/kubelet, makeEnvironmentVariables).
	expanded := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(supplied.From)) {
		expanded[name] = supplied.From[name]
		env.set(name + "=" + expanded[name])
	}
	lookup := func(name string) (string, bool) { v, ok := expanded[name]; return v, ok }
	for _, e := range m.Env {
		// In the author's order: a value refers to those before it, and not to the image's.
		s.literals[e.Name] = e.Value
		value, ok := expand(e.Value, lookup), true
		if e.Host {
			value, ok = supplied.Listed[e.Name]
		}
		if ok {
			expanded[e.Name] = value
			env.set(e.Name + "=" + value)
		}
	}
	for _, a := range arguments(m, c) {
		s.Args = append(s.Args, expand(a, lookup))
	}
	if len(s.Args) == 0 || s.Args[0] == "" {
		return nil, errors.New("neither the pod nor the image names a command: set command in the pod")
	}

	home, err := s.setUser(m.User, c.User)
	if err != nil {
		return nil, err
	}
	if v, ok := env.get("HOME"); !ok || v == "" {
		env.set("HOME=" + home)
	}
	s.Env = env.list

	s.Dir = "/"
	if c.WorkingDir != "" {
		s.Dir = path.Clean("/" + c.WorkingDir)
	}
	if m.WorkingDir != "" {
		s.Dir = m.WorkingDir
	}
	stop, whose := c.StopSignal, "image"
	if l := m.Lifecycle; l != nil && l.StopSignal != "" {
		stop, whose = l.StopSignal, "pod"
	}
	if s.StopSignal, err = parseSignal(stop); err != nil {
		return nil, fmt.Errorf("the %s's stop signal: %w", whose, err)
	}
	var sec workload.Security
	if m.Security != nil {
		sec = *m.Security
	}
	s.NoNewPrivileges, s.ReadOnlyRoot = sec.NoNewPrivileges, sec.ReadOnlyRoot
	for _, name := range workload.DefaultCapabilities {
		dropped := slices.Contains(sec.DropCapabilities, "ALL") || slices.Contains(sec.DropCapabilities, name)
		if !dropped || slices.Contains(sec.AddCapabilities, name) {
			s.Capabilities = append(s.Capabilities, capabilities[name])
		}
	}
	return s, nil
}

// SetEnv sets a variable whatever the image and the manifest say. Nothing refers to it with $(VAR).
func (s *Spec) SetEnv(name, value string) {
	env := environment{s.Env}
	env.set(name + "=" + value)
	s.Env = env.list
}

// ProbeArgs expands a probe's command as the kubelet does: with the manifest's variables as written.
func (s *Spec) ProbeArgs(command []string) []string {
	var args []string
	for _, c := range command {
		args = append(args, expand(c, func(name string) (string, bool) { v, ok := s.literals[name]; return v, ok }))
	}
	return args
}

// arguments picks the command line (containerd, internal/cri/opts.WithProcessArgs):
//
//	command  args  runs
//	no       no    the image's entrypoint and arguments
//	no       yes   the image's entrypoint and args
//	yes      any   command and args
func arguments(m *workload.Manifest, c *image.Config) []string {
	switch {
	case len(m.Command) > 0:
		return slices.Concat(m.Command, m.Args)
	case len(m.Args) > 0:
		return slices.Concat(c.Entrypoint, m.Args)
	default:
		return slices.Concat(c.Entrypoint, c.Cmd)
	}
}

// environment keeps each name at its first place with its last value.
type environment struct{ list []string }

func (e *environment) find(name string) int {
	return slices.IndexFunc(e.list, func(v string) bool { return strings.HasPrefix(v, name+"=") })
}

func (e *environment) get(name string) (string, bool) {
	if i := e.find(name); i >= 0 {
		return e.list[i][len(name)+1:], true
	}
	return "", false
}

// set takes "NAME=value"; an entry without "=" would unset the name in Docker's tools and means nothing.
func (e *environment) set(entry string) {
	name, _, ok := strings.Cut(entry, "=")
	if !ok || name == "" {
		return
	}
	if i := e.find(name); i >= 0 {
		e.list[i] = entry
	} else {
		e.list = append(e.list, entry)
	}
}

// otherSignals are names that package unix does not know (signal(7)).
var otherSignals = map[string]unix.Signal{"SIGCLD": unix.SIGCHLD, "SIGIOT": unix.SIGABRT, "SIGPOLL": unix.SIGIO, "SIGUNUSED": unix.SIGSYS}

// parseSignal reads a stop signal: "SIGQUIT", "QUIT", "3", "SIGRTMIN+3" or "SIGRTMAX-3"; empty is SIGTERM.
func parseSignal(name string) (unix.Signal, error) {
	bad := fmt.Errorf("%q is not a signal", name)
	if name == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(name); err == nil {
		if n < 1 || n > 64 {
			return 0, bad
		}
		return unix.Signal(n), nil
	}
	full := "SIG" + strings.TrimPrefix(strings.ToUpper(name), "SIG")
	// Real-time signals as the C library counts them (signal(7)): it keeps 32 and 33 for itself.
	for base, sign := range map[string]string{"SIGRTMIN": "+", "SIGRTMAX": "-"} {
		offset, ok := strings.CutPrefix(full, base)
		if !ok {
			continue
		}
		n := 0
		if offset != "" {
			var err error
			if n, err = strconv.Atoi(strings.TrimPrefix(offset, sign)); err != nil || n < 0 || n > 30 {
				return 0, bad
			}
		}
		if base == "SIGRTMAX" {
			return unix.Signal(64 - n), nil
		}
		return unix.Signal(34 + n), nil
	}
	if sig, ok := otherSignals[full]; ok {
		return sig, nil
	}
	if sig := unix.SignalNum(full); sig != 0 {
		return sig, nil
	}
	return 0, bad
}

// capabilities by name (include/uapi/linux/capability.h), those of workload.DefaultCapabilities.
var capabilities = map[string]int{
	"CHOWN": unix.CAP_CHOWN, "DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "FOWNER": unix.CAP_FOWNER,
	"FSETID": unix.CAP_FSETID, "KILL": unix.CAP_KILL, "NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"NET_RAW": unix.CAP_NET_RAW, "SETFCAP": unix.CAP_SETFCAP, "SETGID": unix.CAP_SETGID,
	"SETPCAP": unix.CAP_SETPCAP, "SETUID": unix.CAP_SETUID, "SYS_CHROOT": unix.CAP_SYS_CHROOT,
}
