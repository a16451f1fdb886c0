package inject

import (
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestEveryFieldIsJudged fails when a new version of the Kubernetes API brings a field that nobody
// decided about: it must be carried, refused or left on the console on purpose.
func TestEveryFieldIsJudged(t *testing.T) {
	for typ, judged := range map[reflect.Type]string{
		reflect.TypeFor[corev1.Container](): "Name Image Command Args WorkingDir Ports EnvFrom Env Resources ResizePolicy RestartPolicy RestartPolicyRules " +
			"VolumeMounts VolumeDevices LivenessProbe ReadinessProbe StartupProbe Lifecycle TerminationMessagePath TerminationMessagePolicy ImagePullPolicy SecurityContext Stdin StdinOnce TTY",
		reflect.TypeFor[corev1.SecurityContext](): "Capabilities Privileged SELinuxOptions WindowsOptions RunAsUser RunAsGroup RunAsNonRoot ReadOnlyRootFilesystem AllowPrivilegeEscalation ProcMount SeccompProfile AppArmorProfile",
		// The change policies are about volumes that an enclave does not have.
		reflect.TypeFor[corev1.PodSecurityContext]():   "SELinuxOptions WindowsOptions RunAsUser RunAsGroup RunAsNonRoot SupplementalGroups SupplementalGroupsPolicy FSGroup Sysctls FSGroupChangePolicy SeccompProfile AppArmorProfile SELinuxChangePolicy",
		reflect.TypeFor[corev1.VolumeMount]():          "Name ReadOnly RecursiveReadOnly MountPath SubPath MountPropagation SubPathExpr BindMountOptions",
		reflect.TypeFor[corev1.EmptyDirVolumeSource](): "Medium SizeLimit Mode",
		reflect.TypeFor[corev1.EnvVar]():               "Name Value ValueFrom",
		reflect.TypeFor[corev1.ContainerPort]():        "Name HostPort ContainerPort Protocol HostIP",
		reflect.TypeFor[corev1.Probe]():                "ProbeHandler InitialDelaySeconds TimeoutSeconds PeriodSeconds SuccessThreshold FailureThreshold TerminationGracePeriodSeconds",
		reflect.TypeFor[corev1.ProbeHandler]():         "Exec HTTPGet TCPSocket GRPC",
		reflect.TypeFor[corev1.HTTPGetAction]():        "Path Port Host Scheme HTTPHeaders Protocol",
		reflect.TypeFor[corev1.Lifecycle]():            "PostStart PreStop StopSignal",
		reflect.TypeFor[corev1.ResourceRequirements](): "Limits Requests Claims",
		// Where a pod runs, how it is named and when it ends is the cluster's business, not the enclave's.
		reflect.TypeFor[corev1.PodSpec](): "Volumes InitContainers Containers EphemeralContainers RestartPolicy TerminationGracePeriodSeconds ActiveDeadlineSeconds DNSPolicy NodeSelector " +
			"ServiceAccountName DeprecatedServiceAccount AutomountServiceAccountToken NodeName HostNetwork HostPID HostIPC ShareProcessNamespace SecurityContext ImagePullSecrets Hostname Subdomain " +
			"Affinity SchedulerName Tolerations HostAliases PriorityClassName Priority DNSConfig ReadinessGates RuntimeClassName EnableServiceLinks PreemptionPolicy Overhead TopologySpreadConstraints " +
			"SetHostnameAsFQDN OS HostUsers SchedulingGates ResourceClaims Resources HostnameOverride SchedulingGroup EvictionResponders",
	} {
		known := strings.Fields(judged)
		for i := range typ.NumField() {
			if i >= len(known) || typ.Field(i).Name != known[i] {
				t.Errorf("%s.%s: decide what becomes of it and list it here", typ, typ.Field(i).Name)
				break
			}
		}
	}
}
