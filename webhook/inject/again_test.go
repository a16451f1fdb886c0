package inject

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"

	"cloister.dev/cloister/internal/podenv"
	"cloister.dev/cloister/webhook/annotation"
)

// injectedPod returns a pod of testdata after the first pass.
func injectedPod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	pod := readPod(t, filepath.Join("testdata", name, "input.yaml"))
	ops, _, errs := Patch(pod, testOptions)
	if len(errs) > 0 {
		t.Fatal(sentences(errs))
	}
	var out corev1.Pod
	if err := decode(apply(t, pod, ops), &out); err != nil {
		t.Fatal(err)
	}
	return &out
}

// TestSecondPass changes an injected pod as others do, or as an attacker would.
func TestSecondPass(t *testing.T) {
	const boot, side = 0, 1
	env := func(c *corev1.Container, name string) *corev1.EnvVar {
		return &c.Env[slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == name })]
	}
	for name, tc := range map[string]struct {
		change func(p *corev1.Pod)
		denied string // part of a sentence; empty: the pod stays as it is
	}{
		"nothing": {change: func(*corev1.Pod) {}},
		"mesh prepends and appends": {change: func(p *corev1.Pod) {
			always := corev1.ContainerRestartPolicyAlways
			p.Spec.InitContainers = append([]corev1.Container{{Name: "istio-init"}, {Name: "linkerd-proxy", RestartPolicy: &always}}, p.Spec.InitContainers...)
			p.Spec.Containers = append([]corev1.Container{{Name: "istio-proxy"}}, p.Spec.Containers...)
			p.Spec.Volumes = append([]corev1.Volume{{Name: "istio-envoy"}}, p.Spec.Volumes...)
			p.Annotations["sidecar.istio.io/status"] = "{}"
		}},
		"mesh rewrites the console's probes": {change: func(p *corev1.Pod) {
			p.Spec.Containers[0].ReadinessProbe.HTTPGet = &corev1.HTTPGetAction{Path: "/app-health/web/readyz", Port: intstr.FromInt32(15020)}
		}},
		"cloud identity adds to all containers": {change: func(p *corev1.Pod) {
			for _, l := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
				for i := range l {
					l[i].Env = append(l[i].Env, corev1.EnvVar{Name: "AWS_ROLE_ARN", Value: "arn"})
					l[i].VolumeMounts = append(l[i].VolumeMounts, corev1.VolumeMount{Name: "aws-iam-token", MountPath: "/var/run/secrets/eks.amazonaws.com/serviceaccount"})
				}
			}
			p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "aws-iam-token"})
		}},
		"limit range adds limits": {change: func(p *corev1.Pod) {
			for i := range p.Spec.InitContainers {
				p.Spec.InitContainers[i].Resources.Limits[corev1.ResourceCPU] = resource.MustParse("1")
			}
		}},
		"API server's defaults": {change: func(p *corev1.Pod) {
			mode := int32(420)
			for i := range p.Spec.Volumes {
				if d := p.Spec.Volumes[i].DownwardAPI; d != nil {
					d.DefaultMode = &mode
					d.Items[0].FieldRef.APIVersion = "v1"
				}
			}
			p.Spec.InitContainers[boot].TerminationMessagePath = corev1.TerminationMessagePathDefault
		}},
		"env injector": {change: func(p *corev1.Pod) {
			for i := range p.Spec.InitContainers {
				p.Spec.InitContainers[i].Env = append([]corev1.EnvVar{{Name: "HTTP_PROXY", Value: "http://proxy"}}, p.Spec.InitContainers[i].Env...)
			}
			p.Spec.Containers[0].Env = append(p.Spec.Containers[0].Env, corev1.EnvVar{Name: "LD_PRELOAD", Value: "/x.so"})
		}},

		"initboot lost": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers = p.Spec.InitContainers[side:] },
			denied: "the pod carries a part of what is injected",
		},
		"both lost": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers = nil },
			denied: "names that begin with cloister- are kept",
		},
		"order reversed": {
			change: func(p *corev1.Pod) { slices.Reverse(p.Spec.InitContainers) },
			denied: "the pod carries a part of what is injected",
		},
		"sidecar twice": {
			change: func(p *corev1.Pod) {
				p.Spec.InitContainers = append(p.Spec.InitContainers, p.Spec.InitContainers[side])
			},
			denied: "the pod carries a part of what is injected",
		},
		"initboot as an ordinary container": {
			change: func(p *corev1.Pod) {
				p.Spec.Containers = append(p.Spec.Containers, p.Spec.InitContainers...)
				p.Spec.InitContainers = nil
			},
			denied: "the pod carries a part of what is injected",
		},
		"initboot's image": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers[boot].Image = "evil" },
			denied: "this installation injects " + testOptions.InitbootImage,
		},
		"sidecar's image": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers[side].Image = "evil" },
			denied: "this installation injects " + testOptions.SidecarImage,
		},
		"console's image": {
			change: func(p *corev1.Pod) { p.Spec.Containers[0].Image = "nginx" },
			denied: "spec.containers[0].image",
		},
		"annotations lost, console's image": {
			change: func(p *corev1.Pod) {
				p.Annotations = nil
				p.Spec.Containers[0].Image = "nginx"
			},
			denied: "the pod was injected and its annotations are gone",
		},
		"console's command": {
			change: func(p *corev1.Pod) { p.Spec.Containers[0].Command = []string{"/bin/sh"} },
			denied: "spec.containers[0].command",
		},
		"console's args": {
			change: func(p *corev1.Pod) { p.Spec.Containers[0].Args = []string{"x"} },
			denied: "spec.containers[0].command",
		},
		"sidecar's envFrom": {
			change: func(p *corev1.Pod) {
				p.Spec.InitContainers[side].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{}}}
			},
			denied: "spec.initContainers[1].envFrom[0]",
		},
		"console's mount lost": {
			change: func(p *corev1.Pod) { p.Spec.Containers[0].VolumeMounts = nil },
			denied: "the mount of cloister-run at /run/cloister, which was injected, is gone",
		},
		"manifest not canonical": {
			change: func(p *corev1.Pod) {
				e := env(&p.Spec.InitContainers[boot], podenv.EnvManifest)
				e.Value = " " + e.Value
			},
			denied: "not in its RFC 8785 form",
		},
		"manifest lost": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers[boot].Env = p.Spec.InitContainers[boot].Env[1:] },
			denied: "CLOISTER_MANIFEST, which was injected, is gone",
		},
		"manifest forged, other than measured": {
			change: func(p *corev1.Pod) {
				e := env(&p.Spec.InitContainers[boot], podenv.EnvManifest)
				e.Value = strings.Replace(e.Value, "daemon off;", "daemon on;", 1)
			},
			denied: "it is not what the injected manifest measures to",
		},
		"manifest set twice": {
			change: func(p *corev1.Pod) {
				c := &p.Spec.InitContainers[boot]
				c.Env = append(c.Env, *env(c, podenv.EnvManifest))
			},
			denied: "CLOISTER_MANIFEST is not what is injected",
		},
		"variable of ours added": {
			change: func(p *corev1.Pod) {
				c := &p.Spec.Containers[0]
				c.Env = append(c.Env, corev1.EnvVar{Name: "CLOISTER_DEBUG", Value: "1"})
			},
			denied: "CLOISTER_DEBUG is not what is injected",
		},
		"image of another digest": {
			change: func(p *corev1.Pod) {
				env(&p.Spec.InitContainers[boot], podenv.EnvImage).Value = "x@sha256:" + strings.Repeat("cd", 32)
			},
			denied: "does not name the image of the workload manifest",
		},
		"memory": {
			change: func(p *corev1.Pod) { env(&p.Spec.InitContainers[boot], podenv.EnvMemory).Value = "1" },
			denied: "metadata.annotations[cloister.dev/config].memory: Forbidden: it is not what was injected",
		},
		"ports of the sidecar": {
			change: func(p *corev1.Pod) { env(&p.Spec.InitContainers[side], podenv.EnvPorts).Value = "[81]" },
			denied: "CLOISTER_PORTS is not what is injected",
		},
		"restart policy": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers[boot].RestartPolicy = nil },
			denied: "it must be Always",
		},
		"startup probe": {
			change: func(p *corev1.Pod) { p.Spec.InitContainers[boot].StartupProbe = nil },
			denied: "the pod would start before its enclave",
		},
		"volume of the host": {
			change: func(p *corev1.Pod) {
				volume(&p.Spec, volumeRun).VolumeSource = corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}
			},
			denied: "volume cloister-run is not what is injected",
		},
		"volume lost": {
			change: func(p *corev1.Pod) { p.Spec.Volumes = p.Spec.Volumes[:len(p.Spec.Volumes)-1] },
			denied: "volume cloister-no-token, which was injected, is gone",
		},
		"volume given to others": {
			change: func(p *corev1.Pod) {
				p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "spy", VolumeMounts: []corev1.VolumeMount{{Name: volumeRun, MountPath: "/x"}}})
			},
			denied: "volume cloister-run is only for what is injected",
		},
		"sysctl lost": {
			change: func(p *corev1.Pod) { p.Spec.SecurityContext.Sysctls = nil },
			denied: "net.ipv4.ip_unprivileged_port_start, which was injected, is gone",
		},
		"network of the host": {
			change: func(p *corev1.Pod) { p.Spec.HostNetwork = true },
			denied: "spec.hostNetwork",
		},
		"port of ours taken": {
			change: func(p *corev1.Pod) {
				p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "other", Ports: []corev1.ContainerPort{{ContainerPort: podenv.SidecarPort}}})
			},
			denied: "port 14022 is taken by Cloister",
		},
		"annotation names another container": {
			change: func(p *corev1.Pod) {
				p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "other", Image: "other"})
				p.Annotations[annotation.Enclave] = "other"
			},
			denied: "spec.containers[1].image",
		},
		"measurements spoofed": {
			change: func(p *corev1.Pod) { p.Annotations[annotation.Measurements] = `{"PCR16":"00"}` },
			denied: "it is not what the injected manifest measures to",
		},
		"config changed": {
			change: func(p *corev1.Pod) {
				p.Annotations[annotation.Config] += "ports: [{port: 80, plaintext: true}]\n"
			},
			denied: "what it says about port 80 is not what was injected",
		},
		"egress in the config": {
			change: func(p *corev1.Pod) { p.Annotations[annotation.Config] += "egress: ['spy.example:443']\n" },
			denied: "metadata.annotations[cloister.dev/config].egress: Forbidden: it is not what was injected",
		},
		"egress in the sidecar": {
			change: func(p *corev1.Pod) {
				c := &p.Spec.InitContainers[side]
				c.Env = append(c.Env, corev1.EnvVar{Name: podenv.EnvEgress, Value: `["spy.example:443"]`})
			},
			denied: "CLOISTER_EGRESS is not what is injected",
		},
		"container with a name of ours": {
			change: func(p *corev1.Pod) {
				p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "cloister-spy"})
			},
			denied: "names that begin with cloister- are kept",
		},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injectedPod(t, "deployment-completed-by-the-api-server")
			tc.change(pod)
			data, err := json.Marshal(pod)
			if err != nil {
				t.Fatal(err)
			}
			ops, _, errs := Patch(data, testOptions)
			switch {
			case tc.denied == "" && (len(errs) > 0 || len(ops) > 0):
				t.Errorf("got %v\n%s", ops, sentences(errs))
			case tc.denied != "" && !strings.Contains(sentences(errs), tc.denied):
				t.Errorf("denied with %q, want %q", sentences(errs), tc.denied)
			}
		})
	}
}

