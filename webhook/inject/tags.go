package inject

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// Resolver returns an image reference without digest with the digest that it has now, NAME[:TAG]@DIGEST;
// its error is a sentence for the author of the pod.
type Resolver func(ctx context.Context, image string) (pinned string, err error)

// DeriveTagged is Derive for a pod whose container in the enclave may be named by tag, as in PatchTagged.
func DeriveTagged(ctx context.Context, meta *metav1.ObjectMeta, spec *corev1.PodSpec, resolve Resolver) (m *workload.Manifest, image string, warnings []string, errs field.ErrorList) {
	if errs := tooMany(meta, spec); len(errs) > 0 {
		return nil, "", nil, errs
	}
	d, errs := decide(ctx, meta, spec, Options{}, resolve)
	if len(errs) > 0 {
		return nil, "", nil, errs
	}
	return d.manifest, d.image, d.warnings, nil
}

// Tagged returns the index in spec.containers of the container that runs in an enclave, or less than 0, and
// whether its image has a tag, or neither tag nor digest.
func Tagged(meta *metav1.ObjectMeta, spec *corev1.PodSpec) (int, bool) {
	name := meta.Annotations[annotation.Enclave]
	if name == "" {
		return -1, false
	}
	i := slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == name })
	return i, i >= 0 && isTag(spec.Containers[i].Image)
}

// HasDigest tells whether an image is named NAME[:TAG]@sha256:… in full.
func HasDigest(image string) bool { return config.Digest(image) != "" }

func isTag(image string) bool { return image != "" && !strings.ContainsAny(image, "@ \t\r\n") }

// digest returns an image reference with a digest, and the digest.
func (p *problems) digest(ctx context.Context, path *field.Path, image string, never bool, resolve Resolver) (pinned, digest string) {
	pinned = image
	const how = "name it by digest, as in registry/name@sha256:…"
	switch {
	case !isTag(image):
	case never:
		p.list = append(p.list, field.Invalid(path, image, "pin: never takes no tag: "+how+", which `cloister pin -f FILE` does"))
		return image, ""
	case resolve == nil:
		p.list = append(p.list, field.Invalid(path, image, "the enclave must know which image it runs: "+how+", which `cloister pin -f FILE` does"))
		return image, ""
	default:
		var err error
		if pinned, err = resolve(ctx, image); err != nil {
			p.list = append(p.list, field.Invalid(path, image, err.Error()))
			return image, ""
		}
	}
	if digest = config.Digest(pinned); digest == "" {
		p.list = append(p.list, field.Invalid(path, image, "the enclave must know which image it runs: "+how))
		return image, ""
	}
	return pinned, digest
}

// tagWarning says what somebody who measures the same file later must know.
func tagWarning(container, pinned string) string {
	_, digest, _ := strings.Cut(pinned, "@")
	return fmt.Sprintf("the tag of %s is %.19s… now and may be another later: cloister pin -f FILE", shorten(container), digest)
}
