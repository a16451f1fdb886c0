package inject

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/config"
)

// TestSecondPassOfHost changes what the console carries for the workload.
func TestSecondPassOfHost(t *testing.T) {
	console := func(p *corev1.Pod) *corev1.Container {
		return &p.Spec.Containers[slices.IndexFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == "web" })]
	}
	for name, tc := range map[string]struct {
		pod    string
		change func(p *corev1.Pod)
		denied string // part of a sentence; empty: the pod stays as it is
	}{
		"nothing about env":   {pod: "host-supplied-env", change: func(*corev1.Pod) {}},
		"nothing about files": {pod: "host-supplied-files", change: func(*corev1.Pod) {}},
		"others add env and mounts": {pod: "host-supplied-env", change: func(p *corev1.Pod) {
			c := console(p)
			c.Env = append([]corev1.EnvVar{{Name: "PASSWORD", Value: "x"}}, c.Env...)
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "istio", MountPath: "/var/run/istio"})
		}},
		"API server's defaults": {pod: "host-supplied-env", change: func(p *corev1.Pod) {
			for i := range console(p).Env {
				if v := console(p).Env[i].ValueFrom; v != nil && v.FieldRef != nil {
					v.FieldRef.APIVersion = "v1"
				}
			}
		}},
		"variable lost": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) { console(p).Env = console(p).Env[1:] },
			denied: "CLOISTER_env_HOST, which was injected, is gone",
		},
		"variable twice": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) { console(p).Env = append(console(p).Env, console(p).Env[0]) },
			denied: "CLOISTER_env_HOST is not what is injected",
		},
		"variable added": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) {
				console(p).Env = append(console(p).Env, corev1.EnvVar{Name: "CLOISTER_env_LD_PRELOAD", Value: "/evil.so"})
			},
			denied: "CLOISTER_env_LD_PRELOAD is not what is injected",
		},
		"variable of envFrom added": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) {
				console(p).Env = append(console(p).Env, corev1.EnvVar{Name: "CLOISTER_from_X", Value: "x"})
			},
			denied: "CLOISTER_from_X is not what is injected",
		},
		"envFrom lost": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) { console(p).EnvFrom = nil },
			denied: "envFrom: Forbidden: what was injected is gone",
		},
		"envFrom without our prefix": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) { console(p).EnvFrom[0].Prefix = "" },
			denied: "it could set variables that begin with CLOISTER_",
		},
		"envFrom where there was none": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) {
				console(p).EnvFrom = []corev1.EnvFromSource{{Prefix: "CLOISTER_from_", ConfigMapRef: &corev1.ConfigMapEnvSource{}}}
			},
			denied: "it could set variables that begin with CLOISTER_",
		},
		"mount lost": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) {
				console(p).VolumeMounts = slices.DeleteFunc(console(p).VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/etc/app/" })
			},
			denied: "the mount at /etc/app, whose files the enclave needs, is gone",
		},
		"mount of another subPath": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) {
				for i := range console(p).VolumeMounts {
					if m := &console(p).VolumeMounts[i]; m.SubPath != "" {
						m.SubPath = "other.pem"
					}
				}
			},
			denied: "the mount at /srv/tls/key.pem, whose files the enclave needs, is gone",
		},
		"list of mounts": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) { console(p).Env[0].Value = `["/etc/app"]` },
			denied: "CLOISTER_MOUNTS is not what is injected",
		},
		"hostEnv in the config": {
			pod: "host-supplied-env", change: func(p *corev1.Pod) {
				p.Annotations[annotation.Config] = strings.Replace(p.Annotations[annotation.Config], "HTTPS_PROXY", "LD_PRELOAD", 1)
			},
			denied: "hostEnv: Forbidden: it is not what was injected",
		},
		"hostFiles in the config": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) {
				p.Annotations[annotation.Config] = strings.Replace(p.Annotations[annotation.Config], "[/shared]", "[/shared, /scratch]", 1)
			},
			denied: "hostFiles: Forbidden: it is not what was injected",
		},
		"token in the config": {
			pod: "host-supplied-files", change: func(p *corev1.Pod) {
				p.Annotations[annotation.Config] = strings.Replace(p.Annotations[annotation.Config], "serviceAccountToken: true", "", 1)
			},
			denied: "serviceAccountToken: Forbidden: it is not what was injected",
		},
		"token in the config alone": {
			pod:    "host-supplied-env",
			change: func(p *corev1.Pod) { p.Annotations[annotation.Config] += "serviceAccountToken: true\n" },
			denied: "serviceAccountToken: Forbidden: it is not what was injected",
		},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injectedPod(t, tc.pod)
			tc.change(pod)
			data, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			ops, _, errs := Patch(data, testOptions)
			if got := sentences(errs); (got == "") != (tc.denied == "") || !strings.Contains(got, tc.denied) || len(ops) > 0 {
				t.Errorf("operations %v, errors %q; want %q", ops, got, tc.denied)
			}
		})
	}
}

