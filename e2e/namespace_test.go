package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

// Names of the containers that injection adds.
const (
	initbootContainer = "cloister-initboot"
	sidecarContainer  = "cloister-sidecar"
)

// appImage is testapp's binary as an image without anything else but a second layer.
func appImage(binary []byte) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, file := range []struct {
		name    string
		content []byte
	}{{"testapp", binary}, {"etc/motd", []byte("a workload of the end-to-end tests\n")}} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&tar.Header{Name: file.name, Mode: 0o755, Size: int64(len(file.content))}); err != nil {
			return nil, err
		}
		w.Write(file.content)
		if err := w.Close(); err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(b.Bytes())), nil
		}, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Entrypoint = []string{"/testapp"}
	config.Config.Cmd = []string{"serve"}
	config.Config.Env = []string{"PATH=/"}
	return mutate.ConfigFile(image, config)
}

// appPod is a pod whose container "app" runs testapp in an enclave and serves port 8080.
func (c *cluster) appPod(t *testing.T, name string, args ...string) *corev1.Pod {
	t.Helper()
	grace, no := int64(6), false
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Labels:      map[string]string{"app": name},
			Annotations: map[string]string{"cloister.dev/enclave": "app"},
		},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			AutomountServiceAccountToken:  &no,
			Containers: []corev1.Container{{
				Name:  "app",
				Image: c.appRef(t, registryHost),
				Args:  args,
				Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}},
				Resources: corev1.ResourceRequirements{
					Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("20m"), corev1.ResourceMemory: resource.MustParse("128Mi")},
					Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("128Mi")},
				},
			}},
		},
	}
}

// nginxPod is a pod whose container "nginx" runs in an enclave and serves port 80.
func (c *cluster) nginxPod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	pod := c.appPod(t, name)
	pod.Annotations["cloister.dev/enclave"] = "nginx"
	nginx := &pod.Spec.Containers[0]
	nginx.Name, nginx.Image = "nginx", c.nginx
	nginx.Ports[0].ContainerPort = 80
	nginx.ReadinessProbe = httpProbe("/", 80)
	nginx.Resources.Limits[corev1.ResourceMemory] = resource.MustParse("256Mi")
	nginx.Resources.Requests[corev1.ResourceMemory] = resource.MustParse("256Mi")
	return pod
}

// httpProbe asks every second and believes the first answer.
func httpProbe(path string, port int) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt(port)}},
		PeriodSeconds: 1, FailureThreshold: 1,
	}
}

// deployment runs replicas of a pod.
func deployment(pod *corev1.Pod, replicas int32) *appsv1.Deployment {
	return &appsv1.Deployment{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"},
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: pod.Labels},
			Template: template(pod),
		},
	}
}

// job runs a pod until it has succeeded or failed limit+1 times.
func job(pod *corev1.Pod, policy corev1.RestartPolicy, limit int32) *batchv1.Job {
	j := &batchv1.Job{
		TypeMeta:   metav1.TypeMeta{APIVersion: "batch/v1", Kind: "Job"},
		ObjectMeta: metav1.ObjectMeta{Name: pod.Name},
		Spec:       batchv1.JobSpec{BackoffLimit: &limit, Template: template(pod)},
	}
	j.Spec.Template.Spec.RestartPolicy = policy
	return j
}

func template(pod *corev1.Pod) corev1.PodTemplateSpec {
	return corev1.PodTemplateSpec{
		ObjectMeta: metav1.ObjectMeta{Labels: pod.Labels, Annotations: pod.Annotations},
		Spec:       pod.Spec,
	}
}

// service is a Service for the pods of an appPod or nginxPod.
func service(name string, port int) *corev1.Service {
	return &corev1.Service{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: map[string]string{"app": name},
			Ports:    []corev1.ServicePort{{Port: 443, TargetPort: intstr.FromInt(port)}},
		},
	}
}

func toYAML(t *testing.T, object any) []byte {
	t.Helper()
	b, err := yaml.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// namespace is one test's namespace. It goes when the test ends.
type namespace struct {
	*cluster
	name string
}

// namespace makes a namespace with injection, or without.
func (c *cluster) namespace(t *testing.T, injection bool) *namespace {
	t.Helper()
	labels := map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}
	if injection {
		labels["cloister.dev/injection"] = "enabled"
	}
	return c.labelled(t, labels)
}

// labelled makes a namespace with these labels.
func (c *cluster) labelled(t *testing.T, labels map[string]string) *namespace {
	t.Helper()
	made, err := c.kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "e2e-", Labels: labels},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ns := &namespace{c, made.Name}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			ns.dump(ctx, t)
		}
		if err := c.kube.CoreV1().Namespaces().Delete(ctx, ns.name, metav1.DeleteOptions{}); err != nil {
			t.Errorf("delete namespace: %v", err)
		}
	})
	// Pods are refused until the controller has made this account.
	eventually(t, time.Minute, "default service account", func() (bool, string) {
		_, err := c.kube.CoreV1().ServiceAccounts(ns.name).Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil, fmt.Sprint(err)
	})
	return ns
}

