package inject

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/workload"
)

// Volumes of ours.
const (
	volumeRun     = "cloister-run"
	volumeCache   = "cloister-cache"
	volumeTmp     = "cloister-tmp"
	volumePodinfo = "cloister-podinfo"
	volumeNoToken = "cloister-no-token"
)

const (
	// bootSeconds is how long a boot may take, with the fetching of the image: the kubelet gives up then
	// and restarts the container, which begins again.
	bootSeconds = 600
	// overhead is what initboot needs beside the enclave's memory, in bytes.
	overhead = 128 << 20
)

// volumes are added to a pod.
var volumes = []*corev1.Volume{
	memoryVolume(volumeRun),
	{Name: volumeCache, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	memoryVolume(volumeTmp),
	{Name: volumePodinfo, VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{
		Items: []corev1.DownwardAPIVolumeFile{{Path: "annotations", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.annotations"}}}}}},
	memoryVolume(volumeNoToken),
}

func memoryVolume(name string) *corev1.Volume {
	limit := resource.MustParse("16Mi")
	return &corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
		Medium: corev1.StorageMediumMemory, SizeLimit: &limit}}}
}

// Mounts of our containers. The empty volume at the token's path keeps the API server from mounting a
// token there: none of our containers talks to the API.
var (
	mountRun     = corev1.VolumeMount{Name: volumeRun, MountPath: podenv.RunDir}
	mountNoToken = corev1.VolumeMount{Name: volumeNoToken, MountPath: tokenPath, ReadOnly: true}
	mountCache   = corev1.VolumeMount{Name: volumeCache, MountPath: podenv.CacheDir}
	mountTmp     = corev1.VolumeMount{Name: volumeTmp, MountPath: podenv.SidecarDir}
	mountPodinfo = corev1.VolumeMount{Name: volumePodinfo, MountPath: "/etc/podinfo", ReadOnly: true}
)

// processCapabilities is what initboot needs to make an enclave of namespaces: to mount its root, to make
// its devices, to bring its loopback up, and to give the workload workload.DefaultCapabilities.
var processCapabilities = []corev1.Capability{
	"CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW",
	"SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_ADMIN", "SYS_CHROOT",
}

// escape keeps the kubelet from expanding $(VAR) in the value of an environment variable: it reads $$ as
// one $ (k8s.io/kubernetes/third_party/forked/golang/expansion).
func escape(value string) string { return strings.ReplaceAll(value, "$", "$$") }

// unescape is what the kubelet makes of an escaped value.
func unescape(value string) string { return strings.ReplaceAll(value, "$$", "$") }

// What is the same in every pod is made once. Nobody may write to it.
var (
	always, yes, no    = corev1.ContainerRestartPolicyAlways, true, false
	root, unprivileged = int64(0), int64(65532)

	// processSecurity is that of an initboot that makes the enclave of namespaces. The uid is explicit: the pod may demand runAsNonRoot for its
	// other containers.
	processSecurity = &corev1.SecurityContext{
		RunAsUser: &root, RunAsGroup: &root, RunAsNonRoot: &no,
		ReadOnlyRootFilesystem: &yes,
		Capabilities:           &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: processCapabilities},
		SeccompProfile:         &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined},
		AppArmorProfile:        &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined},
	}
	dropAll        = &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}
	runtimeDefault = &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}
	bootProbe      = execProbe("/initboot", "probe", "boot")
	sidecarProbe   = execProbe("/sidecar", "probe", "startup")
	// sidecarReady follows the enclave closely: a pod whose enclave is gone must leave its Services at once.
	sidecarReady = &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/ready", Port: intstr.FromInt32(podenv.SidecarPort), Scheme: corev1.URISchemeHTTP}},
		PeriodSeconds: 1, TimeoutSeconds: 2, FailureThreshold: 1, SuccessThreshold: 1,
	}
)

