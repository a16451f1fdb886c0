package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

// dryRun has the API server judge a pod, without making it.
var dryRun = metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}

// revision labels the namespace with a revision of the webhook and waits until API servers know.
func (ns *namespace) revision(t *testing.T, rev string, taken func() (bool, string)) {
	t.Helper()
	patch := []byte(`{"metadata":{"labels":{"cloister.dev/rev":"` + rev + `"}}}`)
	if _, err := ns.kube.CoreV1().Namespaces().Patch(t.Context(), ns.name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, time.Minute, "the namespace has another revision", taken)
}

// handMade is what the webhook makes of a pod, as somebody could submit it.
func (ns *namespace) handMade(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	out := submit(t, ns, pod)
	out.ObjectMeta = metav1.ObjectMeta{Name: out.Name, Labels: out.Labels, Annotations: out.Annotations}
	out.Status = corev1.PodStatus{}
	return out
}

// asks that a pod is refused by the policy, with a sentence that has want in it.
func refusedByPolicy(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatal("it was admitted")
	}
	if !strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'cloister' with binding 'cloister' denied request") || !strings.Contains(err.Error(), want) {
		t.Errorf("not what the policy says with %q: %v", want, err)
	}
}

// No webhook takes the pods of this test's namespace, as if it were down and nobody cared: the policy alone
// refuses what was not injected.
func TestPolicyCreate(t *testing.T) {
	c := e2e(t)
	injecting := c.namespace(t, true)
	injected := injecting.handMade(t, c.appPod(t, "app"))
	ns := c.namespace(t, true)
	create := func(pod *corev1.Pod) error {
		_, err := ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), pod, dryRun)
		return err
	}
	ns.revision(t, "nobody", func() (bool, string) {
		err := create(c.appPod(t, "app"))
		return err != nil && strings.Contains(err.Error(), "was not injected"), "it was injected"
	})

	inits := func(p *corev1.Pod) []corev1.Container { return p.Spec.InitContainers }
	app := func(p *corev1.Pod) *corev1.Container { return &p.Spec.Containers[0] }
	for name, tt := range map[string]struct {
		change func(*corev1.Pod)
		want   string // empty when it is to be admitted
	}{
		"as injected":        {func(*corev1.Pod) {}, ""},
		"before us a mesh":   {func(p *corev1.Pod) { p.Spec.InitContainers = slices.Insert(inits(p), 0, other("mesh-init")) }, ""},
		"between us another": {func(p *corev1.Pod) { p.Spec.InitContainers = slices.Insert(inits(p), 1, other("mesh-proxy")) }, ""},
		"not annotated":      {func(p *corev1.Pod) { *p = *c.appPod(t, "app"); p.Annotations = nil }, ""},
		"not injected":       {func(p *corev1.Pod) { *p = *c.appPod(t, "app") }, "was not injected"},
		"a misspelt one": {func(p *corev1.Pod) {
			*p = *c.appPod(t, "app")
			p.Annotations = map[string]string{"cloister.dev/enclav": "app"}
		}, "was not injected"},
		"in capitals": {func(p *corev1.Pod) {
			*p = *c.appPod(t, "app")
			p.Annotations = map[string]string{"Cloister.dev/enclave": "app"}
		}, "was not injected"},
		"annotation gone":     {func(p *corev1.Pod) { p.Annotations = nil }, "does not name a container"},
		"names another":       {func(p *corev1.Pod) { p.Annotations["cloister.dev/enclave"] = "ap" }, "does not name a container"},
		"without initboot":    {func(p *corev1.Pod) { p.Spec.InitContainers = inits(p)[1:] }, "was not injected"},
		"without sidecar":     {func(p *corev1.Pod) { p.Spec.InitContainers = inits(p)[:1] }, "was not injected"},
		"wrong order":         {func(p *corev1.Pod) { slices.Reverse(inits(p)) }, "must come before"},
		"initboot's image":    {func(p *corev1.Pod) { inits(p)[0].Image = "example.com/initboot:1" }, "the image of cloister-initboot"},
		"sidecar's image":     {func(p *corev1.Pod) { inits(p)[1].Image = inits(p)[0].Image }, "the image of cloister-sidecar"},
		"initboot's command":  {func(p *corev1.Pod) { inits(p)[0].Command[1] = "console" }, "another command"},
		"sidecar's args":      {func(p *corev1.Pod) { inits(p)[1].Args = []string{"--help"} }, "another command"},
		"initboot runs once":  {func(p *corev1.Pod) { inits(p)[0].RestartPolicy, inits(p)[0].StartupProbe = nil, nil }, "restartPolicy Always"},
		"sidecar's probe":     {func(p *corev1.Pod) { inits(p)[1].StartupProbe = nil }, "startupProbe"},
		"no console: image":   {func(p *corev1.Pod) { app(p).Image = c.appRef(t, registryHost) }, "run in the open"},
		"no console: command": {func(p *corev1.Pod) { app(p).Command = []string{"/testapp", "console"} }, "does not run the console"},
		"console's args":      {func(p *corev1.Pod) { app(p).Args = []string{"x"} }, "does not run the console"},
		"mounts of ours": {func(p *corev1.Pod) {
			o := other("spy")
			o.VolumeMounts = []corev1.VolumeMount{{Name: "cloister-run", MountPath: "/run/cloister"}}
			p.Spec.Containers = append(p.Spec.Containers, o)
		}, "for what is injected only"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injected.DeepCopy()
			tt.change(pod)
			err := create(pod)
			if tt.want != "" {
				refusedByPolicy(t, err, tt.want)
			} else if err != nil {
				t.Error(err)
			}
		})
	}
}

