package e2e

import (
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// hostObjects makes the ConfigMap "settings" and the Secret "keys" of hostPod, and Services for each of which the
// kubelet sets variables whose names look like ours on the console.
func (ns *namespace) hostObjects(t *testing.T) {
	t.Helper()
	settings := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "settings"},
		Data:       map[string]string{"HOST": "db.example", "BOTH": "settings", "FROM": "settings", "app.conf": "one"},
	}
	keys := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "keys"}, StringData: map[string]string{"password": "open sesame", "FROM": "keys"}}
	if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Create(t.Context(), settings, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.kube.CoreV1().Secrets(ns.name).Create(t.Context(), keys, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"cloister-env-x", "cloister-from-x"} {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
		if _, err := ns.kube.CoreV1().Services(ns.name).Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// hostPod has a value of every kind from the host. Its init container leaves a file for the enclave, and
// its container "writer" can make more.
func (c *cluster) hostPod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	pod := c.appPod(t, name)
	pod.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nhostFiles: [/shared]\n"
	settings, keys := corev1.LocalObjectReference{Name: "settings"}, corev1.LocalObjectReference{Name: "keys"}
	field := func(path string) *corev1.EnvVarSource {
		return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
	}
	app := &pod.Spec.Containers[0]
	app.EnvFrom = []corev1.EnvFromSource{
		{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: settings}},
		{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: keys}, Prefix: "SECRET_"},
		{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: keys}},
	}
	app.Env = []corev1.EnvVar{
		{Name: "BOTH", Value: "pod"},
		{Name: "DB", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: settings, Key: "HOST"}}},
		{Name: "PASSWORD", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: keys, Key: "password"}}},
		{Name: "POD", ValueFrom: field("metadata.name")},
		{Name: "IP", ValueFrom: field("status.podIP")},
		{Name: "MEMORY", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Mi")}}},
		{Name: "URL", Value: "https://$(DB)/$(POD)/$(HOST)/$$(POD)"},
	}
	mode := int32(0o400)
	pod.Spec.Volumes = []corev1.Volume{
		{Name: "settings", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: settings}}},
		{Name: "keys", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "keys", DefaultMode: &mode}}},
		{Name: "all", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
			{Secret: &corev1.SecretProjection{LocalObjectReference: keys, Items: []corev1.KeyToPath{{Key: "password", Path: "deep/er/password"}}}},
			{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "vault", Path: "token"}},
		}}}},
		{Name: "podinfo", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
		}}}},
		{Name: "shared", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	}
	app.VolumeMounts = []corev1.VolumeMount{
		{Name: "settings", MountPath: "/etc/app"},
		{Name: "settings", MountPath: "/srv/app.conf", SubPath: "app.conf"},
		{Name: "keys", MountPath: "/srv/password", SubPath: "password"},
		{Name: "all", MountPath: "/srv/all"},
		{Name: "podinfo", MountPath: "/etc/podinfo"},
		{Name: "shared", MountPath: "/shared", ReadOnly: true},
	}
	pod.Spec.InitContainers = []corev1.Container{{
		Name: "render", Image: localImage, Command: []string{"/testapp", "write", "/out/rendered/page", "by the init container"},
		VolumeMounts: []corev1.VolumeMount{{Name: "shared", MountPath: "/out"}},
	}}
	pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{
		Name: "writer", Image: localImage, Command: []string{"/testapp", "serve", "-listen", ":9090"},
		VolumeMounts: []corev1.VolumeMount{{Name: "shared", MountPath: "/out"}},
	})
	return pod
}

