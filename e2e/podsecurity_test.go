package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	jsonpatch "github.com/evanphx/json-patch/v5"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/manifests/seccomp"
	"cloister.dev/cloister/webhook/inject"
)

// nitro is an installation on Nitro hardware, of which this cluster has none: pods of that shape are accepted
// here, and never run.
var nitro = inject.Options{Driver: inject.DriverNitro, HugePages: "2Mi", InitbootImage: "initboot", SidecarImage: "sidecar"}

// patched is a pod after injection, or nil for one that is denied.
func patched(t *testing.T, pod *corev1.Pod, opts inject.Options) *corev1.Pod {
	t.Helper()
	before, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	ops, _, errs := inject.Patch(before, opts)
	if len(errs) > 0 || len(ops) == 0 {
		return nil
	}
	text, err := json.Marshal(ops)
	if err != nil {
		t.Fatal(err)
	}
	patch, err := jsonpatch.DecodePatch(text)
	if err != nil {
		t.Fatal(err)
	}
	after, err := patch.Apply(before)
	if err != nil {
		t.Fatal(err)
	}
	out := &corev1.Pod{}
	if err := json.Unmarshal(after, out); err != nil {
		t.Fatal(err)
	}
	return out
}

// conform makes what the author has beside the enclave pass restricted.
func conform(pod *corev1.Pod) {
	yes, no, uid := true, false, int64(1000)
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Name == pod.Annotations["cloister.dev/enclave"] {
				continue
			}
			list[i].SecurityContext = &corev1.SecurityContext{
				RunAsNonRoot: &yes, RunAsUser: &uid, AllowPrivilegeEscalation: &no,
				Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			}
		}
	}
}

// TestPodSecurity: where Pod Security enforces baseline, and restricted, the API server takes what is injected
// for Nitro hardware; what the development driver needs is denied there, by the webhook and in its words.
func TestPodSecurity(t *testing.T) {
	c := e2e(t)
	goldens, err := filepath.Glob("../webhook/inject/testdata/*/input.yaml")
	if err != nil || len(goldens) < 20 {
		t.Fatalf("%d goldens, %v", len(goldens), err)
	}
	// The webhook of this cluster has another driver and does not see these namespaces.
	baseline := c.labelled(t, map[string]string{inject.EnforceLabel: "baseline"})
	restricted := c.labelled(t, map[string]string{inject.EnforceLabel: "restricted"})
	group := nitro
	group.DeviceGroup = 989
	dryRun := func(t *testing.T, ns *namespace, pod *corev1.Pod) error {
		no, sent := false, pod.DeepCopy()
		sent.Namespace, sent.GenerateName = "", "pod-"
		sent.Spec.ServiceAccountName, sent.Spec.DeprecatedServiceAccount, sent.Spec.AutomountServiceAccountToken = "", "", &no
		_, err := ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), sent, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	accepted := map[string]int{}
	for _, file := range goldens {
		golden := filepath.Base(filepath.Dir(file))
		var pod corev1.Pod
		if err := json.Unmarshal(readPod(t, file), &pod); err != nil {
			t.Fatal(err)
		}
		conform(&pod)
		for _, tt := range []struct {
			name string
			opts inject.Options
			ns   *namespace
		}{{"baseline", nitro, baseline}, {"restricted", group, restricted}} {
			tt.opts.Enforced = tt.name
			injected := patched(t, &pod, tt.opts)
			if injected == nil || golden == "host-port" { // a port of the node is the author's own wish
				continue
			}
			t.Run(golden+" in "+tt.name, func(t *testing.T) {
				if err := dryRun(t, tt.ns, injected); err != nil {
					t.Error(err)
				}
				accepted[tt.name]++
			})
		}
	}
	for _, level := range []string{"baseline", "restricted"} {
		if accepted[level] < 20 {
			t.Errorf("only %d pods were tried where %s is enforced", accepted[level], level)
		}
	}

	// The API server can refuse: the levels are no stricter than they must be, and no laxer.
	process := nitro
	process.Driver = inject.DriverProcess
	for name, tt := range map[string]struct {
		opts inject.Options
		ns   *namespace
	}{
		"nitro without a device group in restricted": {nitro, restricted},
		"process in baseline":                        {process, baseline},
	} {
		t.Run(name, func(t *testing.T) {
			err := dryRun(t, tt.ns, patched(t, c.appPod(t, "app"), tt.opts))
			if err == nil || !strings.Contains(err.Error(), "violates PodSecurity") {
				t.Errorf("the API server says %v", err)
			}
		})
	}

	for _, level := range []string{"baseline", "restricted"} {
		t.Run("the webhook in "+level, func(t *testing.T) {
			ns := c.labelled(t, map[string]string{inject.EnforceLabel: level, "cloister.dev/injection": "enabled"})
			want := "metadata.namespace: Forbidden: it enforces Pod Security " + level + " and what is injected needs privileged"
			// The webhook sees the namespace a moment later than the API server. Until then Pod Security itself refuses.
			eventually(t, time.Minute, "a denial that names the level", func() (bool, string) {
				err := dryRun(t, ns, c.appPod(t, "app"))
				if err == nil {
					t.Fatal("the pod is accepted")
				}
				return strings.Contains(err.Error(), want), err.Error()
			})
		})
	}
}

