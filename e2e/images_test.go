package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// tag gives an image of the registry inside the cluster a tag.
func (c *cluster) tag(t *testing.T, addr, tag string, image v1.Image) {
	t.Helper()
	ref, err := name.ParseReference(addr + "/testapp:" + tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
}

// imageOf is what an injected pod fetches.
func imageOf(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	for _, c := range pod.Spec.InitContainers {
		if c.Name == initbootContainer {
			for _, e := range c.Env {
				if e.Name == "CLOISTER_IMAGE" {
					return e.Value
				}
			}
		}
	}
	t.Fatalf("pod %s is not injected", pod.Name)
	return ""
}

// config is a cloister.dev/config with one line.
func config(line string) string {
	return "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n" + line + "\n"
}

// A tag becomes the digest that it has at admission; the pod keeps that when the tag moves, and a client
// that has pinned the file verifies it.
func TestTagMoves(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	addr, stop, err := forward(t.Context(), "cloister-registry", "service/registry", 5000)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	c.tag(t, addr, ns.name, c.app)
	first, err := c.app.Digest()
	if err != nil {
		t.Fatal(err)
	}

	pod := c.appPod(t, "tagged")
	image := registryHost + "/testapp:" + ns.name
	pod.Spec.Containers[0].Image = image
	out, err := exec.CommandContext(t.Context(), "kubectl", "-n", ns.name, "apply", "-f", writeFile(t, "pod.yaml", toYAML(t, pod))).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Warning: the tag of app is "+first.String()[:19]) || !strings.Contains(string(out), "cloister pin") {
		t.Fatalf("kubectl apply: %v: %s", err, out)
	}
	ns.ready(t, "tagged", 1)
	if got := imageOf(t, ns.pod(t, "tagged")); got != image+"@"+first.String() {
		t.Errorf("the pod runs %s, want digest %s", got, first)
	}

	// The file, pinned by way of the port-forward: PCR16 holds the digest, and nothing of the repository.
	pod.Spec.Containers[0].Image = addr + "/testapp:" + ns.name
	pinned := c.cloister(t, "pin", "-f", writeFile(t, "pod.yaml", toYAML(t, pod)), "--plain-http-registries", addr)
	if pinned.code != 0 {
		t.Fatalf("cloister pin: exit code %d: %s", pinned.code, pinned.stderr)
	}
	measured := c.cloister(t, "measure", "-f", writeFile(t, "pinned.yaml", []byte(pinned.stdout)), "--eif", c.eif)
	if measured.code != 0 {
		t.Fatalf("cloister measure: exit code %d: %s", measured.code, measured.stderr)
	}
	set := writeFile(t, "set.json", []byte(measured.stdout))
	at := ns.forward(t, "pod/tagged", 8080)
	c.answer(t, at, set, "/")

	other, err := mutate.Config(c.app, v1.Config{Entrypoint: []string{"/testapp"}, Cmd: []string{"serve"}, Labels: map[string]string{"moved": "yes"}})
	if err != nil {
		t.Fatal(err)
	}
	c.tag(t, addr, ns.name, other)
	second, err := other.Digest()
	if err != nil {
		t.Fatal(err)
	}
	pod.Name, pod.Spec.Containers[0].Image = "later", image
	eventually(t, 90*time.Second, "the tag has its new digest", func() (bool, string) {
		got := imageOf(t, submit(t, ns, pod))
		return got == image+"@"+second.String(), got
	})
	if got := imageOf(t, ns.pod(t, "tagged")); got != image+"@"+first.String() {
		t.Errorf("the pod that runs has %s now", got)
	}
	c.answer(t, at, set, "/")
}

// A tag that has no digest is denied in time, with what to do.
func TestTagDenied(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	silent, ready := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-pause", "1h")
	defer silent.stop(t)
	private, port := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-user", "reader:password")
	defer private.stop(t)
	node := c.nodeAddr(t)
	for title, tt := range map[string]struct {
		image, config string
		want          []string
	}{
		"pin: never":         {registryHost + "/testapp:e2e", "pin: never", []string{"pin: never takes no tag", "cloister pin -f FILE"}},
		"no such tag":        {registryHost + "/testapp:none", "", []string{"has no testapp:none", "cloister pin -f FILE"}},
		"silent registry":    {node + ":" + strings.TrimPrefix(ready, "ready ") + "/testapp:e2e", "", []string{"does not answer in time", "cloister pin -f FILE"}},
		"closed port":        {node + ":1/testapp:e2e", "", []string{"cannot be reached", "cloister pin -f FILE"}},
		"private registry":   {node + ":" + strings.TrimPrefix(port, "ready ") + "/testapp:e2e", "", []string{"refuses access to testapp", "cloister pin -f FILE"}},
		"unknown authority":  {"kubernetes.default.svc.cluster.local:443/testapp:e2e", "", []string{"has a certificate that is not trusted"}},
		"cloud's metadata":   {"169.254.169.254:80/testapp:e2e", "", []string{"cannot be reached"}},
		"the webhook's node": {"127.0.0.1:8080/testapp:e2e", "", []string{"cannot be reached"}},
		"nobody's name":      {"registry.nowhere.svc.cluster.local:5000/testapp:e2e", "", []string{"has a name that does not resolve"}},
	} {
		t.Run(title, func(t *testing.T) {
			pod := c.appPod(t, "denied")
			pod.Spec.Containers[0].Image = tt.image
			if tt.config != "" {
				pod.Annotations["cloister.dev/config"] = config(tt.config)
			}
			_, err := c.kube.CoreV1().Pods(ns.name).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err == nil {
				t.Fatal("it was admitted")
			}
			// The API server gives up after 5 s, with another error.
			for _, want := range append(tt.want, "denied the request") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the answer lacks %q: %v", want, err)
				}
			}
		})
	}
}

