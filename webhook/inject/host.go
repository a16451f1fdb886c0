package inject

import (
	"fmt"
	"maps"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// What the host supplies is resolved by the kubelet, with its own rules, in the console:
//
//	pod                    manifest                console
//	env, a value           env, the value          –
//	env, a valueFrom       env, the name           env, CLOISTER_env_<name> and the valueFrom
//	  resourceFieldRef     env, the name           env, CLOISTER_env_<name> and the value, made of what the author wrote
//	envFrom                envFrom: true           envFrom, with the prefix CLOISTER_from_<prefix>
//	mount of a ConfigMap … mounts, the path        the mount, at the same path, and CLOISTER_MOUNTS
//
// The names keep the workload's variables apart from what the console's own runtime reads, from the
// variables of services, and from ours.

// env fills in what the manifest says of variables.
func (p *problems) env(cp *field.Path, c *corev1.Container, cfg *config.EnclaveConfig, m *workload.Manifest) {
	m.HostEnv = cfg.HostEnv
	if len(c.Env) > 0 {
		m.Env = make([]workload.EnvVar, 0, len(c.Env))
	}
	for i, e := range c.Env {
		switch {
		case !isWorkloads(e, cfg):
		case e.ValueFrom == nil:
			m.Env = append(m.Env, workload.EnvVar{Name: e.Name, Value: e.Value})
		default:
			at := cp.Child("env").Index(i)
			p.valueFrom(at.Child("valueFrom"), e.ValueFrom)
			if err := m.CheckHostEnv(e.Name); err != nil {
				p.forbid(at, err.Error())
			}
			m.Env = append(m.Env, workload.EnvVar{Name: e.Name, Host: true})
		}
	}
	for i, e := range c.EnvFrom {
		if e.ConfigMapRef == nil && e.SecretRef == nil {
			p.forbid(cp.Child("envFrom").Index(i), "this version knows variables from a ConfigMap and from a Secret only: use one of them")
		}
		m.EnvFrom = true
	}
	supplied := map[string]bool{}
	for _, e := range m.Env {
		supplied[e.Name] = supplied[e.Name] || e.Host
	}
	for _, name := range cfg.HostEnv {
		if !m.EnvFrom && !supplied[name] {
			p.forbid(annotationsPath.Key(annotation.Config).Child("hostEnv").Key(name), fmt.Sprintf("container %s has neither envFrom nor a valueFrom for it: remove it", c.Name))
		}
	}
}

// isWorkloads tells whether a variable is the workload's, and not the cloud's identity.
func isWorkloads(e corev1.EnvVar, cfg *config.EnclaveConfig) bool {
	return !cloudEnv(e.Name) && (cfg.KMS == nil || !isCredential(e))
}

func (p *problems) valueFrom(at *field.Path, v *corev1.EnvVarSource) {
	switch {
	case v.FileKeyRef != nil:
		p.forbid(at.Child("fileKeyRef"), "a file of another container cannot become a variable of the enclave: use a ConfigMap or a Secret")
	case v.ConfigMapKeyRef == nil && v.SecretKeyRef == nil && v.FieldRef == nil && v.ResourceFieldRef == nil:
		p.forbid(at, "this version knows configMapKeyRef, secretKeyRef, fieldRef and resourceFieldRef only: use one of them")
	}
}

// resourceFields evaluates every resourceFieldRef about the container in the enclave, whose console has
// other resources, as the kubelet would (k8s.io/kubernetes/pkg/api/v1/resource): rounded up to the divisor.
// It returns the values by index in c.Env.
func (p *problems) resourceFields(cp *field.Path, c *corev1.Container, cfg *config.EnclaveConfig, memory int64) map[int]string {
	out := map[int]string{}
	for i, e := range c.Env {
		if e.ValueFrom == nil || e.ValueFrom.ResourceFieldRef == nil || !isWorkloads(e, cfg) {
			continue
		}
		ref := e.ValueFrom.ResourceFieldRef
		if ref.ContainerName != "" && ref.ContainerName != c.Name {
			continue
		}
		at := cp.Child("env").Index(i).Child("valueFrom", "resourceFieldRef")
		q, err := resourceField(ref.Resource, c, cfg, memory)
		if err != nil {
			p.forbid(at, err.Error())
			continue
		}
		if ref.Divisor.Sign() < 0 {
			p.list = append(p.list, field.Invalid(at.Child("divisor"), ref.Divisor.String(), "write a positive quantity"))
			continue
		}
		out[i] = divide(q, ref.Divisor, strings.HasSuffix(ref.Resource, ".cpu"))
	}
	return out
}

// divide rounds up; no divisor is one of 1.
func divide(q, divisor resource.Quantity, milli bool) string {
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	n, d := q.Value(), divisor.Value()
	if milli {
		n, d = q.MilliValue(), divisor.MilliValue()
	}
	return strconv.FormatInt(int64(math.Ceil(float64(n)/float64(d))), 10)
}

// resourceField returns what a container was written to have. In place of a limit that is not set the
// kubelet takes the node's; here it is the enclave's.
func resourceField(name string, c *corev1.Container, cfg *config.EnclaveConfig, memory int64) (resource.Quantity, error) {
	list, kind, _ := strings.Cut(name, ".")
	limit, limited := c.Resources.Limits[corev1.ResourceName(kind)]
	request, requested := c.Resources.Requests[corev1.ResourceName(kind)]
	switch kind {
	case "cpu", "memory", "ephemeral-storage":
	default:
		list = ""
	}
	switch {
	case list == "requests" && requested:
		return request, nil
	case list == "requests": // the API server fills a missing request in from the limit
		return limit, nil
	case list != "limits":
		return limit, fmt.Errorf("%s is not known: write limits or requests, and cpu, memory or ephemeral-storage", name)
	case limited:
		return limit, nil
	case kind == "memory":
		return *resource.NewQuantity(memory, resource.BinarySI), nil
	case kind == "cpu" && cfg.CPUs > 0:
		return *resource.NewQuantity(cfg.CPUs, resource.DecimalSI), nil
	}
	return limit, fmt.Errorf("container %s has no limit of %s, and the node's means nothing in an enclave: set the limit", c.Name, kind)
}

// consoleEnv is the environment of the console: what the cloud's identity webhook added, and under names of
// ours what the kubelet is to resolve for the workload. Fields that this version does not know survive.
func consoleEnv(c *corev1.Container, raw *container, d *decision) (env, from []any, err error) {
	for i, e := range c.Env {
		cloud := cloudEnv(e.Name)
		if !cloud && (e.ValueFrom == nil || !isWorkloads(e, d.config)) {
			continue
		}
		value, resolved := d.resourceFields[i]
		switch {
		case cloud && raw.Env != nil:
			env = append(env, raw.Env[i])
			continue
		case cloud:
		case resolved:
			e = corev1.EnvVar{Name: podenv.EnvValue + e.Name, Value: value}
		default:
			e.Name = podenv.EnvValue + e.Name
		}
		if raw.Env == nil {
			env = append(env, e)
			continue
		}
		fields := map[string]string{"name": e.Name}
		if resolved {
			fields["value"], fields["valueFrom"] = value, ""
		}
		v, err := renamed(raw.Env[i], fields)
		if err != nil {
			return nil, nil, err
		}
		env = append(env, v)
	}
	for _, e := range consoleMounts(d.manifest) {
		env = append(env, e)
	}
	for i, e := range c.EnvFrom {
		e.Prefix = podenv.EnvFrom + e.Prefix
		if raw.EnvFrom == nil {
			from = append(from, e)
			continue
		}
		v, err := renamed(raw.EnvFrom[i], map[string]string{"prefix": e.Prefix})
		if err != nil {
			return nil, nil, err
		}
		from = append(from, v)
	}
	return env, from, nil
}

// hostVolume tells whether the kubelet fills a volume with files of the API.
func hostVolume(v *corev1.Volume) bool {
	return v.ConfigMap != nil || v.Secret != nil || v.Projected != nil || v.DownwardAPI != nil
}

// hostMount is a mount whose files the console sends into the enclave.
func (p *problems) hostMount(at *field.Path, c *corev1.Container, v *corev1.Volume, m *corev1.VolumeMount, w workload.Mount) workload.Mount {
	// Whatever the mount says, the kubelet's files are read-only.
	w.Kind, w.ReadOnly, w.SizeLimit = workload.MountHost, false, 0
	for _, own := range []string{"/initboot", "/base.eif", podenv.RunDir} {
		if below(w.Path, own) {
			p.forbid(at.Child("mountPath"), own+" is the console's own, where the kubelet mounts it first: choose another path")
		}
	}
	if err := workload.CheckHostPath(w.Path); err != nil && path.IsAbs(m.MountPath) {
		p.forbid(at.Child("mountPath"), err.Error())
	}
	var items []corev1.DownwardAPIVolumeFile
	if v.DownwardAPI != nil {
		items = append(items, v.DownwardAPI.Items...)
	}
	if v.Projected != nil {
		for _, s := range v.Projected.Sources {
			if s.DownwardAPI != nil {
				items = append(items, s.DownwardAPI.Items...)
			}
		}
	}
	for _, f := range items {
		if f.ResourceFieldRef != nil && f.ResourceFieldRef.ContainerName == c.Name {
			p.forbid(at, fmt.Sprintf("file %s of volume %s is about resources of container %s, whose place the console takes: use a resourceFieldRef in env", f.Path, v.Name, c.Name))
		}
	}
	return w
}

// sharedFiles is a mount of an emptyDir that others share: their files go into the enclave, and nothing
// comes out.
func (p *problems) sharedFiles(at *field.Path, m *corev1.VolumeMount, cfg *config.EnclaveConfig, other string) bool {
	if !slices.Contains(cfg.HostFiles, path.Clean(m.MountPath)) {
		p.forbid(at, fmt.Sprintf("emptyDir %s is shared with container %s, which the enclave cannot see: give it one of its own, or list %s in hostFiles, which lets the host supply its files", m.Name, other, m.MountPath))
		return false
	}
	if !m.ReadOnly {
		p.forbid(at.Child("readOnly"), fmt.Sprintf("files of emptyDir %s come into the enclave and none goes out (hostFiles): write readOnly: true", m.Name))
	}
	if m.SubPath != "" {
		p.notBuilt(at.Child("subPath"), "subPath of a shared emptyDir")
	}
	return true
}

// checkHostFiles refuses hostFiles that are no mounts of a shared emptyDir.
func (p *problems) checkHostFiles(spec *corev1.PodSpec, c *corev1.Container, cfg *config.EnclaveConfig) {
	for _, dir := range cfg.HostFiles {
		at := annotationsPath.Key(annotation.Config).Child("hostFiles").Key(dir)
		i := slices.IndexFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return path.Clean(m.MountPath) == dir })
		switch {
		case i < 0:
			p.forbid(at, fmt.Sprintf("container %s mounts nothing there: remove it", c.Name))
		default:
			v := volume(spec, c.VolumeMounts[i].Name)
			if v == nil || hostVolume(v) || sharedWith(spec, c, v.Name) == "" {
				p.forbid(at, "it is not an emptyDir that another container shares: remove it")
			}
		}
	}
}

