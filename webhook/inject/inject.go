// Package inject decides what happens to a pod at admission: it derives the workload manifest of the
// container that runs in the enclave, and makes the JSON patch that turns the pod into a confidential
// one. It is pure: no I/O, no clock, no randomness; the webhook, the command line and the tests share it.
//
// The law: a patch only adds, except in the console (the named container after mutation), and the patch
// of a pod that was patched and that nobody changed since is empty. What the author asks for and cannot
// be honoured, or is not built yet, is denied, every reason at once.
package inject

import (
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// DriverProcess runs the enclave as processes in namespaces of its own: for development and tests.
const DriverProcess = "process"

// Options is what an installation chooses, never a pod.
type Options struct {
	// Driver is DriverProcess.
	Driver string
	// InitbootImage is the image of cloister-initboot and of the console.
	InitbootImage string
	// SidecarImage is the image of cloister-sidecar.
	SidecarImage string
	// PlainHTTP lists the registries, HOST or HOST:PORT, from which initboot may fetch without TLS.
	PlainHTTP []string
}

// Names of the containers that are added, in this order, before the pod's own init containers.
const (
	Initboot = "cloister-initboot"
	Sidecar  = "cloister-sidecar"
)

// reserved is the prefix of our containers' and volumes' names, reservedName what others are told.
const (
	reserved     = "cloister-"
	reservedName = "names that begin with " + reserved + " are kept for what is injected: choose another"
)

func isReserved(name string) bool { return strings.HasPrefix(name, reserved) }

// Roots of the paths in errors.
var (
	specPath        = field.NewPath("spec")
	annotationsPath = field.NewPath("metadata", "annotations")
)

// Op is one operation of a JSON patch (RFC 6902).
type Op struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// problems collects what is wrong with a pod.
type problems struct{ list field.ErrorList }

// forbid refuses something that an enclave cannot honour.
func (p *problems) forbid(path *field.Path, sentence string) {
	p.list = append(p.list, field.Forbidden(path, sentence))
}

// notBuilt refuses something that the design names and this version lacks.
func (p *problems) notBuilt(path *field.Path, what string) {
	p.forbid(path, what+" is not built yet for the container in the enclave: remove it")
}
