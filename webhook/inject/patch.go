package inject

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/annotation"
)

// Patch decides about one pod, as JSON without duplicate keys. It returns no operations for a pod without
// annotations under our prefix that was not injected either, and for one that is injected already; the
// operations that inject it; or every reason why it is denied. Warnings are for the author of the pod.
// Fields that this version's k8s.io/api does not know survive.
func Patch(pod []byte, opts Options) (ops []Op, warnings []string, errs field.ErrorList) {
	return PatchTagged(context.Background(), pod, opts, nil)
}

// PatchTagged is Patch for a pod whose container in the enclave may be named by tag: resolve, if it is not
// nil, is asked for the digest first, and the decision is that about the pod with the digest.
func PatchTagged(ctx context.Context, pod []byte, opts Options, resolve Resolver) (ops []Op, warnings []string, errs field.ErrorList) {
	if bytes.HasPrefix(pod, []byte("{")) && !mentionsUs(pod) {
		return nil, nil, nil
	}
	meta, spec, raw, unknown, err := decodePod(pod)
	if err != nil {
		return nil, nil, undecodable(err)
	}
	if !annotation.Any(meta.Annotations) {
		if HasManifest(spec) {
			// Another webhook took them away. It could have taken the console too.
			return nil, nil, field.ErrorList{field.Required(annotationsPath.Key(annotation.Enclave), "the pod was injected and its annotations are gone")}
		}
		return nil, nil, nil
	}
	if errs := tooMany(meta, spec); len(errs) > 0 {
		return nil, nil, errs
	}
	if injected(spec) {
		ops, errs := again(meta, spec, opts)
		return ops, nil, errs
	}

	d, errs := decide(ctx, meta, spec, opts, resolve)
	i := -1
	if name := meta.Annotations[annotation.Enclave]; name != "" {
		i = slices.IndexFunc(spec.Containers, func(c corev1.Container) bool { return c.Name == name })
	}
	var console container
	if i >= 0 {
		if len(unknown[i]) > 0 || spec.Containers[i].SecurityContext != nil {
			if err := decode(raw[i], &console); err != nil {
				return nil, nil, undecodable(err)
			}
		}
		errs = append(errs, unknownVolumes(pod, spec, i)...)
		if len(unknown[i]) > 0 {
			known, err := unknownActions(raw[i], containersPath.Index(i))
			if err != nil {
				return nil, nil, undecodable(err)
			}
			errs = append(errs, known...)
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

	ops = make([]Op, 0, 32)
	ops = append(ops, add(MeasurementsPath, measured))
	ops = volumeOps(ops, spec, d.config.EIF)
	ops = initOps(ops, spec, d, opts)
	if lowestPort(d.manifest) < 1024 && !hasPortStart(spec) {
		ops = append(ops, sysctlOp(spec))
	}
	ops, err = consoleOps(ops, &console, spec, d, opts)
	if err != nil {
		return nil, nil, undecodable(err)
	}
	return ops, append(levelWarnings(opts, asRoot), d.warnings...), nil
}

func undecodable(err error) field.ErrorList {
	return field.ErrorList{field.Invalid(field.NewPath("pod"), field.OmitValueType{}, fmt.Sprintf("it cannot be decoded: %v", err))}
}

func add(path string, value any) Op { return Op{Op: "add", Path: path, Value: value} }

// MeasurementsPath is where a patch writes what the pod measures to.
var MeasurementsPath = "/metadata/annotations/" + strings.ReplaceAll(annotation.Measurements, "/", "~1")

func volumeOps(ops []Op, spec *corev1.PodSpec, eif string) []Op {
	ours := volumesOf(eif)
	if v := pullSecrets(spec); v != nil {
		ours = append(slices.Clone(ours), v)
	}
	if len(spec.Volumes) == 0 {
		return append(ops, add("/spec/volumes", ours))
	}
	for _, v := range ours {
		ops = append(ops, add("/spec/volumes/-", v))
	}
	return ops
}

func initOps(ops []Op, spec *corev1.PodSpec, d *decision, opts Options) []Op {
	boot := initboot(opts, d.manifest, d.canonical, d.image, d.config.EIF, d.pluginImages, d.memory, d.cpus)
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
		return append(ops, add("/spec/initContainers", []*corev1.Container{&boot, &side}))
	}
	return append(ops, add("/spec/initContainers/0", &boot), add("/spec/initContainers/1", &side))
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
func consoleOps(ops []Op, raw *container, spec *corev1.PodSpec, d *decision, opts Options) ([]Op, error) {
	c := &spec.Containers[d.index]
	base := "/spec/containers/" + strconv.Itoa(d.index) + "/"
	ops = append(ops,
		add(base+"image", &opts.InitbootImage),
		add(base+"imagePullPolicy", corev1.PullIfNotPresent),
		add(base+"command", consoleCommand(spec, c)),
	)
	remove := func(name string, there bool) {
		if there {
			ops = append(ops, Op{Op: "remove", Path: base + name})
		}
	}
	remove("args", len(c.Args) > 0)
	remove("workingDir", c.WorkingDir != "")
	remove("lifecycle", c.Lifecycle != nil) // it is the workload's
	if t := c.TerminationMessagePath; t != "" && t != corev1.TerminationMessagePathDefault {
		ops = append(ops, add(base+"terminationMessagePath", corev1.TerminationMessagePathDefault))
	}

	env, from, err := consoleEnv(c, raw, d)
	if err != nil {
		return nil, err
	}
	for _, l := range []struct {
		name string
		list []any
		have bool
	}{{"env", env, len(c.Env) > 0}, {"envFrom", from, len(c.EnvFrom) > 0}} {
		if len(l.list) > 0 {
			ops = append(ops, add(base+l.name, l.list))
		} else {
			remove(l.name, l.have)
		}
	}
	mounts := append(make([]any, 0, 8), &mountRun)
	for _, m := range noToken(d.manifest) {
		mounts = append(mounts, m)
	}
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		switch {
		case !cloudMount(m.MountPath) && !isHostMount(d.manifest, m):
		case raw.VolumeMounts != nil:
			mounts = append(mounts, raw.VolumeMounts[i])
		default:
			mounts = append(mounts, m)
		}
	}
	ops = append(ops, add(base+"volumeMounts", mounts))

	ops = resourceOps(ops, base+"resources", raw.Resources, c.Resources, consoleResources(spec))
	// The author's limits were the workload's. Only those of ephemeral storage stay, for the logs.
	if _, ok := c.Resources.Limits[corev1.ResourceCPU]; ok && !guaranteed(spec) {
		ops = append(ops, Op{Op: "remove", Path: base + "resources/limits/cpu"})
	}
	security := confined()
	if rootConsole(spec, c, d.manifest) {
		security.RunAsUser, security.RunAsGroup, security.RunAsNonRoot = &root, &root, &no
	}
	if c.SecurityContext == nil {
		ops = append(ops, add(base+"securityContext", security))
	} else {
		merged, err := merge(raw.SecurityContext, security)
		if err != nil {
			return nil, err
		}
		if capabilities, ok := merged["capabilities"].(map[string]any); ok {
			delete(capabilities, "add")
		}
		ops = append(ops, add(base+"securityContext", merged))
	}
	ops = append(ops, add(base+"startupProbe", consoleStartup(c.StartupProbe)))
	if c.LivenessProbe != nil {
		ops = append(ops, add(base+"livenessProbe", consoleProbe("liveness", c.LivenessProbe)))
	}
	if c.ReadinessProbe != nil {
		ops = append(ops, add(base+"readinessProbe", consoleProbe("readiness", c.ReadinessProbe)))
	}
	return ops, nil
}

// resourceOps writes ours over the resources of a container, amount by amount.
func resourceOps(ops []Op, path string, raw json.RawMessage, have, ours corev1.ResourceRequirements) []Op {
	if (len(raw) == 0 || string(raw) == "null") && have.Limits == nil && have.Requests == nil {
		return append(ops, add(path, &ours))
	}
	for _, l := range []struct {
		name       string
		have, ours corev1.ResourceList
	}{{"/limits", have.Limits, ours.Limits}, {"/requests", have.Requests, ours.Requests}} {
		if l.have == nil {
			ops = append(ops, add(path+l.name, l.ours))
			continue
		}
		for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
			if q, ok := l.ours[name]; ok {
				ops = append(ops, add(path+l.name+"/"+string(name), q))
			}
		}
	}
	return ops
}

