package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"cloister.dev/cloister/webhook/inject"
)

// The webhook as manifests/webhook installs it.
const (
	systemNamespace = "cloister-system"
	webhookName     = "cloister-webhook"
	webhookSecret   = "cloister-webhook-ca"
	webhookConfig   = "00-cloister"
)

// webhook is one revision of the webhook.
type webhook struct {
	*cluster
	suffix string // of its objects' names; empty for the default revision
}

// install installs another revision of the webhook and removes it when the test ends.
func (c *cluster) install(t *testing.T, rev string) webhook {
	t.Helper()
	w := webhook{c, "-" + rev}
	t.Cleanup(func() {
		if err := w.run("remove"); err != nil {
			t.Error(err)
		}
	})
	if err := w.run(); err != nil {
		t.Fatal(err)
	}
	return w
}

// run runs hack/install.sh for this revision.
func (w webhook) run(args ...string) error {
	cmd := exec.Command("../hack/install.sh", args...)
	cmd.Env = append(cmd.Environ(), "REV="+strings.TrimPrefix(w.suffix, "-"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("install.sh %v: %w: %s", args, err, out)
	}
	return nil
}

// configure sets variables of the webhook's environment, NAME=VALUE.
func (w webhook) configure(t *testing.T, env ...string) {
	t.Helper()
	output(t, "kubectl", append([]string{"-n", systemNamespace, "set", "env", "deployment/" + webhookName + w.suffix}, env...)...)
	w.restarted(t)
}

// restarted waits until all of its replicas are new ones.
func (w webhook) restarted(t *testing.T) {
	t.Helper()
	output(t, "kubectl", "-n", systemNamespace, "rollout", "status", "deployment/"+webhookName+w.suffix, "--timeout=120s")
}

// stream is a steady stream of pods that the API server judges, in one namespace.
type stream struct {
	*namespace
	asks, plain *corev1.Pod // asks for an enclave, and does not
	stop        func()

	mu                         sync.Mutex
	injected, left             int
	refused, wrong, uninjected []string
}

// stream submits two pods again and again, one that asks for an enclave and one that does not. Both conform to
// whatever Pod Security enforces.
func (ns *namespace) stream(t *testing.T) *stream {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	s := &stream{namespace: ns, asks: ns.appPod(t, "asks"), plain: ns.appPod(t, "plain"), stop: sync.OnceFunc(func() { cancel(); group.Wait() })}
	t.Cleanup(s.stop)
	asked := s.asks.Annotations
	s.asks.Annotations, s.plain.Annotations = nil, nil
	conform(s.asks)
	conform(s.plain)
	s.asks.Annotations = asked
	group.Go(func() {
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			for _, pod := range []*corev1.Pod{s.asks, s.plain} {
				got, err := s.submit(ctx, pod)
				if ctx.Err() != nil {
					return
				}
				s.judge(pod == s.asks, got, err)
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return s
}

// submit has the API server judge a pod.
func (s *stream) submit(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	return s.kube.CoreV1().Pods(s.name).Create(ctx, pod, dryRun)
}

func (s *stream) judge(asks bool, got *corev1.Pod, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		s.refused = append(s.refused, err.Error())
	case asks && isInjected(got):
		s.injected++
	case asks:
		s.uninjected = append(s.uninjected, got.String())
	case isInjected(got):
		s.wrong = append(s.wrong, got.String())
	default:
		s.left++
	}
}

// isInjected tells whether a pod has all three of our containers.
func isInjected(pod *corev1.Pod) bool {
	i := pod.Spec.InitContainers
	return len(i) >= 2 && i[0].Name == initbootContainer && i[1].Name == sidecarContainer && pod.Spec.Containers[0].Image == i[0].Image
}

// streams are the streams that one webhook serves.
type streams []*stream

// flow waits until each has so many more pods of a kind.
func (all streams) flow(t *testing.T, injected, left, refused int) {
	t.Helper()
	for _, s := range all {
		s.mu.Lock()
		injected, left, refused := s.injected+injected, s.left+left, len(s.refused)+refused
		s.mu.Unlock()
		eventually(t, time.Minute, "the stream flows", func() (bool, string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			last := "none refused"
			if n := len(s.refused); n > 0 {
				last = s.refused[n-1]
			}
			return s.injected >= injected && s.left >= left && len(s.refused) >= refused,
				fmt.Sprintf("%d injected, %d plain, %d uninjected, %s", s.injected, s.left, len(s.uninjected), last)
		})
	}
}

// phase ends a phase: whatever went on, no pod came through without its enclave, and none was refused unless the
// webhook was down. It returns the refusals.
func (all streams) phase(t *testing.T, name string, down bool) (refused []string) {
	t.Helper()
	for _, s := range all {
		s.mu.Lock()
		t.Logf("%s: %d injected, %d plain, %d refused", name, s.injected, s.left, len(s.refused))
		if len(s.uninjected) > 0 {
			t.Errorf("%s: %d pods were admitted without their enclave: %s", name, len(s.uninjected), s.uninjected[0])
		}
		if len(s.wrong) > 0 {
			t.Errorf("%s: %d pods got an enclave that they had not asked for: %s", name, len(s.wrong), s.wrong[0])
		}
		if !down && len(s.refused) > 0 {
			t.Errorf("%s: %d pods were refused: %s", name, len(s.refused), strings.Join(slices.Compact(s.refused), "\n"))
		}
		if !down && (s.injected == 0 || s.left == 0) {
			t.Errorf("%s: no pods", name)
		}
		refused = append(refused, s.refused...)
		s.injected, s.left, s.refused, s.wrong, s.uninjected = 0, 0, nil, nil, nil
		s.mu.Unlock()
	}
	return refused
}

// Its certificate authority is rotated, the webhook is rolled out, and it is down: under a steady stream of pods
// none is refused that should pass, unless it is down, and none passes without its enclave. So it is with what the
// development driver needs, which is a namespace without Pod Security, and with what Nitro hardware needs, where
// baseline and restricted are enforced.
func TestSafe(t *testing.T) {
	c := e2e(t)
	t.Run("privileged", func(t *testing.T) {
		w := webhook{cluster: c}
		w.safe(t, streams{c.namespace(t, true).stream(t)})
	})
	t.Run("baseline and restricted", func(t *testing.T) {
		const rev = "nitro"
		w := c.install(t, rev)
		w.configure(t, "DRIVER=nitro", "DEVICE_GROUP=989")
		var all streams
		for _, level := range []string{"baseline", "restricted"} {
			ns := c.labelled(t, map[string]string{inject.EnforceLabel: level, "cloister.dev/injection": "enabled", "cloister.dev/rev": rev})
			eventually(t, time.Minute, "the revision takes the pods", func() (bool, string) {
				_, err := c.kube.CoreV1().Pods(ns.name).Create(t.Context(), c.appPod(t, "app"), dryRun)
				return err == nil, fmt.Sprint(err)
			})
			all = append(all, ns.stream(t))
		}
		w.safe(t, all)
	})
}

func (w webhook) safe(t *testing.T, s streams) {
	s.flow(t, 5, 5, 0)

	first := w.signing(t)
	aged := w.ageAuthority(t)
	eventually(t, time.Minute, "the caBundle holds the next CA", func() (bool, string) {
		n := len(w.caBundle(t))
		return n >= 3, fmt.Sprint(n)
	})
	s.phase(t, "a new CA in the caBundle", false)
	output(t, "kubectl", "-n", systemNamespace, "rollout", "restart", "deployment/"+webhookName+w.suffix)
	w.restarted(t)
	s.phase(t, "rollout in the middle of it", false)
	eventually(t, 2*time.Minute, "every replica serves a certificate of the new CA", func() (bool, string) {
		ca := w.signing(t)
		if ca.Equal(first) || ca.Equal(aged) {
			return false, "it does not sign yet"
		}
		return w.servedBy(t, ca)
	})
	for pod, at := range w.metric(t, "certificate_expiry_timestamp_seconds") {
		if left := time.Until(time.Unix(int64(at), 0)); left < 23*time.Hour || left > 24*time.Hour {
			t.Errorf("%s says that its certificate expires in %s", pod, left)
		}
	}
	s.phase(t, "CA rotated", false)
	w.outage(t, s)
}

// outage has no webhook for a while.
func (w webhook) outage(t *testing.T, s streams) {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			w.failurePolicy(t, admissionregv1.Fail)
			w.scale(t, 2)
		}
	})
	// each waits until a pod fares so in every namespace.
	each := func(what string, pod func(*stream) *corev1.Pod, fares func(error) bool) {
		t.Helper()
		for _, s := range s {
			eventually(t, time.Minute, what, func() (bool, string) {
				_, err := s.submit(t.Context(), pod(s))
				return fares(err), fmt.Sprint(err)
			})
		}
	}
	plain := func(s *stream) *corev1.Pod { return s.plain }
	asks := func(s *stream) *corev1.Pod { return s.asks }
	passes := func(err error) bool { return err == nil }
	w.scale(t, 0)
	each("the webhook is down", plain, func(err error) bool {
		return err != nil && strings.Contains(err.Error(), "failed calling webhook")
	})
	s.phase(t, "outage", true)

	// Somebody helps himself.
	w.failurePolicy(t, admissionregv1.Ignore)
	each("pods that ask for nothing pass", plain, passes)
	each("the policy refuses the others", asks, func(err error) bool {
		return err != nil && !strings.Contains(err.Error(), "failed calling webhook")
	})
	s.phase(t, "until a failure is ignored", true)
	for _, s := range s {
		_, err := s.submit(t.Context(), s.asks)
		refusedByPolicy(t, err, "was not injected")
	}
	s.flow(t, 0, 5, 5)
	if refused := s.phase(t, "failures ignored", true); slices.ContainsFunc(refused, func(e string) bool { return !strings.Contains(e, "ValidatingAdmissionPolicy 'cloister'") }) {
		t.Errorf("pods were refused by something else than the policy: %s", strings.Join(slices.Compact(refused), "\n"))
	}
	w.failurePolicy(t, admissionregv1.Fail)
	each("failures count again", plain, func(err error) bool { return err != nil })

	w.scale(t, 2)
	w.restarted(t)
	each("the webhook is back", asks, passes)
	s.phase(t, "until it is back", true)
	s.flow(t, 20, 20, 0)
	s.phase(t, "after the outage", false)
}