// The webhook and initboot know the authorities of the registries of the world.
func TestAuthorities(t *testing.T) {
	c := e2e(t)
	system := &namespace{c, "cloister-system"}
	list, err := c.kube.CoreV1().Pods(system.name).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=cloister-webhook"})
	if err != nil || len(list.Items) == 0 {
		t.Fatalf("%d pods of the webhook: %v", len(list.Items), err)
	}
	ns := c.namespace(t, true)
	ns.create(t, c.appPod(t, "app"))
	app := ns.ready(t, "app", 1)[0]
	for container, pid := range map[string]string{
		"webhook":         system.pid(t, &list.Items[0], "webhook", "/webhook"),
		initbootContainer: ns.pid(t, &app, initbootContainer, "/initboot serve"),
	} {
		if got := strings.TrimSpace(c.onNode(t, `grep -c BEGIN /proc/$1/root/etc/ssl/certs/ca-certificates.crt`, pid)); len(got) < 3 {
			t.Errorf("%s has %s authorities", container, got)
		}
	}
}

// pullSecret makes a Secret with credentials for a registry.
func (ns *namespace) pullSecret(t *testing.T, secret, registry, user, password string) {
	t.Helper()
	content := fmt.Sprintf(`{"auths":{%q:{"username":%q,"password":%q}}}`, registry, user, password)
	_, err := ns.kube.CoreV1().Secrets(ns.name).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: secret},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: []byte(content)},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// An image in a private registry is fetched with the pod's pull secrets, as the kubelet would; a pod
// without them says what is missing. What is measured is the same.
func TestPullSecrets(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	private, ready := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-user", "reader:password")
	defer private.stop(t)
	host := c.nodeAddr(t) + ":" + strings.TrimPrefix(ready, "ready ")
	ns.pullSecret(t, "wrong", host, "reader", "guess")
	ns.pullSecret(t, "right", host, "reader", "password")

	pod := c.appPod(t, "private")
	pod.Spec.Containers[0].Image = c.appRef(t, host)
	pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "missing"}, {Name: "wrong"}, {Name: "right"}}
	set, entry := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "private", 1)
	c.answer(t, ns.forward(t, "pod/private", 8080), set, "/")
	if logs := ns.logs(t, "private", initbootContainer); strings.Contains(logs, "guess") || strings.Contains(logs, "reader") {
		t.Errorf("initboot logs a credential: %s", logs)
	}
	// Only initboot sees them.
	running := ns.pod(t, "private")
	for _, l := range [][]corev1.Container{running.Spec.InitContainers, running.Spec.Containers} {
		for _, container := range l {
			for _, m := range container.VolumeMounts {
				if m.Name == "cloister-pull-secrets" && container.Name != initbootContainer {
					t.Errorf("%s mounts the pull secrets", container.Name)
				}
			}
		}
	}
	ns.remove(t, "private")

	for title, tt := range map[string]struct {
		secrets []corev1.LocalObjectReference
		want    string
	}{
		"without":    {nil, "imagePullSecrets have none for it: add a Secret of the type kubernetes.io/dockerconfigjson"},
		"with-wrong": {[]corev1.LocalObjectReference{{Name: "wrong"}}, "with the credentials that the pod's imagePullSecrets have for it: correct them"},
	} {
		t.Run(title, func(t *testing.T) {
			pod := c.appPod(t, title)
			pod.Spec.Containers[0].Image = c.appRef(t, host)
			pod.Spec.ImagePullSecrets = tt.secrets
			if _, other := c.measure(t, pod); other.PCR16 != entry.PCR16 {
				t.Error("pull secrets change PCR16")
			}
			ns.create(t, pod)
			defer ns.remove(t, title)
			eventually(t, bootTime, "the pod says why it waits", func() (bool, string) {
				events, err := c.kube.CoreV1().Events(ns.name).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + title})
				if err != nil {
					t.Fatal(err)
				}
				var seen []string
				for _, e := range events.Items {
					seen = append(seen, e.Message)
				}
				all := strings.Join(seen, "; ")
				return strings.Contains(all, tt.want), all
			})
		})
	}
}

