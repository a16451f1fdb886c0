package e2e

import (
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// registryAddr is the address of the registry inside the cluster, as its node reaches it.
func (c *cluster) registryAddr(t *testing.T) string {
	t.Helper()
	s, err := c.kube.CoreV1().Services("cloister-registry").Get(t.Context(), "registry", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s.Spec.ClusterIP + ":5000"
}

// nodeAddr is the node's address, as its pods reach it.
func (c *cluster) nodeAddr(t *testing.T) string {
	t.Helper()
	n, err := c.kube.CoreV1().Nodes().Get(t.Context(), c.node, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	t.Fatal("the node has no address")
	return ""
}

// An image that is not what its digest says, or that is not there, never starts, and the pod that
// waits for it says why.
func TestWrongImage(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	layers, err := c.app.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digests := make([]v1.Hash, len(layers))
	for i, l := range layers {
		if digests[i], err = l.Digest(); err != nil {
			t.Fatal(err)
		}
	}
	manifest, err := c.app.Digest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := c.app.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	absent := "sha256:" + strings.Repeat("ab", 32)

	for name, tt := range map[string]struct {
		registry []string // flags of a registry that is wrong; nil for the real one
		digest   string   // of the image; empty for the right one
		want     string   // digest that the pod complains of
	}{
		"flipped-layer":    {[]string{"-flip", digests[0].String()}, "", digests[0].Hex},
		"other-layer":      {[]string{"-swap", digests[0].String() + "=" + digests[1].String()}, "", digests[0].Hex},
		"flipped-config":   {[]string{"-flip", config.String()}, "", config.Hex},
		"flipped-manifest": {[]string{"-flip", manifest.String()}, "", manifest.Hex},
		"not-found":        {nil, absent, strings.TrimPrefix(absent, "sha256:")},
	} {
		t.Run(name, func(t *testing.T) {
			pod := c.appPod(t, name)
			host := registryHost
			if tt.registry != nil {
				wrong, ready := c.start(t, append([]string{"registry", "-upstream", "http://" + c.registryAddr(t)}, tt.registry...)...)
				defer wrong.stop(t)
				host = c.nodeAddr(t) + ":" + strings.TrimPrefix(ready, "ready ")
			}
			pod.Spec.Containers[0].Image = c.appRef(t, host)
			if tt.digest != "" {
				pod.Spec.Containers[0].Image = host + "/testapp@" + tt.digest
			}
			ns.create(t, pod)
			defer ns.remove(t, name)
			eventually(t, bootTime, "the pod says why it waits", func() (bool, string) {
				events, err := c.kube.CoreV1().Events(ns.name).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
				if err != nil {
					t.Fatal(err)
				}
				var seen []string
				for _, e := range events.Items {
					if e.Type == corev1.EventTypeWarning && strings.Contains(e.Message, tt.want) {
						return true, ""
					}
					seen = append(seen, e.Message)
				}
				return false, strings.Join(seen, "; ")
			})
			if said := output(t, "kubectl", "-n", ns.name, "describe", "pod", name); !strings.Contains(said, tt.want) {
				t.Errorf("kubectl describe lacks %s: %s", tt.want, said)
			}
			pod = ns.pod(t, name)
			app := container(pod, "app")
			if app.State.Running == nil || app.Started != nil && *app.Started || isReady(pod) {
				t.Errorf("the pod does not wait: %s", state(pod))
			}
			if logs := ns.logs(t, name, "app"); strings.Contains(logs, "testapp") {
				t.Errorf("the workload ran: %s", logs)
			}
			if got := c.onNode(t, `for p in /proc/[0-9]*; do tr '\0' ' ' <$p/cmdline 2>/dev/null | grep -q '^/testapp' && grep -q "$1" $p/cgroup && echo $p; done; true`, string(pod.UID)); got != "" {
				t.Errorf("a process of the workload exists: %s", got)
			}
		})
	}
}

// Once the registry has the image, the pod that waited for it starts by itself.
func TestImageComesLater(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	wrong, ready := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-missing", "10s")
	defer wrong.stop(t)
	pod := c.appPod(t, "app")
	pod.Spec.Containers[0].Image = c.appRef(t, c.nodeAddr(t)+":"+strings.TrimPrefix(ready, "ready "))
	ns.create(t, pod)
	started := time.Now()
	p := ns.ready(t, "app", 1)[0]
	if waited := time.Since(started); waited < 8*time.Second {
		t.Errorf("ready after %s, but the image was not there before 10 s", waited)
	}
	if n := container(&p, "app").RestartCount; n != 0 {
		t.Errorf("the console was restarted %d times", n)
	}
}

// A host that changes layers on their way into the enclave, behind every check of its own, gains nothing:
// the enclave refuses them, and takes them as soon as they are right.
func TestHostChangesLayers(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	// An init container of the pod's own holds the pod between boot and run.
	pod.Spec.Volumes = []corev1.Volume{{Name: "gate", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	pod.Spec.InitContainers = []corev1.Container{{
		Name: "gate", Image: localImage, ImagePullPolicy: corev1.PullNever, Args: []string{"wait", "/gate/open"},
		VolumeMounts: []corev1.VolumeMount{{Name: "gate", MountPath: "/gate"}},
	}}
	ns.create(t, pod)
	eventually(t, bootTime, "the pod's own init container runs", func() (bool, string) {
		p := ns.pod(t, "app")
		return len(p.Status.InitContainerStatuses) == 3 && container(p, "gate").State.Running != nil, state(p)
	})
	volumes := "/var/lib/kubelet/pods/" + string(ns.pod(t, "app").UID) + "/volumes/kubernetes.io~empty-dir/"
	host, _ := c.start(t, "tamper", volumes+"cloister-run/vsock/1")
	c.onNode(t, `touch "$1"`, volumes+"gate/open")

	layers, err := c.app.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, bootTime, "the pod says why it waits", func() (bool, string) {
		said := output(t, "kubectl", "-n", ns.name, "describe", "pod", "app")
		return strings.Contains(said, "Startup probe failed") && strings.Contains(said, digest.Hex), said
	})
	if logs := ns.logs(t, "app", "app"); strings.Contains(logs, "testapp") {
		t.Errorf("the workload ran: %s", logs)
	}
	host.stop(t)
	ns.ready(t, "app", 1)
}
