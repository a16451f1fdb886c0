package inject

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/annotation"
)

// decode reads JSON as the API server does: field names are case-sensitive.
func decode(data []byte, into any) error { return utiljson.Unmarshal(data, into) }

// named is what has a name.
type named struct {
	Name string `json:"name"`
}

// Patch decides about one pod, as JSON without duplicate keys. It returns no operations for a pod without
// annotations under our prefix that was not injected either, and for one that is injected already; the
// operations that inject it; or every reason why it is denied. Warnings are for the author of the pod.
// Fields that this version's k8s.io/api does not know survive.
func Patch(pod []byte, opts Options) (ops []Op, warnings []string, errs field.ErrorList) {
	var head struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec struct {
			InitContainers []struct {
				Name string  `json:"name"`
				Env  []named `json:"env"`
			} `json:"initContainers"`
		} `json:"spec"`
	}
	if err := decode(pod, &head); err != nil {
		return nil, nil, undecodable(err)
	}
	if !annotation.Any(head.Metadata.Annotations) {
		for _, c := range head.Spec.InitContainers {
			if c.Name == Initboot && slices.ContainsFunc(c.Env, func(e named) bool { return e.Name == podenv.EnvManifest }) {
				// Another webhook took them away. It could have taken the console too.
				return nil, nil, field.ErrorList{field.Required(annotationsPath.Key(annotation.Enclave), "the pod was injected and its annotations are gone")}
			}
		}
		return nil, nil, nil
	}
	var typed struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
		Spec     corev1.PodSpec    `json:"spec"`
	}
	if err := decode(pod, &typed); err != nil {
		return nil, nil, undecodable(err)
	}
	meta, spec := &typed.Metadata, &typed.Spec
	if injected(spec) {
		ops, errs := again(meta, spec, opts)
		return ops, nil, errs
	}

	var raw struct {
		Spec struct {
			Volumes    []map[string]json.RawMessage `json:"volumes"`
			Containers []json.RawMessage            `json:"containers"`
		} `json:"spec"`
	}
	if err := decode(pod, &raw); err != nil {
		return nil, nil, undecodable(err)
	}
	d, errs := decide(meta, spec, opts)
	errs = append(errs, unknownVolumes(spec, raw.Spec.Volumes, meta.Annotations[annotation.Enclave])...)
	for i, c := range spec.Containers {
		if c.Name == meta.Annotations[annotation.Enclave] {
			errs = append(errs, unknownActions(raw.Spec.Containers[i], specPath.Child("containers").Index(i))...)
		}
	}
	asRoot := false
	if d != nil {
		asRoot = rootConsole(spec, &spec.Containers[d.index], d.manifest)
	}
	errs = append(errs, checkLevel(opts, asRoot)...)
	if len(errs) > 0 {
		return nil, nil, errs
	}
	measured := measurements(d.canonical)
	if v, ok := meta.Annotations[annotation.Measurements]; ok && v != measured {
		return nil, nil, field.ErrorList{field.Forbidden(annotationsPath.Key(annotation.Measurements), "it is written by the webhook and is not what this pod measures to: remove it")}
	}
	console, err := consoleOps(raw.Spec.Containers[d.index], spec, d, opts)
	if err != nil {
		return nil, nil, undecodable(err)
	}

	ops = append(ops, add(MeasurementsPath, measured))
	ops = append(ops, volumeOps(spec)...)
	ops = append(ops, initOps(spec, d, opts)...)
	if lowestPort(d.manifest) < 1024 && !hasPortStart(spec) {
		ops = append(ops, sysctlOp(spec))
	}
	ops = append(ops, console...)
	warnings = append(levelWarnings(opts, asRoot), d.warnings...)
	return ops, warnings, nil
}

func undecodable(err error) field.ErrorList {
	return field.ErrorList{field.Invalid(field.NewPath("pod"), field.OmitValueType{}, fmt.Sprintf("it cannot be decoded: %v", err))}
}

func add(path string, value any) Op { return Op{Op: "add", Path: path, Value: value} }

// MeasurementsPath is where a patch writes what the pod measures to.
var MeasurementsPath = "/metadata/annotations/" + pointer(annotation.Measurements)

// pointer escapes one segment of a JSON pointer (RFC 6901).
func pointer(segment string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(segment)
}

func volumeOps(spec *corev1.PodSpec) []Op {
	ours := volumes()
	if v := pullSecrets(spec); v != nil {
		ours = append(ours, *v)
	}
	if len(spec.Volumes) == 0 {
		return []Op{add("/spec/volumes", ours)}
	}
	ops := make([]Op, len(ours))
	for i, v := range ours {
		ops[i] = add("/spec/volumes/-", v)
	}
	return ops
}

func initOps(spec *corev1.PodSpec, d *decision, opts Options) []Op {
	boot := initboot(opts, d.manifest, d.canonical, d.image, d.pluginImages, d.memory, d.cpus)
	if pullSecrets(spec) != nil {
		boot.VolumeMounts = append(boot.VolumeMounts, mountPullSecrets)
	}
	boot.Resources = bootResources(spec, d, opts)
	side := sidecar(opts, d.manifest)
	if d.manifest.KMS != nil {
		addIdentity(&side, &spec.Containers[d.index])
	}
	side.Resources = sidecarResources(spec)
	if len(spec.InitContainers) == 0 {
		return []Op{add("/spec/initContainers", []corev1.Container{boot, side})}
	}
	return []Op{add("/spec/initContainers/0", boot), add("/spec/initContainers/1", side)}
}