// confined is the security context of the console and the sidecar. What it points to is shared.
func confined() *corev1.SecurityContext {
	return &corev1.SecurityContext{
		RunAsUser: &unprivileged, RunAsGroup: &unprivileged, RunAsNonRoot: &yes,
		AllowPrivilegeEscalation: &no,
		ReadOnlyRootFilesystem:   &yes,
		Capabilities:             dropAll,
		SeccompProfile:           runtimeDefault,
	}
}

// initboot renders the first native sidecar, without resources.
func initboot(opts Options, m *workload.Manifest, canonical []byte, image, eif string, pluginImages []string, memory, cpus int64) corev1.Container {
	command := []string{"/initboot", "serve", "--driver=" + opts.Driver}
	if len(opts.PlainHTTP) > 0 {
		command = append(command, "--plain-http-registries="+strings.Join(opts.PlainHTTP, ","))
	}
	mounts := []corev1.VolumeMount{mountRun, mountCache, mountNoToken}
	if eif != "" {
		command = append(command, "--eif="+podenv.EIFDir+"/"+podenv.EIFName)
		mounts = append(mounts, mountEIF)
	}
	c := corev1.Container{
		Name:    Initboot,
		Image:   opts.InitbootImage,
		Command: command,
		Env: append(append([]corev1.EnvVar{
			{Name: podenv.EnvManifest, Value: escape(string(canonical))},
			{Name: podenv.EnvImage, Value: escape(image)},
			{Name: podenv.EnvMemory, Value: strconv.FormatInt(memory, 10)},
		}, pluginImagesEnv(pluginImages)...), podEnv(m)...),
		ImagePullPolicy: corev1.PullIfNotPresent,
		RestartPolicy:   &always,
		StartupProbe:    bootProbe,
		VolumeMounts:    mounts,
	}
	if opts.Driver == DriverNitro {
		c.Env = append(c.Env, nitroEnv(cpus))
		c.SecurityContext = nitroSecurity(opts)
	} else {
		c.SecurityContext = processSecurity
	}
	return c
}

// podEnv tells initboot which pod it is in, where telemetry carries that.
func podEnv(m *workload.Manifest) []corev1.EnvVar {
	if m.Plugin(workload.PluginLogging) == nil && m.Plugin(workload.PluginTelemetry) == nil {
		return nil
	}
	from := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{
			FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path},
		}}
	}
	return []corev1.EnvVar{
		from(podenv.EnvPodName, "metadata.name"), from(podenv.EnvPodNamespace, "metadata.namespace"), from(podenv.EnvPodUID, "metadata.uid"),
	}
}

// sidecar renders the second native sidecar, without resources.
func sidecar(opts Options, m *workload.Manifest) corev1.Container {
	env := []corev1.EnvVar{{Name: podenv.EnvPorts, Value: string(jsonText(portNumbers(m)))}}
	if list := m.Endpoints(); len(list) > 0 {
		env = append(env, corev1.EnvVar{Name: podenv.EnvEgress, Value: string(jsonText(list))})
	}
	if m.KMS != nil {
		env = append(env, corev1.EnvVar{Name: podenv.EnvAWSRegion, Value: m.KMS.Region})
	}
	security := confined()
	if opts.Driver == DriverNitro {
		security.SeccompProfile = vsockProfile()
	}
	return corev1.Container{
		Name:            Sidecar,
		Image:           opts.SidecarImage,
		Command:         []string{"/sidecar", "serve"},
		Env:             env,
		ImagePullPolicy: corev1.PullIfNotPresent,
		RestartPolicy:   &always,
		StartupProbe:    sidecarProbe,
		ReadinessProbe:  sidecarReady,
		VolumeMounts:    []corev1.VolumeMount{mountRun, mountTmp, mountPodinfo, mountNoToken},
		SecurityContext: security,
	}
}

func portNumbers(m *workload.Manifest) []uint32 {
	numbers := make([]uint32, len(m.Ports))
	for i, p := range m.Ports {
		numbers[i] = p.Port
	}
	return numbers
}

// jsonText is a text, or a list of texts or numbers, which always marshal, as JSON.
func jsonText[T string | []string | []uint32](v T) json.RawMessage {
	b, _ := json.Marshal(v)
	return b
}