// merge writes ours over a JSON object: objects are merged, everything else replaced.
func merge(raw json.RawMessage, ours any) (map[string]any, error) {
	var out, over map[string]any
	if err := decode(raw, &out); err != nil {
		return nil, err
	}
	data, err := json.Marshal(ours)
	if err != nil {
		return nil, err
	}
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

// unknownVolumes refuses to mount a volume whose source this version does not know into spec.containers[index]:
// without its source it would look like an emptyDir.
func unknownVolumes(pod []byte, spec *corev1.PodSpec, index int) field.ErrorList {
	p := &problems{}
	var raw struct {
		Spec struct {
			Volumes []map[string]json.RawMessage `json:"volumes"`
		} `json:"spec"`
	}
	for j, m := range spec.Containers[index].VolumeMounts {
		k := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.Name == m.Name })
		if k < 0 || spec.Volumes[k].VolumeSource != (corev1.VolumeSource{}) {
			continue
		}
		if raw.Spec.Volumes == nil {
			if err := decode(pod, &raw); err != nil {
				return undecodable(err)
			}
		}
		if len(raw.Spec.Volumes[k]) > 1 {
			p.forbid(containersPath.Index(index).Child("volumeMounts").Index(j),
				fmt.Sprintf("volume %s is of a kind that this version does not know: only an emptyDir of its own can be mounted into an enclave", m.Name))
		}
	}
	return p.list
}

// HasManifest tells whether a pod looks as after an injection: its initboot carries a workload manifest.
func HasManifest(spec *corev1.PodSpec) bool {
	return slices.ContainsFunc(spec.InitContainers, func(c corev1.Container) bool {
		return c.Name == Initboot && slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == podenv.EnvManifest })
	})
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
