package workload

import (
	"bytes"
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
)

// APIVersion is the only value of Manifest.APIVersion that this version of the package accepts.
const APIVersion = "cloister.dev/v1alpha1"

// MaxManifestSize is the largest canonical manifest in bytes: what the kernel takes as one string of
// an environment (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h).
const MaxManifestSize = 128 << 10

// DefaultPlatform is the platform of an image whose manifest names none.
const DefaultPlatform = "linux/amd64"

// Manifest is the measured description of a workload: what the author of a pod template wrote about
// the container that runs in the enclave, and nothing that a cluster adds. A value equal to its default
// is left out, so that equal workloads have equal manifests.
type Manifest struct {
	APIVersion string `json:"apiVersion"`
	Image      Image  `json:"image"`
	// Command replaces the image's entrypoint and, when set, its arguments too; Args replaces the
	// image's arguments. Both are expanded with $(VAR) as the kubelet does it.
	Command []string `json:"command,omitempty"`
	Args    []string `json:"args,omitempty"`
	// Env is in the author's order, which $(VAR) depends on.
	Env []EnvVar `json:"env,omitempty"`
	// EnvFrom lets the host supply variables of any name but those that RefusedEnv knows. Env wins.
	EnvFrom bool `json:"envFrom,omitempty"`
	// HostEnv names those of RefusedEnv that the host may supply all the same, in ascending order.
	HostEnv    []string  `json:"hostEnv,omitempty"`
	WorkingDir string    `json:"workingDir,omitempty"`
	User       *User     `json:"user,omitempty"`
	Security   *Security `json:"security,omitempty"`
	Ports      []Port    `json:"ports,omitempty"`
	Probes     *Probes   `json:"probes,omitempty"`
	// Lifecycle is what is run beside the workload at its start and its end.
	Lifecycle *Lifecycle `json:"lifecycle,omitempty"`
	// TerminationMessagePath is where the workload leaves a last word for Kubernetes, empty for
	// DefaultTerminationMessagePath.
	TerminationMessagePath string  `json:"terminationMessagePath,omitempty"`
	Mounts                 []Mount `json:"mounts,omitempty"`
	// HostAliases are lines of /etc/hosts, in the author's order.
	HostAliases []HostAlias `json:"hostAliases,omitempty"`
	// Egress lists what the workload may connect to, "host:port" as ParseEndpoint reads it, in ascending
	// order. Nothing else can be reached, nor does another name resolve.
	Egress []string `json:"egress,omitempty"`
	// Plugins are in the author's order.
	Plugins []Plugin `json:"plugins,omitempty"`
	// Logs is LogsOTLP, or empty for the console.
	Logs string `json:"logs,omitempty"`
	// Secrets are in the author's order; KMS decrypts them.
	Secrets []Secret `json:"secrets,omitempty"`
	KMS     *KMS     `json:"kms,omitempty"`
	// TLS is TLSKMS, or empty for a certificate that is made in the enclave.
	TLS string `json:"tls,omitempty"`
}

// Image pins the workload's image.
type Image struct {
	// Digest is "sha256:" and 64 hexadecimal digits, of an image manifest or of an index.
	Digest string `json:"digest"`
	// Platform is "os/architecture", empty for DefaultPlatform; it chooses from an index.
	Platform string `json:"platform,omitempty"`
}

// EnvVar is one environment variable.
type EnvVar struct {
	Name string `json:"name"`
	// Value is expanded with $(VAR) as the kubelet does it.
	Value string `json:"value,omitempty"`
	// Host says that the host supplies the value, or none: it can read and change it. It is not expanded.
	Host bool `json:"host,omitempty"`
}

// Header is one header of a request.
type Header struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// User overrides the image's user. Nil fields leave the image's choice.
type User struct {
	UID *int64 `json:"uid,omitempty"`
	GID *int64 `json:"gid,omitempty"`
	// Groups are supplementary group ids, in ascending order without duplicates.
	Groups []int64 `json:"groups,omitempty"`
	// NonRoot refuses to start the workload as uid 0.
	NonRoot bool `json:"nonRoot,omitempty"`
}

// Security narrows what the workload may do inside the enclave.
type Security struct {
	// NoNewPrivileges sets PR_SET_NO_NEW_PRIVS.
	NoNewPrivileges bool `json:"noNewPrivileges,omitempty"`
	// ReadOnlyRoot mounts the image read-only.
	ReadOnlyRoot bool `json:"readOnlyRoot,omitempty"`
	// DropCapabilities are capability names without "CAP_" in ascending order, or just "ALL".
	DropCapabilities []string `json:"dropCapabilities,omitempty"`
	// AddCapabilities are given back after DropCapabilities; only those of the default set.
	AddCapabilities []string `json:"addCapabilities,omitempty"`
}

