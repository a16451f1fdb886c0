package inject

import (
	"cmp"
	"context"
	"fmt"
	"path"
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

// decision is what the author of a pod asked for.
type decision struct {
	manifest  *workload.Manifest
	canonical []byte
	image     string // as the author wrote it, with its digest
	// pluginImages are the images of the plugins that have one, as the author wrote them.
	pluginImages []string
	index        int // of the named container in spec.containers
	config       *config.EnclaveConfig
	memory       int64 // of the enclave, in bytes
	cpus         int64 // vCPUs of the enclave; 0 with a driver that sets none apart
	// resourceFields are the values of the container's resourceFieldRefs, by index in its env.
	resourceFields map[int]string
	warnings       []string
}

// Derive returns the workload manifest of the container that the annotation cloister.dev/enclave names,
// and its image as the author wrote it. It takes the pod template as written as well as the pod as the API
// server completed it: defaults and what the cluster adds (the service account token, cloud identity,
// resources) leave no trace in the manifest. Warnings say what the host can read and change.
func Derive(meta *metav1.ObjectMeta, spec *corev1.PodSpec) (m *workload.Manifest, image string, warnings []string, errs field.ErrorList) {
	return DeriveTagged(context.Background(), meta, spec, nil)
}

// decide reads a pod that has not been injected. The manifest does not depend on opts; resources that do are
// not looked at without a driver. Resolve, if it is not nil, is asked for the digest of a tag; nothing else
// here is more than a function of the pod.
func decide(ctx context.Context, meta *metav1.ObjectMeta, spec *corev1.PodSpec, opts Options, resolve Resolver) (*decision, field.ErrorList) {
	p := &problems{}
	values, errs := annotation.Read(meta.Annotations, annotationsPath)
	p.list = errs
	p.checkPod(meta, spec)
	p.checkReserved(spec)

	d := &decision{index: -1, config: values.Config}
	if values.Enclave != "" {
		d.index = p.find(spec, values.Enclave)
	}
	if d.index < 0 {
		return nil, p.list
	}
	c := &spec.Containers[d.index]
	cp := containersPath.Index(d.index)
	if v, ok := meta.Annotations["container.apparmor.security.beta.kubernetes.io/"+c.Name]; ok && v != "runtime/default" {
		p.forbid(annotationsPath.Key("container.apparmor.security.beta.kubernetes.io/"+c.Name), "a profile of the host's kernel does not reach into an enclave: remove it")
	}

	m := &workload.Manifest{
		APIVersion: workload.APIVersion,
		Command:    c.Command,
		Args:       c.Args,
		WorkingDir: c.WorkingDir,
	}
	d.manifest = m
	d.image, m.Image.Digest = p.digest(ctx, cp.Child("image"), c.Image, d.config.Pin == config.PinNever, resolve)
	if arch, ok := spec.NodeSelector[corev1.LabelArchStable]; ok && "linux/"+arch != workload.DefaultPlatform {
		m.Image.Platform = "linux/" + arch
	}
	p.env(cp, c, d.config, m)
	m.User, m.Security = p.security(cp, spec.SecurityContext, c.SecurityContext)
	m.Ports = p.ports(cp.Child("ports"), c, d.config)
	m.Probes = p.probes(cp, c)
	m.Lifecycle = p.lifecycle(cp.Child("lifecycle"), c)
	m.TerminationMessagePath = p.terminationMessage(cp, c)
	m.Mounts = p.mounts(cp, spec, c, d.config)
	m.Egress = p.egress(m, d.config)
	m.HostAliases = p.hostAliases(spec, m)
	m.Plugins, d.pluginImages = plugins(d.config, m.Image.Platform)
	m.Logs = d.config.Logs
	m.Secrets, m.KMS, m.TLS = d.config.Secrets, d.config.KMS, d.config.TLS
	p.rest(cp, c)
	if low := lowestPort(m); low < 1024 {
		p.checkPortStart(spec, low)
	}
	d.memory = d.config.Memory
	d.warnings = append(HostAccess(m), pluginWarnings(m)...)
	if d.memory == 0 {
		d.memory = p.memory(cp, c)
		if c.Resources.Limits.Memory().IsZero() {
			d.warnings = append(d.warnings, fmt.Sprintf("container %s has no memory limit and %s no memory: its enclave gets 512Mi", shorten(c.Name), annotation.Config))
		}
	}
	if d.image != c.Image {
		d.warnings = append(d.warnings, tagWarning(c.Name, d.image))
	}
	if opts.Driver == DriverNitro {
		d.cpus = p.nitroCPUs(cp, c, d)
	}
	p.checkPodResources(spec, d, opts)
	d.resourceFields = p.resourceFields(cp, c, d.config, d.memory)
	if len(p.list) > 0 {
		return nil, p.list
	}

	canonical, err := m.Canonical()
	if err != nil {
		return nil, manifestErrors(cp, err)
	}
	if n := len(podenv.EnvManifest) + len("=") + len(canonical) + 1; n > workload.MaxManifestSize {
		return nil, field.ErrorList{field.Invalid(cp, field.OmitValueType{}, fmt.Sprintf(
			"its workload manifest makes an environment variable of %d bytes and the kernel takes at most %d: shorten command, args, env or probes", n, workload.MaxManifestSize))}
	}
	d.canonical = canonical
	return d, nil
}

// checkReserved refuses names of ours in a pod that has not been injected.
func (p *problems) checkReserved(spec *corev1.PodSpec) {
	for i, v := range spec.Volumes {
		if isReserved(v.Name) {
			p.forbid(specPath.Child("volumes").Index(i).Child("name"), reservedName)
		}
	}
	for _, l := range containerLists(spec) {
		for i, c := range l.containers {
			if isReserved(c.Name) {
				p.forbid(l.path.Index(i).Child("name"), reservedName)
			}
			for j, m := range c.VolumeMounts {
				if isReserved(m.Name) { // the volume that it names is there after the patch
					p.forbid(l.path.Index(i).Child("volumeMounts").Index(j), fmt.Sprintf("volume %s is only for what is injected", m.Name))
				}
			}
		}
	}
}

// find returns the index of the container called name, or -1.
func (p *problems) find(spec *corev1.PodSpec, name string) int {
	names := make([]string, len(spec.Containers))
	for i, c := range spec.Containers {
		if names[i] = c.Name; c.Name == name {
			return i
		}
	}
	at := annotationsPath.Key(annotation.Enclave)
	if slices.ContainsFunc(spec.InitContainers, func(c corev1.Container) bool { return c.Name == name }) {
		p.forbid(at, fmt.Sprintf("%q is an init container, only one of spec.containers can run in an enclave", name))
		return -1
	}
	hint := "its containers are " + strings.Join(names, ", ")
	if n := config.Nearest(name, names); n != "" {
		hint = fmt.Sprintf("did you mean %q?", n)
	}
	p.list = append(p.list, field.Invalid(at, name, "the pod has no container of this name, "+hint))
	return -1
}

// cloudEnv tells whether an identity webhook of the cloud adds this variable. It is no part of the
// manifest, which would else differ from cluster to cluster, and it stays on the console.
func cloudEnv(name string) bool {
	return name == "AWS_ROLE_ARN" || name == "AWS_WEB_IDENTITY_TOKEN_FILE" || strings.HasPrefix(name, "AWS_CONTAINER_")
}

// cloudMount tells whether an identity webhook of the cloud adds a mount here.
func cloudMount(mountPath string) bool {
	for _, dir := range []string{"/var/run/secrets/eks.amazonaws.com", "/var/run/secrets/pods.eks.amazonaws.com"} {
		if mountPath == dir || strings.HasPrefix(mountPath, dir+"/") {
			return true
		}
	}
	return false
}

func (p *problems) security(cp *field.Path, pod *corev1.PodSecurityContext, sc *corev1.SecurityContext) (*workload.User, *workload.Security) {
	if pod == nil {
		pod = &corev1.PodSecurityContext{}
	}
	if sc == nil {
		sc = &corev1.SecurityContext{}
	}
	path := cp.Child("securityContext")

	// What the container says wins over what the pod says.
	u := workload.User{UID: cmp.Or(sc.RunAsUser, pod.RunAsUser), GID: cmp.Or(sc.RunAsGroup, pod.RunAsGroup)}
	if n := cmp.Or(sc.RunAsNonRoot, pod.RunAsNonRoot); n != nil {
		u.NonRoot = *n
	}
	u.Groups = slices.Clone(pod.SupplementalGroups)
	if pod.FSGroup != nil {
		u.Groups = append(u.Groups, *pod.FSGroup)
	}
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	user := &u
	if u.UID == nil && u.GID == nil && len(u.Groups) == 0 && !u.NonRoot {
		user = nil
	}

	if sc.Privileged != nil && *sc.Privileged {
		p.forbid(path.Child("privileged"), "there is nothing of the host inside an enclave to have privileges over: remove it")
	}
	if m := sc.ProcMount; m != nil && *m != corev1.DefaultProcMount {
		p.notBuilt(path.Child("procMount"), "a procMount other than Default")
	}
	p.checkProfiles(path, sc.SELinuxOptions, sc.WindowsOptions, sc.SeccompProfile, sc.AppArmorProfile)

	s := workload.Security{
		NoNewPrivileges: sc.AllowPrivilegeEscalation != nil && !*sc.AllowPrivilegeEscalation,
		ReadOnlyRoot:    sc.ReadOnlyRootFilesystem != nil && *sc.ReadOnlyRootFilesystem,
	}
	if sc.Capabilities != nil {
		s.DropCapabilities, s.AddCapabilities = p.capabilities(path.Child("capabilities"), sc.Capabilities)
	}
	security := &s
	if !s.NoNewPrivileges && !s.ReadOnlyRoot && len(s.DropCapabilities)+len(s.AddCapabilities) == 0 {
		security = nil
	}
	return user, security
}

// capabilities brings drop and add to their shortest form, as container runtimes understand them: "drop
// ALL" comes first, what is added comes back, what is dropped by its name is gone in any case.
func (p *problems) capabilities(path *field.Path, c *corev1.Capabilities) (drop, add []string) {
	all := false
	for _, name := range c.Drop {
		switch n := capability(name); {
		case n == "ALL":
			all = true
		case slices.Contains(workload.DefaultCapabilities, n):
			drop = append(drop, n)
		}
	}
	for i, name := range c.Add {
		n := capability(name)
		if !slices.Contains(workload.DefaultCapabilities, n) {
			p.forbid(path.Child("add").Index(i), fmt.Sprintf("%s cannot be had inside an enclave, which gives %s", name, strings.Join(workload.DefaultCapabilities, ", ")))
		} else if all && !slices.Contains(drop, n) {
			add = append(add, n)
		}
	}
	if all {
		drop = []string{"ALL"}
	}
	slices.Sort(drop)
	slices.Sort(add)
	return slices.Compact(drop), slices.Compact(add)
}

func capability(c corev1.Capability) string {
	return strings.TrimPrefix(strings.ToUpper(string(c)), "CAP_")
}

func (p *problems) ports(path *field.Path, c *corev1.Container, cfg *config.EnclaveConfig) []workload.Port {
	var out []workload.Port
	for i, port := range c.Ports {
		path := path.Index(i)
		if port.Protocol != "" && port.Protocol != corev1.ProtocolTCP {
			p.forbid(path.Child("protocol"), "only TCP reaches an enclave")
		}
		out = append(out, served(cfg, port.Name, uint32(port.ContainerPort)))
	}
	if len(cfg.Ports) == 0 {
		return out
	}
	at := annotationsPath.Key(annotation.Config).Child("ports")
	seen := map[uint32]bool{}
	for i, s := range cfg.Ports {
		j := slices.IndexFunc(out, func(w workload.Port) bool { return matches(s, w) })
		switch {
		case j < 0:
			p.list = append(p.list, field.Invalid(at.Index(i), cmp.Or(s.Name, strconv.FormatUint(uint64(s.Port), 10)), fmt.Sprintf("container %s declares no such containerPort", c.Name)))
		case seen[out[j].Port]:
			p.list = append(p.list, field.Duplicate(at.Index(i), out[j].Port))
		default:
			seen[out[j].Port] = true
		}
	}
	return out
}

// egress refuses a port on which the workload itself listens. Inside the enclave every allowed host is an
// address of the loopback device with a listener on the allowed port, and a workload that listens on all
// addresses takes that port on each of them.
func (p *problems) egress(m *workload.Manifest, cfg *config.EnclaveConfig) []string {
	if len(cfg.Egress) == 0 {
		return nil
	}
	at := annotationsPath.Key(annotation.Config).Child("egress")
	for _, e := range cfg.Egress {
		_, port, err := workload.ParseEndpoint(e)
		if err == nil && slices.ContainsFunc(m.Ports, func(w workload.Port) bool { return w.Port == uint32(port) }) {
			p.forbid(at.Key(e), fmt.Sprintf("%s has the port of a containerPort, on which the workload itself listens: let one of the two have another port", e))
		}
	}
	return cfg.Egress
}

func matches(s config.Port, w workload.Port) bool {
	return s.Port == w.Port || s.Name != "" && s.Name == w.Name
}

// served is a containerPort as the config says it is served.
func served(cfg *config.EnclaveConfig, name string, port uint32) workload.Port {
	w := workload.Port{Name: name, Port: port}
	i := slices.IndexFunc(cfg.Ports, func(s config.Port) bool { return matches(s, w) })
	if i < 0 {
		return w
	}
	w.Plaintext, w.Protocol = cfg.Ports[i].Plaintext, cfg.Ports[i].Protocol
	return w
}

// lowestPort returns the lowest port that the workload serves, or 65536.
func lowestPort(m *workload.Manifest) uint32 {
	low := uint32(1 << 16)
	for _, p := range m.Ports {
		low = min(low, p.Port)
	}
	return low
}

// tokenPath is where the service account's token is mounted.
const tokenPath = "/var/run/secrets/kubernetes.io/serviceaccount"

// tokenMount tells whether this is the mount that the API server's ServiceAccount plugin adds.
func tokenMount(spec *corev1.PodSpec, m *corev1.VolumeMount) bool {
	v := volume(spec, m.Name)
	return m.MountPath == tokenPath && strings.HasPrefix(m.Name, "kube-api-access-") && v != nil && v.Projected != nil
}

func volume(spec *corev1.PodSpec, name string) *corev1.Volume {
	for i := range spec.Volumes {
		if spec.Volumes[i].Name == name {
			return &spec.Volumes[i]
		}
	}
	return nil
}

func (p *problems) mounts(cp *field.Path, spec *corev1.PodSpec, c *corev1.Container, cfg *config.EnclaveConfig) []workload.Mount {
	for i := range c.VolumeDevices {
		p.forbid(cp.Child("volumeDevices").Index(i), "a device of the host cannot be given to an enclave: remove it")
	}
	var out []workload.Mount
	volumes := map[string]string{} // by path
	for i := range c.VolumeMounts {
		m := &c.VolumeMounts[i]
		if tokenMount(spec, m) || cloudMount(m.MountPath) {
			continue
		}
		path := cp.Child("volumeMounts").Index(i)
		if w, ok := p.mount(path, spec, c, m, cfg); ok {
			if volumes[w.Path] != "" {
				p.list = append(p.list, field.Duplicate(path.Child("mountPath"), m.MountPath))
			}
			volumes[w.Path] = m.Name
			out = append(out, w)
		}
	}
	p.checkHostFiles(spec, c, cfg)
	out = p.token(spec, cfg, out)
	// A parent before what is mounted below it, whatever the author's order.
	slices.SortFunc(out, func(a, b workload.Mount) int { return strings.Compare(a.Path, b.Path) })
	numberVolumes(out, volumes)
	return out
}

func (p *problems) mount(at *field.Path, spec *corev1.PodSpec, c *corev1.Container, m *corev1.VolumeMount, cfg *config.EnclaveConfig) (workload.Mount, bool) {
	before := len(p.list)
	if m.SubPathExpr != "" {
		p.notBuilt(at.Child("subPathExpr"), "subPathExpr")
	}
	if g := m.MountPropagation; g != nil && *g != corev1.MountPropagationNone {
		p.forbid(at.Child("mountPropagation"), "mounts do not propagate between an enclave and its host: remove it")
	}
	if r := m.RecursiveReadOnly; r != nil && *r != corev1.RecursiveReadOnlyDisabled {
		p.notBuilt(at.Child("recursiveReadOnly"), "recursiveReadOnly")
	}
	if len(m.BindMountOptions) > 0 {
		p.notBuilt(at.Child("bindMountOptions"), "bindMountOptions")
	}
	w := workload.Mount{Path: path.Clean(m.MountPath), Kind: workload.MountTmpfs, ReadOnly: m.ReadOnly, SubPath: p.subPath(at, m)}
	switch {
	case !path.IsAbs(m.MountPath) || w.Path == "/":
		p.list = append(p.list, field.Invalid(at.Child("mountPath"), m.MountPath, "write an absolute path other than /"))
	case w.Path == "/dev" || below(w.Path, "/proc") || below(w.Path, "/sys"):
		p.forbid(at.Child("mountPath"), "/dev, /proc and /sys are the enclave's own: choose another path")
	}
	v := volume(spec, m.Name)
	if v == nil {
		p.list = append(p.list, field.Invalid(at.Child("name"), m.Name, "the pod has no volume of this name; the claims of a StatefulSet cannot be mounted into an enclave"))
		return w, false
	}
	if hostVolume(v) {
		return p.hostMount(at, c, v, m, w), len(p.list) == before
	}
	// A volume without a source is an emptyDir: the API server fills it in.
	if v.EmptyDir == nil && v.VolumeSource != (corev1.VolumeSource{}) {
		p.forbid(at, fmt.Sprintf("volume %s is %s: only ConfigMap, Secret, projected and downward API volumes and emptyDirs can be mounted into an enclave", m.Name, source(v)))
		return w, false
	}
	if e := v.EmptyDir; e != nil {
		if e.Medium != corev1.StorageMediumDefault && e.Medium != corev1.StorageMediumMemory {
			p.notBuilt(at, "an emptyDir of medium "+string(e.Medium))
		}
		if e.Mode != nil {
			p.notBuilt(at, "an emptyDir with a mode")
		}
		if e.SizeLimit != nil {
			w.SizeLimit = e.SizeLimit.Value()
		}
	}
	if other := sharedWith(spec, c, m.Name); other != "" {
		ok := p.sharedFiles(at, m, cfg, other)
		return p.hostMount(at, c, v, m, w), ok && len(p.list) == before
	}
	return w, len(p.list) == before
}

// below tells whether p is dir or lies in it.
func below(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// source names the kind of a volume for people.
func source(v *corev1.Volume) string {
	s := v.VolumeSource
	for _, k := range []struct {
		set  bool
		name string
	}{
		{s.PersistentVolumeClaim != nil, "a persistent volume claim"},
		{s.HostPath != nil, "a hostPath"},
		{s.Ephemeral != nil, "an ephemeral volume claim"},
		{s.CSI != nil, "of a CSI driver"},
		{s.Image != nil, "an image"},
	} {
		if k.set {
			return k.name
		}
	}
	return "storage of the host"
}

// rest refuses what else a container can say.
func (p *problems) rest(cp *field.Path, c *corev1.Container) {
	for _, f := range []struct {
		name string
		set  bool
	}{{"stdin", c.Stdin}, {"stdinOnce", c.StdinOnce}, {"tty", c.TTY}} {
		if f.set {
			p.forbid(cp.Child(f.name), "nobody can type into an enclave: remove it")
		}
	}
	for i, r := range c.ResizePolicy {
		if r.RestartPolicy != corev1.NotRequired {
			p.forbid(cp.Child("resizePolicy").Index(i), "an enclave keeps the memory that it booted with: remove it")
		}
	}
	if c.ImagePullPolicy == corev1.PullNever {
		p.forbid(cp.Child("imagePullPolicy"), "the enclave fetches its image by digest from the registry, never from the node: remove it")
	}
	p.resources(cp.Child("resources"), c.Resources)
}

func (p *problems) resources(path *field.Path, r corev1.ResourceRequirements) {
	for i := range r.Claims {
		p.forbid(path.Child("claims").Index(i), "a device of the host cannot be given to an enclave: remove it")
	}
	var refused map[corev1.ResourceName]*field.Path
	for _, l := range []struct {
		name string
		list corev1.ResourceList
	}{{"limits", r.Limits}, {"requests", r.Requests}} {
		for name := range l.list {
			switch name {
			case corev1.ResourceCPU, corev1.ResourceMemory, corev1.ResourceEphemeralStorage:
				continue
			}
			if refused == nil {
				refused = map[corev1.ResourceName]*field.Path{}
			}
			if refused[name] == nil {
				refused[name] = path.Child(l.name).Key(string(name))
			}
		}
	}
	names := make([]corev1.ResourceName, 0, len(refused))
	for name := range refused {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		p.forbid(refused[name], "a device or huge pages of the host cannot be given to an enclave: remove it")
	}
}

// defaultMemory is what an enclave gets when nobody says how much.
const defaultMemory = 512 << 20

// memory returns the enclave's memory in bytes from the container's limit.
func (p *problems) memory(cp *field.Path, c *corev1.Container) int64 {
	limit, ok := c.Resources.Limits[corev1.ResourceMemory]
	if !ok || limit.IsZero() {
		return defaultMemory
	}
	if limit.Sign() < 0 || limit.CmpInt64(config.MaxMemory) > 0 {
		p.list = append(p.list, field.Invalid(cp.Child("resources", "limits").Key("memory"), limit.String(), "it is the memory of the enclave: at most 1Ti"))
		return 0
	}
	return limit.Value()
}

// shorten keeps warnings below 120 characters, beyond which API servers may cut them.
func shorten(name string) string {
	const most = 24
	if len(name) <= most {
		return name
	}
	return name[:most-1] + "…"
}
