package inject

import (
	"fmt"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/internal/podenv"
)

// volumePullSecrets holds the pod's imagePullSecrets, with which initboot fetches the images of the
// workload and of its plugins. They are the host's business: the manifest says nothing of them.
const volumePullSecrets = "cloister-pull-secrets"

var mountPullSecrets = corev1.VolumeMount{Name: volumePullSecrets, MountPath: podenv.PullSecretsDir, ReadOnly: true}

// pullSecrets returns the volume, or nil for a pod without pull secrets. A Secret that is missing is
// passed over, as by the kubelet. Each has a folder of its own, numbered in the pod's order.
func pullSecrets(spec *corev1.PodSpec) *corev1.Volume {
	if len(spec.ImagePullSecrets) == 0 {
		return nil
	}
	source := &corev1.ProjectedVolumeSource{}
	for i, s := range spec.ImagePullSecrets {
		if s.Name == "" {
			continue
		}
		p := corev1.SecretProjection{LocalObjectReference: s, Optional: &yes}
		for _, key := range []string{corev1.DockerConfigJsonKey, corev1.DockerConfigKey} {
			p.Items = append(p.Items, corev1.KeyToPath{Key: key, Path: fmt.Sprintf("%d/%s", i, key)})
		}
		source.Sources = append(source.Sources, corev1.VolumeProjection{Secret: &p})
	}
	if source.Sources == nil {
		return nil
	}
	return &corev1.Volume{Name: volumePullSecrets, VolumeSource: corev1.VolumeSource{Projected: source}}
}

// pullSecretsAgain compares the volume of an injected pod with its pull secrets. The API server adds those
// of the service account to a pod that was injected offline, so what is missing is added.
func (p *problems) pullSecretsAgain(spec *corev1.PodSpec, boot int) (ops []Op) {
	want := pullSecrets(spec)
	i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == volumePullSecrets })
	switch {
	case want == nil && i < 0:
		return nil
	case want == nil || i >= 0 && spec.Volumes[i].Projected == nil:
		p.forbid(specPath.Child("volumes").Index(i), fmt.Sprintf("volume %s is not what is injected", volumePullSecrets))
		return nil
	case i < 0 && len(spec.Volumes) == 0:
		return nil // what is lost is reported
	case i < 0:
		ops = append(ops, add("/spec/volumes/-", want))
	default:
		have := spec.Volumes[i].DeepCopy()
		have.Projected.DefaultMode = nil // set by the API server
		if !reflect.DeepEqual(have, want) {
			ops = append(ops, add(fmt.Sprintf("/spec/volumes/%d/projected", i), want.Projected))
		}
	}
	c := &spec.InitContainers[boot]
	switch j := slices.IndexFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == volumePullSecrets }); {
	case j < 0 && len(c.VolumeMounts) > 0:
		ops = append(ops, add(fmt.Sprintf("/spec/initContainers/%d/volumeMounts/-", boot), mountPullSecrets))
	case j >= 0 && c.VolumeMounts[j].MountPath != mountPullSecrets.MountPath:
		p.forbid(specPath.Child("initContainers").Index(boot).Child("volumeMounts").Index(j), "it is not what is injected")
	}
	return ops
}
