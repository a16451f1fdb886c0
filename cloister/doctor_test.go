package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	admissionregv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/version"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
)

// checkup is when the tests look at a cluster.
var checkup = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// chain makes a CA that is valid for caLeft and a certificate of its own for the webhook that is valid for
// leafLeft, both from checkup on.
func chain(t *testing.T, caLeft, leafLeft time.Duration) (bundle []byte, leaf *x509.Certificate) {
	t.Helper()
	sign := func(template, parent *x509.Certificate, key, parentKey *ecdsa.PrivateKey) *x509.Certificate {
		template.SerialNumber, template.NotBefore = big.NewInt(1), checkup.Add(-time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), parentKey)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: "cloister-webhook"}, NotAfter: checkup.Add(caLeft),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	ca := sign(template, template, key, key)
	leaf = sign(&x509.Certificate{DNSNames: []string{"cloister-webhook.cloister-system.svc"}, NotAfter: checkup.Add(leafLeft)}, ca, key, key)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), leaf
}

const day = 24 * time.Hour

// manifest reads the object of a kind from a file of manifests/.
func manifest(t *testing.T, file, kind string, into any) {
	t.Helper()
	b, err := os.ReadFile("../manifests/" + file)
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range strings.Split(string(b), "\n---\n") {
		var is metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(document), &is); err != nil {
			t.Fatal(err)
		}
		if is.Kind == kind {
			if err := yaml.Unmarshal([]byte(document), into); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatalf("manifests/%s has no %s", file, kind)
}

// healthy is a cluster with one node, manifests/ as it is, and a confidential pod.
func healthy(t *testing.T) *snapshot {
	t.Helper()
	bundle, leaf := chain(t, 300*day, 23*time.Hour)
	s := &snapshot{
		now:     checkup,
		version: version.Info{GitVersion: "v1.37.2"},
		nodes: []corev1.Node{{
			ObjectMeta: metav1.ObjectMeta{Name: "node-1"},
			Status:     corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "linux", KubeletVersion: "v1.37.2"}, Allocatable: corev1.ResourceList{}},
		}},
		namespaces: []corev1.Namespace{
			namespace("kube-system"), namespace("cloister-system"), namespace("default"),
			namespace("shop", labelInjection, enabled),
		},
		hooks:       make([]admissionregv1.MutatingWebhookConfiguration, 1),
		policies:    make([]admissionregv1.ValidatingAdmissionPolicy, 1),
		bindings:    make([]admissionregv1.ValidatingAdmissionPolicyBinding, 1),
		services:    make([]corev1.Service, 1),
		deployments: make([]appsv1.Deployment, 1),
		configMaps: []corev1.ConfigMap{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "cloister-system", Name: "cloister-install"},
			Data:       map[string]string{"DRIVER": "process", "INITBOOT_IMAGE": "example/initboot:1", "SIDECAR_IMAGE": "example/sidecar:1"},
		}},
		images: []injectedImages{{
			ObjectMeta: metav1.ObjectMeta{Name: "cloister"},
			Images:     map[string][]string{"initboot": {"example/initboot:1"}, "sidecar.canary": {"example/sidecar:1"}},
		}},
		served: map[string]served{"cloister-system/cloister-webhook-1": {chain: []*x509.Certificate{leaf}}},
		unread: map[string]error{},
	}
	manifest(t, "webhook/configuration.yaml", "MutatingWebhookConfiguration", &s.hooks[0])
	manifest(t, "webhook/service.yaml", "Service", &s.services[0])
	manifest(t, "webhook/deployment.yaml", "Deployment", &s.deployments[0])
	manifest(t, "policy/policy.yaml", "ValidatingAdmissionPolicy", &s.policies[0])
	manifest(t, "policy/binding.yaml", "ValidatingAdmissionPolicyBinding", &s.bindings[0])
	s.hooks[0].Webhooks[0].ClientConfig.CABundle = bundle
	s.deployments[0].Status.ReadyReplicas = 2
	template := s.deployments[0].Spec.Template
	s.pods = []corev1.Pod{
		{
			ObjectMeta: metav1.ObjectMeta{Namespace: "cloister-system", Name: "cloister-webhook-1", Labels: template.Labels},
			Spec:       template.Spec, Status: corev1.PodStatus{Phase: corev1.PodRunning},
		},
		*confidentialPod("web-1", corev1.ContainerStatus{State: runs}, corev1.ContainerStatus{State: runs}),
		{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "ordinary"}, Status: corev1.PodStatus{Phase: corev1.PodRunning}},
	}
	return s
}

