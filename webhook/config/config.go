// Package config reads EnclaveConfig, the inline YAML of the annotation cloister.dev/config. It is
// strict: a field that is unknown, misspelt, listed twice or not built yet is an error, and all errors
// are reported at once.
package config

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	nodes "go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/workload"
)

// APIVersion and Kind are what a config must begin with.
const (
	APIVersion = "cloister.dev/v1alpha1"
	Kind       = "EnclaveConfig"
)

// MaxMemory is the largest enclave memory in bytes that a config or a limit may ask for: 1 TiB, more
// than any instance type gives to one enclave.
const MaxMemory = 1 << 40

// MaxCPUs is the largest number of vCPUs that a config may ask for.
const MaxCPUs = 512

// EnclaveConfig is what the author of a pod says about its enclave.
type EnclaveConfig struct {
	// Memory of the enclave in bytes; 0 means the container's memory limit.
	Memory int64
	// CPUs is the number of the enclave's vCPUs; 0 means the container's CPU request or limit.
	CPUs int64
	// Ports say how containerPorts are served. One that is not listed is served as HTTP over TLS.
	Ports []Port
	// Egress lists what the workload may connect to, as workload.Manifest has it.
	Egress []string
	// Plugins are in the author's order.
	Plugins []Plugin
	// Logs is workload.LogsOTLP, or empty for the console.
	Logs string
	// Secrets are in the author's order. KMS decrypts them, and the key of the certificate that TLS serves.
	Secrets []workload.Secret
	KMS     *workload.KMS
	// TLS is workload.TLSKMS, or empty for a certificate that is made in the enclave.
	TLS string
	// Pin is PinNever, or empty for tags that are resolved at admission. It is no part of the manifest.
	Pin string
	// HostEnv names variables that the host may supply although they are refused otherwise, in ascending order.
	HostEnv []string
	// HostFiles are the mount paths of shared emptyDir volumes whose files the host supplies, in ascending order.
	HostFiles []string
	// ServiceAccountToken gives the workload the token of the pod's service account, which the host supplies.
	ServiceAccountToken bool
}

// PinNever refuses an image that is not named by digest.
const PinNever = "never"

// Port says how one containerPort is served. It has either a number or a name.
type Port struct {
	Port uint32
	Name string
	// Protocol is workload.ProtocolHTTP or workload.ProtocolTCP.
	Protocol string
	// Plaintext serves the port without TLS.
	Plaintext bool
}

// notBuilt are the fields of the design that this version refuses.
var notBuilt = []string{
	"debug", "eif", "nsm",
}

