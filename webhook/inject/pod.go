package inject

import (
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
)

// unprivilegedPorts lets the sidecar, which has no capabilities, listen on ports below 1024. It is one of
// the sysctls that Kubernetes calls safe.
const unprivilegedPorts = "net.ipv4.ip_unprivileged_port_start"

// checkPod refuses what stands outside of the containers. It holds in every pass.
func (p *problems) checkPod(meta *metav1.ObjectMeta, spec *corev1.PodSpec) {
	if _, static := meta.Annotations[corev1.MirrorPodAnnotationKey]; static {
		p.forbid(annotationsPath.Key(corev1.MirrorPodAnnotationKey), "the pod is static: its kubelet runs it from a file of the node, in the open, whatever is decided here: take the file away and make a Deployment or DaemonSet of it")
	}
	for _, host := range []struct {
		name string
		set  bool
	}{{"hostNetwork", spec.HostNetwork}, {"hostPID", spec.HostPID}, {"hostIPC", spec.HostIPC}} {
		if host.set {
			p.forbid(specPath.Child(host.name), "an enclave is no part of the host: remove it")
		}
	}
	if s := spec.ShareProcessNamespace; s != nil && *s {
		p.forbid(specPath.Child("shareProcessNamespace"), "no container can see the processes of an enclave: remove it")
	}
	if u := spec.HostUsers; u != nil && !*u {
		p.forbid(specPath.Child("hostUsers"), "a user namespace around the enclave is not built yet: remove it")
	}
	if spec.OS != nil && spec.OS.Name != corev1.Linux {
		p.forbid(specPath.Child("os", "name"), "an enclave runs Linux only")
	}
	if os, ok := spec.NodeSelector[corev1.LabelOSStable]; ok && os != string(corev1.Linux) {
		p.forbid(specPath.Child("nodeSelector").Key(corev1.LabelOSStable), "an enclave runs Linux only")
	}
	if len(spec.EphemeralContainers) > 0 {
		p.forbid(specPath.Child("ephemeralContainers"), "a pod with an enclave starts without debug containers: remove them")
	}
	p.checkPodSecurity(spec.SecurityContext)

	for _, l := range containerLists(spec) {
		for i, c := range l.containers {
			for j, port := range c.Ports {
				if n := port.ContainerPort; n == podenv.ConsolePort || n == podenv.SidecarPort {
					p.forbid(l.path.Index(i).Child("ports").Index(j).Child("containerPort"),
						fmt.Sprintf("port %d is taken by Cloister in a pod with an enclave: choose another", n))
				}
			}
		}
	}
}

func (p *problems) checkPodSecurity(sc *corev1.PodSecurityContext) {
	if sc == nil {
		return
	}
	path := specPath.Child("securityContext")
	p.checkProfiles(path, sc.SELinuxOptions, sc.WindowsOptions, sc.SeccompProfile, sc.AppArmorProfile)
	if s := sc.SupplementalGroupsPolicy; s != nil && *s != corev1.SupplementalGroupsPolicyMerge {
		p.notBuilt(path.Child("supplementalGroupsPolicy"), "a policy other than Merge")
	}
	for i, s := range sc.Sysctls {
		// The sidecar needs this one on the pod's network; the enclave has a network of its own.
		if s.Name != unprivilegedPorts {
			p.forbid(path.Child("sysctls").Index(i), "a sysctl of the pod has no effect inside the enclave: remove it")
		}
	}
}

// checkProfiles refuses confinement by the host's kernel other than its default: it does not reach into
// an enclave.
func (p *problems) checkProfiles(path *field.Path, se *corev1.SELinuxOptions, win *corev1.WindowsSecurityContextOptions, seccomp *corev1.SeccompProfile, armor *corev1.AppArmorProfile) {
	const sentence = "a profile of the host's kernel does not reach into an enclave: remove it or use RuntimeDefault"
	if se != nil {
		p.forbid(path.Child("seLinuxOptions"), "a label of the host's kernel does not reach into an enclave: remove it")
	}
	if win != nil {
		p.forbid(path.Child("windowsOptions"), "an enclave runs Linux only")
	}
	if seccomp != nil && seccomp.Type != corev1.SeccompProfileTypeRuntimeDefault {
		p.forbid(path.Child("seccompProfile"), sentence)
	}
	if armor != nil && armor.Type != corev1.AppArmorProfileTypeRuntimeDefault {
		p.forbid(path.Child("appArmorProfile"), sentence)
	}
}

// checkPortStart refuses a sysctl of the author's that keeps the sidecar from listening on port lowest.
func (p *problems) checkPortStart(spec *corev1.PodSpec, lowest uint32) {
	if spec.SecurityContext == nil {
		return
	}
	for i, s := range spec.SecurityContext.Sysctls {
		if s.Name != unprivilegedPorts {
			continue
		}
		if start, err := strconv.ParseUint(s.Value, 10, 16); err != nil || uint32(start) > lowest {
			p.forbid(specPath.Child("securityContext", "sysctls").Index(i),
				fmt.Sprintf("the sidecar must listen on port %d without privilege: remove it or set %s to 0", lowest, unprivilegedPorts))
		}
	}
}

func hasPortStart(spec *corev1.PodSpec) bool {
	if spec.SecurityContext == nil {
		return false
	}
	for _, s := range spec.SecurityContext.Sysctls {
		if s.Name == unprivilegedPorts {
			return true
		}
	}
	return false
}

// containerList is the init or the other containers of a pod with their path.
type containerList struct {
	path       *field.Path
	containers []corev1.Container
}

func containerLists(spec *corev1.PodSpec) [2]containerList {
	return [2]containerList{{initContainersPath, spec.InitContainers}, {containersPath, spec.Containers}}
}