// TestSecondPassFollowsGracePeriod: another webhook changes the pod's grace period after us.
func TestSecondPassFollowsGracePeriod(t *testing.T) {
	pod := injectedPod(t, "smallest-pod")
	grace := int64(90)
	pod.Spec.TerminationGracePeriodSeconds = &grace
	data, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	ops, _, errs := Patch(data, testOptions)
	if len(errs) > 0 || len(ops) != 1 {
		t.Fatalf("got %v\n%s", ops, sentences(errs))
	}
	var got corev1.Pod
	if err := decode(checkLaw(t, data, ops), &got); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/initboot", "console", "--grace-period=90s"}; !slices.Equal(got.Spec.Containers[0].Command, want) {
		t.Errorf("command %q, want %q", got.Spec.Containers[0].Command, want)
	}
}

// TestSecondPassFollowsProbes: so does another webhook with the grace period of a probe. No other flag of
// the console is its business.
func TestSecondPassFollowsProbes(t *testing.T) {
	pod := injectedPod(t, "probes-of-every-kind")
	c := &pod.Spec.Containers[0]
	c.StartupProbe.TerminationGracePeriodSeconds, c.LivenessProbe.TerminationGracePeriodSeconds = nil, new(int64(25))
	data, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	ops, _, errs := Patch(data, testOptions)
	if len(errs) > 0 || len(ops) != 1 {
		t.Fatalf("got %v\n%s", ops, sentences(errs))
	}
	var got corev1.Pod
	if err := decode(checkLaw(t, data, ops), &got); err != nil {
		t.Fatal(err)
	}
	if want := []string{"/initboot", "console", "--grace-period=60s", "--liveness-grace-period=25s"}; !slices.Equal(got.Spec.Containers[0].Command, want) {
		t.Errorf("command %q, want %q", got.Spec.Containers[0].Command, want)
	}
	c.Command = append(c.Command, "--listen=:80")
	if data, err = json.Marshal(pod); err != nil {
		t.Fatal(err)
	}
	if _, _, errs := Patch(data, testOptions); !strings.Contains(sentences(errs), "spec.containers[0].command") {
		t.Errorf("a flag of nobody's: %s", sentences(errs))
	}
}