func (w webhook) scale(t *testing.T, n int) {
	t.Helper()
	if out, err := exec.Command("kubectl", "-n", systemNamespace, "scale", "deployment/"+webhookName+w.suffix, fmt.Sprintf("--replicas=%d", n)).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func (w webhook) failurePolicy(t *testing.T, policy admissionregv1.FailurePolicyType) {
	t.Helper()
	patch := fmt.Appendf(nil, `[{"op":"replace","path":"/webhooks/0/failurePolicy","value":%q}]`, policy)
	_, err := w.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Patch(context.WithoutCancel(t.Context()), webhookConfig+w.suffix, types.JSONPatchType, patch, metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// certificates reads PEM.
func certificates(t *testing.T, data []byte) (list []*x509.Certificate) {
	t.Helper()
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return list
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, cert)
	}
}

func (w webhook) caBundle(t *testing.T) []*x509.Certificate {
	t.Helper()
	config, err := w.kube.AdmissionregistrationV1().MutatingWebhookConfigurations().Get(t.Context(), webhookConfig+w.suffix, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return certificates(t, config.Webhooks[0].ClientConfig.CABundle)
}

// signing is the CA that the Secret holds.
func (w webhook) signing(t *testing.T) *x509.Certificate {
	t.Helper()
	secret, err := w.kube.CoreV1().Secrets(systemNamespace).Get(t.Context(), webhookSecret+w.suffix, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return certificates(t, secret.Data[corev1.TLSCertKey])[0]
}

// ageAuthority puts a CA into the Secret that is in the last third of its life, so that the webhook rotates it now,
// and returns it. The caBundle keeps what it has.
func (w webhook) ageAuthority(t *testing.T) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: webhookName},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(20 * time.Minute),
		KeyUsage: x509.KeyUsageCertSign, BasicConstraintsValid: true, IsCA: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	secrets := w.kube.CoreV1().Secrets(systemNamespace)
	secret, err := secrets.Get(t.Context(), webhookSecret+w.suffix, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret.Data["ca.crt"] = slices.Concat(cert, secret.Data["ca.crt"])
	secret.Data[corev1.TLSCertKey] = cert
	secret.Data[corev1.TLSPrivateKeyKey] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})
	if _, err := secrets.Update(t.Context(), secret, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	return certificates(t, cert)[0]
}

// metric reads a metric without labels of each running replica of the webhook.
func (w webhook) metric(t *testing.T, name string) map[string]float64 {
	t.Helper()
	pods, err := w.kube.CoreV1().Pods(systemNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + webhookName + w.suffix})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil {
			continue
		}
		b, err := w.kube.CoreV1().Pods(systemNamespace).ProxyGet("http", p.Name, "8080", "/metrics", nil).DoRaw(t.Context())
		if err != nil {
			continue // it is starting
		}
		for line := range strings.Lines(string(b)) {
			if value, ok := strings.CutPrefix(line, name+" "); ok {
				if out[p.Name], err = strconv.ParseFloat(strings.TrimSpace(value), 64); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	return out
}

// servedBy asks each replica for its certificate and tells whether all are of the CA.
func (w webhook) servedBy(t *testing.T, ca *x509.Certificate) (bool, string) {
	t.Helper()
	pods, err := w.kube.CoreV1().Pods(systemNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=" + webhookName + w.suffix})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil {
			continue
		}
		addr, stop, err := forward(t.Context(), systemNamespace, "pod/"+p.Name, 9443)
		if err != nil {
			return false, err.Error()
		}
		conn, err := tls.Dial("tcp", addr, &tls.Config{InsecureSkipVerify: true})
		if err == nil {
			err = conn.ConnectionState().PeerCertificates[0].CheckSignatureFrom(ca)
			conn.Close()
		}
		stop()
		if err != nil {
			return false, p.Name + ": " + err.Error()
		}
	}
	return true, ""
}

// mutated is a pod that another webhook has changed after ours.
func mutated(t *testing.T, c *cluster, injector string) *corev1.Pod {
	t.Helper()
	pod := c.appPod(t, "app")
	pod.Annotations["example.com/injector"] = injector
	pod.Spec.Containers[0].ReadinessProbe = httpProbe("/check/ready", 8080)
	return pod
}

// Other webhooks come after ours, and ours is asked again: what a mesh or an injector of variables does is kept and
// changes nothing of the enclave; what would change the enclave is denied.
func TestOtherInjectors(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	type op map[string]any
	env := func(container, name, value string) op {
		return op{"op": "add", "path": "/spec/" + container + "/env/-", "value": op{"name": name, "value": value}}
	}
	tests := map[string]struct {
		patch []op
		want  string // in the denial; empty when it is to be admitted
	}{
		"nothing": {},
		"mesh": {patch: []op{
			{"op": "add", "path": "/spec/initContainers/0", "value": op{"name": "istio-proxy", "image": localImage, "restartPolicy": "Always", "args": []string{"serve"}}},
			{"op": "add", "path": "/spec/initContainers/0", "value": op{"name": "istio-init", "image": localImage}},
			{"op": "add", "path": "/spec/volumes/-", "value": op{"name": "istio-envoy", "emptyDir": op{}}},
			{"op": "add", "path": "/spec/containers/0/volumeMounts/-", "value": op{"name": "istio-envoy", "mountPath": "/etc/istio"}},
			{"op": "replace", "path": "/spec/containers/0/readinessProbe/httpGet", "value": op{"path": "/app-health/app/readyz", "port": 15020}},
			{"op": "add", "path": "/metadata/annotations/sidecar.istio.io~1status", "value": "{}"},
			{"op": "add", "path": "/metadata/labels/service.istio.io~1canonical-name", "value": "app"},
		}},
		"variables": {patch: []op{
			env("initContainers/0", "HTTPS_PROXY", "http://proxy.example:3128"),
			env("initContainers/1", "OTEL_SERVICE_NAME", "app"),
			{"op": "add", "path": "/spec/containers/0/env", "value": []op{{"name": "LD_PRELOAD", "value": "/evil.so"}, {"name": "AWS_ROLE_ARN", "value": "arn"}}},
		}},
		"a forged manifest": {patch: []op{
			{"op": "replace", "path": "/spec/initContainers/0/env/0/value", "value": `{"apiVersion":"cloister.dev/v1alpha1"}`},
		}, want: "CLOISTER_MANIFEST"},
		"a variable of ours":   {patch: []op{env("initContainers/1", "CLOISTER_PORTS_MORE", "[1]")}, want: "CLOISTER_PORTS_MORE is not what is injected"},
		"one twice":            {patch: []op{env("initContainers/0", "CLOISTER_MANIFEST", "{}")}, want: "CLOISTER_MANIFEST is not what is injected"},
		"variables from a map": {patch: []op{{"op": "add", "path": "/spec/initContainers/0/envFrom", "value": []op{{"configMapRef": op{"name": "x"}}}}}, want: "envFrom"},
		"one of ours on the console": {patch: []op{
			{"op": "add", "path": "/spec/containers/0/env", "value": []op{{"name": "CLOISTER_MANIFEST", "value": "{}"}}},
		}, want: "CLOISTER_MANIFEST is not what is injected"},
		"the probe of initboot": {patch: []op{{"op": "remove", "path": "/spec/initContainers/0/startupProbe"}}, want: "startupProbe"},
		"the sidecar":           {patch: []op{{"op": "remove", "path": "/spec/initContainers/1"}}, want: "cloister-sidecar"},
		"the order":             {patch: []op{{"op": "move", "from": "/spec/initContainers/0", "path": "/spec/initContainers/1"}}, want: "once and then"},
		"the image":             {patch: []op{{"op": "replace", "path": "/spec/containers/0/image", "value": localImage}}, want: "this installation injects"},
		"the measurements":      {patch: []op{{"op": "replace", "path": "/metadata/annotations/cloister.dev~1measurements", "value": `{"PCR16":"00"}`}}, want: "not what the injected manifest measures to"},
		"the annotations":       {patch: []op{{"op": "remove", "path": "/metadata/annotations"}}, want: "its annotations are gone"},
		"a spy": {patch: []op{
			{"op": "add", "path": "/spec/containers/-", "value": op{"name": "spy", "image": localImage, "volumeMounts": []op{{"name": "cloister-run", "mountPath": "/run/cloister"}}}},
		}, want: "cloister-run"},
	}
	patches := map[string][]op{}
	for name, tt := range tests {
		if tt.patch != nil {
			patches[name] = tt.patch
		}
	}
	text, err := json.Marshal(patches)
	if err != nil {
		t.Fatal(err)
	}
	_, ready := c.start(t, "mutate", "-patches", string(text))
	ns.mutatingWebhook(t, strings.Fields(ready))

	create := func(name string) (*corev1.Pod, error) {
		return ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), mutated(t, c, name), dryRun)
	}
	var reference *corev1.Pod
	eventually(t, time.Minute, "the other webhook is asked", func() (bool, string) {
		reference, err = create("nothing")
		if err != nil {
			t.Fatal(err)
		}
		_, err := create("the sidecar")
		return err != nil, "it is not"
	})
	of := func(pod *corev1.Pod, container, name string) string {
		for _, c := range pod.Spec.InitContainers {
			for _, e := range c.Env {
				if c.Name == container && e.Name == name {
					return e.Value
				}
			}
		}
		return ""
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := create(name)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "inject.cloister.dev") {
					t.Fatalf("our webhook does not deny it with %q: %v", tt.want, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range [][2]string{{initbootContainer, "CLOISTER_MANIFEST"}, {initbootContainer, "CLOISTER_IMAGE"}, {sidecarContainer, "CLOISTER_PORTS"}} {
				if want := of(reference, v[0], v[1]); of(got, v[0], v[1]) != want || want == "" {
					t.Errorf("%s is %s, was %s", v[1], of(got, v[0], v[1]), want)
				}
			}
			if got.Annotations["cloister.dev/measurements"] != reference.Annotations["cloister.dev/measurements"] {
				t.Error("it measures to something else")
			}
		})
	}
	mesh, err := create("mesh")
	if err != nil {
		t.Fatal(err)
	}
	if p := mesh.Spec.Containers[0].ReadinessProbe.HTTPGet; p.Port != intstr.FromInt(15020) || mesh.Spec.InitContainers[0].Name != "istio-init" {
		t.Errorf("the mesh's changes are gone: %v, %v", p, mesh.Spec.InitContainers[0].Name)
	}
}

