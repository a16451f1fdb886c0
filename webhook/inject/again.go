package inject

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// again judges a pod that carries our containers: after another webhook ran, or made offline. No
// annotation is believed; what the manifest in it renders to must be there, whole. Others may have added
// to our containers and changed the console's probes and resources: that stays with them, and never
// reaches the enclave. A lost or altered part of ours is denied.
func again(meta *metav1.ObjectMeta, spec *corev1.PodSpec, opts Options) ([]Op, field.ErrorList) {
	p := &problems{}
	values, errs := annotation.Read(meta.Annotations, annotationsPath)
	p.list = errs
	p.checkPod(meta, spec)

	inits := initContainersPath
	boot, side := one(spec.InitContainers, Initboot), one(spec.InitContainers, Sidecar)
	if boot < 0 || side < 0 || boot > side {
		p.forbid(inits, fmt.Sprintf("the pod carries a part of what is injected: there must be %s once and then %s once, or neither", Initboot, Sidecar))
		return nil, p.list
	}
	for _, l := range containerLists(spec) {
		for i, c := range l.containers {
			if isReserved(c.Name) && c.Name != Initboot && c.Name != Sidecar {
				p.forbid(l.path.Index(i).Child("name"), reservedName)
			}
		}
	}

	m, canonical, image, memory := p.readBack(inits.Index(boot), &spec.InitContainers[boot])
	index := -1
	if values.Enclave != "" {
		index = p.find(spec, values.Enclave)
	}
	if m == nil || index < 0 {
		return nil, p.list
	}
	pluginImages := p.readPluginImages(inits.Index(boot), &spec.InitContainers[boot], m)
	var cpus int64
	if opts.Driver == DriverNitro {
		cpus = p.readCPUs(inits.Index(boot), &spec.InitContainers[boot], m)
	}
	eif := injectedEIF(spec)
	p.compare(inits.Index(boot), &spec.InitContainers[boot], initboot(opts, m, canonical, image, eif, pluginImages, memory, cpus))
	p.compare(inits.Index(side), &spec.InitContainers[side], sidecar(opts, m))

	c, cp := &spec.Containers[index], containersPath.Index(index)
	console := corev1.Container{
		Image: opts.InitbootImage, Command: consoleCommand(spec, c), Env: consoleMounts(m), VolumeMounts: append([]corev1.VolumeMount{mountRun}, noToken(m)...),
	}
	var ops []Op
	if isConsoleCommand(c.Command) && !slices.Equal(c.Command, console.Command) {
		// Another webhook changed a grace period after us.
		ops = append(ops, Op{Op: "replace", Path: fmt.Sprintf("/spec/containers/%d/command", index), Value: console.Command})
		console.Command = c.Command
	}
	p.compare(cp, p.compareHost(cp, c, m), console)
	p.compareVolumes(spec, c, eif)
	ops = append(ops, p.pullSecretsAgain(spec, boot)...)
	p.list = append(p.list, checkLevel(opts, isRoot(c))...)
	if len(errs) == 0 {
		p.compareConfig(values.Config, spec, c, m, eif, memory, cpus)
	}
	if want := measurements(canonical); values.Measurements != want {
		p.forbid(annotationsPath.Key(annotation.Measurements), "it is not what the injected manifest measures to")
	}
	if low := lowestPort(m); low < 1024 {
		p.checkPortStart(spec, low)
		if !hasPortStart(spec) {
			p.forbid(specPath.Child("securityContext", "sysctls"), fmt.Sprintf("%s, which was injected, is gone", unprivilegedPorts))
		}
	}
	if len(p.list) > 0 {
		return nil, p.list
	}
	return ops, nil
}

// one returns the index of the only container of this name, else -1.
func one(list []corev1.Container, name string) int {
	found := -1
	for i, c := range list {
		if c.Name != name {
			continue
		}
		if found >= 0 {
			return -1
		}
		found = i
	}
	return found
}

// readBack reads what initboot's environment says. The manifest is nil when it cannot be used.
func (p *problems) readBack(path *field.Path, c *corev1.Container) (m *workload.Manifest, canonical []byte, image string, memory int64) {
	value := func(name string) string {
		for _, e := range c.Env {
			if e.Name == name && e.ValueFrom == nil {
				return unescape(e.Value)
			}
		}
		p.forbid(path.Child("env"), name+", which was injected, is gone")
		return ""
	}
	text, image, number := value(podenv.EnvManifest), value(podenv.EnvImage), value(podenv.EnvMemory)
	if len(p.list) > 0 {
		return nil, nil, "", 0
	}
	canonical = []byte(text)
	m, err := workload.Parse(canonical)
	if err != nil {
		p.forbid(path.Child("env").Key(podenv.EnvManifest), err.Error())
		return nil, nil, "", 0
	}
	if config.Digest(image) != m.Image.Digest {
		p.forbid(path.Child("env").Key(podenv.EnvImage), "it does not name the image of the workload manifest")
	}
	memory, err = strconv.ParseInt(number, 10, 64)
	if err != nil || memory < 1 || memory > config.MaxMemory {
		p.forbid(path.Child("env").Key(podenv.EnvMemory), "it is not a number of bytes")
	}
	return m, canonical, image, memory
}