// TestSecondPassOfEgress: the host's list is that of the manifest, whole and nothing more.
func TestSecondPassOfEgress(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(env []corev1.EnvVar) []corev1.EnvVar
		denied string
	}{
		"nothing": {change: func(env []corev1.EnvVar) []corev1.EnvVar { return env }},
		"lost": {
			change: func(env []corev1.EnvVar) []corev1.EnvVar { return env[:1] },
			denied: "CLOISTER_EGRESS, which was injected, is gone",
		},
		"longer": {
			change: func(env []corev1.EnvVar) []corev1.EnvVar {
				env[1].Value = strings.Replace(env[1].Value, "]", `,"spy.example:443"]`, 1)
				return env
			},
			denied: "CLOISTER_EGRESS is not what is injected",
		},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injectedPod(t, "egress")
			c := &pod.Spec.InitContainers[1]
			c.Env = tc.change(c.Env)
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

// TestSecondPassOfEIF: the enclave boots from what the config names, and from nothing else.
func TestSecondPassOfEIF(t *testing.T) {
	other := "spy.example/eif@sha256:" + strings.Repeat("ef", 32)
	eifVolume := func(p *corev1.Pod) *corev1.Volume {
		i := slices.IndexFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == volumeEIF })
		return &p.Spec.Volumes[i]
	}
	withoutConfig := func(p *corev1.Pod) {
		p.Annotations[annotation.Config] = "apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n"
	}
	for name, tc := range map[string]struct {
		pod    string
		change func(p *corev1.Pod)
		denied string
	}{
		"nothing":       {"sealed", func(*corev1.Pod) {}, ""},
		"another image": {"sealed", func(p *corev1.Pod) { eifVolume(p).Image.Reference = other }, "config].eif: Forbidden: it is not what was injected"},
		"pulled always": {"sealed", func(p *corev1.Pod) { eifVolume(p).Image.PullPolicy = corev1.PullAlways }, "volume cloister-eif is not what is injected"},
		"config lost":   {"sealed", withoutConfig, "config].eif: Forbidden: it is not what was injected"},
		"no image": {"sealed", func(p *corev1.Pod) {
			eifVolume(p).VolumeSource = corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}
		}, "spec.initContainers[0].command"},
		"mount lost":     {"sealed", func(p *corev1.Pod) { m := p.Spec.InitContainers[0].VolumeMounts; m[3] = m[4] }, "the mount of cloister-eif at /run/cloister-eif, which was injected, is gone"},
		"writable mount": {"sealed", func(p *corev1.Pod) { p.Spec.InitContainers[0].VolumeMounts[3].ReadOnly = false }, "the mount of cloister-eif"},
		"another file":   {"sealed", func(p *corev1.Pod) { p.Spec.InitContainers[0].Command[3] = "--eif=/base.eif" }, "spec.initContainers[0].command"},
		"base EIF": {"sealed", func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = p.Spec.InitContainers[0].Command[:3]
			p.Spec.Volumes = slices.DeleteFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == volumeEIF })
		}, "config].eif: Forbidden: it is not what was injected"},
		"one that nobody asked for": {"smallest-pod", func(p *corev1.Pod) {
			p.Spec.InitContainers[0].Command = append(p.Spec.InitContainers[0].Command, "--eif=/run/cloister-eif/enclave.eif")
			p.Spec.InitContainers[0].VolumeMounts = append(p.Spec.InitContainers[0].VolumeMounts, mountEIF)
			p.Spec.Volumes = append(p.Spec.Volumes, *volumesOf(other)[len(volumes)])
		}, "config].eif: Forbidden: it is not what was injected"},
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
