package inject

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

var nitroOptions = Options{Driver: DriverNitro, HugePages: "2Mi", InitbootImage: testOptions.InitbootImage, SidecarImage: testOptions.SidecarImage}

// nitroPod is a pod whose container has these resources, as JSON, and this config.
func nitroPod(resources, config, arch string) []byte {
	return fmt.Appendf(nil, `{"metadata":{"annotations":{"cloister.dev/enclave":"a","cloister.dev/config":%q}},
		"spec":{"nodeSelector":{"kubernetes.io/arch":%q},"containers":[{"name":"a","image":"x@sha256:%s","resources":%s}]}}`,
		"apiVersion: cloister.dev/v1alpha1\nkind: EnclaveConfig\n"+config, arch, strings.Repeat("ab", 32), resources)
}

// TestNitroResources: what initboot asks of a node.
func TestNitroResources(t *testing.T) {
	for name, tc := range map[string]struct {
		resources, config, arch string
		change                  func(*Options)
		pages, cpus             string // what is requested
		env                     string // CLOISTER_CPUS
	}{
		"nothing said":        {resources: `{}`, pages: "hugepages-2Mi=640Mi", env: "2"},
		"limit":               {resources: `{"limits":{"memory":"1Gi","cpu":"2500m"},"requests":{"cpu":"1"}}`, pages: "hugepages-2Mi=1152Mi", env: "4"},
		"request alone":       {resources: `{"requests":{"cpu":"2100m"}}`, pages: "hugepages-2Mi=640Mi", env: "4"},
		"config wins":         {resources: `{"limits":{"memory":"1Gi","cpu":"8"}}`, config: "cpus: 1\nmemory: 100Mi\n", pages: "hugepages-2Mi=228Mi", env: "2"},
		"a byte more":         {resources: `{"limits":{"memory":"104857601"}}`, pages: "hugepages-2Mi=230Mi", env: "2"},
		"Graviton":            {resources: `{"limits":{"cpu":"3"}}`, arch: "arm64", pages: "hugepages-2Mi=640Mi", env: "3"},
		"one vCPU of a core":  {resources: `{"limits":{"cpu":"100m"}}`, arch: "arm64", pages: "hugepages-2Mi=640Mi", env: "1"},
		"big pages":           {resources: `{}`, change: func(o *Options) { o.HugePages = "1Gi" }, pages: "hugepages-1Gi=1Gi", env: "2"},
		"vCPUs of the plugin": {resources: `{"limits":{"cpu":"3"}}`, change: func(o *Options) { o.EnclaveCPUs = true }, pages: "hugepages-2Mi=640Mi", cpus: "4", env: "4"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := nitroOptions
			if tc.change != nil {
				tc.change(&opts)
			}
			if tc.arch == "" {
				tc.arch = "amd64"
			}
			pod := nitroPod(tc.resources, tc.config, tc.arch)
			ops, _, errs := Patch(pod, opts)
			if len(errs) > 0 {
				t.Fatal(sentences(errs))
			}
			var p corev1.Pod
			if err := decode(checkLawOf(t, opts, pod, ops), &p); err != nil {
				t.Fatal(err)
			}
			boot := p.Spec.InitContainers[0]
			for _, list := range []corev1.ResourceList{boot.Resources.Requests, boot.Resources.Limits} {
				if q := list["aws.ec2.nitro/nitro_enclaves"]; q.String() != "1" {
					t.Errorf("%s enclaves", q.String())
				}
				pages, size, _ := strings.Cut(tc.pages, "=")
				if q := list[corev1.ResourceName(pages)]; q.String() != size {
					t.Errorf("%s of %s, want %s", q.String(), pages, size)
				}
				if q, ok := list["aws.ec2.nitro/nitro_enclaves_cpus"]; ok != (tc.cpus != "") || ok && q.String() != tc.cpus {
					t.Errorf("%s vCPUs of the plugin, want %q", q.String(), tc.cpus)
				}
			}
			env := boot.Env[len(boot.Env)-1]
			if env.Name != "CLOISTER_CPUS" || env.Value != tc.env {
				t.Errorf("%s=%s, want %s vCPUs", env.Name, env.Value, tc.env)
			}
		})
	}
	_, _, errs := Patch(nitroPod(`{"limits":{"cpu":"9223372036854775807"}}`, "", "amd64"), nitroOptions)
	if got := sentences(errs); !strings.Contains(got, "at most 512 vCPUs") || len(errs) != 1 {
		t.Errorf("more vCPUs than there are: %q", got)
	}
}

// TestNitroAgain: a number of vCPUs that was changed after the injection is denied.
func TestNitroAgain(t *testing.T) {
	pod := nitroPod(`{}`, "cpus: 1\n", "amd64")
	ops, _, errs := Patch(pod, nitroOptions)
	if len(errs) > 0 {
		t.Fatal(sentences(errs))
	}
	injected := string(apply(t, pod, ops))
	const env = `{"name":"CLOISTER_CPUS","value":"2"}`
	if !strings.Contains(injected, env) {
		t.Fatal(injected)
	}
	for name, tc := range map[string]struct{ now, want string }{
		"half a core":      {`{"name":"CLOISTER_CPUS","value":"3"}`, "full cores"},
		"none":             {`{"name":"CLOISTER_CPUS","value":"0"}`, "full cores"},
		"no number":        {`{"name":"CLOISTER_CPUS","value":"two"}`, "full cores"},
		"too many":         {`{"name":"CLOISTER_CPUS","value":"514"}`, "full cores"},
		"from the pod":     {`{"name":"CLOISTER_CPUS","valueFrom":{"fieldRef":{"fieldPath":"metadata.name"}}}`, "full cores"},
		"gone":             {`{"name":"OTHER","value":"2"}`, "CLOISTER_CPUS, which was injected, is gone"},
		"twice":            {env + `,` + env, "CLOISTER_CPUS is not what is injected"},
		"not the config's": {`{"name":"CLOISTER_CPUS","value":"4"}`, "metadata.annotations[cloister.dev/config].cpus: Forbidden: it is not what was injected"},
		"another shape":    {env, "it is not what is injected"},
	} {
		t.Run(name, func(t *testing.T) {
			opts := nitroOptions
			if name == "another shape" {
				opts = testOptions
			}
			_, _, errs := Patch([]byte(strings.Replace(injected, env, tc.now, 1)), opts)
			if got := sentences(errs); !strings.Contains(got, tc.want) {
				t.Errorf("%q, want %q", got, tc.want)
			}
		})
	}
}

func TestOptionsCheck(t *testing.T) {
	for name, tc := range map[string]struct {
		options Options
		want    string // part of the error
	}{
		"process":           {Options{Driver: DriverProcess}, ""},
		"nitro":             {nitroOptions, ""},
		"unknown driver":    {Options{Driver: "proces"}, `there is no driver "proces"`},
		"none":              {Options{}, `there is no driver ""`},
		"pages of any size": {Options{Driver: DriverNitro, HugePages: "4Ki"}, "HUGEPAGES"},
		"a negative gid":    {Options{Driver: DriverNitro, HugePages: "2Mi", DeviceGroup: -1}, "DEVICE_GROUP"},
	} {
		t.Run(name, func(t *testing.T) {
			err := tc.options.Check()
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}