// Parse reads a config. Errors have paths below path.
func Parse(doc string, path *field.Path) (*EnclaveConfig, field.ErrorList) {
	if err := noAliases(doc); err != nil {
		return nil, field.ErrorList{field.Invalid(path, field.OmitValueType{}, err.Error())}
	}
	// The strict converter refuses duplicate keys, which would hide one of two settings.
	data, err := yaml.YAMLToJSONStrict([]byte(doc))
	if err != nil {
		return nil, field.ErrorList{field.Invalid(path, field.OmitValueType{}, fmt.Sprintf("this is not YAML: %v", err))}
	}
	// It reads the first document only: what a second one says would be lost.
	if n := documents(doc); n > 1 {
		return nil, field.ErrorList{field.Invalid(path, field.OmitValueType{}, fmt.Sprintf("it has %d YAML documents: write one", n))}
	}
	c := &EnclaveConfig{}
	r := &reader{}
	fields, ok := r.object(path, data)
	if !ok {
		return nil, r.errs
	}
	for _, required := range []struct{ key, want string }{{"apiVersion", APIVersion}, {"kind", Kind}} {
		var got string
		p := path.Child(required.key)
		if raw, ok := fields[required.key]; !ok {
			r.errs = append(r.errs, field.Required(p, fmt.Sprintf("write %s: %s", required.key, required.want)))
		} else if r.value(p, raw, &got, "a string") && got != required.want {
			r.errs = append(r.errs, field.NotSupported(p, got, []string{required.want}))
		}
	}
	for _, key := range sorted(fields) {
		p, raw := path.Child(key), fields[key]
		switch {
		case key == "apiVersion" || key == "kind":
		case key == "memory":
			c.Memory = r.memory(p, raw)
		case key == "cpus":
			if r.value(p, raw, &c.CPUs, "a whole number") && (c.CPUs < 1 || c.CPUs > MaxCPUs) {
				r.errs = append(r.errs, field.Invalid(p, c.CPUs, fmt.Sprintf("write a number of vCPUs from 1 to %d", MaxCPUs)))
			}
		case key == "ports":
			c.Ports = r.ports(p, raw)
		case key == "egress":
			c.Egress = r.egress(p, raw)
		case key == "plugins":
			c.Plugins = r.plugins(p, raw)
		case key == "logs":
			c.Logs = r.logs(p, raw)
		case key == "secrets":
			c.Secrets = r.secrets(p, raw)
		case key == "kms":
			c.KMS = r.kms(p, raw)
		case key == "tls":
			c.TLS = r.tls(p, raw)
		case key == "pin":
			c.Pin = r.pin(p, raw)
		case key == "hostEnv":
			c.HostEnv = r.hostEnv(p, raw)
		case key == "hostFiles":
			c.HostFiles = r.hostFiles(p, raw)
		case key == "serviceAccountToken":
			r.value(p, raw, &c.ServiceAccountToken, "true or false")
		case slices.Contains(notBuilt, key):
			r.errs = append(r.errs, field.Forbidden(p, "this setting is not built yet: remove it"))
		default:
			known := append([]string{"apiVersion", "kind", "memory", "cpus", "ports", "egress", "hostEnv", "hostFiles", "kms", "logs", "pin", "plugins", "secrets", "serviceAccountToken", "tls"}, notBuilt...)
			r.unknown(p, key, known)
		}
	}
	if len(r.errs) > 0 {
		return nil, r.errs
	}
	return c, nil
}

// noAliases refuses aliases. They repeat what they stand for, so that a document of kilobytes would become
// JSON of gigabytes.
func noAliases(doc string) error {
	var root nodes.Node
	if err := nodes.Unmarshal([]byte(doc), &root); err != nil {
		return fmt.Errorf("this is not YAML: %w", err)
	}
	for rest := []*nodes.Node{&root}; len(rest) > 0; {
		n := rest[len(rest)-1]
		if n.Kind == nodes.AliasNode {
			return fmt.Errorf("line %d has the alias *%s: write out what it stands for", n.Line, n.Value)
		}
		rest = append(rest[:len(rest)-1], n.Content...)
	}
	return nil
}

// documents counts the YAML documents in doc that hold something.
func documents(doc string) int {
	n := 0
	for r := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(doc))); ; {
		d, err := r.Read()
		if err != nil { // io.EOF: the reader has no other error of its own
			return n
		}
		if len(bytes.TrimSpace(d)) > 0 {
			n++
		}
	}
}

// reader decodes JSON values and collects what is wrong with them.
type reader struct{ errs field.ErrorList }

// object decodes a JSON object into its fields.
func (r *reader) object(p *field.Path, raw json.RawMessage) (map[string]json.RawMessage, bool) {
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil || m == nil {
		r.errs = append(r.errs, field.Invalid(p, field.OmitValueType{}, "write a mapping of fields to values"))
		return nil, false
	}
	return m, true
}

// value decodes one JSON value into a pointer to a string, bool or integer; null is refused.
func (r *reader) value(p *field.Path, raw json.RawMessage, into any, kind string) bool {
	if err := json.Unmarshal(raw, into); err != nil || bytes.Equal(raw, []byte("null")) {
		r.errs = append(r.errs, field.Invalid(p, field.OmitValueType{}, "write "+kind))
		return false
	}
	return true
}

