package scrape

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
)

// Trim is a cache.TransformFunc for pods: it keeps what the controller reads, which is little, and of
// pods without an enclave the name. A cluster has many of those.
func Trim(object any) (any, error) {
	pod, ok := object.(*corev1.Pod)
	if !ok {
		return object, nil
	}
	out := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion,
	}}
	if !Confidential(pod) {
		return out, nil
	}
	out.Labels, out.OwnerReferences, out.DeletionTimestamp = pod.Labels, pod.OwnerReferences, pod.DeletionTimestamp
	out.Annotations = map[string]string{annotation.Enclave: pod.Annotations[annotation.Enclave]}
	for _, c := range pod.Spec.InitContainers {
		if c.Name == inject.Sidecar {
			out.Spec.InitContainers = []corev1.Container{{Name: c.Name}}
		}
	}
	out.Status = corev1.PodStatus{
		Phase: pod.Status.Phase, PodIP: pod.Status.PodIP, Conditions: pod.Status.Conditions,
		InitContainerStatuses: only(pod.Status.InitContainerStatuses, inject.Sidecar),
		ContainerStatuses:     only(pod.Status.ContainerStatuses, pod.Annotations[annotation.Enclave]),
	}
	return out, nil
}

func only(list []corev1.ContainerStatus, name string) []corev1.ContainerStatus {
	for _, c := range list {
		if c.Name == name {
			return []corev1.ContainerStatus{{
				Name: c.Name, ContainerID: c.ContainerID, State: c.State, LastTerminationState: c.LastTerminationState,
			}}
		}
	}
	return nil
}

// Confidential reports whether a pod was injected.
func Confidential(pod *corev1.Pod) bool {
	for _, c := range pod.Spec.InitContainers {
		if c.Name == inject.Sidecar {
			return true
		}
	}
	return false
}

// Ready reports whether Services send requests to a pod.
func Ready(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && pod.DeletionTimestamp == nil
		}
	}
	return false
}

// Serving reports whether a pod's sidecar runs.
func Serving(pod *corev1.Pod) bool {
	for _, c := range pod.Status.InitContainerStatuses {
		if c.Name == inject.Sidecar {
			return c.State.Running != nil && pod.Status.PodIP != ""
		}
	}
	return false
}
