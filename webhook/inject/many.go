package inject

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/workload"
)

// maxItems is how many volumes and mounts, ports, and names in hostAliases a pod may have. Each is compared with the
// others of its kind.
const maxItems = 2048

// tooMany refuses a pod that would take long to decide about. Whoever may create pods in one namespace shares the
// webhook with all others, and nobody has checked the pod yet: the API server does that afterwards.
func tooMany(meta *metav1.ObjectMeta, spec *corev1.PodSpec) field.ErrorList {
	p := &problems{}
	mounts, ports, names := len(spec.Volumes), 0, len(spec.HostAliases)
	for _, l := range containerLists(spec) {
		for i := range l.containers {
			mounts += len(l.containers[i].VolumeMounts)
			ports += len(l.containers[i].Ports)
		}
	}
	for _, a := range spec.HostAliases {
		names += len(a.Hostnames)
	}
	for _, n := range []struct {
		what  string
		count int
	}{{"volumes with their mounts", mounts}, {"ports", ports}, {"hostAliases with their names", names}} {
		if n.count > maxItems {
			p.forbid(specPath, fmt.Sprintf("it has %d %s, in a pod with an enclave there can be %d: remove some", n.count, n.what, maxItems))
		}
	}
	if n := len(meta.Annotations[annotation.Config]); n > workload.MaxManifestSize {
		p.forbid(annotationsPath.Key(annotation.Config), fmt.Sprintf("it has %d bytes, and there can be %d: shorten it", n, workload.MaxManifestSize))
	}
	return p.list
}