// installed is the ConfigMap that the webhook is configured by.
func (c *cluster) installed(t *testing.T) map[string]string {
	t.Helper()
	d, err := c.kube.AppsV1().Deployments("cloister-system").Get(t.Context(), "cloister-webhook", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, from := range d.Spec.Template.Spec.Containers[0].EnvFrom {
		if from.ConfigMapRef != nil {
			m, err := c.kube.CoreV1().ConfigMaps("cloister-system").Get(t.Context(), from.ConfigMapRef.Name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return m.Data
		}
	}
	t.Fatal("the webhook has no ConfigMap")
	return nil
}

// What `cloister inject` makes of a file is what the webhook makes of the pods, passes the webhook in a labelled
// namespace, and runs; the service account's pull secrets, which come later, are used too.
func TestInjectedOffline(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	private, ready := c.start(t, "registry", "-upstream", "http://"+c.registryAddr(t), "-user", "reader:password")
	defer private.stop(t)
	host := c.nodeAddr(t) + ":" + strings.TrimPrefix(ready, "ready ")
	for key, value := range c.installed(t) {
		t.Setenv(key, value)
	}
	pod := c.appPod(t, "offline")
	pod.Spec.Containers[0].Image = c.appRef(t, host)
	set, _ := c.measure(t, pod)

	// Byte for byte: the pod as the API server hands it to the webhook, which it stores as it comes back.
	unlabelled := c.namespace(t, false)
	whole := submit(t, unlabelled, pod)
	whole.TypeMeta = pod.TypeMeta
	whole.ManagedFields, whole.UID, whole.Namespace = nil, "", ""
	by := submit(t, ns, whole)
	r := c.cloister(t, "inject", "-f", writeFile(t, "pod.yaml", toYAML(t, whole)))
	if r.code != 0 {
		t.Fatalf("cloister inject: exit code %d: %s", r.code, r.stderr)
	}
	var offline corev1.Pod
	if err := yaml.Unmarshal([]byte(r.stdout), &offline); err != nil {
		t.Fatal(err)
	}
	defaulted := submit(t, ns, &offline)
	if diff := cmp.Diff(by.Spec, defaulted.Spec); diff != "" {
		t.Errorf("injected offline (-webhook +offline):\n%s", diff)
	}
	if diff := cmp.Diff(by.Annotations, defaulted.Annotations); diff != "" {
		t.Errorf("annotations (-webhook +offline):\n%s", diff)
	}

	// Where no webhook looks, it runs too.
	public := c.appPod(t, "public")
	r = c.cloister(t, "inject", "-f", writeFile(t, "public.yaml", toYAML(t, public)))
	if r.code != 0 {
		t.Fatalf("cloister inject: exit code %d: %s", r.code, r.stderr)
	}
	output(t, "kubectl", "-n", unlabelled.name, "apply", "-f", writeFile(t, "injected.yaml", []byte(r.stdout)))
	unlabelled.ready(t, "public", 1)
	c.answer(t, unlabelled.forward(t, "pod/public", 8080), set, "/")
	unlabelled.remove(t, "public")

	// A Deployment, before the service account has a pull secret for it.
	r = c.cloister(t, "inject", "-f", writeFile(t, "deployment.yaml", toYAML(t, deployment(pod, 1))))
	if r.code != 0 {
		t.Fatalf("cloister inject: exit code %d: %s", r.code, r.stderr)
	}
	ns.pullSecret(t, "right", host, "reader", "password")
	account, err := c.kube.CoreV1().ServiceAccounts(ns.name).Get(t.Context(), "default", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	account.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "right"}}
	if _, err := c.kube.CoreV1().ServiceAccounts(ns.name).Update(t.Context(), account, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	output(t, "kubectl", "-n", ns.name, "apply", "-f", writeFile(t, "injected.yaml", []byte(r.stdout)))
	made := ns.ready(t, "offline", 1)[0]
	c.answer(t, ns.forward(t, "pod/"+made.Name, 8080), set, "/")
	// The same command again has nothing to do.
	stored, err := json.Marshal(&made)
	if err != nil {
		t.Fatal(err)
	}
	var object map[string]any
	if err := json.Unmarshal(stored, &object); err != nil {
		t.Fatal(err)
	}
	object["kind"] = "Pod"
	again := c.cloister(t, "inject", "-o", "patch", "-f", writeFile(t, "stored.yaml", toYAML(t, object)))
	if again.code != 0 || strings.TrimSpace(again.stdout) != "[]" {
		t.Errorf("a second pass: exit code %d, patch %s: %s", again.code, again.stdout, again.stderr)
	}
}
