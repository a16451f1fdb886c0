package inject

import (
	"fmt"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// Resources of AWS's device plugin (aws-nitro-enclaves-k8s-device-plugin): the device itself, and vCPUs of
// the node's enclave pool, which it offers only when its chart says so.
const (
	NitroEnclaves    corev1.ResourceName = "aws.ec2.nitro/nitro_enclaves"
	nitroEnclaveCPUs corev1.ResourceName = "aws.ec2.nitro/nitro_enclaves_cpus"
)

// hugePages are the sizes of which an enclave's memory can be made, in bytes
// (Documentation/virt/ne_overview.rst).
var hugePages = map[string]int64{"2Mi": 2 << 20, "1Gi": 1 << 30}

// VsockProfile is the seccomp profile of the containers that open AF_VSOCK sockets, which RuntimeDefault
// refuses, as a path below the kubelet's seccomp folder. manifests/seccomp puts it there.
const VsockProfile = "profiles/cloister-vsock.json"

// vsockProfile is the same as a field of a security context.
func vsockProfile() *corev1.SeccompProfile {
	name := VsockProfile
	return &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost, LocalhostProfile: &name}
}

// nitroSecurity is the security context of initboot. /dev/nitro_enclaves has mode 0660 and belongs to root:
// so initboot is uid 0, with no capability, unless the installer names a group that may open the device.
func nitroSecurity(opts Options) *corev1.SecurityContext {
	sc := confined()
	sc.SeccompProfile = vsockProfile()
	if opts.DeviceGroup > 0 {
		sc.RunAsGroup = &opts.DeviceGroup
		return sc
	}
	root, no := int64(0), false
	// RunAsNonRoot is explicit: the pod may demand it for its other containers.
	sc.RunAsUser, sc.RunAsGroup, sc.RunAsNonRoot = &root, &root, &no
	return sc
}

// nitroEnv tells initboot the number of vCPUs.
func nitroEnv(cpus int64) corev1.EnvVar {
	return corev1.EnvVar{Name: podenv.EnvCPUs, Value: strconv.FormatInt(cpus, 10)}
}

// nitroCPUs is the number of vCPUs of an enclave: what the config or the container's limit, else its
// request, says, rounded up to full cores, since the device takes no others.
func (p *problems) nitroCPUs(cp *field.Path, c *corev1.Container, d *decision) int64 {
	cpus := d.config.CPUs
	for _, list := range []corev1.ResourceList{c.Resources.Limits, c.Resources.Requests} {
		if cpus == 0 {
			cpus = list.Cpu().Value() // rounded up
		}
	}
	if cpus > config.MaxCPUs {
		p.list = append(p.list, field.Invalid(cp.Child("resources"), cpus, fmt.Sprintf("an enclave has at most %d vCPUs", config.MaxCPUs)))
		return config.MaxCPUs
	}
	return fullCores(d.manifest, cpus)
}

// fullCores rounds up to the vCPUs of full cores: two of each with Intel and AMD, one with Graviton.
func fullCores(m *workload.Manifest, cpus int64) int64 {
	cpus = max(cpus, 1)
	if m.Image.Platform != "linux/arm64" {
		cpus += cpus % 2
	}
	return cpus
}

// nitroResources are those of initboot: the enclave's share of the machine, which is the device, huge pages
// and vCPUs of the pool, and little for itself, whatever the size of the enclave.
func nitroResources(spec *corev1.PodSpec, d *decision, opts Options) corev1.ResourceRequirements {
	r := resources(resource.MustParse("100m"), overhead, guaranteed(spec))
	page := hugePages[opts.HugePages]
	pages := (d.memory + podenv.NitroOverhead + page - 1) / page
	take := func(name corev1.ResourceName, q *resource.Quantity) { r.Requests[name], r.Limits[name] = *q, *q }
	take(NitroEnclaves, resource.NewQuantity(1, resource.DecimalSI))
	take(corev1.ResourceName(corev1.ResourceHugePagesPrefix+opts.HugePages), resource.NewQuantity(pages*page, resource.BinarySI))
	if opts.EnclaveCPUs {
		take(nitroEnclaveCPUs, resource.NewQuantity(d.cpus, resource.DecimalSI))
	}
	return r
}

// readCPUs reads back what nitroEnv has written; 0 where that is gone, which compare reports.
func (p *problems) readCPUs(path *field.Path, c *corev1.Container, m *workload.Manifest) int64 {
	i := slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == podenv.EnvCPUs })
	if i < 0 {
		return 0
	}
	cpus, err := strconv.ParseInt(c.Env[i].Value, 10, 64)
	if err != nil || cpus < 1 || cpus > config.MaxCPUs || cpus != fullCores(m, cpus) {
		p.forbid(path.Child("env").Key(podenv.EnvCPUs), fmt.Sprintf("it is not a number of vCPUs up to %d that makes full cores", config.MaxCPUs))
	}
	return cpus
}