// namespace has the labels given, key after value.
func namespace(name string, pairs ...string) corev1.Namespace {
	n := corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelMetadataName: name}}}
	for i := 0; i < len(pairs); i += 2 {
		n.Labels[pairs[i]] = pairs[i+1]
	}
	return n
}

// annotated is a pod that was not injected.
func annotated(namespace, name string, pairs ...string) corev1.Pod {
	p := corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: map[string]string{}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for i := 0; i < len(pairs); i += 2 {
		p.Annotations[pairs[i]] = pairs[i+1]
	}
	return p
}

// another is the configuration of another injector that takes all pods.
func another(name string) admissionregv1.MutatingWebhookConfiguration {
	return admissionregv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Webhooks: []admissionregv1.MutatingWebhook{{
			Name: "inject.example.com",
			Rules: []admissionregv1.RuleWithOperations{{
				Operations: []admissionregv1.OperationType{"*"},
				Rule:       admissionregv1.Rule{APIGroups: []string{"*"}, APIVersions: []string{"*"}, Resources: []string{"*"}},
			}},
		}},
	}
}

// nitro makes the cluster one with Nitro enclaves.
func nitro(s *snapshot) {
	s.configMaps[0].Data["DRIVER"], s.configMaps[0].Data["HUGEPAGES"] = inject.DriverNitro, "1Gi"
	s.nodes[0].Status.Allocatable = corev1.ResourceList{
		inject.NitroEnclaves: resource.MustParse("4"), "hugepages-1Gi": resource.MustParse("8Gi"),
	}
	pod := &s.pods[1]
	pod.Spec.NodeName = "node-1"
	pod.Spec.InitContainers[0].SecurityContext = &corev1.SecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost}}
}

