package inject

import (
	"path"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

// subPath returns the directory of its volume that a mount shows, clean, or nothing for its root.
func (p *problems) subPath(at *field.Path, m *corev1.VolumeMount) string {
	if m.SubPath == "" {
		return ""
	}
	sub := path.Clean(m.SubPath)
	if path.IsAbs(sub) || sub == ".." || strings.HasPrefix(sub, "../") {
		p.list = append(p.list, field.Invalid(at.Child("subPath"), m.SubPath, "write a relative path inside the volume"))
		return ""
	}
	if sub == "." {
		return ""
	}
	return sub
}

// numberVolumes gives mounts that show one volume, whose name is no part of the manifest, the same number.
// A directory of a volume that nobody else shows is as good as the whole. Names are by path. What the host
// supplies has no number: each mount is supplied by itself.
func numberVolumes(mounts []workload.Mount, names map[string]string) {
	shown := map[string]int{}
	for _, m := range mounts {
		shown[names[m.Path]]++
	}
	numbers := map[string]int{}
	for i := range mounts {
		m := &mounts[i]
		if m.Kind == workload.MountHost {
			continue
		}
		name := names[m.Path]
		if shown[name] < 2 {
			m.SubPath = ""
			continue
		}
		if numbers[name] == 0 {
			numbers[name] = len(numbers) + 1
		}
		m.Volume = numbers[name]
	}
}
