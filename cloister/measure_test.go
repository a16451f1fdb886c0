package main

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/workload"
)

const digest = "sha256:6a92cd1fcdc8d8cdec60f33dda4db2cb1fcdcacf3410a8e05b3741f44a9b5998"

const deployment = `apiVersion: apps/v1
kind: Deployment
metadata:
  name: web
spec:
  template:
    metadata:
      annotations:
        cloister.dev/enclave: app
    spec:
      containers:
      - name: app
        image: registry:5000/web:1.4.0@` + digest + `
        env:
        - name: MODE
          value: fast
        ports:
        - containerPort: 80
`

const deploymentManifest = `{"apiVersion":"cloister.dev/v1alpha1","env":[{"name":"MODE","value":"fast"}],"image":{"digest":"` + digest + `"},"ports":[{"port":80}]}`

const job = `apiVersion: batch/v1
kind: Job
metadata:
  name: once
spec:
  template:
    metadata:
      annotations:
        cloister.dev/enclave: work
    spec:
      restartPolicy: Never
      containers:
      - name: work
        image: registry:5000/work@` + digest + `
        command: [/work]
`

const jobManifest = `{"apiVersion":"cloister.dev/v1alpha1","command":["/work"],"image":{"digest":"` + digest + `"}}`

const service = "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n"

const bad = `apiVersion: v1
kind: Pod
metadata:
  name: broken
  annotations:
    cloister.dev/enclave: app
spec:
  containers:
  - name: app
    image: web:latest
    env:
    - name: A
      valueFrom: {fileKeyRef: {volumeName: v, path: p, key: k}}
`

// writeEIF writes a small EIF and returns its name and measurements.
func writeEIF(t *testing.T) (string, *eif.Measurements) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "base.eif")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := eif.Write(f, eif.Image{
		Arch: eif.X86_64, Kernel: strings.NewReader("kernel"), Cmdline: "quiet",
		Ramdisks: []eif.Data{strings.NewReader("first"), strings.NewReader("second")},
	})
	if err != nil {
		t.Fatal(err)
	}
	return file, m
}

func TestMeasure(t *testing.T) {
	image, code := writeBase(t, eif.X86_64)
	pcr16 := func(manifest string) string { return hex.EncodeToString(workload.PCR16([]byte(manifest))) }
	line := func(label, manifest string) string {
		return fmt.Sprintf(`{"label":%q,"PCR0":"%x","PCR1":"%x","PCR2":"%x","PCR16":%q}`, label, code.PCR0, code.PCR1, code.PCR2, pcr16(manifest))
	}
	sets := func(entries ...string) string {
		return `{"measurements":[` + strings.Join(entries, ",") + "]}\n"
	}
	both := service + "---\n" + deployment + "---\n" + job
	tests := map[string]struct {
		files  []string
		stdin  string
		args   []string
		stdout string
		stderr []string
	}{
		"tag is the label": {files: []string{deployment}, stdout: sets(line("1.4.0", deploymentManifest)),
			stderr: []string{"Deployment web: measured as 1.4.0\n  the host can read: stdout, stderr and termination message"}},
		"start of PCR16 is the label": {files: []string{job}, stdout: sets(line(pcr16(jobManifest)[:12], jobManifest))},
		"label":                       {files: []string{deployment}, args: []string{"--label", "canary"}, stdout: sets(line("canary", deploymentManifest))},
		"documents":                   {files: []string{both}, stdout: sets(line("1.4.0", deploymentManifest), line(pcr16(jobManifest)[:12], jobManifest))},
		"files":                       {files: []string{job, deployment}, stdout: sets(line(pcr16(jobManifest)[:12], jobManifest), line("1.4.0", deploymentManifest))},
		"same twice":                  {files: []string{deployment, deployment}, stdout: sets(line("1.4.0", deploymentManifest))},
		"standard input":              {stdin: deployment, args: []string{"-f", "-"}, stdout: sets(line("1.4.0", deploymentManifest))},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			args := append([]string{"measure", "--eif", image}, test.args...)
			for _, f := range test.files {
				args = append(args, "-f", writeFile(t, "in.yaml", []byte(f)))
			}
			r := call(t, test.stdin, args...)
			r.want(t, 0, test.stderr...)
			if diff := cmp.Diff(test.stdout, r.stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if _, err := workload.ParseMeasurements([]byte(r.stdout)); err != nil {
				t.Errorf("the set is refused on load: %v", err)
			}
		})
	}
}

