package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// foreign is what another injector adds to a pod.
type foreign struct {
	inits, containers []corev1.Container
	env               []corev1.EnvVar      // of each container
	mounts            []corev1.VolumeMount // of each container
	volumes           []corev1.Volume
	annotations       map[string]string
}

// foreignOf reads it from the golden of an injector: all that the golden of the plain pod has not. The images of
// these injectors cannot be pulled here. So testapp stands in for them: everything about their containers is theirs
// but the image, the command and the paths that probes ask for.
func foreignOf(t *testing.T, golden string) foreign {
	t.Helper()
	read := func(name string) (pod corev1.Pod) {
		if err := json.Unmarshal(readPod(t, filepath.Join("../webhook/inject/testdata", name, "input.yaml")), &pod); err != nil {
			t.Fatal(err)
		}
		return pod
	}
	plain, with := read("deployment-completed-by-the-api-server"), read(golden)
	f := foreign{annotations: map[string]string{}}
	standIn := func(c corev1.Container) corev1.Container {
		run := []string{"/testapp", "exists", "/testapp"}
		c.Image, c.ImagePullPolicy, c.Args = localImage, corev1.PullNever, nil
		if c.Lifecycle != nil {
			c.Lifecycle.PostStart.Exec.Command = run
		}
		if c.StartupProbe != nil {
			c.StartupProbe.HTTPGet.Path = "/check/up"
		}
		c.Command = run
		if port := map[string]string{"istio-proxy": ":15020,:15090", "linkerd-proxy": ":4191"}[c.Name]; port != "" {
			c.Command = []string{"/testapp", "serve", "-listen", port}
		}
		return c
	}
	for _, c := range with.Spec.InitContainers {
		f.inits = append(f.inits, standIn(c))
	}
	app := plain.Spec.Containers[0]
	for _, c := range with.Spec.Containers {
		if c.Name != app.Name {
			f.containers = append(f.containers, standIn(c))
			continue
		}
		for _, e := range c.Env {
			if !slices.ContainsFunc(app.Env, func(p corev1.EnvVar) bool { return p.Name == e.Name }) {
				f.env = append(f.env, e)
			}
		}
		for _, m := range c.VolumeMounts {
			if !slices.ContainsFunc(app.VolumeMounts, func(p corev1.VolumeMount) bool { return p.MountPath == m.MountPath }) {
				f.mounts = append(f.mounts, m)
			}
		}
	}
	for _, v := range with.Spec.Volumes {
		if !slices.ContainsFunc(plain.Spec.Volumes, func(p corev1.Volume) bool { return p.Name == v.Name }) {
			f.volumes = append(f.volumes, v)
		}
	}
	for k, v := range with.Annotations {
		if _, ok := plain.Annotations[k]; !ok {
			f.annotations[k] = v
		}
	}
	if len(f.inits)+len(f.env) == 0 || len(f.volumes) == 0 {
		t.Fatalf("%s adds nothing", golden)
	}
	return f
}

// before has the injector come before ours: the pod is submitted with it.
func (f foreign) before(pod *corev1.Pod) {
	spec := &pod.Spec
	for i := range spec.Containers {
		spec.Containers[i].Env = append(spec.Containers[i].Env, f.env...)
		spec.Containers[i].VolumeMounts = append(spec.Containers[i].VolumeMounts, f.mounts...)
	}
	spec.InitContainers, spec.Containers = slices.Concat(f.inits, spec.InitContainers), slices.Concat(f.containers, spec.Containers)
	spec.Volumes = append(spec.Volumes, f.volumes...)
	for k, v := range f.annotations {
		pod.Annotations[k] = v
	}
}

// after is the injector's patch of a pod that is injected already.
func (f foreign) after(injected *corev1.Pod) (patch []map[string]any) {
	add := func(path string, value any) {
		patch = append(patch, map[string]any{"op": "add", "path": path, "value": value})
	}
	for list, containers := range map[string][]corev1.Container{"initContainers": injected.Spec.InitContainers, "containers": injected.Spec.Containers} {
		for i, c := range containers {
			if len(f.env) > 0 {
				add(fmt.Sprintf("/spec/%s/%d/env", list, i), slices.Concat(c.Env, f.env))
			}
			if len(f.mounts) > 0 {
				add(fmt.Sprintf("/spec/%s/%d/volumeMounts", list, i), slices.Concat(c.VolumeMounts, f.mounts))
			}
		}
	}
	if slices.ContainsFunc(f.containers, func(c corev1.Container) bool { return c.Name == "istio-proxy" }) { // it asks in the kubelet's stead
		add("/spec/containers/0/readinessProbe/httpGet", corev1.HTTPGetAction{Path: "/check/app", Port: intstr.FromInt(15020)})
	}
	for _, c := range slices.Backward(f.inits) {
		add("/spec/initContainers/0", c)
	}
	for _, c := range slices.Backward(f.containers) {
		add("/spec/containers/0", c)
	}
	for _, v := range f.volumes {
		add("/spec/volumes/-", v)
	}
	for k, v := range f.annotations {
		add("/metadata/annotations/"+strings.ReplaceAll(k, "/", "~1"), v)
	}
	return patch
}