// sharedWith returns the name of another container that mounts a volume, or "".
func sharedWith(spec *corev1.PodSpec, c *corev1.Container, name string) string {
	for _, l := range containerLists(spec) {
		for i := range l.containers {
			other := &l.containers[i]
			if other != c && slices.ContainsFunc(other.VolumeMounts, func(o corev1.VolumeMount) bool { return o.Name == name }) {
				return other.Name
			}
		}
	}
	return ""
}

// token lists the service account's token, which the author asks for in the config: the mount is the API
// server's, and not in what the author wrote.
func (p *problems) token(spec *corev1.PodSpec, cfg *config.EnclaveConfig, out []workload.Mount) []workload.Mount {
	if !cfg.ServiceAccountToken || slices.ContainsFunc(out, func(w workload.Mount) bool { return w.Path == tokenPath }) {
		return out
	}
	if a := spec.AutomountServiceAccountToken; a != nil && !*a {
		p.forbid(annotationsPath.Key(annotation.Config).Child("serviceAccountToken"), "the pod says automountServiceAccountToken: false, so it has no token: remove one of them")
	}
	return append(out, workload.Mount{Path: tokenPath, Kind: workload.MountHost})
}

// isHostMount tells whether a mount of the author's is one of the manifest's that the host supplies.
func isHostMount(m *workload.Manifest, v *corev1.VolumeMount) bool {
	w := m.HostMount(path.Clean(v.MountPath))
	return w != nil && !isReserved(v.Name) && new(problems).subPath(nil, v) == w.SubPath
}

