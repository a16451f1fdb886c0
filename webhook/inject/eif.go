package inject

import (
	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/internal/podenv"
)

// volumeEIF is an image volume with a sealed EIF: the kubelet pulls it, with the pod's imagePullSecrets, and
// initboot boots it instead of the base EIF.
const volumeEIF = "cloister-eif"

var mountEIF = corev1.VolumeMount{Name: volumeEIF, MountPath: podenv.EIFDir, ReadOnly: true}

// volumesOf are the volumes that every pod has whose enclave boots from the EIF in the image reference eif,
// which is empty for the base EIF.
func volumesOf(eif string) []*corev1.Volume {
	if eif == "" {
		return volumes
	}
	return append(volumes[:len(volumes):len(volumes)], &corev1.Volume{Name: volumeEIF, VolumeSource: corev1.VolumeSource{
		Image: &corev1.ImageVolumeSource{Reference: eif, PullPolicy: corev1.PullIfNotPresent},
	}})
}

// injectedEIF returns the reference of the EIF with which a pod was injected; empty for the base EIF.
func injectedEIF(spec *corev1.PodSpec) string {
	if v := volume(spec, volumeEIF); v != nil && v.Image != nil {
		return v.Image.Reference
	}
	return ""
}
