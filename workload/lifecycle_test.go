package workload

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// lively has everything that is about probes, hooks, volumes and names.
func lively() *Manifest {
	return &Manifest{
		APIVersion: APIVersion,
		Image:      Image{Digest: digest},
		Probes: &Probes{
			Startup:  &Probe{GRPC: &GRPC{Port: 9000, Service: "db"}},
			Liveness: &Probe{TCP: &TCP{Port: 80}},
		},
		Lifecycle: &Lifecycle{
			PostStart:  &Hook{Exec: &Exec{Command: []string{"/warm"}}},
			PreStop:    &Hook{HTTP: &HTTPGet{Port: 80, Path: "/drain"}},
			StopSignal: "SIGRTMIN+3",
		},
		TerminationMessagePath: "/tmp/last",
		Mounts: []Mount{
			{Path: "/a", Kind: MountTmpfs, Volume: 1}, {Path: "/b", Kind: MountTmpfs, Volume: 2, SubPath: "x/y"},
			{Path: "/c", Kind: MountTmpfs, Volume: 1, SubPath: "x", ReadOnly: true}, {Path: "/d", Kind: MountTmpfs}, {Path: "/e", Kind: MountTmpfs, Volume: 2},
		},
		Egress:      []string{"db.internal:5432"},
		HostAliases: []HostAlias{{IP: "10.0.0.1", Names: []string{"a", "a.internal"}}, {IP: "fd00::1", Names: []string{"b"}}},
	}
}

func TestLifecycleAndVolumes(t *testing.T) {
	m := lively()
	c, err := m.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(c)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(m, got); d != "" {
		t.Errorf("parsed manifest differs (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]string{"10.0.0.1\ta\ta.internal", "fd00::1\tb"}, m.HostLines()); d != "" {
		t.Errorf("lines of /etc/hosts (-want +got):\n%s", d)
	}
}

func TestLifecycleAndVolumesRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Manifest)
		want   string
	}{
		"no kind of probe":       {func(m *Manifest) { *m.Probes.Startup = Probe{} }, "exactly one of http, tcp, grpc and exec"},
		"two kinds of probe":     {func(m *Manifest) { m.Probes.Startup.TCP = &TCP{Port: 1} }, "exactly one of http, tcp, grpc and exec"},
		"tcp port":               {func(m *Manifest) { m.Probes.Liveness.TCP.Port = 0 }, "probes.liveness: port 0"},
		"grpc port":              {func(m *Manifest) { m.Probes.Startup.GRPC.Port = 65536 }, "probes.startup: port 65536"},
		"grpc service":           {func(m *Manifest) { m.Probes.Startup.GRPC.Service = "\xff" }, "UTF-8"},
		"no lifecycle":           {func(m *Manifest) { *m.Lifecycle = Lifecycle{} }, "lifecycle must be left out"},
		"no kind of hook":        {func(m *Manifest) { *m.Lifecycle.PreStop = Hook{} }, "lifecycle.preStop must have exactly one"},
		"two kinds of hook":      {func(m *Manifest) { m.Lifecycle.PostStart.Sleep = 1 }, "lifecycle.postStart must have exactly one"},
		"sleep for ever":         {func(m *Manifest) { *m.Lifecycle.PreStop = Hook{Sleep: 1 << 40} }, "out of range"},
		"sleep backwards":        {func(m *Manifest) { *m.Lifecycle.PreStop = Hook{Sleep: -1} }, "out of range"},
		"hook's port":            {func(m *Manifest) { m.Lifecycle.PreStop.HTTP.Port = 0 }, "lifecycle.preStop: port 0"},
		"hook's command":         {func(m *Manifest) { m.Lifecycle.PostStart.Exec.Command = nil }, "exec has no command"},
		"stop signal":            {func(m *Manifest) { m.Lifecycle.StopSignal = "9" }, "lifecycle.stopSignal"},
		"termination message":    {func(m *Manifest) { m.TerminationMessagePath = "last" }, "terminationMessagePath"},
		"default message path":   {func(m *Manifest) { m.TerminationMessagePath = "/dev/termination-log" }, "terminationMessagePath"},
		"first volume":           {func(m *Manifest) { m.Mounts[0].Volume = 2 }, "volume 2 must be the next number"},
		"negative volume":        {func(m *Manifest) { m.Mounts[0].Volume = -1 }, "must be the next number"},
		"volume of one mount":    {func(m *Manifest) { m.Mounts[4].Volume, m.Mounts[4].SubPath = 0, "" }, "no other mount has volume 2"},
		"subPath without volume": {func(m *Manifest) { m.Mounts[3].SubPath = "x" }, "subPath must be left out"},
		"subPath climbs":         {func(m *Manifest) { m.Mounts[1].SubPath = "../x" }, "stay inside the volume"},
		"subPath is absolute":    {func(m *Manifest) { m.Mounts[1].SubPath = "/x" }, "stay inside the volume"},
		"subPath is not clean":   {func(m *Manifest) { m.Mounts[1].SubPath = "x//y" }, "stay inside the volume"},
		"two sizes":              {func(m *Manifest) { m.Mounts[0].SizeLimit = 1 }, "differ in kind or sizeLimit"},
		"alias of no address":    {func(m *Manifest) { m.HostAliases[0].IP = "host" }, "not an IP address"},
		"long address":           {func(m *Manifest) { m.HostAliases[1].IP = "FD00::1" }, "not an IP address in its shortest form"},
		"no names":               {func(m *Manifest) { m.HostAliases[0].Names = nil }, "10.0.0.1 has no name"},
		"two words":              {func(m *Manifest) { m.HostAliases[0].Names[0] = "a b" }, "not a host name"},
		"name of egress":         {func(m *Manifest) { m.HostAliases[0].Names[0] = "db.internal" }, "a name of egress"},
	} {
		t.Run(name, func(t *testing.T) {
			m := lively()
			c.change(m)
			if err := m.Validate(); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}