// mutatingWebhook registers what listens on the node's port, for this namespace and until the test ends.
func (ns *namespace) mutatingWebhook(t *testing.T, ready []string) {
	t.Helper()
	bundle, err := base64.StdEncoding.DecodeString(ready[2])
	if err != nil {
		t.Fatal(err)
	}
	configs := ns.kube.AdmissionregistrationV1().MutatingWebhookConfigurations()
	config := &admissionregv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: "10-" + ns.name},
		Webhooks: []admissionregv1.MutatingWebhook{{
			Name:                    "mutate.example.com",
			AdmissionReviewVersions: []string{"v1"},
			ClientConfig:            admissionregv1.WebhookClientConfig{URL: new("https://127.0.0.1:" + ready[1] + "/"), CABundle: bundle},
			SideEffects:             new(admissionregv1.SideEffectClassNone),
			NamespaceSelector:       &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns.name}},
			Rules: []admissionregv1.RuleWithOperations{{
				Operations: []admissionregv1.OperationType{admissionregv1.Create},
				Rule:       admissionregv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}
	if _, err := configs.Create(t.Context(), config, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := configs.Delete(context.WithoutCancel(t.Context()), config.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// What somebody makes by hand to pass for an injected pod is denied by the webhook.
func TestForged(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	injected := ns.handMade(t, c.appPod(t, "app"))
	initboot := func(p *corev1.Pod) *corev1.Container { return &p.Spec.InitContainers[0] }
	for name, tt := range map[string]struct {
		change func(*corev1.Pod)
		want   string // empty when it is to be admitted
	}{
		"all of it": {func(*corev1.Pod) {}, ""},
		"spoofed measurements": {func(p *corev1.Pod) {
			*p = *c.appPod(t, "app")
			p.Annotations["cloister.dev/measurements"] = `{"PCR16":"00"}`
		}, "not what this pod measures to"},
		"own container called cloister-initboot": {func(p *corev1.Pod) {
			*p = *c.appPod(t, "app")
			p.Spec.InitContainers = []corev1.Container{other(initbootContainer)}
		}, "a part of what is injected"},
		"own containers called as ours": {func(p *corev1.Pod) {
			*p = *c.appPod(t, "app")
			p.Spec.InitContainers = []corev1.Container{other(initbootContainer), other(sidecarContainer)}
		}, "CLOISTER_MANIFEST, which was injected, is gone"},
		"forged manifest": {func(p *corev1.Pod) {
			m := &initboot(p).Env[0].Value
			*m = strings.Replace(*m, `"digest":"sha256:`, `"digest":"sha256:00`, 1)
		}, "CLOISTER_MANIFEST"},
		"other measurements": {func(p *corev1.Pod) { p.Annotations["cloister.dev/measurements"] = `{"PCR16":"00"}` }, "measures to"},
		"added variable":     {func(p *corev1.Pod) { initboot(p).Env = append(initboot(p).Env, corev1.EnvVar{Name: "CLOISTER_X"}) }, "CLOISTER_X is not what is injected"},
		"changed memory": {func(p *corev1.Pod) {
			i := slices.IndexFunc(initboot(p).Env, func(e corev1.EnvVar) bool { return e.Name == "CLOISTER_MEMORY" })
			initboot(p).Env[i].Value = "-1"
		}, "not a number of bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := injected.DeepCopy()
			tt.change(pod)
			_, err := ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), pod, dryRun)
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), "inject.cloister.dev") {
				t.Errorf("our webhook does not deny it with %q: %v", tt.want, err)
			}
		})
	}
}