// A change to the healthy cluster, and what the check of that name says then.
func TestChecks(t *testing.T) {
	hook := func(s *snapshot) *admissionregv1.MutatingWebhook { return &s.hooks[0].Webhooks[0] }
	ignore := admissionregv1.Ignore
	never := admissionregv1.NeverReinvocationPolicy
	label := func(pairs ...string) func(*snapshot) {
		return func(s *snapshot) { s.namespaces = append(s.namespaces, namespace("lab", pairs...)) }
	}
	add := func(p corev1.Pod) func(*snapshot) {
		return func(s *snapshot) { s.pods = append(s.pods, p) }
	}
	const refused = "every pod in labelled namespaces is refused"

	for check, tests := range map[string]map[string]struct {
		change func(*snapshot)
		want   []string // level and a part of the line, for each line
	}{
		"version": {
			"healthy":    {want: []string{"ok the API server is v1.37.2"}},
			"the oldest": {func(s *snapshot) { s.version.GitVersion = "v1.33.0-eks-1" }, []string{"ok v1.33.0-eks-1"}},
			"gate":       {func(s *snapshot) { s.version.GitVersion = "v1.30.4+k3s1" }, []string{"warning SidecarContainers"}},
			"too old":    {func(s *snapshot) { s.version.GitVersion = "v1.29.9" }, []string{"error v1.29.9, fix: upgrade Kubernetes to 1.30"}},
			"strange":    {func(s *snapshot) { s.version.GitVersion = "v2.0.0" }, []string{`warning "v2.0.0"`}},
		},
		"kubelets": {
			"healthy": {want: []string{"ok 1 node"}},
			"old": {func(s *snapshot) {
				for _, v := range []string{"v1.29.1", "v1.31.1", "dirty"} {
					s.nodes = append(s.nodes, corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "other"}, Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{KubeletVersion: v}}})
				}
			}, []string{"error other (v1.29.1)", "warning other (v1.31.1)", "warning other (dirty)"}},
			"Windows": {func(s *snapshot) {
				s.nodes = append(s.nodes, corev1.Node{Status: corev1.NodeStatus{NodeInfo: corev1.NodeSystemInfo{OperatingSystem: "windows", KubeletVersion: "v1.29.1"}}})
			}, []string{"ok"}},
		},
		"configuration": {
			"healthy":  {want: []string{"ok 00-cloister"}},
			"missing":  {func(s *snapshot) { s.hooks = nil }, []string{"error fix: install Cloister"}},
			"ignore":   {func(s *snapshot) { hook(s).FailurePolicy = &ignore }, []string{"error failurePolicy Ignore"}},
			"no rule":  {func(s *snapshot) { hook(s).Rules[0].Operations = []admissionregv1.OperationType{"UPDATE"} }, []string{"error never asked"}},
			"narrowed": {func(s *snapshot) { hook(s).MatchConditions = []admissionregv1.MatchCondition{{Name: "x"}} }, []string{"error not asked about every pod"}},
			"objects": {func(s *snapshot) {
				hook(s).ObjectSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}
			}, []string{"error not asked about every pod"}},
			"wide":   {func(s *snapshot) { hook(s).NamespaceSelector = nil }, []string{"warning takes namespaces that are not labelled"}},
			"once":   {func(s *snapshot) { hook(s).ReinvocationPolicy = &never }, []string{"warning reinvocationPolicy"}},
			"by URL": {func(s *snapshot) { hook(s).ClientConfig.Service = nil }, []string{"warning names no Service"}},
		},
		"webhook": {
			"healthy":       {want: []string{"ok cloister-system/cloister-webhook (2)"}},
			"none":          {func(s *snapshot) { s.hooks = nil }, []string{"warning no webhook"}},
			"no Service":    {func(s *snapshot) { s.services = nil }, []string{"error Service cloister-system/cloister-webhook, " + refused}},
			"no Deployment": {func(s *snapshot) { s.deployments = nil }, []string{"error no Deployment, " + refused}},
			"zero":          {func(s *snapshot) { s.deployments[0].Spec.Replicas = new(int32) }, []string{"error scaled to zero, " + refused + ", fix: kubectl"}},
			"none ready":    {func(s *snapshot) { s.deployments[0].Status.ReadyReplicas = 0 }, []string{"error no replica, " + refused}},
			"one ready":     {func(s *snapshot) { s.deployments[0].Status.ReadyReplicas = 1 }, []string{"warning 1 of 2"}},
			"one": {func(s *snapshot) {
				*s.deployments[0].Spec.Replicas, s.deployments[0].Status.ReadyReplicas = 1, 1
			}, []string{"warning one replica"}},
		},
		"certificate": {
			"healthy":   {want: []string{"ok 1 pod, in 23h0m"}},
			"no pod":    {func(s *snapshot) { s.pods = nil }, []string{"warning no pod"}},
			"no bundle": {func(s *snapshot) { hook(s).ClientConfig.CABundle = nil }, []string{"error no caBundle, " + refused}},
			"another CA": {func(s *snapshot) { hook(s).ClientConfig.CABundle, _ = chain(t, 300*day, day) }, []string{
				"error does not verify, certificate signed by unknown authority"}},
			"old and new": {func(s *snapshot) {
				other, _ := chain(t, 300*day, day)
				hook(s).ClientConfig.CABundle = append(other, hook(s).ClientConfig.CABundle...)
			}, []string{"ok"}},
			"another name": {func(s *snapshot) {
				hook(s).ClientConfig.Service.Name, s.services[0].Name = "renamed", "renamed"
			}, []string{"error does not verify, not renamed.cloister-system.svc"}},
			"no TLS": {func(s *snapshot) {
				s.served["cloister-system/cloister-webhook-1"] = served{err: errors.New("connection reset")}
			}, []string{"error does not answer with TLS, connection reset"}},
			"expired":    {func(s *snapshot) { s.now = checkup.Add(23*time.Hour + time.Minute) }, []string{"error does not verify, expired"}},
			"expires":    {func(s *snapshot) { s.now = checkup.Add(20 * time.Hour) }, []string{"warning in 3h0m, not renewed in time"}},
			"CA expires": {func(s *snapshot) { serve(t, s, 80*day) }, []string{"warning certificate authority, in 80 days"}},
		},
		"policy": {
			"healthy":    {want: []string{"ok the policy cloister"}},
			"missing":    {func(s *snapshot) { s.policies = nil }, []string{"error missing, fix: apply manifests/policy"}},
			"ignore":     {func(s *snapshot) { s.policies[0].Spec.FailurePolicy = new(admissionregv1.Ignore) }, []string{"error failurePolicy Ignore"}},
			"not bound":  {func(s *snapshot) { s.bindings = nil }, []string{"error no effect"}},
			"only warns": {func(s *snapshot) { s.bindings[0].Spec.ValidationActions = []admissionregv1.ValidationAction{"Warn"} }, []string{"error no effect"}},
			"narrowed":   {func(s *snapshot) { s.bindings[0].Spec.MatchResources = &admissionregv1.MatchResources{} }, []string{"warning narrows"}},
		},
		"images": {
			"healthy": {want: []string{"ok"}},
			"missing": {func(s *snapshot) { s.images = nil }, []string{"error InjectedImages cloister"}},
			"another": {func(s *snapshot) { s.configMaps[0].Data["INITBOOT_IMAGE"] = "example/initboot:2" }, []string{"error example/initboot:2, fix: add it to images.initboot"}},
			"by flag": {func(s *snapshot) {
				s.deployments[0].Spec.Template.Spec.Containers[0].Args = []string{"--sidecar-image=example/sidecar:2"}
			}, []string{"error example/sidecar:2"}},
		},
		"labels": {
			"healthy":     {want: []string{"ok 1 namespace"}},
			"none":        {func(s *snapshot) { s.namespaces = nil }, []string{"ok no namespace has the label"}},
			"disabled":    {label(labelInjection, "disabled"), []string{"ok"}},
			"another":     {label(labelInjection, "true"), []string{"warning lab, fix: kubectl label --overwrite namespace lab cloister.dev/injection=enabled"}},
			"only rev":    {label(labelRevision, "canary"), []string{"warning without effect"}},
			"misspelt":    {label("cloister.dev/inject", enabled), []string{"warning cloister.dev/inject"}},
			"no revision": {label(labelInjection, enabled, labelRevision, "canary"), []string{`error "canary", fix: install it, kubectl label namespace lab cloister.dev/rev-`}},
			"twice": {func(s *snapshot) {
				s.hooks = append(s.hooks, *s.hooks[0].DeepCopy())
				s.hooks[1].Name = "00-cloister-canary"
			}, []string{"error two revisions, 00-cloister-canary"}},
			"no effect": {func(s *snapshot) {
				s.namespaces[0].Labels[labelInjection], s.namespaces[1].Labels[labelInjection] = enabled, enabled
			}, []string{"warning kube-system", "warning cloister-system"}},
			"going": {func(s *snapshot) {
				s.namespaces[0].Labels[labelInjection], s.namespaces[0].DeletionTimestamp = enabled, &metav1.Time{Time: checkup}
			}, []string{"ok"}},
		},
		"injectors": {
			"healthy": {want: []string{"ok"}},
			"before":  {func(s *snapshot) { s.hooks = append(s.hooks, another("00-before")) }, []string{"error 00-before, of shop, fix: give"}},
			"after":   {func(s *snapshot) { s.hooks = append(s.hooks, another("istio")) }, []string{"ok after the webhook, istio"}},
			"elsewhere": {func(s *snapshot) {
				s.hooks = append(s.hooks, another("00-before"))
				s.hooks[1].Webhooks[0].NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: "default"}}
			}, []string{"ok no other injector"}},
			"of others": {func(s *snapshot) {
				s.hooks = append(s.hooks, another("00-before"))
				s.hooks[1].Webhooks[0].Rules[0].Resources = []string{"services", "pods/exec"}
			}, []string{"ok no other injector"}},
		},
		"meshes": {
			"healthy":   {want: []string{"ok"}},
			"Istio":     {label(labelInjection, enabled, "istio-injection", "enabled"), []string{"warning lab of Istio, excludeInboundPorts"}},
			"elsewhere": {label("istio-injection", "enabled"), []string{"ok"}},
			"Linkerd": {func(s *snapshot) {
				s.namespaces[3].Annotations = map[string]string{"linkerd.io/inject": "enabled"}
			}, []string{"warning shop of Linkerd, skip-inbound-ports"}},
		},
		"pod-security": {
			"healthy":           {want: []string{"ok 1 namespace without the label"}},
			"privileged":        {func(s *snapshot) { s.namespaces[3].Labels[inject.EnforceLabel] = "privileged" }, []string{"ok"}},
			"process: baseline": {func(s *snapshot) { s.namespaces[3].Labels[inject.EnforceLabel] = "baseline" }, []string{"error shop, baseline, fix: kubectl label --overwrite namespace shop " + inject.EnforceLabel + "=privileged"}},
			"elsewhere":         {func(s *snapshot) { s.namespaces[2].Labels[inject.EnforceLabel] = "restricted" }, []string{"ok"}},
			"nitro: baseline":   {func(s *snapshot) { nitro(s); s.namespaces[3].Labels[inject.EnforceLabel] = "baseline" }, []string{"ok"}},
			"nitro: restricted": {func(s *snapshot) { nitro(s); s.namespaces[3].Labels[inject.EnforceLabel] = "restricted" }, []string{"error restricted, needs baseline"}},
			"nitro: device group": {func(s *snapshot) {
				nitro(s)
				s.configMaps[0].Data["DEVICE_GROUP"], s.namespaces[3].Labels[inject.EnforceLabel] = "990", "restricted"
			}, []string{"ok"}},
			"driver is not known": {func(s *snapshot) { s.configMaps = nil; s.namespaces[3].Labels[inject.EnforceLabel] = "baseline" }, []string{`warning not checked, ""`}},
		},
		"devices": {
			"process":       {want: []string{"ok needs no devices"}},
			"nitro":         {nitro, []string{"ok node-1"}},
			"no device":     {func(s *snapshot) { nitro(s); delete(s.nodes[0].Status.Allocatable, inject.NitroEnclaves) }, []string{"error no node offers"}},
			"no huge pages": {func(s *snapshot) { nitro(s); delete(s.nodes[0].Status.Allocatable, "hugepages-1Gi") }, []string{"error hugepages-1Gi, node-1"}},
			"other pages":   {func(s *snapshot) { nitro(s); delete(s.configMaps[0].Data, "HUGEPAGES") }, []string{"error hugepages-2Mi, node-1"}},
		},
		"seccomp": {
			"process": {want: []string{"ok needs no seccomp profile"}},
			"nitro":   {nitro, []string{"ok on every node"}},
			"unseen":  {func(s *snapshot) { nitro(s); s.pods[1].Spec.NodeName = "another" }, []string{"warning cannot be seen, node-1, profiles/cloister-vsock.json"}},
			"installer": {func(s *snapshot) {
				nitro(s)
				s.pods[1].Spec.NodeName = "another"
				pod := annotated("cloister-node", "cloister-seccomp-1")
				pod.Labels, pod.Spec.NodeName = map[string]string{"app.kubernetes.io/name": installer}, "node-1"
				pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
				s.pods = append(s.pods, pod)
			}, []string{"ok"}},
			"missing": {func(s *snapshot) {
				nitro(s)
				s.pods[1].Status.InitContainerStatuses[0].State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{
					Reason: "CreateContainerError", Message: `failed to create containerd container: cannot load seccomp profile "/var/lib/kubelet/seccomp/x.json": open: no such file or directory`}}
			}, []string{"error node-1, fix: apply manifests/seccomp"}},
		},
		"missed": {
			"healthy":       {want: []string{"ok 1 confidential pod"}},
			"before":        {add(annotated("shop", "old", annotation.Enclave, "app")), []string{"error shop, old, before the namespace was labelled"}},
			"not labelled":  {add(annotated("default", "open", annotation.Enclave, "app")), []string{"error default, open, fix: kubectl label"}},
			"static":        {add(annotated("shop", "static-node-1", annotation.Enclave, "app", corev1.MirrorPodAnnotationKey, "x")), []string{"error static pods, static-node-1"}},
			"static, shown": {func(s *snapshot) { s.pods[1].Annotations[corev1.MirrorPodAnnotationKey] = "x" }, []string{"error static pods, web-1"}},
			"ended": {func(s *snapshot) {
				s.pods = append(s.pods, annotated("shop", "old", annotation.Enclave, "app"))
				s.pods[len(s.pods)-1].Status.Phase = corev1.PodSucceeded
			}, []string{"ok"}},
			"many": {func(s *snapshot) {
				for i := range 9 {
					s.pods = append(s.pods, annotated("shop", fmt.Sprint("old-", i), annotation.Enclave, "app"))
				}
			}, []string{"error old-0, old-1, old-2 and 6 more"}},
		},
		"annotations": {
			"healthy": {want: []string{"ok"}},
			"going": {func(s *snapshot) {
				s.pods = append(s.pods, annotated("default", "typo", annotation.Prefix+"enclav", "app"))
				s.namespaces[2].DeletionTimestamp = &metav1.Time{Time: checkup}
			}, []string{"ok"}},
			"right":       {add(annotated("default", "open", annotation.Enclave, "app")), []string{"ok"}},
			"misspelt":    {add(annotated("default", "typo", annotation.Prefix+"enclav", "app")), []string{`error default/typo, did you mean "cloister.dev/enclave"`}},
			"wrong value": {add(annotated("default", "typo", annotation.Enclave, "app", annotation.Config, "memmory: 1Gi")), []string{"error default/typo, memmory"}},
		},
	} {
		c := checkNamed(t, check)
		levels := map[level]bool{}
		for name, test := range tests {
			t.Run(check+"/"+name, func(t *testing.T) {
				s := healthy(t)
				if test.change != nil {
					test.change(s)
				}
				found := c.run(s)
				if len(found) != len(test.want) {
					t.Fatalf("it says %v, want %q", found, test.want)
				}
				for i, want := range test.want {
					wantLevel, parts, _ := strings.Cut(want, " ")
					text := found[i].Sentence + ", fix: " + found[i].Fix
					for _, part := range strings.Split(parts, ", ") {
						if !strings.Contains(text, part) {
							t.Errorf("%q lacks %q", text, part)
						}
					}
					if string(found[i].Level) != wantLevel {
						t.Errorf("%q is %s, want %s", text, found[i].Level, wantLevel)
					}
					if (found[i].Fix == "") != (found[i].Level == levelOK) {
						t.Errorf("%s and the fix %q", found[i].Level, found[i].Fix)
					}
					levels[found[i].Level] = true
				}
			})
		}
		if !levels[levelOK] || !levels[levelError] && !levels[levelWarning] {
			t.Errorf("%s: a case that passes or one that fails is missing", check)
		}
	}
}

