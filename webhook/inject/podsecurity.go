package inject

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// EnforceLabel is the label of a namespace that names the level which Pod Security enforces in it.
const EnforceLabel = "pod-security.kubernetes.io/enforce"

// Levels of the Pod Security Standards, from the strictest
// (https://kubernetes.io/docs/concepts/security/pod-security-standards/).
const (
	levelRestricted = "restricted"
	levelBaseline   = "baseline"
	levelPrivileged = "privileged"
)

var levels = []string{levelRestricted, levelBaseline, levelPrivileged}

// TooStrict tells whether Pod Security, enforcing a level, refuses what an installation injects, and returns the
// strictest level that admits it. What is no level refuses nothing.
func TooStrict(opts Options, enforced string) (strictest string, refused bool) {
	strictest, _ = level(opts, false)
	return strictest, stricter(enforced, strictest)
}

// stricter tells whether a level is stricter than another. What is no level is not: the API server lets nobody
// write it.
func stricter(enforced, than string) bool {
	i := slices.Index(levels, enforced)
	return i >= 0 && i < slices.Index(levels, than)
}

// level is the strictest level that what is injected passes, and why it is no stricter one. The author's own
// containers may need a laxer one.
func level(opts Options, consoleIsRoot bool) (level, why string) {
	switch {
	case opts.Driver == DriverProcess:
		return levelPrivileged, "driver process makes its enclaves of namespaces"
	case opts.DeviceGroup == 0:
		return levelBaseline, "root alone may open the enclaves' device unless the installation names a DEVICE_GROUP"
	case consoleIsRoot:
		return levelBaseline, "the console must be root to read files that only root may read, unless the pod has an fsGroup"
	}
	return levelRestricted, ""
}

// checkLevel refuses a pod that Pod Security would refuse after the injection, in words about containers
// that its author has not written.
func checkLevel(opts Options, consoleIsRoot bool) field.ErrorList {
	need, why := level(opts, consoleIsRoot)
	if !stricter(opts.Enforced, need) {
		return nil
	}
	return field.ErrorList{field.Forbidden(field.NewPath("metadata", "namespace"), fmt.Sprintf(
		"it enforces Pod Security %s and what is injected needs %s, since %s: label the namespace %s=%s or create the pod in another",
		opts.Enforced, need, why, EnforceLabel, need))}
}

// isRoot tells whether an injected console is root.
func isRoot(console *corev1.Container) bool {
	sc := console.SecurityContext
	return sc != nil && sc.RunAsUser != nil && *sc.RunAsUser == 0
}

// levelWarnings say what the driver is, and what is asked of the namespace where it does not say what it
// enforces.
func levelWarnings(opts Options, consoleIsRoot bool) []string {
	need, _ := level(opts, consoleIsRoot)
	known := slices.Contains(levels, opts.Enforced) || need == levelRestricted
	const development = "driver process: development only, not an isolation boundary"
	switch {
	case opts.Driver == DriverProcess && known:
		return []string{development}
	case opts.Driver == DriverProcess:
		return []string{development + "; the namespace must be Pod Security " + need}
	case !known:
		return []string{"the namespace must not be stricter than Pod Security " + need}
	}
	return nil
}
