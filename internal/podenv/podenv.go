// Package podenv names what the webhook writes into a pod and the injected containers find there:
// environment, ports and folders. It holds constants only, so that webhook/inject stays pure.
package podenv

// EnvPrefix begins the names of all variables that are injected; a pod can set none that begins with it.
const EnvPrefix = "CLOISTER_"

// Environment of initboot.
const (
	EnvManifest     = EnvPrefix + "MANIFEST"      // the workload manifest, canonical JSON
	EnvImage        = EnvPrefix + "IMAGE"         // the workload's image reference, by digest
	EnvMemory       = EnvPrefix + "MEMORY"        // the enclave's memory in bytes, a decimal number
	EnvCPUs         = EnvPrefix + "CPUS"          // the enclave's vCPUs, a decimal number; unset with the process driver
	EnvPluginImages = EnvPrefix + "PLUGIN_IMAGES" // JSON array of image references, by digest; unset for none

	// The pod, where telemetry carries it.
	EnvPodName      = EnvPrefix + "POD_NAME"
	EnvPodNamespace = EnvPrefix + "POD_NAMESPACE"
	EnvPodUID       = EnvPrefix + "POD_UID"
)

// Environment of the console. What the kubelet resolves for the workload stands there under names that mean
// nothing to the console itself, to its runtime and to whatever else sets variables in a container. The kubelet
// sets some for each Service of the namespace, all in upper case: a Service "cloister-env-x" makes a
// CLOISTER_ENV_X_SERVICE_HOST (k8s.io/kubernetes/pkg/kubelet/envvars).
const (
	EnvValue = EnvPrefix + "env_"  // and the name of a variable of the pod's env
	EnvFrom  = EnvPrefix + "from_" // and the name of a variable of its envFrom

	EnvMounts = EnvPrefix + "MOUNTS" // JSON array of paths whose files the workload gets; unset for none
)

// Environment of the sidecar.
const (
	EnvPorts     = EnvPrefix + "PORTS"      // JSON array of the port numbers on which Envoy listens
	EnvEgress    = EnvPrefix + "EGRESS"     // JSON array of "host:port" that the enclave may reach; unset for none
	EnvAWSRegion = EnvPrefix + "AWS_REGION" // of the KMS that the enclave uses; unset where it uses none
)

// Ports of the pod that its containers cannot have.
const (
	ConsolePort = 14021 // the console answers the kubelet's probes
	SidecarPort = 14022 // the sidecar's readiness and metrics
)

// Folders in our containers, each a volume.
const (
	RunDir     = "/run/cloister"         // of all three: initboot's sockets
	CacheDir   = "/var/cache/cloister"   // of initboot: image content
	SidecarDir = "/run/cloister-sidecar" // of the sidecar: Envoy's files and sockets
	EIFDir     = "/run/cloister-eif"     // of initboot: the image that holds a sealed EIF

	// PullSecretsDir, of initboot, has a folder for each of the pod's imagePullSecrets, whose name is its
	// place in their list, with a file .dockerconfigjson or .dockercfg.
	PullSecretsDir = "/run/cloister-pull-secrets"
)

// EIFName is the one file in an image that holds an EIF.
const EIFName = "enclave.eif"

// NitroOverhead is what a Nitro enclave gets of huge pages beyond EnvMemory, in bytes: kernel, /init and the
// base EIF itself, which is loaded into the enclave's own memory.
const NitroOverhead = 128 << 20