// Whoever deploys what is denied reads why on the Deployment.
func TestDenialReported(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	pod.Annotations = map[string]string{"cloister.dev/enclav": "app"}
	ns.create(t, deployment(pod, 2))
	eventually(t, time.Minute, "an Event on the Deployment", func() (bool, string) {
		list, err := ns.kube.CoreV1().Events(ns.name).List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=Deployment,involvedObject.name=app,reason=AnnotationRefused"})
		if err != nil {
			t.Fatal(err)
		}
		return len(list.Items) > 0 && strings.Contains(list.Items[0].Message, `did you mean "cloister.dev/enclave"`), fmt.Sprint(list.Items)
	})
}

// Two revisions stand side by side, each with its own images: the namespace's label says which one takes its pods.
func TestRevisions(t *testing.T) {
	c := e2e(t)
	const rev = "e2e"
	w := c.install(t, rev)
	first, second := c.namespace(t, true), c.namespace(t, true)
	pod := submit(t, first, c.appPod(t, "app"))
	image := func(ns *namespace) (string, error) {
		pod, err := ns.kube.CoreV1().Pods(ns.name).Create(t.Context(), c.appPod(t, "app"), dryRun)
		if err != nil {
			return "", err
		}
		if !isInjected(pod) {
			t.Fatal("not injected")
		}
		return pod.Spec.InitContainers[0].Image, nil
	}
	const other = "cloister.dev/initboot:of-a-revision"
	w.configure(t, "INITBOOT_IMAGE="+other)

	// The revision's images must be allowed, too.
	second.revision(t, rev, func() (bool, string) {
		_, err := image(second)
		return err != nil && strings.Contains(err.Error(), "the image of cloister-initboot is none that this installation injects"), fmt.Sprint(err)
	})
	allow := exec.CommandContext(t.Context(), "kubectl", "apply", "--server-side", "--force-conflicts", "--field-manager=cloister-install-"+rev, "-f", "-")
	allow.Stdin = strings.NewReader(`{"apiVersion":"cloister.dev/v1alpha1","kind":"InjectedImages","metadata":{"name":"cloister"},"images":{"initboot.` + rev + `":["` + other + `"],"sidecar.` + rev + `":["` + pod.Spec.InitContainers[1].Image + `"]}}`)
	if out, err := allow.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	eventually(t, time.Minute, "the second revision injects", func() (bool, string) {
		got, err := image(second)
		return err == nil && got == other, fmt.Sprint(got, err)
	})
	if got, err := image(first); err != nil || got == other || got == "" {
		t.Errorf("the first revision injects %q: %v", got, err)
	}
	configs := c.kube.AdmissionregistrationV1().MutatingWebhookConfigurations()
	if _, err := configs.Get(t.Context(), webhookConfig+w.suffix, metav1.GetOptions{}); err != nil {
		t.Error(err)
	}

	// A namespace whose revision is gone gets no pods in the open.
	if err := w.run("remove"); err != nil {
		t.Fatal(err)
	}
	if _, err := configs.Get(t.Context(), webhookConfig+w.suffix, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the revision's configuration is still there: %v", err)
	}
	eventually(t, time.Minute, "the revision is gone", func() (bool, string) {
		_, err := image(second)
		return err != nil && strings.Contains(err.Error(), "names an installed revision"), fmt.Sprint(err)
	})
	if got, err := image(first); err != nil {
		t.Errorf("the first revision injects %q: %v", got, err)
	}
}