// compare reports what of want is missing or different in have, and variables of ours that somebody added.
func (p *problems) compare(path *field.Path, have *corev1.Container, want corev1.Container) {
	if have.Image != want.Image {
		p.forbid(path.Child("image"), fmt.Sprintf("this installation injects %s", want.Image))
	}
	if !slices.Equal(have.Command, want.Command) || len(have.Args) > 0 {
		p.forbid(path.Child("command"), fmt.Sprintf("it is not what is injected, %q without args", want.Command))
	}
	for i, e := range have.Env {
		if !strings.HasPrefix(e.Name, podenv.EnvPrefix) {
			continue
		}
		// More than one of a name would let the last one win.
		j := slices.IndexFunc(want.Env, func(w corev1.EnvVar) bool { return w.Name == e.Name })
		first := slices.IndexFunc(have.Env, func(h corev1.EnvVar) bool { return h.Name == e.Name })
		if j < 0 || first != i || !reflect.DeepEqual(e, want.Env[j]) {
			p.forbid(path.Child("env").Index(i), e.Name+" is not what is injected: variables that begin with CLOISTER_ are kept for it")
		}
	}
	for i := range have.EnvFrom {
		p.forbid(path.Child("envFrom").Index(i), "it could set variables that begin with CLOISTER_, which are kept for what is injected: add variables one by one")
	}
	for _, w := range want.Env {
		if !slices.ContainsFunc(have.Env, func(h corev1.EnvVar) bool { return h.Name == w.Name }) {
			p.forbid(path.Child("env"), w.Name+", which was injected, is gone")
		}
	}
	for _, w := range want.VolumeMounts {
		if !slices.ContainsFunc(have.VolumeMounts, func(h corev1.VolumeMount) bool {
			return h.Name == w.Name && h.MountPath == w.MountPath && h.ReadOnly == w.ReadOnly && h.SubPath == "" && h.SubPathExpr == ""
		}) {
			p.forbid(path.Child("volumeMounts"), fmt.Sprintf("the mount of %s at %s, which was injected, is gone", w.Name, w.MountPath))
		}
	}
	if want.RestartPolicy == nil {
		return // the console
	}
	if have.RestartPolicy == nil || *have.RestartPolicy != *want.RestartPolicy {
		p.forbid(path.Child("restartPolicy"), "it must be Always, as it was injected")
	}
	if have.StartupProbe == nil || have.StartupProbe.Exec == nil || !slices.Equal(have.StartupProbe.Exec.Command, want.StartupProbe.Exec.Command) {
		p.forbid(path.Child("startupProbe"), "it is not what is injected: the pod would start before its enclave")
	}
}

// compareVolumes reports volumes of ours that are missing or different, and containers of others that
// mount them.
func (p *problems) compareVolumes(spec *corev1.PodSpec, console *corev1.Container, eif string) {
	for _, want := range volumesOf(eif) {
		have := volume(spec, want.Name)
		if have == nil {
			p.forbid(specPath.Child("volumes"), fmt.Sprintf("volume %s, which was injected, is gone", want.Name))
			continue
		}
		got := have.DeepCopy()
		switch {
		case got.EmptyDir != nil && want.EmptyDir != nil:
			got.EmptyDir.SizeLimit = want.EmptyDir.SizeLimit // how much is a matter of resources
		case got.DownwardAPI != nil && want.DownwardAPI != nil:
			got.DownwardAPI.DefaultMode = nil // set by the API server
			for _, f := range got.DownwardAPI.Items {
				if f.FieldRef != nil {
					f.FieldRef.APIVersion = ""
				}
			}
		}
		if !reflect.DeepEqual(got, want) {
			p.forbid(specPath.Child("volumes"), fmt.Sprintf("volume %s is not what is injected", want.Name))
		}
	}
	for _, l := range containerLists(spec) {
		for i := range l.containers {
			c := &l.containers[i]
			if c == console || isReserved(c.Name) {
				continue
			}
			for j, m := range c.VolumeMounts {
				if isReserved(m.Name) {
					p.forbid(l.path.Index(i).Child("volumeMounts").Index(j), fmt.Sprintf("volume %s is only for what is injected", m.Name))
				}
			}
		}
	}
}

// compareConfig reports a config that was changed after the manifest was made from it.
func (p *problems) compareConfig(cfg *config.EnclaveConfig, spec *corev1.PodSpec, c *corev1.Container, m *workload.Manifest, eif string, memory, cpus int64) {
	at := annotationsPath.Key(annotation.Config)
	if cfg.Memory != 0 && cfg.Memory != memory {
		p.forbid(at.Child("memory"), "it is not what was injected")
	}
	if cpus != 0 && cfg.CPUs != 0 && fullCores(m, cfg.CPUs) != cpus {
		p.forbid(at.Child("cpus"), "it is not what was injected")
	}
	if cfg.EIF != eif {
		p.forbid(at.Child("eif"), "it is not what was injected")
	}
	if !slices.Equal(cfg.Egress, m.Egress) {
		p.forbid(at.Child("egress"), "it is not what was injected")
	}
	if cfg.Logs != m.Logs {
		p.forbid(at.Child("logs"), "it is not what was injected")
	}
	p.comparePlugins(at, cfg, m)
	p.compareKMS(at, cfg, m)
	p.compareHostConfig(at, cfg, m, spec, c)
	for _, port := range m.Ports {
		if served(cfg, port.Name, port.Port) != port {
			p.forbid(at.Child("ports"), fmt.Sprintf("what it says about port %d is not what was injected", port.Port))
		}
	}
}
