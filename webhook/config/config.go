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
	// CPUs is the number of the enclave's vCPUs; 0 means what the container asks for.
	CPUs int64
	// EIF is the reference of a sealed EIF's image, with a digest; empty for the installation's base EIF. It is no
	// part of the manifest, which the EIF holds.
	EIF string
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
	// Protocol is workload.ProtocolTCP, or empty for HTTP.
	Protocol string
	// Plaintext serves the port without TLS.
	Plaintext bool
}

// configTable is EnclaveConfig. A new field is a row here, a field of EnclaveConfig, and
// `go test ./webhook/annotation -update`, which writes the docs.
var configTable = table[EnclaveConfig]{rows: []row[EnclaveConfig]{
	{Field{
		Key: "apiVersion", Type: "`" + APIVersion + "`", Required: "write apiVersion: " + APIVersion, Schema: choice(APIVersion),
		Sentence: "The version of this format.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, _ *EnclaveConfig) { r.constant(p, raw, APIVersion) }},
	{Field{
		Key: "kind", Type: "`" + Kind + "`", Required: "write kind: " + Kind, Schema: choice(Kind),
		Sentence: "The name of this format.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, _ *EnclaveConfig) { r.constant(p, raw, Kind) }},
	{Field{
		Key: "memory", Type: "quantity, at most 1Ti", Default: "the container's memory limit, else 512Mi",
		Schema:   Schema{"type": []string{"string", "number"}, "pattern": quantity},
		Sentence: "Memory of the enclave; the image unpacks into it.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.Memory = r.memory(p, raw) }},
	{Field{
		Key: "cpus", Type: fmt.Sprintf("1 to %d", MaxCPUs), Default: "the container's CPU limit, else its request", Schema: whole(1, MaxCPUs),
		Sentence: "Number of the enclave's vCPUs, rounded up to full cores. The `process` driver requests them as CPU; its default is the container's request, else its limit.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		if r.value(p, raw, &c.CPUs, "a whole number") && (c.CPUs < 1 || c.CPUs > MaxCPUs) {
			r.errs = append(r.errs, field.Invalid(p, c.CPUs, fmt.Sprintf("write a number of vCPUs from 1 to %d", MaxCPUs)))
		}
	}},
	{Field{
		Key: "ports", Type: "list", Measured: true, Schema: listOf(portTable.schema()), Fields: portTable.fields(),
		Sentence: "How containerPorts are served. One that is not listed is HTTP over attested TLS.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		c.Ports = portTable.readList(r, p, raw, "a list of ports")
	}},
	{Field{
		Key: "egress", Type: "list of `host:port`", Measured: true, Schema: listOf(text),
		Sentence: "What the workload may reach. Everything else does not resolve.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.Egress = r.egress(p, raw) }},
	{Field{
		Key: "eif", Type: "`name@sha256:…`", Default: "the base EIF of the installation", Schema: text,
		Sentence: "The enclave image that `cloister build` has sealed for this pod and `cloister eif push` has pushed ([sealed.md](sealed.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.EIF = r.eif(p, raw) }},
	{Field{
		Key: "hostEnv", Type: "list of names", Measured: true, Schema: listOf(text),
		Sentence: "Variables that the host may supply although they are refused otherwise, such as `PATH`.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.HostEnv = r.hostEnv(p, raw) }},
	{Field{
		Key: "hostFiles", Type: "list of paths", Measured: true, Schema: listOf(text),
		Sentence: "Mount paths of emptyDir volumes that other containers share: the host supplies their files.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		c.HostFiles = r.hostFiles(p, raw)
	}},
	{Field{
		Key: "kms", Type: "mapping", Measured: true, Schema: kmsTable.schema(), Fields: kmsTable.fields(),
		Sentence: "The AWS KMS that decrypts secrets and the key of the certificate ([kms.md](kms.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.KMS = r.kms(p, raw) }},
	{Field{
		Key: "logs", Type: "`stdout` or `otlp`", Default: "`stdout`", Measured: true, Schema: choice("stdout", workload.LogsOTLP),
		Sentence: "Where the workload's output goes: to `kubectl logs`, which the host can read, or only to the plugin of type `logging` ([telemetry.md](telemetry.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		c.Logs = r.choice(p, raw, "stdout", workload.LogsOTLP)
	}},
	{Field{
		Key: "pin", Type: "`resolve` or `never`", Default: "`resolve`", Schema: choice("resolve", PinNever),
		Sentence: "Whether a tag is resolved to a digest at admission or refused ([images.md](images.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		c.Pin = r.choice(p, raw, "resolve", PinNever)
	}},
	{Field{
		Key: "plugins", Type: "list", Measured: true, Schema: pluginList, Fields: pluginTable.fields(),
		Sentence: "What runs in the enclave beside the workload ([plugins.md](plugins.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.Plugins = r.plugins(p, raw) }},
	{Field{
		Key: "secrets", Type: "list", Measured: true, Schema: listOf(secretTable.schema()), Fields: secretTable.fields(),
		Sentence: "What KMS decrypts for the workload ([kms.md](kms.md)).",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		c.Secrets = secretTable.readList(r, p, raw, "a list of secrets")
	}},
	{Field{
		Key: "serviceAccountToken", Type: "boolean", Default: "`false`", Measured: true, Schema: boolean,
		Sentence: "Give the workload the token of the pod's service account, which the host supplies.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) {
		r.value(p, raw, &c.ServiceAccountToken, "true or false")
	}},
	{Field{
		Key: "tls", Type: "`ephemeral` or `kms`", Default: "`ephemeral`", Measured: true, Schema: choice(ephemeral, workload.TLSKMS),
		Sentence: "The certificate for clients that do not ask for the attested one: made in the enclave, or that of `kms.certificate`.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *EnclaveConfig) { c.TLS = r.tls(p, raw) }},
	{Field: Field{Key: "debug"}},
	{Field: Field{Key: "nsm"}},
}}

var portTable = table[Port]{
	either: []string{"port", "name"}, oneOf: "name the containerPort by either port or name",
	rows: []row[Port]{
		{Field{
			Key: "port", Type: "1 to 65535", Measured: true, Schema: whole(1, 65535),
			Sentence: "Number of the containerPort.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, port *Port) {
			if r.value(p, raw, &port.Port, "a port number") && (port.Port < 1 || port.Port > 65535) {
				r.errs = append(r.errs, field.Invalid(p, port.Port, "write a number from 1 to 65535"))
			}
		}},
		{Field{
			Key: "name", Type: "text", Measured: true, Schema: text,
			Sentence: "Name of the containerPort, instead of its number.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, port *Port) {
			r.value(p, raw, &port.Name, "the name of a port")
		}},
		{Field{
			Key: "protocol", Type: "`http` or `tcp`", Default: "`http`", Measured: true, Schema: choice(workload.ProtocolHTTP, workload.ProtocolTCP),
			Sentence: "Whether the gateway speaks HTTP or passes bytes.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, port *Port) {
			port.Protocol = r.choice(p, raw, workload.ProtocolHTTP, workload.ProtocolTCP)
		}},
		{Field{
			Key: "plaintext", Type: "boolean", Default: "`false`", Measured: true, Schema: boolean,
			Sentence: "Serve the port without TLS: the host can read and change everything on it.",
		}, func(r *reader, p *field.Path, raw json.RawMessage, port *Port) {
			r.value(p, raw, &port.Plaintext, "true or false")
		}},
	},
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
	configTable.read(r, path, data, c)
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

// quantity is the form of resource.Quantity (k8s.io/apimachinery/pkg/api/resource).
const quantity = `^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$`

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

// constant reads a text that can only be want.
func (r *reader) constant(p *field.Path, raw json.RawMessage, want string) {
	var got string
	if r.value(p, raw, &got, "a string") && got != want {
		r.errs = append(r.errs, field.NotSupported(p, got, []string{want}))
	}
}

// choice reads one of some texts, of which the first is the default and becomes "".
func (r *reader) choice(p *field.Path, raw json.RawMessage, values ...string) string {
	var got string
	switch {
	case !r.value(p, raw, &got, strings.Join(values, " or ")) || got == values[0]:
		return ""
	case !slices.Contains(values, got):
		r.errs = append(r.errs, field.NotSupported(p, got, values))
	}
	return got
}

// eif reads the reference of an enclave image.
func (r *reader) eif(p *field.Path, raw json.RawMessage) (reference string) {
	if r.value(p, raw, &reference, "an image reference") && Digest(reference) == "" {
		r.errs = append(r.errs, field.Invalid(p, reference, "it must always be the same enclave image: name it by digest, as in registry/name@sha256:…, which `cloister eif push` prints"))
	}
	return reference
}

// egress reads a list of host:port in any order and case.
func (r *reader) egress(p *field.Path, raw json.RawMessage) []string {
	return r.set(p, raw, "host:port", strings.ToLower, func(p *field.Path, e string) {
		if _, _, err := workload.ParseEndpoint(e); err != nil {
			r.errs = append(r.errs, field.Invalid(p, e, err.Error()))
		}
	})
}

func sorted(m map[string]json.RawMessage) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