// What the kubelet resolves reaches the workload, in each replica, with the kubelet's own precedence; each
// attests what `cloister measure` says of the Deployment. A changed ConfigMap shows inside.
func TestHostValues(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	ns.hostObjects(t)
	d := deployment(c.hostPod(t, "app"), 2)
	set, _ := c.measure(t, d)
	ns.create(t, d)
	pods := ns.ready(t, "app", 2)
	read := func(addr, file string) string { return c.answer(t, addr, set, "/read?file="+url.QueryEscape(file)) }
	addresses := map[string]string{}
	for _, p := range pods {
		addr := ns.forward(t, "pod/"+p.Name, 8080)
		addresses[p.Name] = addr
		for name, want := range map[string]string{
			"HOST": "db.example", "BOTH": "pod", "FROM": "keys", "SECRET_FROM": "keys", "SECRET_password": "open sesame",
			"DB": "db.example", "PASSWORD": "open sesame", "POD": p.Name, "IP": p.Status.PodIP, "MEMORY": "128",
			"URL": "https://db.example/" + p.Name + "/db.example/$(POD)", "KUBERNETES_SERVICE_HOST": "", "X_SERVICE_HOST": "", "HOSTNAME": "enclave",
		} {
			if got := c.answer(t, addr, set, "/env?name="+name); got != want {
				t.Errorf("%s: %s is %q, want %q", p.Name, name, got, want)
			}
		}
		for file, want := range map[string]string{
			"/etc/app/app.conf": "one", "/srv/app.conf": "one", "/srv/password": "open sesame", "/srv/all/deep/er/password": "open sesame",
			"/shared/rendered/page": "by the init container", "/var/run/secrets/kubernetes.io/serviceaccount/token": "error: open /var/run/secrets/kubernetes.io/serviceaccount/token: no such file or directory",
		} {
			if got := read(addr, file); got != want {
				t.Errorf("%s: %s has %q, want %q", p.Name, file, got, want)
			}
		}
		if got := read(addr, "/srv/all/token"); strings.Count(got, ".") != 2 {
			t.Errorf("%s: the projected token is %q", p.Name, got)
		}
		if got := read(addr, "/etc/podinfo/labels"); !strings.Contains(got, `app="app"`) {
			t.Errorf("%s: the downward API says %q", p.Name, got)
		}
	}

	change := []byte(`{"data":{"app.conf":"two","new":"file"}}`)
	if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Patch(t.Context(), "settings", types.MergePatchType, change, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, p := range pods {
		// The kubelet looks at a pod that has changed at once, and else within a minute or two.
		note := []byte(`{"metadata":{"labels":{"changed":"yes"}}}`)
		if _, err := ns.kube.CoreV1().Pods(ns.name).Patch(t.Context(), p.Name, types.MergePatchType, note, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		addr := addresses[p.Name]
		eventually(t, 3*time.Minute, "the changed ConfigMap inside "+p.Name, func() (bool, string) {
			got := read(addr, "/etc/app/app.conf")
			return got == "two" && read(addr, "/etc/app/new") == "file", got
		})
		eventually(t, 3*time.Minute, "the changed labels inside "+p.Name, func() (bool, string) {
			got := read(addr, "/etc/podinfo/labels")
			return strings.Contains(got, `changed="yes"`), got
		})
		plainGet(t, ns.forward(t, "pod/"+p.Name, 9090), "/touch?file=/out/rendered/late")
		eventually(t, time.Minute, "the other container's file inside "+p.Name, func() (bool, string) {
			got := read(addr, "/shared/rendered/late")
			return got == "" && read(addr, "/shared/rendered/page") == "by the init container", got
		})
		if got := read(addr, "/srv/app.conf"); got != "one" {
			t.Errorf("%s: the file of a subPath changed to %q, which it does not in any pod", p.Name, got)
		}
	}
	for _, p := range ns.pods(t, "app") {
		if n := container(&p, "app").RestartCount; n != 0 {
			t.Errorf("%s was restarted %d times", p.Name, n)
		}
	}
}

// Nearly as much as is accepted arrives, at the start and when one part of it changes, with the memory that
// the console has.
func TestHostValuesLarge(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "large")
	projected := &corev1.ProjectedVolumeSource{}
	for i := range 7 {
		name := fmt.Sprint("part-", i)
		part := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{name: strings.Repeat("x", 1_000_000)}}
		if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Create(t.Context(), part, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		projected.Sources = append(projected.Sources, corev1.VolumeProjection{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: name}}})
	}
	pod.Spec.Volumes = []corev1.Volume{{Name: "large", VolumeSource: corev1.VolumeSource{Projected: projected}}}
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "large", MountPath: "/srv/large"}}
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "large", 1)
	addr := ns.forward(t, "pod/large", 8080)
	for i := range 7 {
		if got := c.answer(t, addr, set, fmt.Sprint("/read?file=/srv/large/part-", i)); len(got) != 1_000_000 {
			t.Errorf("part %d has %d bytes", i, len(got))
		}
	}
	if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Patch(t.Context(), "part-3", types.MergePatchType, []byte(`{"data":{"part-3":"small"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := ns.kube.CoreV1().Pods(ns.name).Patch(t.Context(), "large", types.MergePatchType, []byte(`{"metadata":{"labels":{"changed":"yes"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 3*time.Minute, "the changed ConfigMap", func() (bool, string) {
		got := c.answer(t, addr, set, "/read?file=/srv/large/part-3")
		return got == "small", fmt.Sprint(len(got), " bytes")
	})
	if s := container(ns.pod(t, "large"), "app"); s.RestartCount != 0 {
		t.Errorf("the console was restarted %d times: %+v", s.RestartCount, s.LastTerminationState)
	}
}

// A workload that is not root reads a Secret that the kubelet gives to its group, as in any pod.
func TestHostFilesOfAGroup(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	ns.hostObjects(t)
	pod := c.appPod(t, "group")
	uid, group, mode := int64(1000), int64(2000), int32(0o400)
	pod.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &uid, RunAsNonRoot: new(true), FSGroup: &group}
	pod.Spec.Volumes = []corev1.Volume{{Name: "keys", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "keys", DefaultMode: &mode}}}}
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "keys", MountPath: "/etc/keys"}}
	set, _ := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "group", 1)
	if got := c.answer(t, ns.forward(t, "pod/group", 8080), set, "/read?file=/etc/keys/password"); got != "open sesame" {
		t.Errorf("the Secret has %q", got)
	}
}