// serve replaces the CA of the healthy cluster.
func serve(t *testing.T, s *snapshot, caLeft time.Duration) {
	t.Helper()
	bundle, leaf := chain(t, caLeft, 23*time.Hour)
	s.hooks[0].Webhooks[0].ClientConfig.CABundle = bundle
	s.served["cloister-system/cloister-webhook-1"] = served{chain: []*x509.Certificate{leaf}}
}

func checkNamed(t *testing.T, name string) check {
	t.Helper()
	for _, c := range checks {
		if c.name == name {
			return c
		}
	}
	t.Fatalf("there is no check %q", name)
	return check{}
}

// Nothing is said of what could not be read but that.
func TestDiagnoseUnread(t *testing.T) {
	all := []string{ofVersion, ofNodes, ofNamespaces, ofPods, ofConfiguration, ofPolicies, ofBindings, ofImages, ofServices, ofDeployments, ofConfigMaps, ofPortForward}
	s := &snapshot{unread: map[string]error{}}
	for _, what := range all {
		s.unread[what] = errors.New(what + " is forbidden")
	}
	report := diagnose(s)
	if len(report) != len(checks) {
		t.Errorf("%d lines for %d checks", len(report), len(checks))
	}
	for _, l := range report {
		if l.Level != levelWarning || !strings.Contains(l.Sentence, "not checked: ") || !strings.Contains(l.Fix, "docs/doctor.md") {
			t.Errorf("%+v", l)
		}
	}
	for _, what := range all {
		s := healthy(t)
		s.unread[what] = errors.New("is forbidden")
		for i, l := range diagnose(s) {
			needs := strings.Contains(" "+strings.Join(checks[i].needs, " ")+" ", " "+what+" ")
			if l.Check != checks[i].name || needs != (l.Level == levelWarning) {
				t.Errorf("without %s: %+v", what, l)
			}
		}
	}
}