// consoleMounts tells the console which mounts it has to send.
func consoleMounts(m *workload.Manifest) []corev1.EnvVar {
	var paths []string
	for _, w := range m.Mounts {
		if w.Kind == workload.MountHost {
			paths = append(paths, w.Path)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	return []corev1.EnvVar{{Name: podenv.EnvMounts, Value: escape(string(jsonText(paths)))}}
}

// noToken are the mounts that keep the API server from mounting a token into the console.
func noToken(m *workload.Manifest) []corev1.VolumeMount {
	if m.HostMount(tokenPath) != nil {
		return nil
	}
	return []corev1.VolumeMount{mountNoToken}
}

// rootConsole tells whether it may be that only root can read files that the console has to read for a
// workload that may run as root. The console then does, without any capability.
func rootConsole(spec *corev1.PodSpec, c *corev1.Container, m *workload.Manifest) bool {
	if u := m.User; u != nil && (u.NonRoot || u.UID != nil && *u.UID != 0) {
		return false // the workload could not read them either
	}
	sc := spec.SecurityContext
	group := sc != nil && sc.FSGroup != nil // the kubelet lets it read its own files
	for i := range c.VolumeMounts {
		v := volume(spec, c.VolumeMounts[i].Name)
		if v == nil || !isHostMount(m, &c.VolumeMounts[i]) {
			continue
		}
		if !hostVolume(v) || !group && slices.ContainsFunc(modes(v), func(mode *int32) bool { return mode != nil && *mode&0o004 == 0 }) {
			return true
		}
	}
	return false
}

// modes are those that a volume gives its files.
func modes(v *corev1.Volume) []*int32 {
	var out []*int32
	keys := func(items []corev1.KeyToPath) {
		for _, k := range items {
			out = append(out, k.Mode)
		}
	}
	fields := func(items []corev1.DownwardAPIVolumeFile) {
		for _, f := range items {
			out = append(out, f.Mode)
		}
	}
	if s := v.ConfigMap; s != nil {
		out = append(out, s.DefaultMode)
		keys(s.Items)
	}
	if s := v.Secret; s != nil {
		out = append(out, s.DefaultMode)
		keys(s.Items)
	}
	if s := v.DownwardAPI; s != nil {
		out = append(out, s.DefaultMode)
		fields(s.Items)
	}
	if s := v.Projected; s != nil {
		out = append(out, s.DefaultMode)
		for _, source := range s.Sources {
			if source.ConfigMap != nil {
				keys(source.ConfigMap.Items)
			}
			if source.Secret != nil {
				keys(source.Secret.Items)
			}
			if source.DownwardAPI != nil {
				fields(source.DownwardAPI.Items)
			}
		}
	}
	return out
}

// compareHost reports what the console has lost of what the kubelet is to resolve for the manifest, and
// returns the console without it.
func (p *problems) compareHost(cp *field.Path, c *corev1.Container, m *workload.Manifest) *corev1.Container {
	rest := *c
	missing := map[string]bool{}
	for _, e := range m.Env {
		if e.Host {
			missing[podenv.EnvValue+e.Name] = true
		}
	}
	// A second one of a name stays, and is refused with all that nobody injected.
	rest.Env = slices.DeleteFunc(slices.Clone(c.Env), func(h corev1.EnvVar) bool {
		found := missing[h.Name]
		delete(missing, h.Name)
		return found
	})
	for _, name := range slices.Sorted(maps.Keys(missing)) {
		p.forbid(cp.Child("env"), name+", which was injected, is gone")
	}
	if m.EnvFrom {
		ours := func(e corev1.EnvFromSource) bool { return strings.HasPrefix(e.Prefix, podenv.EnvFrom) }
		if !slices.ContainsFunc(c.EnvFrom, ours) {
			p.forbid(cp.Child("envFrom"), "what was injected is gone")
		}
		rest.EnvFrom = slices.DeleteFunc(slices.Clone(c.EnvFrom), ours)
	}
	for _, w := range m.Mounts {
		if w.Kind != workload.MountHost || w.Path == tokenPath { // the token's is the API server's to mount
			continue
		}
		if !slices.ContainsFunc(c.VolumeMounts, func(v corev1.VolumeMount) bool {
			return path.Clean(v.MountPath) == w.Path && isHostMount(m, &v)
		}) {
			p.forbid(cp.Child("volumeMounts"), fmt.Sprintf("the mount at %s, whose files the enclave needs, is gone", w.Path))
		}
	}
	return &rest
}

// compareHostConfig reports a config whose words about the host were changed after the manifest was made
// from it.
func (p *problems) compareHostConfig(at *field.Path, cfg *config.EnclaveConfig, m *workload.Manifest, spec *corev1.PodSpec, c *corev1.Container) {
	const changed = "it is not what was injected"
	if !slices.Equal(cfg.HostEnv, m.HostEnv) {
		p.forbid(at.Child("hostEnv"), changed)
	}
	if slices.ContainsFunc(cfg.HostFiles, func(dir string) bool { return m.HostMount(dir) == nil }) {
		p.forbid(at.Child("hostFiles"), changed)
	}
	given := m.HostMount(tokenPath) != nil
	automatic := slices.ContainsFunc(c.VolumeMounts, func(v corev1.VolumeMount) bool { return tokenMount(spec, &v) })
	if cfg.ServiceAccountToken != given && (cfg.ServiceAccountToken || automatic) {
		p.forbid(at.Child("serviceAccountToken"), changed)
	}
}

// hostAccess lists what the host supplies, several names in one sentence where they fit.
func hostAccess(m *workload.Manifest) []string {
	var names, paths []string
	for _, e := range m.Env {
		if e.Host {
			names = append(names, e.Name)
		}
	}
	for _, v := range m.Mounts {
		if v.Kind == workload.MountHost {
			paths = append(paths, v.Path)
		}
	}
	out := enumerate("the host can read and change: env ", names)
	if m.EnvFrom {
		out = append(out, "the host can read and change: every variable that env does not list (envFrom)")
	}
	out = append(out, enumerate("the host can change what is run or trusted, by env ", m.HostEnv)...)
	for _, p := range paths {
		// Only what the pod says: the image's own working directory is not known here.
		if wd := path.Clean(m.WorkingDir); wd == p || strings.HasPrefix(wd, p+"/") {
			out = append(out, enumerate("the host can change what is run or trusted, by files at the workingDir ", []string{wd})...)
			break
		}
	}
	return append(out, enumerate("the host can read and change: files at ", paths)...)
}

// enumerate begins as many sentences as it takes for all words, of at most 120 bytes each.
func enumerate(begin string, words []string) []string {
	const most = 120
	var out []string
	for _, w := range words {
		if q := strconv.Quote(w); strings.Contains(q, `\`) { // a line's end, or what steers a terminal
			w = q
		}
		if room := most - len(begin); len(w) > room {
			w = w[:room-len("…")] + "…"
		}
		if n := len(out) - 1; n >= 0 && len(out[n])+len(", ")+len(w) <= most {
			out[n] += ", " + w
		} else {
			out = append(out, begin+w)
		}
	}
	return out
}