// dump logs what a person needs to see why a test failed.
func (ns *namespace) dump(ctx context.Context, t *testing.T) {
	show := func(args ...string) {
		out, _ := exec.CommandContext(ctx, "kubectl", append([]string{"-n", ns.name}, args...)...).CombinedOutput()
		t.Logf("kubectl %s\n%s", strings.Join(args, " "), out)
	}
	show("describe", "pods")
	pods, err := ns.kube.CoreV1().Pods(ns.name).List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Log(err)
		return
	}
	for _, p := range pods.Items {
		show("logs", p.Name, "--all-containers", "--prefix", "--tail=60")
		for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
			if s.RestartCount > 0 {
				show("logs", p.Name, "-c", s.Name, "--previous", "--tail=30")
			}
		}
	}
}

// create submits a Pod, Service or an owner of pods.
func (ns *namespace) create(t *testing.T, object any) {
	t.Helper()
	var err error
	switch o := object.(type) {
	case *corev1.Pod:
		_, err = ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *corev1.Service:
		_, err = ns.kube.CoreV1().Services(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *appsv1.Deployment:
		_, err = ns.kube.AppsV1().Deployments(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *appsv1.StatefulSet:
		_, err = ns.kube.AppsV1().StatefulSets(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *appsv1.DaemonSet:
		_, err = ns.kube.AppsV1().DaemonSets(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *batchv1.CronJob:
		_, err = ns.kube.BatchV1().CronJobs(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	case *batchv1.Job:
		_, err = ns.kube.BatchV1().Jobs(ns.name).Create(t.Context(), o, metav1.CreateOptions{})
	default:
		t.Fatalf("create %T", object)
	}
	if err != nil {
		t.Fatalf("create %T: %v", object, err)
	}
}

// pod reads a pod.
func (ns *namespace) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	pod, err := ns.kube.CoreV1().Pods(ns.name).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// remove deletes a pod that has done its part, unless its test failed: the node has room for few.
func (ns *namespace) remove(t *testing.T, name string) {
	t.Helper()
	if t.Failed() {
		return
	}
	if err := ns.kube.CoreV1().Pods(ns.name).Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// pods lists the pods of an app that are not being deleted.
func (ns *namespace) pods(t *testing.T, app string) []corev1.Pod {
	t.Helper()
	list, err := ns.kube.CoreV1().Pods(ns.name).List(t.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		t.Fatal(err)
	}
	var alive []corev1.Pod
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			alive = append(alive, p)
		}
	}
	return alive
}

// bootTime is the most that a pod may take to become ready on a busy machine.
const bootTime = 3 * time.Minute

// ready waits until n pods of an app exist and all are ready.
func (ns *namespace) ready(t *testing.T, app string, n int) []corev1.Pod {
	t.Helper()
	var pods []corev1.Pod
	eventually(t, bootTime, fmt.Sprintf("%d ready pods of %s", n, app), func() (bool, string) {
		pods = ns.pods(t, app)
		ok := len(pods) == n
		var seen []string
		for _, p := range pods {
			ok = ok && isReady(&p)
			seen = append(seen, p.Name+" "+state(&p))
		}
		return ok, strings.Join(seen, ", ")
	})
	return pods
}

func isReady(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// state is one line about a pod's containers.
func state(p *corev1.Pod) string {
	s := string(p.Status.Phase)
	for _, c := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		s += fmt.Sprintf(" %s(started=%t ready=%t restarts=%d)", c.Name, c.Started != nil && *c.Started, c.Ready, c.RestartCount)
	}
	return s
}

// container is the status of a container of a pod, or of one of its sidecars. Before the kubelet has written
// it nothing is ready and nothing was restarted.
func container(p *corev1.Pod, name string) corev1.ContainerStatus {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == name {
			return s
		}
	}
	return corev1.ContainerStatus{Name: name}
}

// logs is everything that the present container of that name has printed.
func (ns *namespace) logs(t *testing.T, pod, container string) string {
	t.Helper()
	b, err := ns.kube.CoreV1().Pods(ns.name).GetLogs(pod, &corev1.PodLogOptions{Container: container}).DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// forward opens a port of a pod ("pod/x") or Service ("service/x") on 127.0.0.1 until the test ends.
func (ns *namespace) forward(t *testing.T, target string, port int) (addr string) {
	t.Helper()
	addr, stop, err := forward(t.Context(), ns.name, target, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	return addr
}

// pid finds, on the node, the process of a container whose command line begins with command.
func (ns *namespace) pid(t *testing.T, pod *corev1.Pod, containerName, command string) string {
	t.Helper()
	_, id, _ := strings.Cut(container(pod, containerName).ContainerID, "://")
	found := ns.onNode(t, `for p in /proc/[0-9]*; do
		grep -qs "$1" $p/cgroup || continue
		case "$(tr '\0' ' ' <$p/cmdline)" in "$2"|"$2 "*) echo ${p#/proc/};; esac
	done`, id, command)
	pids := strings.Fields(found)
	if len(pids) != 1 {
		t.Fatalf("%d processes %q in container %s of %s: %v", len(pids), command, containerName, pod.Name, pids)
	}
	return pids[0]
}