// TestSeccompProfile: with the profile that ships, a container that is confined like the sidecar can make an
// AF_VSOCK socket; with the runtime's own it cannot, which is why the profile is needed.
func TestSeccompProfile(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	initboot := submit(t, ns, c.appPod(t, "app")).Spec.InitContainers[0].Image
	b, err := os.ReadFile("../manifests/seccomp/daemonset.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(b, &set); err != nil {
		t.Fatal(err)
	}
	set.Namespace = ns.name
	set.Spec.Template.Spec.Containers[0].Image = initboot
	const file = "/var/lib/kubelet/seccomp/profiles/" + seccomp.Name
	c.onNode(t, `rm -f "$1"`, file)
	t.Cleanup(func() { // the test's context is over by then
		if out, err := exec.Command("docker", "exec", c.node, "rm", "-f", file).CombinedOutput(); err != nil {
			t.Errorf("remove the profile: %v: %s", err, out)
		}
	})
	if _, err := ns.kube.AppsV1().DaemonSets(ns.name).Create(t.Context(), &set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, bootTime, "the profile on the node", func() (bool, string) {
		got := c.onNode(t, `cat "$1" 2>/dev/null || true`, file)
		return got == string(seccomp.Profile), got
	})

	// As nitro's sidecar, in a namespace that enforces restricted.
	restricted := c.labelled(t, map[string]string{inject.EnforceLabel: "restricted"})
	group := nitro
	group.DeviceGroup = 989
	sidecar := patched(t, c.appPod(t, "app"), group).Spec.InitContainers[1]
	runtimeDefault := *sidecar.SecurityContext
	runtimeDefault.SeccompProfile = &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}
	for name, tt := range map[string]struct {
		security *corev1.SecurityContext
		refused  bool
	}{
		"shipped":         {sidecar.SecurityContext, false},
		"runtime-default": {&runtimeDefault, true},
	} {
		t.Run(name, func(t *testing.T) {
			pod := c.appPod(t, name, "vsock")
			pod.Annotations, pod.Spec.RestartPolicy = nil, corev1.RestartPolicyNever
			app := &pod.Spec.Containers[0]
			app.Image, app.ImagePullPolicy, app.SecurityContext = localImage, corev1.PullNever, tt.security
			restricted.create(t, pod)
			eventually(t, bootTime, "the end of the pod", func() (bool, string) {
				p := restricted.pod(t, name)
				return p.Status.Phase == corev1.PodSucceeded, state(p)
			})
			// A kernel without vsock may refuse too, with another error.
			said := restricted.logs(t, name, "app")
			if !strings.Contains(said, "testapp: socket: ") || strings.Contains(said, "operation not permitted") != tt.refused {
				t.Errorf("it says %q", said)
			}
		})
	}
}
