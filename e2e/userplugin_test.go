package e2e

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// A plugin that is no part of this repository's programs, docs/examples/pathguard, refuses a path.
func TestUserPlugin(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	limits := corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("384Mi")}
	pod.Spec.Containers[0].Resources.Limits = limits
	pod.Spec.Containers[0].Resources.Requests[corev1.ResourceMemory] = limits[corev1.ResourceMemory]
	image := setting(t, "CLOISTER_PATHGUARD_IMAGE")
	plugin := map[string]any{
		"name": "pathguard", "type": "authentication", "image": image, "timeout": "2s",
		"headers": []string{"x-path-checked"}, "config": map[string]any{"refuse": []string{"/env"}},
	}
	enclaveConfig(pod, map[string]any{"plugins": []any{plugin}})
	d := deployment(pod, 1)
	set, entry := c.measure(t, d)

	// Its image is measured by digest, wherever it comes from.
	elsewhere := pod.DeepCopy()
	elsewhere.Annotations["cloister.dev/config"] = strings.ReplaceAll(pod.Annotations["cloister.dev/config"], registryHost, "mirror.example")
	if _, same := c.measure(t, deployment(elsewhere, 1)); same.PCR16 != entry.PCR16 {
		t.Error("another repository with the same digest changes PCR16")
	}
	another := pod.DeepCopy()
	digest := image[strings.Index(image, "sha256:"):]
	another.Annotations["cloister.dev/config"] = strings.ReplaceAll(pod.Annotations["cloister.dev/config"], digest, "sha256:"+strings.Repeat("0", 64))
	if _, changed := c.measure(t, deployment(another, 1)); changed.PCR16 == entry.PCR16 {
		t.Error("another image of the plugin does not change PCR16")
	}

	ns.create(t, d)
	p := ns.ready(t, "app", 1)[0]
	addr := ns.forward(t, "pod/"+p.Name, 8080)
	for _, path := range []string{"/env?name=PATH", "/env/", "/%65nv?name=PATH", "//env?name=PATH", "/echo/../env?name=PATH"} {
		a := c.request(t, addr, set, path)
		if a.status != 403 || a.body != "this path is closed\n" || !strings.Contains(a.header, "x-refused-by: pathguard") {
			t.Errorf("%s: status %d, %s, %q", path, a.status, a.header, a.body)
		}
	}
	a := c.request(t, addr, set, "/headers", "X-Path-Checked: by myself")
	if a.status != 200 || !strings.Contains(a.body, `"X-Path-Checked":["yes"]`) {
		t.Errorf("another path: status %d, %s", a.status, a.body)
	}
	// It runs beside the workload, as nobody: without root and with no way out.
	pid := ns.pid(t, &p, initbootContainer, "python3 /opt/pathguard/pathguard.py")
	if uids := strings.Fields(c.onNode(t, `grep ^Uid: /proc/"$1"/status`, pid)); uids[1] != "65536" {
		t.Errorf("it runs as uid %s", uids[1])
	}
	if devices := strings.Fields(c.onNode(t, `sed -n 's/^ *\([^:]*\):.*/\1/p' /proc/"$1"/net/dev`, pid)); !slices.Equal(devices, []string{"lo"}) {
		t.Errorf("it has the network devices %q", devices)
	}
}
