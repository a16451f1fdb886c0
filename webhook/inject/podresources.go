package inject

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// podResources tells whether the pod as a whole has requests or limits, which decide about its QoS class
// then (k8s.io/kubernetes, ComputePodQOS).
func podResources(spec *corev1.PodSpec) bool {
	return spec.Resources != nil && len(spec.Resources.Requests)+len(spec.Resources.Limits) > 0
}

// checkPodResources refuses requests of the whole pod that are less than those of its containers with
// ours: the API server would refuse them too, in words that nobody could make sense of.
func (p *problems) checkPodResources(spec *corev1.PodSpec, d *decision, opts Options) {
	if !podResources(spec) || opts.Driver == "" {
		return
	}
	for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		at, list := specPath.Child("resources", "requests"), spec.Resources.Requests
		if _, ok := list[name]; !ok {
			at, list = specPath.Child("resources", "limits"), spec.Resources.Limits
		}
		have, ok := list[name]
		if !ok {
			continue
		}
		if need := totalRequest(spec, d, opts, name); have.Cmp(need) < 0 {
			p.list = append(p.list, field.Invalid(at.Key(string(name)), have.String(), fmt.Sprintf(
				"with the enclave the containers of this pod request %s: set at least that, or give the enclave less", need.String())))
		}
	}
}

// totalRequest returns what all containers of the pod will request together: init containers run one after
// another, beside the native sidecars before them.
func totalRequest(spec *corev1.PodSpec, d *decision, opts Options, name corev1.ResourceName) resource.Quantity {
	boot := bootResources(spec, d, opts)
	// In the order of the pod: ours come first.
	sidecars := boot.Requests[name].DeepCopy()
	sidecars.Add(sidecarResources(spec).Requests[name])
	var most resource.Quantity
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		r := request(c.Resources, name)
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			sidecars.Add(r)
			r = resource.Quantity{}
		}
		r.Add(sidecars)
		if r.Cmp(most) > 0 {
			most = r
		}
	}
	total := sidecars
	for i := range spec.Containers {
		if i == d.index {
			total.Add(consoleResources(spec).Requests[name])
		} else {
			total.Add(request(spec.Containers[i].Resources, name))
		}
	}
	if most.Cmp(total) > 0 {
		total = most
	}
	return total
}

// request returns a container's request, which is its limit where it names none.
func request(r corev1.ResourceRequirements, name corev1.ResourceName) resource.Quantity {
	if q, ok := r.Requests[name]; ok {
		return q.DeepCopy()
	}
	return r.Limits[name].DeepCopy()
}