func (r *reader) unknown(p *field.Path, key string, known []string) {
	hint := "known are " + strings.Join(known, ", ")
	if n := Nearest(key, known); n != "" {
		hint = fmt.Sprintf("did you mean %q?", n)
	}
	r.errs = append(r.errs, field.Forbidden(p, "there is no such field, "+hint))
}

func (r *reader) memory(p *field.Path, raw json.RawMessage) int64 {
	var q resource.Quantity
	if !r.value(p, raw, &q, `a quantity such as "512Mi"`) {
		return 0
	}
	if q.Sign() <= 0 || q.CmpInt64(MaxMemory) > 0 {
		r.errs = append(r.errs, field.Invalid(p, q.String(), `write a quantity such as "512Mi", at most 1Ti`))
		return 0
	}
	return q.Value()
}

func (r *reader) ports(p *field.Path, raw json.RawMessage) []Port {
	var list []json.RawMessage
	if !r.value(p, raw, &list, "a list of ports") {
		return nil
	}
	known := []string{"port", "name", "protocol", "plaintext"}
	var out []Port
	for i, raw := range list {
		p := p.Index(i)
		fields, ok := r.object(p, raw)
		if !ok {
			continue
		}
		port := Port{Protocol: workload.ProtocolHTTP}
		for _, key := range sorted(fields) {
			p, raw := p.Child(key), fields[key]
			switch key {
			case "port":
				if r.value(p, raw, &port.Port, "a port number") && (port.Port < 1 || port.Port > 65535) {
					r.errs = append(r.errs, field.Invalid(p, port.Port, "write a number from 1 to 65535"))
				}
			case "name":
				r.value(p, raw, &port.Name, "the name of a port")
			case "protocol":
				if r.value(p, raw, &port.Protocol, "http or tcp") && port.Protocol != workload.ProtocolHTTP && port.Protocol != workload.ProtocolTCP {
					r.errs = append(r.errs, field.NotSupported(p, port.Protocol, []string{workload.ProtocolHTTP, workload.ProtocolTCP}))
				}
			case "plaintext":
				r.value(p, raw, &port.Plaintext, "true or false")
			default:
				r.unknown(p, key, known)
			}
		}
		_, number := fields["port"]
		_, name := fields["name"]
		if number == name {
			r.errs = append(r.errs, field.Required(p, "name the containerPort by either port or name"))
		}
		out = append(out, port)
	}
	return out
}

// logs reads "stdout" (the console, the default, which is left out) or "otlp".
func (r *reader) logs(p *field.Path, raw json.RawMessage) string {
	var logs string
	if !r.value(p, raw, &logs, "stdout or otlp") {
		return ""
	}
	switch logs {
	case "stdout":
		return ""
	case workload.LogsOTLP:
	default:
		r.errs = append(r.errs, field.NotSupported(p, logs, []string{"stdout", workload.LogsOTLP}))
	}
	return logs
}

// pin reads "resolve" (the default, which is left out) or "never".
func (r *reader) pin(p *field.Path, raw json.RawMessage) string {
	var pin string
	switch {
	case !r.value(p, raw, &pin, "resolve or never") || pin == "resolve":
		return ""
	case pin != PinNever:
		r.errs = append(r.errs, field.NotSupported(p, pin, []string{"resolve", PinNever}))
	}
	return pin
}

// egress reads a list of host:port in any order and case.
func (r *reader) egress(p *field.Path, raw json.RawMessage) []string {
	var list []json.RawMessage
	if !r.value(p, raw, &list, "a list of host:port") {
		return nil
	}
	var out []string
	for i, raw := range list {
		p := p.Index(i)
		var e string
		if !r.value(p, raw, &e, "host:port") {
			continue
		}
		e = strings.ToLower(e)
		if _, _, err := workload.ParseEndpoint(e); err != nil {
			r.errs = append(r.errs, field.Invalid(p, e, err.Error()))
			continue
		}
		if slices.Contains(out, e) {
			r.errs = append(r.errs, field.Duplicate(p, e))
			continue
		}
		out = append(out, e)
	}
	slices.Sort(out)
	return out
}

func sorted(m map[string]json.RawMessage) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
