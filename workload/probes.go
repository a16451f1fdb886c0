package workload

import (
	"regexp"
	"strings"
)

// Probes are run inside the enclave. When and how often is decided outside.
type Probes struct {
	Startup   *Probe `json:"startup,omitempty"`
	Liveness  *Probe `json:"liveness,omitempty"`
	Readiness *Probe `json:"readiness,omitempty"`
}

// Probe has exactly one field.
type Probe struct {
	HTTP *HTTPGet `json:"http,omitempty"`
	TCP  *TCP     `json:"tcp,omitempty"`
	GRPC *GRPC    `json:"grpc,omitempty"`
	Exec *Exec    `json:"exec,omitempty"`
}

// HTTPGet is a GET to 127.0.0.1. As a probe 200 to 399 is success, as a hook any answer.
type HTTPGet struct {
	// Port is a number: names are resolved when the manifest is made.
	Port uint32 `json:"port"`
	// Path begins with "/"; empty means "/".
	Path string `json:"path,omitempty"`
	// Scheme is "HTTPS" (the certificate is not verified, as the kubelet does not), or empty for HTTP.
	Scheme string `json:"scheme,omitempty"`
	// Headers are in the author's order; "Host" sets the request's host.
	Headers []Header `json:"headers,omitempty"`
}

// TCP is a connection to 127.0.0.1; that it can be made is success.
type TCP struct {
	Port uint32 `json:"port"`
}

// GRPC asks the health service (grpc.health.v1.Health) at 127.0.0.1, without TLS; SERVING is success.
type GRPC struct {
	Port uint32 `json:"port"`
	// Service is the name to ask for; empty is the server as a whole.
	Service string `json:"service,omitempty"`
}

// Exec runs a command in the workload's file system as the workload's user; status 0 is success.
type Exec struct {
	Command []string `json:"command"`
}

// Lifecycle is a container's lifecycle, as Kubernetes knows it.
type Lifecycle struct {
	// PostStart begins when the workload has been started. Until it has ended the workload does not count
	// as started; when it fails the workload is stopped.
	PostStart *Hook `json:"postStart,omitempty"`
	// PreStop begins when the workload is to end, and has ended before the stop signal is sent.
	PreStop *Hook `json:"preStop,omitempty"`
	// StopSignal is a name as "SIGQUIT" or "SIGRTMIN+3", empty for the image's.
	StopSignal string `json:"stopSignal,omitempty"`
}

// Hook has exactly one field.
type Hook struct {
	HTTP *HTTPGet `json:"http,omitempty"`
	Exec *Exec    `json:"exec,omitempty"`
	// Sleep is in seconds.
	Sleep int64 `json:"sleep,omitempty"`
}

// DefaultTerminationMessagePath is where Kubernetes reads a container's last word.
const DefaultTerminationMessagePath = "/dev/termination-log"

// maxSleep is what fits into a time.Duration, in seconds.
const maxSleep = 1 << 32

// signalRE is how Kubernetes spells signals (k8s.io/api/core/v1, Signal).
var signalRE = regexp.MustCompile(`^SIG[A-Z0-9]+([+-][0-9]{1,2})?$`)

func (m *Manifest) validateProbes(bad func(string, ...any), text func(string, ...string)) {
	if m.Probes == nil {
		return
	}
	if *m.Probes == (Probes{}) {
		bad("probes must be left out when there is none")
	}
	for _, n := range []struct {
		name  string
		probe *Probe
	}{{"probes.startup", m.Probes.Startup}, {"probes.liveness", m.Probes.Liveness}, {"probes.readiness", m.Probes.Readiness}} {
		p := n.probe
		if p == nil {
			continue
		}
		if count(p.HTTP != nil, p.TCP != nil, p.GRPC != nil, p.Exec != nil) != 1 {
			bad("%s must have exactly one of http, tcp, grpc and exec", n.name)
		}
		p.HTTP.validate(n.name, bad, text)
		p.Exec.validate(n.name, bad, text)
		if p.TCP != nil {
			validatePort(n.name, p.TCP.Port, bad)
		}
		if p.GRPC != nil {
			validatePort(n.name, p.GRPC.Port, bad)
			text("probe service", p.GRPC.Service)
		}
	}
}

func (m *Manifest) validateLifecycle(bad func(string, ...any), text func(string, ...string)) {
	l := m.Lifecycle
	if l == nil {
		return
	}
	if *l == (Lifecycle{}) {
		bad("lifecycle must be left out when it says nothing")
	}
	if l.StopSignal != "" && !signalRE.MatchString(l.StopSignal) {
		bad("lifecycle.stopSignal %q is not the name of a signal", l.StopSignal)
	}
	for _, n := range []struct {
		name string
		hook *Hook
	}{{"lifecycle.postStart", l.PostStart}, {"lifecycle.preStop", l.PreStop}} {
		h := n.hook
		if h == nil {
			continue
		}
		if count(h.HTTP != nil, h.Exec != nil, h.Sleep != 0) != 1 {
			bad("%s must have exactly one of http, exec and sleep", n.name)
		}
		if h.Sleep < 0 || h.Sleep > maxSleep {
			bad("%s: sleep %d is out of range", n.name, h.Sleep)
		}
		h.HTTP.validate(n.name, bad, text)
		h.Exec.validate(n.name, bad, text)
	}
}

func (h *HTTPGet) validate(name string, bad func(string, ...any), text func(string, ...string)) {
	if h == nil {
		return
	}
	validatePort(name, h.Port, bad)
	if h.Path == "/" || (h.Path != "" && !strings.HasPrefix(h.Path, "/")) {
		bad("%s: path %q must begin with / and be left out for /", name, h.Path)
	}
	if h.Scheme != "" && h.Scheme != "HTTPS" {
		bad("%s: scheme %q must be HTTPS, or left out for HTTP", name, h.Scheme)
	}
	text(name+" path", h.Path)
	for _, e := range h.Headers {
		text(name+" header", e.Name, e.Value)
	}
}

func (e *Exec) validate(name string, bad func(string, ...any), text func(string, ...string)) {
	if e == nil {
		return
	}
	if len(e.Command) == 0 {
		bad("%s: exec has no command", name)
	}
	text(name+" command", e.Command...)
}

func validatePort(name string, port uint32, bad func(string, ...any)) {
	if port < 1 || port > 65535 {
		bad("%s: port %d is not between 1 and 65535", name, port)
	}
}

// count tells how many are true.
func count(set ...bool) (n int) {
	for _, s := range set {
		if s {
			n++
		}
	}
	return n
}