// One value more in the template is another workload.
func TestMeasureChange(t *testing.T) {
	image, _ := writeBase(t, eif.X86_64)
	pcr := func(yaml string) string {
		r := call(t, yaml, "measure", "--eif", image, "-f", "-")
		r.want(t, 0)
		set, err := workload.ParseMeasurements([]byte(r.stdout))
		if err != nil {
			t.Fatal(err)
		}
		return set[0].PCR16
	}
	before := pcr(deployment)
	for name, yaml := range map[string]string{
		"env":     strings.Replace(deployment, "fast", "slow", 1),
		"command": strings.Replace(deployment, "        env:", "        command: [/other]\n        env:", 1),
	} {
		if pcr(yaml) == before {
			t.Errorf("another %s has the same PCR16", name)
		}
	}
	if pcr(strings.Replace(deployment, "  name: web", "  name: web\n  namespace: other", 1)) != before {
		t.Error("the namespace changes PCR16")
	}
}

func TestMeasurePlaintext(t *testing.T) {
	image, _ := writeBase(t, eif.X86_64)
	yaml := strings.Replace(deployment, "enclave: app", `enclave: app
        cloister.dev/config: |
          apiVersion: cloister.dev/v1alpha1
          kind: EnclaveConfig
          ports: [{port: 80, plaintext: true}]`, 1)
	call(t, yaml, "measure", "--eif", image, "-f", "-").want(t, 0, "the host can read and change: everything on port 80")
}

func TestMeasureRefuses(t *testing.T) {
	image, _ := writeBase(t, eif.X86_64)
	two, _ := writeEIF(t)
	tests := map[string]struct {
		args  []string
		stdin string
		code  int
		want  []string
	}{
		"no file":       {[]string{"--eif", image}, "", 2, []string{"with -f"}},
		"no eif":        {[]string{"-f", "-"}, deployment, 2, []string{"--eif", "must pin the code", "PCR16"}},
		"argument":      {[]string{"x"}, "", 2, nil},
		"no such file":  {[]string{"-f", "/nonexistent", "--eif", image}, "", 1, []string{"no such file"}},
		"no EIF":        {[]string{"-f", "-", "--eif", "/dev/null"}, deployment, 1, []string{"read enclave image"}},
		"two ramdisks":  {[]string{"-f", "-", "--eif", two}, deployment, 1, []string{"it has 2 ramdisks and is not sealed, but a base EIF has one"}},
		"no annotation": {[]string{"-f", "-", "--eif", image}, service + "---\n" + strings.Replace(job, "cloister.dev", "example.com", 1), 1, []string{"no pod template has the annotation cloister.dev/enclave"}},
		"no YAML":       {[]string{"-f", "-", "--eif", image}, "a: [", 1, []string{"read YAML document 1"}},
		"typo":          {[]string{"-f", "-", "--eif", image}, strings.Replace(deployment, "/enclave", "/enclav", 1), 1, []string{`did you mean "cloister.dev/enclave"`}},
		"injected":      {[]string{"-f", "-", "--eif", image}, read(t, "../webhook/inject/testdata/smallest-pod/want.yaml"), 1, []string{"-: Pod app: it is injected already: measure the file that its author wrote"}},
		"bad pod": {[]string{"-f", "-", "--eif", image}, deployment + "---\n" + bad, 1, []string{
			"-: Pod broken: ImageRefused: spec.containers[0].image: Invalid value", "-: Pod broken: EnvironmentRefused: spec.containers[0].env[0].valueFrom.fileKeyRef: Forbidden", "the webhook would deny",
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, test.stdin, append([]string{"measure"}, test.args...)...)
			r.want(t, test.code, append(test.want, "cloister: ")...)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
}