// Replicas are equal, whoever else has a hand in them: one set, of the template as its author wrote it, is what all
// of them attest. The API server has completed each, with the token of its service account and with the resources of
// a LimitRange; EKS pod identity, Istio or Linkerd came before our webhook, or after it.
func TestReplicas(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	if _, err := ns.kube.CoreV1().LimitRanges(ns.name).Create(t.Context(), &corev1.LimitRange{
		ObjectMeta: metav1.ObjectMeta{Name: "defaults"},
		Spec: corev1.LimitRangeSpec{Limits: []corev1.LimitRangeItem{{
			Type:           corev1.LimitTypeContainer,
			Default:        corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1"), corev1.ResourceMemory: resource.MustParse("160Mi")},
			DefaultRequest: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("32Mi")},
		}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	written := func(name string) *corev1.Pod {
		pod := c.appPod(t, name)
		pod.Annotations["cloister.dev/config"] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\nmemory: 128Mi\n"
		pod.Spec.AutomountServiceAccountToken = nil
		app := &pod.Spec.Containers[0]
		app.Resources = corev1.ResourceRequirements{}
		app.Env = []corev1.EnvVar{{Name: "COLOR", Value: "green"}}
		app.ReadinessProbe = httpProbe("/check/ready", 8080)
		return pod
	}
	plain := deployment(written("plain"), 2)
	set, _ := c.measure(t, plain)
	ns.create(t, plain)
	injected := submit(t, ns, written("app"))

	pods, patches := []*corev1.Pod{}, map[string]any{}
	for name, golden := range map[string]string{"eks": "eks-pod-identity-before-us", "istio": "istio-before-us", "linkerd": "linkerd-before-us"} {
		f := foreignOf(t, golden)
		before, after := written(name+"-before"), written(name+"-after")
		f.before(before)
		patches[after.Name] = f.after(injected)
		after.Annotations["example.com/injector"] = after.Name
		pods = append(pods, before, after)
	}
	text, err := json.Marshal(patches)
	if err != nil {
		t.Fatal(err)
	}
	_, ready := c.start(t, "mutate", "-patches", string(text))
	ns.mutatingWebhook(t, strings.Fields(ready))
	eventually(t, time.Minute, "the other injectors are asked", func() (bool, string) {
		pod := written("asked")
		pod.Annotations["example.com/injector"] = "linkerd-after"
		names := []string{}
		for _, c := range submit(t, ns, pod).Spec.InitContainers {
			names = append(names, c.Name)
		}
		return slices.Equal(names, []string{"linkerd-init", "linkerd-proxy", initbootContainer, sidecarContainer}), fmt.Sprint(names)
	})
	for _, pod := range pods {
		ns.create(t, pod)
	}

	for name, n := range map[string]int{"plain": 2, "eks-before": 1, "eks-after": 1, "istio-before": 1, "istio-after": 1, "linkerd-before": 1, "linkerd-after": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, pod := range ns.ready(t, name, n) {
				app := pod.Spec.Containers[len(pod.Spec.Containers)-1]
				if app.Resources.Limits.Cpu().String() != "1" {
					t.Errorf("the LimitRange gave the container %v", app.Resources)
				}
				addr := ns.forward(t, "pod/"+pod.Name, 8080)
				eventually(t, bootTime, "an attested answer", func() (bool, string) { // Istio's readiness is not the workload's
					r := c.curl(t, addr, set, "/env?name=COLOR")
					return r.code == 0 && r.stdout == "green", r.stdout + r.stderr
				})
				if got := c.answer(t, addr, set, "/env?name=AWS_ROLE_ARN"); got != "" {
					t.Errorf("AWS_ROLE_ARN is %q inside", got)
				}
				if got := c.answer(t, addr, set, "/read?file=/var/run/secrets/kubernetes.io/serviceaccount/token"); !strings.HasPrefix(got, "error: ") {
					t.Error("the service account's token is inside")
				}
			}
			if name != "plain" {
				ns.remove(t, name)
			}
		})
	}
}