// docs/doctor.md has a row for each check.
func TestDoctorDocs(t *testing.T) {
	b, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if !strings.Contains(string(b), "| `"+c.name+"` |") {
			t.Errorf("docs/doctor.md has no row for %s", c.name)
		}
	}
}

// clusterServer is an API server that has what is in the snapshot, one object a page, and forbids the paths given.
func clusterServer(t *testing.T, s *snapshot, forbidden ...string) (kubeconfig string) {
	t.Helper()
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, code int, body any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		json.NewEncoder(w).Encode(body)
	}
	status := func(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
		reply(w, code, metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Message: message, Reason: reason, Code: int32(code)})
	}
	object := func(path string, o any) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { reply(w, 200, o) })
	}
	object("/version", s.version)
	object("/api/v1/namespaces/cloister-system/services/cloister-webhook", s.services[0])
	object("/api/v1/namespaces/cloister-system/configmaps/cloister-install", s.configMaps[0])
	serveList(mux, reply, "/api/v1/nodes", s.nodes)
	serveList(mux, reply, "/api/v1/namespaces", s.namespaces)
	serveList(mux, reply, "/api/v1/pods", s.pods)
	serveList(mux, reply, "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations", s.hooks)
	serveList(mux, reply, "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies", s.policies)
	serveList(mux, reply, "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings", s.bindings)
	serveList(mux, reply, "/apis/apps/v1/namespaces/cloister-system/deployments", s.deployments)
	if s.images != nil {
		serveList(mux, reply, "/apis/cloister.dev/v1alpha1/injectedimages", s.images)
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, path := range forbidden {
			if r.URL.Path == path {
				status(w, http.StatusForbidden, metav1.StatusReasonForbidden, path+" is forbidden")
				return
			}
		}
		if _, pattern := mux.Handler(r); pattern == "" {
			status(w, http.StatusNotFound, metav1.StatusReasonNotFound, "the server could not find the requested resource")
			return
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	return writeFile(t, "kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: dead
contexts: [{name: here, context: {cluster: here}}, {name: dead, context: {cluster: dead}}]
clusters: [{name: here, cluster: {server: %q}}, {name: dead, cluster: {server: "http://127.0.0.1:1"}}]
`, server.URL))
}

func serveList[T any](mux *http.ServeMux, reply func(http.ResponseWriter, int, any), path string, items []T) {
	mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
		page := 0
		fmt.Sscan(r.URL.Query().Get("continue"), &page)
		list := map[string]any{"metadata": map[string]string{}, "items": []T{}}
		if page < len(items) {
			list["items"] = items[page : page+1]
			list["metadata"] = map[string]string{"continue": strings.Repeat(fmt.Sprint(page+1), min(1, len(items)-page-1))}
		}
		reply(w, 200, list)
	})
}

// The pods' certificates are the part that only a real API server can forward: e2e/doctor_test.go.
func TestDoctor(t *testing.T) {
	s := healthy(t)
	file := clusterServer(t, s)
	args := []string{"doctor", "--kubeconfig", file, "--context", "here"}
	r := call(t, "", args...)
	r.want(t, 0)
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	if len(lines) != len(checks) {
		t.Fatalf("%d lines:\n%s", len(lines), r.stdout)
	}
	for i, line := range lines {
		want := "ok       " + checks[i].name
		if checks[i].name == "certificate" {
			want = "warning  certificate"
		}
		if !strings.HasPrefix(line, want) {
			t.Errorf("%q, want %q", line, want)
		}
	}

	t.Run("error", func(t *testing.T) {
		s := healthy(t)
		s.pods = append(s.pods, annotated("shop", "old", annotation.Enclave, "app"))
		s.images = nil
		r := call(t, "", "doctor", "--kubeconfig", clusterServer(t, s, "/api/v1/nodes"), "--context", "here", "-o", "json")
		r.want(t, 1, "cloister: 2 errors and 4 warnings were found")
		var report struct{ Findings []line }
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil {
			t.Fatal(err)
		}
		got := map[string]level{}
		for _, l := range report.Findings {
			if l.Level != levelOK {
				got[l.Check] = l.Level
			}
		}
		if diff := cmp.Diff(map[string]level{
			"kubelets": levelWarning, "certificate": levelWarning, "devices": levelWarning, "seccomp": levelWarning,
			"images": levelError, "missed": levelError,
		}, got); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
	t.Run("no cluster", func(t *testing.T) {
		call(t, "", "doctor", "--kubeconfig", file).want(t, 1, "ask the API server")
		call(t, "", "doctor", "--kubeconfig", file, "--context", "nowhere").want(t, 1, "find the cluster", "nowhere")
		call(t, "", "doctor", "--kubeconfig", file+"x").want(t, 1, "find the cluster")
	})
	t.Run("usage", func(t *testing.T) {
		call(t, "", "doctor", "-o", "yaml").want(t, 2, "only json")
		call(t, "", "doctor", "now").want(t, 2)
	})
}

func TestPort(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*revision)
		want   int32
	}{
		"by name":    {func(*revision) {}, 9443},
		"by number":  {func(r *revision) { r.service.Spec.Ports[0].TargetPort = intstr.FromInt32(8443) }, 8443},
		"the same":   {func(r *revision) { r.service.Spec.Ports[0].TargetPort = intstr.IntOrString{} }, 443},
		"no such":    {func(r *revision) { r.service.Spec.Ports[0].Port = 444 }, 0},
		"by default": {func(r *revision) { r.hook.ClientConfig.Service.Port = nil }, 9443},
	} {
		s := healthy(t)
		r := s.revisions()[0]
		test.change(&r)
		if got := r.port(&s.pods[0]); got != test.want {
			t.Errorf("%s: port %d, want %d", name, got, test.want)
		}
	}
}

// Flags go before the environment, and that before ConfigMaps.
func TestSettings(t *testing.T) {
	s := healthy(t)
	container := &s.deployments[0].Spec.Template.Spec.Containers[0]
	driver := func() string { return s.revisions()[0].settings["DRIVER"] }
	if got := driver(); got != inject.DriverProcess {
		t.Errorf("envFrom: %q", got)
	}
	container.Env = append(container.Env, corev1.EnvVar{Name: "DRIVER", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{
		LocalObjectReference: corev1.LocalObjectReference{Name: "cloister-install"}, Key: "SIDECAR_IMAGE"}}})
	if got := driver(); got != "example/sidecar:1" {
		t.Errorf("valueFrom: %q", got)
	}
	container.Env[len(container.Env)-1] = corev1.EnvVar{Name: "DRIVER", Value: "qemu"}
	if got := driver(); got != "qemu" {
		t.Errorf("env: %q", got)
	}
	container.Args = []string{"-driver", "nitro"}
	if got := driver(); got != "nitro" {
		t.Errorf("flag: %q", got)
	}
}
