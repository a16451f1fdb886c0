package inject

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation/field"
	kjson "sigs.k8s.io/json"

	"cloister.dev/cloister/workload"
)

func (p *problems) probes(cp *field.Path, c *corev1.Container) *workload.Probes {
	out := workload.Probes{
		Startup:   p.probe(cp, "startupProbe", c, c.StartupProbe),
		Liveness:  p.probe(cp, "livenessProbe", c, c.LivenessProbe),
		Readiness: p.probe(cp, "readinessProbe", c, c.ReadinessProbe),
	}
	if out == (workload.Probes{}) {
		return nil
	}
	return &out
}

func (p *problems) probe(cp *field.Path, name string, c *corev1.Container, probe *corev1.Probe) *workload.Probe {
	if probe == nil {
		return nil
	}
	at := cp.Child(name)
	switch {
	case probe.HTTPGet != nil:
		return &workload.Probe{HTTP: p.httpGet(at.Child("httpGet"), c, probe.HTTPGet)}
	case probe.TCPSocket != nil:
		p.checkHost(at.Child("tcpSocket", "host"), probe.TCPSocket.Host)
		return &workload.Probe{TCP: &workload.TCP{Port: p.port(at.Child("tcpSocket", "port"), c, probe.TCPSocket.Port)}}
	case probe.GRPC != nil:
		g := &workload.GRPC{Port: p.port(at.Child("grpc", "port"), c, intstr.FromInt32(probe.GRPC.Port))}
		if probe.GRPC.Service != nil {
			g.Service = *probe.GRPC.Service
		}
		if mode := probe.GRPC.Mode; mode != nil && *mode != corev1.GRPCProbeModePlaintext {
			p.notBuilt(at.Child("grpc", "mode"), "a grpc probe by TLS")
		}
		return &workload.Probe{GRPC: g}
	case probe.Exec != nil:
		return &workload.Probe{Exec: p.exec(at.Child("exec"), probe.Exec)}
	default:
		p.list = append(p.list, field.Required(at, "say what the probe does: httpGet, tcpSocket, grpc or exec"))
		return nil
	}
}

// lifecycle returns the hooks, which are run inside the enclave, and the stop signal.
func (p *problems) lifecycle(at *field.Path, c *corev1.Container) *workload.Lifecycle {
	l := c.Lifecycle
	if l == nil {
		return nil
	}
	out := workload.Lifecycle{
		PostStart: p.hook(at.Child("postStart"), c, l.PostStart),
		PreStop:   p.hook(at.Child("preStop"), c, l.PreStop),
	}
	if l.StopSignal != nil {
		out.StopSignal = string(*l.StopSignal)
	}
	if out == (workload.Lifecycle{}) {
		return nil
	}
	return &out
}

func (p *problems) hook(at *field.Path, c *corev1.Container, hook *corev1.LifecycleHandler) *workload.Hook {
	if hook == nil {
		return nil
	}
	switch {
	case hook.Exec != nil:
		return &workload.Hook{Exec: p.exec(at.Child("exec"), hook.Exec)}
	case hook.HTTPGet != nil:
		return &workload.Hook{HTTP: p.httpGet(at.Child("httpGet"), c, hook.HTTPGet)}
	case hook.Sleep != nil:
		if hook.Sleep.Seconds == 0 {
			return nil
		}
		return &workload.Hook{Sleep: hook.Sleep.Seconds}
	case hook.TCPSocket != nil:
		p.forbid(at.Child("tcpSocket"), "Kubernetes knows no such hook, and fails it when it is to be run: remove it")
	default:
		p.list = append(p.list, field.Required(at, "say what the hook does: exec, httpGet or sleep"))
	}
	return nil
}

func (p *problems) exec(at *field.Path, e *corev1.ExecAction) *workload.Exec {
	if len(e.Command) == 0 {
		p.list = append(p.list, field.Required(at.Child("command"), "name the command that is to be run"))
	}
	return &workload.Exec{Command: e.Command}
}

