package inject

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject/injecttest"
)

// passes returns the strictest level that a pod passes, and what the API server would say of a stricter one.
func passes(t *testing.T, e policy.Evaluator, pod *corev1.Pod) (passed, complaint string) {
	t.Helper()
	for _, l := range levels {
		r := policy.AggregateCheckResults(e.EvaluatePod(api.LevelVersion{Level: api.Level(l), Version: api.LatestVersion()}, &pod.ObjectMeta, &pod.Spec))
		if r.Allowed {
			return l, complaint
		}
		complaint = r.ForbiddenDetail()
	}
	t.Fatal("not even privileged")
	return "", ""
}

// onlyOurs takes what its author wrote, and no injection changes, out of an injected pod.
func onlyOurs(pod *corev1.Pod) {
	author := func(c corev1.Container) bool {
		return !isReserved(c.Name) && c.Name != pod.Annotations[annotation.Enclave]
	}
	pod.Spec.InitContainers = slices.DeleteFunc(pod.Spec.InitContainers, author)
	pod.Spec.Containers = slices.DeleteFunc(pod.Spec.Containers, author)
	pod.Spec.Containers[0].Ports = slices.DeleteFunc(pod.Spec.Containers[0].Ports, func(p corev1.ContainerPort) bool { return p.HostPort != 0 })
	pod.Spec.Volumes = slices.DeleteFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return !isReserved(v.Name) })
}

// TestPodSecurity has the API server's own judge of the Pod Security Standards look at what is injected into
// every golden, with each driver: the level that the webhook names is the strictest that passes.
func TestPodSecurity(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	inputs, err := filepath.Glob("testdata/*/input.yaml")
	if err != nil {
		t.Fatal(err)
	}
	nitro := testOptions
	nitro.Driver, nitro.HugePages = DriverNitro, "2Mi"
	group := nitro
	group.DeviceGroup = 989
	for name, tc := range map[string]struct {
		opts   Options
		levels []string
	}{
		"process":                   {testOptions, []string{levelPrivileged}},
		"nitro":                     {nitro, []string{levelBaseline}},
		"nitro with a device group": {group, []string{levelBaseline, levelRestricted}},
	} {
		t.Run(name, func(t *testing.T) {
			seen := map[string]int{}
			for _, input := range inputs {
				dir := filepath.Base(filepath.Dir(input))
				pod := readPod(t, input)
				ops, _, errs := PatchTagged(t.Context(), pod, tc.opts, injecttest.ResolveTag)
				if len(errs) > 0 || len(ops) == 0 {
					continue
				}
				var injected corev1.Pod
				if err := decode(checkLawOf(t, tc.opts, apply(t, pod, ops), nil), &injected); err != nil {
					t.Fatal(err)
				}
				onlyOurs(&injected)
				passed, complaint := passes(t, evaluator, &injected)
				console := &injected.Spec.Containers[0]
				want, _ := level(tc.opts, isRoot(console))
				if passed != want || !slices.Contains(tc.levels, want) {
					t.Errorf("%s passes %s, the webhook says %s: %s", dir, passed, want, complaint)
				}
				seen[passed]++

				// In a namespace that is stricter than that the pod is denied in both passes, in one that is not in none.
				for i, enforced := range levels {
					opts := tc.opts
					opts.Enforced = enforced
					_, _, first := PatchTagged(t.Context(), pod, opts, injecttest.ResolveTag)
					_, _, second := Patch(apply(t, pod, ops), opts)
					denied := i < slices.Index(levels, passed)
					if (len(first) > 0) != denied || (len(second) > 0) != denied {
						t.Errorf("%s, where %s is enforced: %v, %v", dir, enforced, first, second)
					}
					if denied && !strings.Contains(first[0].Detail, "Pod Security "+enforced+" and what is injected needs "+passed) {
						t.Errorf("%s, where %s is enforced: %v", dir, enforced, first)
					}
				}
			}
			for _, l := range tc.levels {
				if seen[l] == 0 {
					t.Errorf("no golden shows %s: %v", l, seen)
				}
			}
		})
	}
}
