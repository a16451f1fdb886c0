package e2e

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/webhook/inject/injecttest"
)

// A real API server takes every pod as injection makes it: those of the goldens, and pods as other
// projects write them, which are no part of the repository.
func TestAccepted(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, false)
	pods := map[string]*corev1.Pod{}
	decoded := func(text []byte) *corev1.Pod {
		pod := &corev1.Pod{}
		if err := json.Unmarshal(text, pod); err != nil {
			t.Fatal(err)
		}
		return pod
	}
	goldens, err := filepath.Glob("../webhook/inject/testdata/*/want.yaml")
	if err != nil || len(goldens) < 20 {
		t.Fatalf("%d goldens, %v", len(goldens), err)
	}
	for _, file := range goldens {
		pods[filepath.Base(filepath.Dir(file))] = decoded(readPod(t, file))
	}
	vectors := injecttest.Vectors(t, "..")
	process := nitro
	process.Driver = inject.DriverProcess
	for name, text := range vectors {
		if pod := patched(t, decoded(text), process); pod != nil {
			pods[name] = pod
		}
	}
	if len(vectors) > 0 && len(pods) == len(goldens) {
		t.Error("none of the pods of other projects is injected")
	}
	for name, sent := range pods {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// What the namespace lacks, and what admission would add.
			no := false
			if sent.Name == "" {
				sent.GenerateName = "pod-"
			}
			sent.Namespace, sent.UID, sent.ResourceVersion = "", "", ""
			sent.Spec.ServiceAccountName, sent.Spec.DeprecatedServiceAccount, sent.Spec.AutomountServiceAccountToken = "", "", &no
			sent.Spec.Tolerations, sent.Spec.Priority, sent.Spec.PriorityClassName, sent.Spec.NodeName = nil, nil, "", ""
			got, err := c.kube.CoreV1().Pods(ns.name).Create(t.Context(), sent, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err != nil {
				t.Fatal(err)
			}
			if err := within(t, sent.Spec, got.Spec); err != nil {
				t.Errorf("the API server has changed it: %v", err)
			}
		})
	}
}

func readPod(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := yaml.YAMLToJSON(b)
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// Pods of every kind of owner run, and each attests what `cloister measure` says of the owner's YAML.
// That of the StatefulSet has everything that stands around a container.
func TestKinds(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	meta := func(kind string) (metav1.TypeMeta, metav1.ObjectMeta) {
		version := "apps/v1"
		if kind == "CronJob" {
			version = "batch/v1"
		}
		return metav1.TypeMeta{APIVersion: version, Kind: kind}, metav1.ObjectMeta{Name: strings.ToLower(kind)}
	}

	const hostPort = 18443
	shape := c.appPod(t, "statefulset")
	shape.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\negress: [\"10.255.255.1:5432\"]\n"
	app := &shape.Spec.Containers[0]
	app.Ports[0].HostPort = hostPort
	app.VolumeMounts = []corev1.VolumeMount{
		{Name: "data", MountPath: "/data"}, {Name: "data", MountPath: "/srv/www", SubPath: "public", ReadOnly: true},
	}
	shape.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	shape.Spec.HostAliases = []corev1.HostAlias{{IP: "10.255.255.1", Hostnames: []string{"db", "db.internal"}}}
	whole := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("300m"), corev1.ResourceMemory: resource.MustParse("640Mi")}
	shape.Spec.Resources = &corev1.ResourceRequirements{Requests: whole, Limits: corev1.ResourceList{corev1.ResourceMemory: whole[corev1.ResourceMemory]}}
	beside := func(name, addr string) corev1.Container {
		return corev1.Container{Name: name, Image: localImage, ImagePullPolicy: corev1.PullNever, Command: []string{"/testapp", "serve", "-listen", addr}}
	}
	native := beside("native", ":8081")
	always := corev1.ContainerRestartPolicyAlways
	native.RestartPolicy = &always
	native.StartupProbe = httpProbe("/check/up", 8081)
	native.StartupProbe.FailureThreshold = 60
	shape.Spec.InitContainers = []corev1.Container{native}
	shape.Spec.Containers = append(shape.Spec.Containers, beside("other", ":8082"))
	stateful := &appsv1.StatefulSet{Spec: appsv1.StatefulSetSpec{Selector: &metav1.LabelSelector{MatchLabels: shape.Labels}, Template: template(shape)}}
	stateful.TypeMeta, stateful.ObjectMeta = meta("StatefulSet")

	onEach := c.appPod(t, "daemonset")
	daemon := &appsv1.DaemonSet{Spec: appsv1.DaemonSetSpec{Selector: &metav1.LabelSelector{MatchLabels: onEach.Labels}, Template: template(onEach)}}
	daemon.TypeMeta, daemon.ObjectMeta = meta("DaemonSet")

	cron := &batchv1.CronJob{Spec: batchv1.CronJobSpec{Schedule: "* * * * *", ConcurrencyPolicy: batchv1.ForbidConcurrent}}
	cron.TypeMeta, cron.ObjectMeta = meta("CronJob")
	cron.Spec.JobTemplate.Spec = job(c.appPod(t, "cronjob", "exit", "0"), corev1.RestartPolicyNever, 0).Spec

	bare := c.appPod(t, "")
	bare.GenerateName, bare.Labels = "generated-", map[string]string{"app": "generated"}

	owned := deployment(c.appPod(t, "deployment"), 1)
	for _, o := range []any{cron, stateful, daemon, owned, bare} {
		ns.create(t, o)
	}

	for name, object := range map[string]any{"statefulset": stateful, "daemonset": daemon, "deployment": owned, "generated": bare} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			set, _ := c.measure(t, object)
			pod := ns.ready(t, name, 1)[0]
			addr := ns.forward(t, "pod/"+pod.Name, 8080)
			if got := c.answer(t, addr, set, "/echo?hello"); got != "hello" {
				t.Errorf("answer %q", got)
			}
			if name != "statefulset" {
				return
			}
			c.answer(t, addr, set, "/note?file=/data/public/page&text=hello")
			if got := c.answer(t, addr, set, "/read?file=/srv/www/page"); !strings.HasPrefix(got, "hello ") {
				t.Errorf("the other mount of the volume shows %q", got)
			}
			if got := c.answer(t, addr, set, "/read?file=/etc/hosts"); !strings.Contains(got, "10.255.255.1\tdb\tdb.internal\n") {
				t.Errorf("/etc/hosts is %q", got)
			}
			onNode := net.JoinHostPort(pod.Status.HostIP, strconv.Itoa(hostPort))
			if got := c.answer(t, onNode, set, "/echo?node"); got != "node" {
				t.Errorf("answer at the node's port %q", got)
			}
			if pod.Status.QOSClass != corev1.PodQOSBurstable {
				t.Errorf("QoS class %s", pod.Status.QOSClass)
			}
		})
	}
	t.Run("cronjob", func(t *testing.T) {
		t.Parallel()
		eventually(t, bootTime+bootTime, "a job of the CronJob succeeds", func() (bool, string) {
			pods := ns.pods(t, "cronjob")
			for _, p := range pods {
				if p.Status.Phase == corev1.PodSucceeded && container(&p, sidecarContainer).State.Terminated != nil {
					return true, ""
				}
			}
			if len(pods) == 0 {
				return false, "no pod yet"
			}
			return false, state(&pods[0])
		})
	})
}