// Protocols of a Port.
const (
	// ProtocolHTTP is HTTP/1.1 or HTTP/2 by ALPN; the default.
	ProtocolHTTP = "http"
	// ProtocolTCP is a byte stream.
	ProtocolTCP = "tcp"
)

// Port is a TCP port of the workload that clients reach through the gateway.
type Port struct {
	// Name is what probes may refer to.
	Name string `json:"name,omitempty"`
	// Port is 1 to 65535.
	Port uint32 `json:"port"`
	// Protocol is ProtocolTCP, or empty for ProtocolHTTP.
	Protocol string `json:"protocol,omitempty"`
	// Plaintext serves the port without TLS: the host reads and can change everything on it.
	Plaintext bool `json:"plaintext,omitempty"`
}

// Kinds of a Mount.
const (
	// MountTmpfs is memory of the enclave: an emptyDir that no other container shares.
	MountTmpfs = "tmpfs"
	// MountHost is files that the host supplies, a directory or one file, read-only: a ConfigMap, Secret,
	// projected or downward API volume, or an emptyDir that another container shares. The host can read and
	// change them at any time.
	MountHost = "host"
)

// Mount is something mounted into the workload's file system.
type Mount struct {
	// Path is absolute and clean.
	Path string `json:"path"`
	// Kind is MountTmpfs or MountHost.
	Kind string `json:"kind"`
	// SubPath is what of the volume is mounted in place of its root, relative and clean. Files of the host
	// never change then. Of memory only mounts with a Volume have one: a directory, which is made.
	SubPath string `json:"subPath,omitempty"`
	// SizeLimit is in bytes; 0 means no limit but the enclave's memory.
	SizeLimit int64 `json:"sizeLimit,omitempty"`
	ReadOnly  bool  `json:"readOnly,omitempty"`
	// Volume is 0, or a number that other mounts have too: they show the same memory. The numbers begin
	// with 1, in the order of Mounts.
	Volume int `json:"volume,omitempty"`
}

// Canonical returns the RFC 8785 (JCS) form of m, which is what is measured. It fails when m is not
// valid or when the form is larger than MaxManifestSize.
func (m *Manifest) Canonical() ([]byte, error) {
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return m.canonical()
}

func (m *Manifest) canonical() ([]byte, error) {
	c, err := appendCanonical(make([]byte, 0, 1<<10), reflect.ValueOf(m))
	if err != nil {
		return nil, fmt.Errorf("encode workload manifest: %w", err)
	}
	if len(c) > MaxManifestSize {
		return nil, fmt.Errorf("the workload manifest has %d bytes, more than the %d that fit into one environment variable: shorten args, env or probes", len(c), MaxManifestSize)
	}
	return c, nil
}

// Parse reads a manifest that must be its own RFC 8785 form: what is measured is what is used. Unknown
// and duplicate fields, numbers beyond 2^53 and any other byte order are refused.
func Parse(canonical []byte) (*Manifest, error) {
	if len(canonical) > MaxManifestSize {
		return nil, fmt.Errorf("the workload manifest has %d bytes, at most %d are accepted", len(canonical), MaxManifestSize)
	}
	dec := json.NewDecoder(bytes.NewReader(canonical))
	dec.DisallowUnknownFields()
	var m Manifest
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("decode workload manifest: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("the workload manifest is followed by other data")
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	again, err := m.canonical()
	if err != nil {
		return nil, err
	}
	// A duplicate field, a default that is spelled out, another order or another spelling of a string
	// or a number all show here.
	if !bytes.Equal(again, canonical) {
		return nil, errors.New("the workload manifest is not in its RFC 8785 form, so what was measured could differ from what is used")
	}
	return &m, nil
}

// PCR16 returns the value of PCR16 in an enclave that was given these bytes as manifest:
// SHA384(0^48 || SHA384(canonical)), 48 bytes. The register is extended with the digest, not with the
// manifest, so that its value can be computed from the digest alone.
func PCR16(canonical []byte) []byte {
	var extended [2 * sha512.Size384]byte
	copy(extended[sha512.Size384:], Digest(canonical))
	pcr := sha512.Sum384(extended[:])
	return pcr[:]
}

// Digest returns what PCR16 is extended with: the SHA-384 of the canonical manifest, 48 bytes.
func Digest(canonical []byte) []byte {
	d := sha512.Sum384(canonical)
	return d[:]
}