// The token of the pod's service account is in the enclave if the config says so.
func TestServiceAccountToken(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	const file = "/read?file=/var/run/secrets/kubernetes.io/serviceaccount/"
	for name, given := range map[string]bool{"with": true, "without": false} {
		pod := c.appPod(t, name)
		pod.Spec.AutomountServiceAccountToken = nil
		if given {
			pod.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nserviceAccountToken: true\n"
		}
		set, _ := c.measure(t, pod)
		ns.create(t, pod)
		ns.ready(t, name, 1)
		addr := ns.forward(t, "pod/"+name, 8080)
		token, namespace := c.answer(t, addr, set, file+"token"), c.answer(t, addr, set, file+"namespace")
		if given && (strings.Count(token, ".") != 2 || namespace != ns.name) || !given && !strings.HasPrefix(token, "error: ") {
			t.Errorf("%s: token %q, namespace %q", name, token, namespace)
		}
		ns.remove(t, name)
	}
}

// A name that only the ConfigMap knows is refused inside, and the pod says why.
func TestHostNameRefused(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	evil := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "evil"}, Data: map[string]string{"LD_PRELOAD": "/etc/evil.so", "FINE": "fine", "GODEBUG": "x"}}
	if _, err := ns.kube.CoreV1().ConfigMaps(ns.name).Create(t.Context(), evil, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := c.appPod(t, "refused")
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	pod.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "evil"}}}}
	ns.create(t, pod)
	eventually(t, bootTime, "the end of the pod", func() (bool, string) {
		p := ns.pod(t, "refused")
		return p.Status.Phase == corev1.PodFailed, state(p)
	})
	end := container(ns.pod(t, "refused"), "app").State.Terminated
	for _, want := range []string{"env LD_PRELOAD cannot be supplied by the host", "env GODEBUG cannot be supplied by the host", "hostEnv"} {
		if end == nil || end.ExitCode != 125 || !strings.Contains(end.Message, want) {
			t.Errorf("it ended with %+v, want %q", end, want)
		}
	}
	if end != nil && strings.Contains(end.Message, "/etc/evil.so") {
		t.Errorf("a value is in the message: %s", end.Message)
	}
	if logs := ns.logs(t, "refused", "app"); strings.Contains(logs, "started") {
		t.Errorf("the workload has run: %s", logs)
	}

	allowed := c.appPod(t, "allowed")
	allowed.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nhostEnv: [LD_PRELOAD, GODEBUG]\n"
	allowed.Spec.Containers[0].EnvFrom = pod.Spec.Containers[0].EnvFrom
	set, _ := c.measure(t, allowed)
	ns.create(t, allowed)
	ns.ready(t, "allowed", 1)
	if got := c.answer(t, ns.forward(t, "pod/allowed", 8080), set, "/env?name=LD_PRELOAD"); got != "/etc/evil.so" {
		t.Errorf("with hostEnv it is %q", got)
	}
}
