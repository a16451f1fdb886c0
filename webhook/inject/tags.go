package inject

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/workload"
)

// Resolver returns an image reference without digest with the digest that it has now, NAME[:TAG]@DIGEST;
// its error is a sentence for the author of the pod.
type Resolver func(ctx context.Context, image string) (pinned string, err error)

// PatchTagged is Patch for a pod whose container in the enclave may be named by tag: resolve, if it is not
// nil, is asked for the digest first, and the decision is that about the pod with the digest.
func PatchTagged(ctx context.Context, pod []byte, opts Options, resolve Resolver) (ops []Op, warnings []string, errs field.ErrorList) {
	ops, warnings, errs = Patch(pod, opts)
	i, pinned, rest := resolve.pin(ctx, errs)
	if pinned == "" || len(rest) > 0 {
		return ops, warnings, rest
	}
	pod, name, err := withImage(pod, i, pinned)
	if err != nil {
		return nil, nil, undecodable(err)
	}
	ops, warnings, errs = Patch(pod, opts)
	return ops, append(warnings, tagWarning(name, pinned)), errs
}

// DeriveTagged is Derive in the same way.
func DeriveTagged(ctx context.Context, meta *metav1.ObjectMeta, spec *corev1.PodSpec, resolve Resolver) (m *workload.Manifest, image string, warnings []string, errs field.ErrorList) {
	m, image, warnings, errs = Derive(meta, spec)
	i, pinned, rest := resolve.pin(ctx, errs)
	if pinned == "" || len(rest) > 0 {
		return m, image, warnings, rest
	}
	spec = spec.DeepCopy()
	spec.Containers[i].Image = pinned
	m, image, warnings, errs = Derive(meta, spec)
	return m, image, append(warnings, tagWarning(spec.Containers[i].Name, pinned)), errs
}

// Tagged returns the index in spec.containers of the container that runs in an enclave, if its image has
// a tag, or neither tag nor digest.
func Tagged(meta *metav1.ObjectMeta, spec *corev1.PodSpec) (int, bool) {
	name := meta.Annotations[annotation.Enclave]
	if name == "" {
		return 0, false
	}
	i := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == name })
	return i, i >= 0 && isTag(spec.Containers[i].Image)
}

func isTag(image string) bool { return image != "" && !strings.ContainsAny(image, "@ \t\r\n") }

// originTag marks the error about an image that can be resolved.
const originTag = "tag"

// digest returns the digest that an image reference names.
func (p *problems) digest(path *field.Path, image string, never bool) string {
	if m := imageRE.FindStringSubmatch(image); m != nil {
		return m[1]
	}
	const how = "name it by digest, as in registry/name@sha256:…"
	switch {
	case !isTag(image):
		p.list = append(p.list, field.Invalid(path, image, "the enclave must know which image it runs: "+how))
	case never:
		p.list = append(p.list, field.Invalid(path, image, "pin: never takes no tag: "+how+", which `cloister pin -f FILE` does"))
	default:
		p.list = append(p.list, field.Invalid(path, image, "the enclave must know which image it runs: "+how+", which `cloister pin -f FILE` does").WithOrigin(originTag))
	}
	return ""
}

// pin resolves the image that errs complain of, if they do, and returns the index of its container and the
// other errors. Where it cannot be resolved, the error says why, and pinned is empty.
func (resolve Resolver) pin(ctx context.Context, errs field.ErrorList) (index int, pinned string, rest field.ErrorList) {
	i := slices.IndexFunc(errs, func(e *field.Error) bool { return e.Origin == originTag })
	if i < 0 || resolve == nil {
		return 0, "", errs
	}
	e := *errs[i]
	if _, err := fmt.Sscanf(e.Field, "spec.containers[%d].image", &index); err != nil {
		return 0, "", errs
	}
	pinned, err := resolve(ctx, e.BadValue.(string))
	rest = slices.Delete(slices.Clone(errs), i, i+1)
	if err != nil {
		e.Detail, e.Origin = err.Error(), ""
		return 0, "", slices.Insert(rest, i, &e)
	}
	return index, pinned, rest
}

// withImage returns the pod, which was decoded before, with another image of a container, and the
// container's name.
func withImage(pod []byte, index int, image string) (out []byte, name string, err error) {
	var object map[string]any
	if err := decode(pod, &object); err != nil {
		return nil, "", err
	}
	c := object["spec"].(map[string]any)["containers"].([]any)[index].(map[string]any)
	c["image"] = image
	out, err = json.Marshal(object)
	return out, c["name"].(string), err
}

// tagWarning says what somebody who measures the same file later must know.
func tagWarning(container, pinned string) string {
	_, digest, _ := strings.Cut(pinned, "@")
	return fmt.Sprintf("the tag of %s is %.19s… now and may be another later: cloister pin -f FILE", shorten(container), digest)
}