// other is a container that is not ours.
func other(name string) corev1.Container {
	return corev1.Container{Name: name, Image: localImage, Args: []string{"serve"}}
}

// Nobody asks the webhook about updates: the policy keeps an injected pod what it is.
func TestPolicyUpdate(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	pod.Spec.NodeSelector = map[string]string{"example.com/node": "none"} // it need not run
	pod.Annotations["example.com/note"] = "a"
	ns.create(t, pod)

	kubectl := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), "kubectl", append([]string{"-n", ns.name}, args...)...).CombinedOutput()
		return string(out), err
	}
	for name, tt := range map[string]struct {
		args []string
		want string // empty when it is to be done
	}{
		"console's image":       {[]string{"set", "image", "pod/app", "app=" + c.appRef(t, registryHost)}, "change the image in the Deployment"},
		"initboot's image":      {[]string{"set", "image", "pod/app", initbootContainer + "=" + localImage}, "never change in a pod"},
		"sidecar's image":       {[]string{"set", "image", "pod/app", sidecarContainer + "=" + localImage}, "never change in a pod"},
		"the annotation goes":   {[]string{"annotate", "pod/app", "cloister.dev/enclave-"}, "read when a pod is created"},
		"another measurement":   {[]string{"annotate", "--overwrite", "pod/app", `cloister.dev/measurements={"PCR16":"00"}`}, "read when a pod is created"},
		"another annotation":    {[]string{"annotate", "pod/app", "cloister.dev/config=x"}, "read when a pod is created"},
		"an annotation of none": {[]string{"annotate", "--overwrite", "pod/app", "example.com/note=b"}, ""},
		"a label":               {[]string{"label", "pod/app", "a=b"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := kubectl(tt.args...)
			if tt.want == "" {
				if err != nil {
					t.Error(out)
				}
			} else if err == nil || !strings.Contains(out, "ValidatingAdmissionPolicy 'cloister'") || !strings.Contains(out, tt.want) {
				t.Errorf("not refused with %q: %v: %s", tt.want, err, out)
			}
		})
	}

	// kubectl debug
	debugger := func(mounts ...corev1.VolumeMount) error {
		p := ns.pod(t, "app")
		p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{
			Name: "debugger", Image: localImage, VolumeMounts: mounts, TerminationMessagePolicy: corev1.TerminationMessageReadFile,
		}})
		_, err := ns.kube.CoreV1().Pods(ns.name).UpdateEphemeralContainers(t.Context(), "app", p, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	refusedByPolicy(t, debugger(corev1.VolumeMount{Name: "cloister-run", MountPath: "/run/cloister"}), "debug without their mounts")
	if err := debugger(); err != nil {
		t.Errorf("debugging without mounts: %v", err)
	}
}

// What the webhook makes of every golden of it that is not denied, the policy admits.
func TestGoldensAdmitted(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	wants, err := filepath.Glob("../webhook/inject/testdata/*/want.yaml")
	if err != nil || len(wants) < 20 {
		t.Fatal(wants, err)
	}
	for _, want := range wants {
		dir := filepath.Dir(want)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			if _, err := os.Stat(filepath.Join(dir, "options.yaml")); err == nil {
				t.Skip("a golden of another installation than this one")
			}
			data, err := os.ReadFile(filepath.Join(dir, "input.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			var pod corev1.Pod
			if err := yaml.Unmarshal(data, &pod); err != nil {
				t.Fatal(err)
			}
			asks := pod.Annotations["cloister.dev/enclave"]
			i := slices.IndexFunc(pod.Spec.Containers, func(c corev1.Container) bool { return c.Name == asks })
			if i >= 0 && !strings.Contains(pod.Spec.Containers[i].Image, "@") {
				t.Skip("a tag of a registry that is not there")
			}
			pod.Namespace, pod.Spec.NodeName = "", ""
			if pod.Name == "" {
				pod.GenerateName = "app-"
			}
			got := submit(t, ns, &pod)
			if i >= 0 && got.Spec.Containers[i].Command[0] != "/initboot" {
				t.Errorf("not injected: %q", got.Spec.Containers[i].Command)
			}
		})
	}
}
