package workload

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

const maxSafeInteger = 1 << 53

var (
	digestRE   = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	platformRE = regexp.MustCompile(`^[a-z0-9]+/[a-z0-9]+$`)
)

// Validate reports everything that is wrong with m, joined, one sentence each. A value that is spelled
// out although it is the default is wrong too: equal workloads must have equal manifests.
func (m *Manifest) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("workload manifest: "+format, args...))
	}
	text := func(field string, values ...string) {
		for _, v := range values {
			if !isText(v) {
				bad("%s is not UTF-8 text without NUL", field)
			}
		}
	}

	if m.APIVersion != APIVersion {
		bad("apiVersion is %q, this version knows only %q", m.APIVersion, APIVersion)
	}
	if !digestRE.MatchString(m.Image.Digest) {
		bad("image.digest %q is not sha256: and 64 hexadecimal digits", m.Image.Digest)
	}
	if p := m.Image.Platform; p != "" && (!platformRE.MatchString(p) || p == DefaultPlatform) {
		bad("image.platform %q must be os/architecture and left out for %s", p, DefaultPlatform)
	}
	text("command", m.Command...)
	text("args", m.Args...)
	m.validateHost(bad, text)
	if w := m.WorkingDir; w != "" && !path.IsAbs(w) {
		bad("workingDir %q is not absolute", w)
	}
	text("workingDir", m.WorkingDir)
	m.validateUser(bad)
	m.validateSecurity(bad)

	ports, names := map[uint32]bool{}, map[string]bool{}
	for _, p := range m.Ports {
		switch {
		case p.Port < 1 || p.Port > 65535:
			bad("port %d is not between 1 and 65535", p.Port)
		case ports[p.Port]:
			bad("port %d is listed twice", p.Port)
		case p.Name != "" && names[p.Name]:
			bad("port name %q is listed twice", p.Name)
		}
		if p.Protocol != "" && p.Protocol != ProtocolTCP {
			bad("port %d: protocol %q must be %q, or left out for %s", p.Port, p.Protocol, ProtocolTCP, ProtocolHTTP)
		}
		ports[p.Port], names[p.Name] = true, true
		text("port name", p.Name)
	}
	m.validateProbes(bad, text)
	m.validateLifecycle(bad, text)
	m.validateHostAliases(bad)
	if p := m.TerminationMessagePath; p != "" && (p == DefaultTerminationMessagePath || !path.IsAbs(p) || path.Clean(p) != p || p == "/") {
		bad("terminationMessagePath %q must be absolute, clean, and left out for %s", p, DefaultTerminationMessagePath)
	}
	text("terminationMessagePath", m.TerminationMessagePath)
	m.validateEgress(bad)
	m.validatePlugins(bad, text)
	m.validateKMS(bad, text)
	m.validateTelemetry(bad)

	seen := map[string]bool{}
	for _, v := range m.Mounts {
		if !path.IsAbs(v.Path) || path.Clean(v.Path) != v.Path || v.Path == "/" {
			bad("mount path %q must be absolute, clean and not /", v.Path)
		}
		if seen[v.Path] {
			bad("mount path %q is listed twice", v.Path)
		}
		seen[v.Path] = true
		if v.Kind != MountTmpfs && v.Kind != MountHost {
			bad("mount %q: kind %q must be %q or %q", v.Path, v.Kind, MountTmpfs, MountHost)
		}
		if v.SizeLimit < 0 || v.SizeLimit > maxSafeInteger {
			bad("mount %q: sizeLimit %d is out of range", v.Path, v.SizeLimit)
		}
		if p := v.SubPath; p != "" && (path.IsAbs(p) || path.Clean(p) != p || p == "." || p == ".." || strings.HasPrefix(p, "../")) {
			bad("mount %q: subPath %q must be relative and clean, and stay inside the volume", v.Path, p)
		}
		text("mount path", v.Path, v.SubPath)
	}
	m.validateVolumes(bad)
	return errors.Join(errs...)
}

// isText tells whether s is UTF-8 without NUL.
func isText(s string) bool { return utf8.ValidString(s) && strings.IndexByte(s, 0) < 0 }

func (m *Manifest) validateUser(bad func(string, ...any)) {
	u := m.User
	if u == nil {
		return
	}
	if u.UID == nil && u.GID == nil && len(u.Groups) == 0 && !u.NonRoot {
		bad("user must be left out when it says nothing")
	}
	ids := slices.Clone(u.Groups)
	for _, p := range []*int64{u.UID, u.GID} {
		if p != nil {
			ids = append(ids, *p)
		}
	}
	for _, id := range ids {
		if id < 0 || id > 1<<31-1 {
			bad("user or group id %d is not between 0 and 2147483647", id)
		}
	}
	if !slices.IsSorted(u.Groups) || len(slices.Compact(slices.Clone(u.Groups))) != len(u.Groups) {
		bad("user.groups must be in ascending order without duplicates")
	}
	if u.NonRoot && u.UID != nil && *u.UID == 0 {
		bad("user.nonRoot contradicts user.uid 0")
	}
}

func (m *Manifest) validateSecurity(bad func(string, ...any)) {
	s := m.Security
	if s == nil {
		return
	}
	if !s.NoNewPrivileges && !s.ReadOnlyRoot && len(s.DropCapabilities)+len(s.AddCapabilities) == 0 {
		bad("security must be left out when it says nothing")
	}
	if slices.Contains(s.DropCapabilities, "ALL") && len(s.DropCapabilities) > 1 {
		bad("security.dropCapabilities must be just ALL when it has ALL")
	}
	for _, l := range [][]string{s.DropCapabilities, s.AddCapabilities} {
		if !slices.IsSorted(l) || len(slices.Compact(slices.Clone(l))) != len(l) {
			bad("security: capabilities must be in ascending order without duplicates")
		}
	}
	for _, c := range s.DropCapabilities {
		if c != "ALL" && !slices.Contains(DefaultCapabilities, c) {
			bad("security.dropCapabilities: %q is not in the default set, so it must be left out", c)
		}
	}
	for _, c := range s.AddCapabilities {
		if !slices.Contains(DefaultCapabilities, c) {
			bad("security.addCapabilities: %q cannot be had inside the enclave", c)
		}
	}
}

// DefaultCapabilities are what a workload that runs as uid 0 has: containerd's default set without
// MKNOD and AUDIT_WRITE. In ascending order.
var DefaultCapabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "NET_RAW",
	"SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
}
