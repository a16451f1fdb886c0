package inject

import (
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/config"
	"cloister.dev/cloister/workload"
)

// credentialEnv are variables of AWS's credentials. In a pod that uses KMS those with a valueFrom are for
// the sidecar, which holds the pod's identity; a literal one is the workload's, and measured.
var credentialEnv = []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}

func isCredential(e corev1.EnvVar) bool {
	return e.ValueFrom != nil && slices.Contains(credentialEnv, e.Name)
}

// addIdentity gives the sidecar what the container c has of the pod's identity at AWS, so that it can hand
// the enclave credentials for KMS.
func addIdentity(side *corev1.Container, c *corev1.Container) {
	for _, e := range c.Env {
		if cloudEnv(e.Name) || isCredential(e) {
			side.Env = append(side.Env, e)
		}
	}
	for _, m := range c.VolumeMounts {
		if cloudMount(m.MountPath) {
			side.VolumeMounts = append(side.VolumeMounts, m)
		}
	}
}

// kmsAccess is what the host gets to know and to do where KMS is used.
func kmsAccess(m *workload.Manifest) []string {
	if m.KMS == nil {
		return nil
	}
	return []string{
		"the host can read: names, sizes and times of requests to KMS, and which secrets there are",
		"the host can use: the pod's AWS credentials; the key's policy must refuse them without this attestation",
	}
}

// compareKMS reports a config whose secrets were changed after the manifest was made from it.
func (p *problems) compareKMS(at *field.Path, cfg *config.EnclaveConfig, m *workload.Manifest) {
	for _, f := range []struct {
		name       string
		want, have any
	}{{"secrets", cfg.Secrets, m.Secrets}, {"kms", cfg.KMS, m.KMS}, {"tls", cfg.TLS, m.TLS}} {
		if !reflect.DeepEqual(f.want, f.have) {
			p.forbid(at.Child(f.name), "it is not what was injected")
		}
	}
}
