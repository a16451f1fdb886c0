package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/workload"
)

// sealedEIF is a sealed EIF in the registry inside the cluster.
type sealedEIF struct {
	file   string
	digest string // of its image
	layer  string // digest of that image's only layer
	entry  workload.Measurement
}

// seal builds and pushes the sealed EIF of a pod; registry is the registry's address here.
func (c *cluster) seal(t *testing.T, registry string, pod *corev1.Pod) sealedEIF {
	t.Helper()
	plain := "--plain-http-registries=" + registry
	build := func() string {
		out := filepath.Join(t.TempDir(), "app.eif")
		r := c.cloister(t, "build", "--image", c.appRef(t, registry), plain, "-f", writeFile(t, "pod.yaml", toYAML(t, pod)), "--base", c.eif, "--output", out)
		if r.code != 0 {
			t.Fatalf("cloister build: exit code %d: %s", r.code, r.stderr)
		}
		return out
	}
	s := sealedEIF{file: build()}
	first, err := os.ReadFile(s.file)
	if err != nil {
		t.Fatal(err)
	}
	second, err := os.ReadFile(build())
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, second) {
		t.Error("two builds differ")
	}

	pushed := c.cloister(t, "eif", "push", s.file, registry+"/sealed:e2e", plain)
	if pushed.code != 0 {
		t.Fatalf("cloister eif push: exit code %d: %s", pushed.code, pushed.stderr)
	}
	ref, err := name.NewDigest(strings.TrimSpace(pushed.stdout))
	if err != nil {
		t.Fatal(err)
	}
	s.digest = ref.DigestStr()
	image, err := remote.Image(ref, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	s.layer = layer.String()

	measured := c.cloister(t, "measure", "--eif", s.file)
	if measured.code != 0 {
		t.Fatalf("cloister measure: exit code %d: %s", measured.code, measured.stderr)
	}
	set, err := workload.ParseMeasurements([]byte(measured.stdout))
	if err != nil {
		t.Fatal(err)
	}
	s.entry = set[0]
	s.entry.PCR0 = "" // PCR1 and PCR2 say as much
	return s
}

// boots returns a copy of a pod that boots from an EIF in an image.
func boots(pod *corev1.Pod, name, eif string) *corev1.Pod {
	pod = pod.DeepCopy()
	pod.Name, pod.Labels["app"] = name, name
	pod.Annotations["cloister.dev/config"] = config("eif: " + eif)
	return pod
}

// A sealed EIF runs by digest, from the kubelet's image volume. A client that pins it by PCR1, PCR2 and
// PCR16 talks to that enclave alone; the image's own registry is never asked.
func TestSealed(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	addr, stop, err := forward(t.Context(), "cloister-registry", "service/registry", 5000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	// The node's container runtime asks registries at loopback addresses without TLS.
	mirror := func(flags ...string) string {
		r, ready := c.start(t, append([]string{"registry", "-upstream", "http://" + c.registryAddr(t)}, flags...)...)
		t.Cleanup(func() { r.stop(t) })
		return "127.0.0.1:" + strings.TrimPrefix(ready, "ready ") + "/sealed@"
	}
	right := mirror()

	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].Image = c.appRef(t, "127.0.0.1:1") // where nobody is
	pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "COLOR", Value: ns.name}}
	sealed := c.seal(t, addr, pod)
	t.Cleanup(func() { // without t's context, which has ended by then
		script := `ctr -n k8s.io images ls -q | grep /sealed@ | xargs -r ctr -n k8s.io images rm`
		if out, err := exec.Command("docker", "exec", c.node, "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Errorf("remove images from the node: %v: %s", err, out)
		}
	})
	set := setFile(t, sealed.entry)
	ns.create(t, boots(pod, "app", right+sealed.digest))
	p := ns.ready(t, "app", 1)[0]
	if got := c.answer(t, ns.forward(t, "pod/app", 8080), set, "/echo?hello"); got != "hello" {
		t.Errorf("the sealed enclave answers %q", got)
	}
	volumes := "/var/lib/kubelet/pods/" + string(p.UID) + "/volumes/kubernetes.io~empty-dir/"
	if got := c.onNode(t, `find "$1" -type f`, volumes+"cloister-cache"); got != "" {
		t.Errorf("initboot has fetched %s", got)
	}

	// The same YAML without `eif`: the same workload in another enclave.
	base := pod.DeepCopy()
	base.Name, base.Labels["app"] = "base", "base"
	base.Spec.Containers[0].Image = c.appRef(t, registryHost)
	if _, entry := c.measure(t, base); entry.PCR16 != sealed.entry.PCR16 || entry.PCR1 != sealed.entry.PCR1 {
		t.Errorf("base and sealed EIF have other workloads: %+v, %+v", entry, sealed.entry)
	}
	ns.create(t, base)

	// Another sealed EIF.
	another := pod.DeepCopy()
	another.Spec.Containers[0].Env[0].Value += "-2"
	other := c.seal(t, addr, another)

	// The host changes it on its way: the kubelet has no such image.
	ns.create(t, boots(another, "flipped", mirror("-flip", other.layer)+other.digest))
	waits := func(name, why string) {
		t.Helper()
		eventually(t, bootTime, "pod "+name+" says why it waits", func() (bool, string) {
			said := output(t, "kubectl", "-n", ns.name, "describe", "pod", name)
			return strings.Contains(said, why), said
		})
		if isReady(ns.pod(t, name)) {
			t.Errorf("pod %s is ready", name)
		}
	}
	waits("flipped", "Failed to pull image")
	ns.remove(t, "flipped")

	ns.create(t, boots(another, "other", right+other.digest))
	// Not the one of this YAML.
	ns.create(t, boots(pod, "mixed", right+other.digest))
	for _, name := range []string{"base", "other"} {
		ns.ready(t, name, 1)
		if r := c.curl(t, ns.forward(t, "pod/"+name, 8080), set, "/"); r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "PCR2") {
			t.Errorf("%s: exit code %d, stdout %q, stderr %s", name, r.code, r.stdout, r.stderr)
		}
	}
	c.answer(t, ns.forward(t, "pod/other", 8080), setFile(t, other.entry), "/")
	waits("mixed", "the EIF is sealed with another workload manifest, of PCR16 "+other.entry.PCR16)
}