// execProbe is a startup probe that asks every second for as long as a boot may take.
func execProbe(command ...string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: command}},
		PeriodSeconds: 1, TimeoutSeconds: 5, SuccessThreshold: 1, FailureThreshold: bootSeconds,
	}
}

// Flags of the console: how long the kubelet waits after it has sent SIGTERM, for what reason ever, and
// after a probe with a grace period of its own has failed.
const (
	graceFlag         = "--grace-period="
	startupGraceFlag  = "--startup-grace-period="
	livenessGraceFlag = "--liveness-grace-period="
)

// consoleCommand is the command line of the console c.
func consoleCommand(spec *corev1.PodSpec, c *corev1.Container) []string {
	grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
	if s := spec.TerminationGracePeriodSeconds; s != nil {
		grace = *s
	}
	command := []string{"/initboot", "console", fmt.Sprintf("%s%ds", graceFlag, grace)}
	for _, f := range []struct {
		flag  string
		probe *corev1.Probe
	}{{startupGraceFlag, c.StartupProbe}, {livenessGraceFlag, c.LivenessProbe}} {
		if f.probe != nil && f.probe.TerminationGracePeriodSeconds != nil {
			command = append(command, fmt.Sprintf("%s%ds", f.flag, *f.probe.TerminationGracePeriodSeconds))
		}
	}
	return command
}

// isConsoleCommand tells whether a command line is the console's with whatever grace periods.
func isConsoleCommand(command []string) bool {
	if len(command) < 3 || command[0] != "/initboot" || command[1] != "console" {
		return false
	}
	for _, arg := range command[2:] {
		if !strings.HasPrefix(arg, graceFlag) && !strings.HasPrefix(arg, startupGraceFlag) && !strings.HasPrefix(arg, livenessGraceFlag) {
			return false
		}
	}
	return true
}

// withDefaults fills in what the API server would (pkg/apis/core/v1/defaults.go), in whose absence raw
// YAML is read.
func withDefaults(p corev1.Probe) corev1.Probe {
	for _, f := range []struct {
		value *int32
		deflt int32
	}{{&p.TimeoutSeconds, 1}, {&p.PeriodSeconds, 10}, {&p.SuccessThreshold, 1}, {&p.FailureThreshold, 3}} {
		if *f.value <= 0 {
			*f.value = f.deflt
		}
	}
	return p
}

// consoleStartup is the console's startup probe. It waits for the workload's start and then asks the
// author's startup probe, if there is one, as often as the author said.
func consoleStartup(author *corev1.Probe) *corev1.Probe {
	out := execProbe("/initboot", "probe", "startup")
	if author == nil {
		return out
	}
	a := withDefaults(*author)
	command := &out.Exec.Command
	if a.InitialDelaySeconds > 0 {
		*command = append(*command, fmt.Sprintf("--initial-delay=%ds", a.InitialDelaySeconds))
	}
	*command = append(*command, fmt.Sprintf("--timeout=%ds", a.TimeoutSeconds))
	out.PeriodSeconds = a.PeriodSeconds
	// A second more than the enclave has, so that its answer arrives and not the kubelet's time-out.
	out.TimeoutSeconds = later(a.TimeoutSeconds, 1)
	// The author's failures count from the workload's start, so the boot and the delay come on top.
	wait := later(a.InitialDelaySeconds, bootSeconds)
	out.FailureThreshold = later(a.FailureThreshold, (wait-1)/a.PeriodSeconds+1)
	out.TerminationGracePeriodSeconds = a.TerminationGracePeriodSeconds
	return out
}