func (p *problems) httpGet(at *field.Path, c *corev1.Container, get *corev1.HTTPGetAction) *workload.HTTPGet {
	p.checkHost(at.Child("host"), get.Host)
	if proto := get.Protocol; proto != nil && *proto != corev1.HTTPProtocolHTTP1 {
		p.notBuilt(at.Child("protocol"), "a protocol other than HTTP1")
	}
	h := &workload.HTTPGet{Port: p.port(at.Child("port"), c, get.Port)}
	if get.Path != "" && get.Path != "/" {
		h.Path = "/" + strings.TrimPrefix(get.Path, "/")
	}
	switch get.Scheme {
	case "", corev1.URISchemeHTTP:
	case corev1.URISchemeHTTPS:
		h.Scheme = string(get.Scheme)
	default:
		p.list = append(p.list, field.NotSupported(at.Child("scheme"), get.Scheme, []corev1.URIScheme{corev1.URISchemeHTTP, corev1.URISchemeHTTPS}))
	}
	for _, e := range get.HTTPHeaders {
		h.Headers = append(h.Headers, workload.Header{Name: e.Name, Value: e.Value})
	}
	return h
}

// checkHost refuses another target than the workload, which is what probes and hooks reach.
func (p *problems) checkHost(at *field.Path, host string) {
	if host != "" {
		p.forbid(at, "inside the enclave only the workload itself can be reached, at 127.0.0.1: remove it")
	}
}

// port resolves a port as the kubelet does: a name among the container's ports, else a number.
func (p *problems) port(at *field.Path, c *corev1.Container, port intstr.IntOrString) uint32 {
	n := int64(port.IntVal)
	if port.Type == intstr.String {
		i := slices.IndexFunc(c.Ports, func(cp corev1.ContainerPort) bool { return cp.Name == port.StrVal && port.StrVal != "" })
		if i >= 0 {
			n = int64(c.Ports[i].ContainerPort)
		} else if v, err := strconv.ParseInt(port.StrVal, 10, 32); err == nil {
			n = v
		} else {
			p.list = append(p.list, field.Invalid(at, port.StrVal, fmt.Sprintf("container %s has no port of this name", c.Name)))
			return 0
		}
	}
	if n < 1 || n > 65535 {
		p.list = append(p.list, field.Invalid(at, n, "write a port from 1 to 65535"))
		return 0
	}
	return uint32(n)
}

// terminationMessage returns where the workload leaves its last word, or nothing for the usual place.
func (p *problems) terminationMessage(cp *field.Path, c *corev1.Container) string {
	at := cp.Child("terminationMessagePath")
	switch file := path.Clean(c.TerminationMessagePath); {
	case c.TerminationMessagePath == "" || file == workload.DefaultTerminationMessagePath:
		return ""
	case !path.IsAbs(file) || file == "/":
		p.list = append(p.list, field.Invalid(at, c.TerminationMessagePath, "write the absolute path of a file"))
		return ""
	case below(file, "/proc") || below(file, "/sys"):
		p.forbid(at, "/proc and /sys are the enclave's own: choose another path")
		return ""
	default:
		return file
	}
}

// unknownActions refuses fields of the named container's probes and hooks that this version does not know:
// the console's take their place, so they would be lost. Each is decoded by itself, since a decoder lists only
// the first hundred fields that it does not know.
func unknownActions(container json.RawMessage, cp *field.Path) (field.ErrorList, error) {
	var actions struct {
		StartupProbe   json.RawMessage `json:"startupProbe"`
		LivenessProbe  json.RawMessage `json:"livenessProbe"`
		ReadinessProbe json.RawMessage `json:"readinessProbe"`
		Lifecycle      json.RawMessage `json:"lifecycle"`
	}
	if err := decode(container, &actions); err != nil {
		return nil, err
	}
	p := &problems{}
	for _, a := range []struct {
		name string
		raw  json.RawMessage
		into any
	}{
		{"startupProbe", actions.StartupProbe, &corev1.Probe{}},
		{"livenessProbe", actions.LivenessProbe, &corev1.Probe{}},
		{"readinessProbe", actions.ReadinessProbe, &corev1.Probe{}},
		{"lifecycle", actions.Lifecycle, &corev1.Lifecycle{}},
	} {
		if a.raw == nil {
			continue
		}
		unknown, err := kjson.UnmarshalStrict(a.raw, a.into, kjson.DisallowUnknownFields)
		if err != nil {
			return nil, err
		}
		for _, err := range unknown {
			var at kjson.FieldError
			if errors.As(err, &at) {
				at.SetFieldPath(a.name + "." + at.FieldPath())
			}
			p.forbid(cp.Child(a.name), fmt.Sprintf("this version does not know all of it (%v), so the enclave could not honour it: remove that", err))
		}
	}
	return p.list, nil
}
