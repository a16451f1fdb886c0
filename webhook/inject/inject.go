// Package inject decides what happens to a pod at admission: it derives the workload manifest of the
// container that runs in the enclave, and makes the JSON patch that turns the pod into a confidential
// one. It is pure: no I/O, no clock, no randomness; the webhook, the command line and the tests share it.
//
// The law: a patch only adds, except in the console (the named container after mutation), and the patch
// of a pod that was patched and that nobody changed since is empty. What the author asks for and cannot
// be honoured, or is not built yet, is denied, every reason at once.
package inject

import (
	"cmp"
	"fmt"
	"math"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Drivers, by which enclaves are launched.
const (
	// DriverProcess runs the enclave as processes in namespaces of its own: for development and tests.
	DriverProcess = "process"
	// DriverNitro launches AWS Nitro enclaves. Only the shape of its pods is known here.
	DriverNitro = "nitro"
)

// Options is what an installation and the pod's namespace choose, never a pod.
type Options struct {
	// Driver is DriverProcess or DriverNitro.
	Driver string
	// InitbootImage is the image of cloister-initboot and of the console.
	InitbootImage string
	// SidecarImage is the image of cloister-sidecar.
	SidecarImage string
	// PlainHTTP lists the registries, HOST or HOST:PORT, from which initboot may fetch without TLS.
	PlainHTTP []string

	// HugePages is the size of the pages that nodes keep for enclaves: 2Mi or 1Gi. Driver nitro only, like
	// the next two.
	HugePages string
	// EnclaveCPUs says that the device plugin offers the vCPUs of the nodes' enclave pools.
	EnclaveCPUs bool
	// DeviceGroup is a gid that may open /dev/nitro_enclaves; 0 means that root alone may.
	DeviceGroup int64

	// Enforced is the level that Pod Security enforces in the pod's namespace: privileged, baseline or
	// restricted. It is empty when that is not known.
	Enforced string
}

// Read takes ENCLAVE_CPUS and DEVICE_GROUP as an installation's environment has them, empty for none, and checks
// the whole.
func (o *Options) Read(enclaveCPUs, deviceGroup string) (err error) {
	if o.EnclaveCPUs, err = strconv.ParseBool(cmp.Or(enclaveCPUs, "false")); err != nil {
		return fmt.Errorf("ENCLAVE_CPUS is %q: set it to true or false", enclaveCPUs)
	}
	if o.DeviceGroup, err = strconv.ParseInt(cmp.Or(deviceGroup, "0"), 10, 64); err != nil {
		return fmt.Errorf("DEVICE_GROUP is %q: set it to the number of the group", deviceGroup)
	}
	return o.Check()
}

// Check says in a sentence what an installation must choose otherwise.
func (o Options) Check() error {
	switch o.Driver {
	case DriverProcess:
		return nil
	case DriverNitro:
	default:
		return fmt.Errorf("there is no driver %q: set DRIVER to %s or %s", o.Driver, DriverProcess, DriverNitro)
	}
	if hugePages[o.HugePages] == 0 {
		return fmt.Errorf("there are no huge pages of %q: set HUGEPAGES to 2Mi or 1Gi", o.HugePages)
	}
	if o.DeviceGroup < 0 || o.DeviceGroup > math.MaxInt32 {
		return fmt.Errorf("DEVICE_GROUP is %d: set it to the gid that may open /dev/nitro_enclaves, or to 0", o.DeviceGroup)
	}
	return nil
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
	specPath           = field.NewPath("spec")
	initContainersPath = specPath.Child("initContainers")
	containersPath     = specPath.Child("containers")
	annotationsPath    = field.NewPath("metadata", "annotations")
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