// consoleProbe is a liveness or readiness probe of the console. The author's delay counts from the
// workload's start, which the console knows and the kubelet does not.
func consoleProbe(kind string, author *corev1.Probe) *corev1.Probe {
	a := withDefaults(*author)
	return &corev1.Probe{
		ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{
			Path:   fmt.Sprintf("/probe/%s?timeout=%ds&period=%ds&delay=%ds", kind, a.TimeoutSeconds, a.PeriodSeconds, a.InitialDelaySeconds),
			Port:   intstr.FromInt32(podenv.ConsolePort),
			Scheme: corev1.URISchemeHTTP,
		}},
		TimeoutSeconds:                later(a.TimeoutSeconds, 1),
		PeriodSeconds:                 a.PeriodSeconds,
		SuccessThreshold:              a.SuccessThreshold,
		FailureThreshold:              a.FailureThreshold,
		TerminationGracePeriodSeconds: a.TerminationGracePeriodSeconds,
	}
}

// later adds without overflow.
func later(a, b int32) int32 { return int32(min(int64(a)+int64(b), 1<<31-1)) }

// measurements is the value of the annotation that people read. The EIF, and so PCR0, is not known here.
func measurements(canonical []byte) string {
	return `{"PCR16":"` + hex.EncodeToString(workload.PCR16(canonical)) + `"}`
}

// guaranteed tells whether the author's pod has QoS class Guaranteed for what its containers say: requests
// equal to limits for CPU and memory on every one.
func guaranteed(spec *corev1.PodSpec) bool {
	if podResources(spec) {
		return false // the class does not depend on the containers
	}
	for _, l := range containerLists(spec) {
		for _, c := range l.containers {
			for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
				limit, ok := c.Resources.Limits[name]
				if !ok || limit.IsZero() {
					return false
				}
				if request, ok := c.Resources.Requests[name]; ok && request.Cmp(limit) != 0 {
					return false
				}
			}
		}
	}
	return true
}

// resources returns requests with limits for memory, and for CPU only when limitCPU: a CPU limit would
// throttle the boot and the unpacking of the image, and the QoS class needs it of Guaranteed pods only.
func resources(cpu resource.Quantity, memory int64, limitCPU bool) corev1.ResourceRequirements {
	mem := *resource.NewQuantity(memory, resource.BinarySI)
	r := corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: cpu, corev1.ResourceMemory: mem},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: mem},
	}
	if limitCPU {
		r.Limits[corev1.ResourceCPU] = cpu
	}
	return r
}

// fixedSidecar and fixedConsole are by whether the author's pod is Guaranteed. Nobody may write to them.
var fixedSidecar, fixedConsole = fixed("100m", 128<<20), fixed("50m", 64<<20)

func fixed(cpu string, memory int64) map[bool]corev1.ResourceRequirements {
	q := resource.MustParse(cpu)
	return map[bool]corev1.ResourceRequirements{false: resources(q, memory, false), true: resources(q, memory, true)}
}

// bootResources, sidecarResources and consoleResources are those of our containers.
func bootResources(spec *corev1.PodSpec, d *decision, opts Options) corev1.ResourceRequirements {
	if opts.Driver == DriverNitro {
		return nitroResources(spec, d, opts)
	}
	return resources(enclaveCPU(d, &spec.Containers[d.index]), d.memory+overhead, guaranteed(spec))
}

func sidecarResources(spec *corev1.PodSpec) corev1.ResourceRequirements {
	return fixedSidecar[guaranteed(spec)]
}

func consoleResources(spec *corev1.PodSpec) corev1.ResourceRequirements {
	return fixedConsole[guaranteed(spec)]
}

// enclaveCPU is what initboot requests: what the enclave uses, which is what the author asked for, and a
// little for itself.
func enclaveCPU(d *decision, c *corev1.Container) resource.Quantity {
	cpu := resource.MustParse("100m")
	if q, ok := c.Resources.Limits[corev1.ResourceCPU]; ok && !q.IsZero() {
		cpu = q
	}
	if q, ok := c.Resources.Requests[corev1.ResourceCPU]; ok && !q.IsZero() {
		cpu = q
	}
	if d.config.CPUs > 0 {
		cpu = *resource.NewQuantity(d.config.CPUs, resource.DecimalSI)
	}
	cpu = cpu.DeepCopy()
	cpu.Add(resource.MustParse("50m"))
	return cpu
}