func sysctlOp(spec *corev1.PodSpec) Op {
	sysctl := corev1.Sysctl{Name: unprivilegedPorts, Value: "0"}
	sc := spec.SecurityContext
	if sc == nil {
		return add("/spec/securityContext", corev1.PodSecurityContext{Sysctls: []corev1.Sysctl{sysctl}})
	}
	// checkPod lets no other sysctl pass, so there is no list to append to.
	return add("/spec/securityContext/sysctls", []corev1.Sysctl{sysctl})
}

// consoleOps turns the named container into the console, field by field: what is not named here stays,
// known to this version or not.
func consoleOps(raw json.RawMessage, spec *corev1.PodSpec, d *decision, opts Options) ([]Op, error) {
	c := &spec.Containers[d.index]
	var have map[string]json.RawMessage
	var lists struct {
		Env          []json.RawMessage `json:"env"`
		EnvFrom      []json.RawMessage `json:"envFrom"`
		VolumeMounts []json.RawMessage `json:"volumeMounts"`
	}
	if err := decode(raw, &have); err != nil {
		return nil, err
	}
	if err := decode(raw, &lists); err != nil {
		return nil, err
	}
	base := fmt.Sprintf("/spec/containers/%d/", d.index)
	ops := []Op{
		add(base+"image", opts.InitbootImage),
		add(base+"imagePullPolicy", corev1.PullIfNotPresent),
		add(base+"command", consoleCommand(spec, c)),
	}
	remove := func(name string) {
		if _, ok := have[name]; ok {
			ops = append(ops, Op{Op: "remove", Path: base + name})
		}
	}
	remove("args")
	remove("workingDir")
	remove("lifecycle") // it is the workload's
	if t := c.TerminationMessagePath; t != "" && t != corev1.TerminationMessagePathDefault {
		ops = append(ops, add(base+"terminationMessagePath", corev1.TerminationMessagePathDefault))
	}

	env, from, err := consoleEnv(c, lists.Env, lists.EnvFrom, d)
	if err != nil {
		return nil, err
	}
	for _, l := range []struct {
		name string
		list []any
	}{{"env", env}, {"envFrom", from}} {
		if len(l.list) > 0 {
			ops = append(ops, add(base+l.name, l.list))
		} else {
			remove(l.name)
		}
	}
	mounts := []any{mountRun}
	for _, m := range noToken(d.manifest) {
		mounts = append(mounts, m)
	}
	for i := range c.VolumeMounts {
		if m := &c.VolumeMounts[i]; cloudMount(m.MountPath) || isHostMount(d.manifest, m) {
			mounts = append(mounts, lists.VolumeMounts[i])
		}
	}
	ops = append(ops, add(base+"volumeMounts", mounts))

	limits, err := merge(have["resources"], consoleResources(spec))
	if err != nil {
		return nil, err
	}
	// The author's limits were the workload's. Only those of ephemeral storage stay, for the logs.
	if l, ok := limits["limits"].(map[string]any); ok && !guaranteed(spec) {
		delete(l, string(corev1.ResourceCPU))
	}
	context := confined()
	if rootConsole(spec, c, d.manifest) {
		root, no := int64(0), false
		context.RunAsUser, context.RunAsGroup, context.RunAsNonRoot = &root, &root, &no
	}
	security, err := merge(have["securityContext"], context)
	if err != nil {
		return nil, err
	}
	if capabilities, ok := security["capabilities"].(map[string]any); ok {
		delete(capabilities, "add")
	}
	ops = append(ops,
		add(base+"resources", limits),
		add(base+"securityContext", security),
		add(base+"startupProbe", consoleStartup(c.StartupProbe)),
	)
	if c.LivenessProbe != nil {
		ops = append(ops, add(base+"livenessProbe", consoleProbe("liveness", c.LivenessProbe)))
	}
	if c.ReadinessProbe != nil {
		ops = append(ops, add(base+"readinessProbe", consoleProbe("readiness", c.ReadinessProbe)))
	}
	return ops, nil
}

// merge writes ours over a JSON object that may be absent: objects are merged, everything else replaced.
func merge(raw json.RawMessage, ours any) (map[string]any, error) {
	out := map[string]any{}
	if len(raw) > 0 {
		if err := decode(raw, &out); err != nil {
			return nil, err
		}
	}
	if out == nil { // null
		out = map[string]any{}
	}
	data, err := json.Marshal(ours)
	if err != nil {
		return nil, err
	}
	var over map[string]any
	if err := decode(data, &over); err != nil {
		return nil, err
	}
	overlay(out, over)
	return out, nil
}

func overlay(base, over map[string]any) {
	for k, v := range over {
		if o, ok := v.(map[string]any); ok {
			if b, ok := base[k].(map[string]any); ok && b != nil {
				overlay(b, o)
				continue
			}
		}
		base[k] = v
	}
}

// unknownVolumes refuses to mount a volume whose source this version does not know into the container
// called name: without its source it would look like an emptyDir.
func unknownVolumes(spec *corev1.PodSpec, raw []map[string]json.RawMessage, name string) field.ErrorList {
	p := &problems{}
	for i, c := range spec.Containers {
		if c.Name != name {
			continue
		}
		for j, m := range c.VolumeMounts {
			k := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
			if k >= 0 && spec.Volumes[k].VolumeSource == (corev1.VolumeSource{}) && len(raw[k]) > 1 {
				p.forbid(specPath.Child("containers").Index(i).Child("volumeMounts").Index(j),
					fmt.Sprintf("volume %s is of a kind that this version does not know: only an emptyDir of its own can be mounted into an enclave", m.Name))
			}
		}
	}
	return p.list
}

// injected tells whether one of our containers is there.
func injected(spec *corev1.PodSpec) bool {
	for _, l := range containerLists(spec) {
		if slices.ContainsFunc(l.containers, func(c corev1.Container) bool { return c.Name == Initboot || c.Name == Sidecar }) {
			return true
		}
	}
	return false
}