// The cases follow k8s.io/kubernetes/pkg/api/v1/resource: rounded up, millicores for CPU.
func TestResourceField(t *testing.T) {
	c := &corev1.Container{Name: "a", Resources: corev1.ResourceRequirements{
		Limits:   corev1.ResourceList{"cpu": resource.MustParse("1500m"), "memory": resource.MustParse("100Mi")},
		Requests: corev1.ResourceList{"cpu": resource.MustParse("250m")},
	}}
	for name, tc := range map[string]struct {
		resource, divisor string
		cpus, want        string
	}{
		"cpu":                        {resource: "limits.cpu", want: "2"},
		"millicores":                 {resource: "limits.cpu", divisor: "1m", want: "1500"},
		"a request":                  {resource: "requests.cpu", divisor: "1m", want: "250"},
		"memory":                     {resource: "limits.memory", want: "104857600"},
		"memory in MB":               {resource: "limits.memory", divisor: "1M", want: "105"},
		"a request from its limit":   {resource: "requests.memory", divisor: "1Mi", want: "100"},
		"a request that is not made": {resource: "requests.ephemeral-storage", want: "0"},
	} {
		t.Run(name, func(t *testing.T) {
			q, err := resourceField(tc.resource, c, &config.EnclaveConfig{}, 1)
			if err != nil {
				t.Fatal(err)
			}
			var d resource.Quantity
			if tc.divisor != "" {
				d = resource.MustParse(tc.divisor)
			}
			if got := divide(q, d, strings.HasSuffix(tc.resource, ".cpu")); got != tc.want {
				t.Errorf("got %s, want %s", got, tc.want)
			}
		})
	}
	if q, err := resourceField("limits.memory", &corev1.Container{}, &config.EnclaveConfig{}, 7<<20); err != nil || q.Value() != 7<<20 {
		t.Errorf("memory without a limit: %v, %v", q, err)
	}
	for _, r := range []string{"limits.ephemeral-storage", "limits.gpu", "limits", "memory"} {
		if _, err := resourceField(r, &corev1.Container{}, &config.EnclaveConfig{}, 1); err == nil {
			t.Errorf("%s is known", r)
		}
	}
}

func TestEnumerate(t *testing.T) {
	long := strings.Repeat("x", 200)
	got := enumerate("begin ", []string{"a", "b", long, strings.Repeat("y", 60), strings.Repeat("z", 60), "end", "/a\n  no more\x1b[2K"})
	want := []string{
		"begin a, b", "begin " + long[:111] + "…", "begin " + strings.Repeat("y", 60),
		"begin " + strings.Repeat("z", 60) + ", end, " + `"/a\n  no more\x1b[2K"`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestHostMountsOfHomes: files of the host in the home directory are refused, and those in the working directory
// are spoken of.
func TestHostMountsOfHomes(t *testing.T) {
	const warning = "the host can change what is run or trusted, by files at the workingDir "
	for name, tc := range map[string]struct {
		home, dir       string
		denied, warning string
	}{
		"neither":              {home: "/srv/app2", dir: "/srv"},
		"home":                 {home: "/srv/app", denied: "/srv/app is or holds /srv/app, the workload's home directory"},
		"home below":           {home: "/srv/app/home/", denied: "/srv/app is or holds /srv/app/home, the workload's home directory"},
		"home by a variable":   {home: "/srv/$(A)", dir: "/srv/app2"},
		"workingDir":           {dir: "/srv/app", warning: warning + "/srv/app"},
		"workingDir below":     {dir: "/srv/app/bin", warning: warning + "/srv/app/bin"},
		"workingDir elsewhere": {dir: "/srv/apps"},
	} {
		t.Run(name, func(t *testing.T) {
			c := corev1.Container{
				Name: "a", Image: "a@sha256:" + strings.Repeat("ab", 32), WorkingDir: tc.dir,
				VolumeMounts: []corev1.VolumeMount{{Name: "v", MountPath: "/srv/app"}},
			}
			if tc.home != "" {
				c.Env = []corev1.EnvVar{{Name: "HOME", Value: tc.home}}
			}
			v := corev1.Volume{Name: "v", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{}}}
			meta := &metav1.ObjectMeta{Annotations: map[string]string{annotation.Enclave: "a"}}
			_, _, warnings, errs := Derive(meta, &corev1.PodSpec{Containers: []corev1.Container{c}, Volumes: []corev1.Volume{v}})
			if got := sentences(errs); !strings.Contains(got, tc.denied) || (got != "") != (tc.denied != "") {
				t.Errorf("denied with %q, want %q", got, tc.denied)
			}
			got := slices.DeleteFunc(warnings, func(w string) bool { return !strings.HasPrefix(w, warning) })
			if strings.Join(got, "") != tc.warning {
				t.Errorf("warnings %q, want %q", got, tc.warning)
			}
		})
	}
}
