package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/version"
)

// What is read of a cluster, by the names that kubectl has for it.
const (
	ofVersion       = "version"
	ofNodes         = "nodes"
	ofNamespaces    = "namespaces"
	ofPods          = "pods"
	ofConfiguration = "mutatingwebhookconfigurations"
	ofPolicies      = "validatingadmissionpolicies"
	ofBindings      = "validatingadmissionpolicybindings"
	ofImages        = "injectedimages"
	ofServices      = "services"
	ofDeployments   = "deployments"
	ofConfigMaps    = "configmaps"
	ofPortForward   = "pods/portforward"
)

// lookTime limits the reading of one thing.
const lookTime = 20 * time.Second

// hookName is the name of our webhook in the configuration of each revision.
const hookName = "inject.cloister.dev"

// snapshot is a cluster at one time, as far as it can be read.
type snapshot struct {
	now        time.Time
	version    version.Info
	nodes      []corev1.Node
	namespaces []corev1.Namespace
	pods       []corev1.Pod
	hooks      []admissionregv1.MutatingWebhookConfiguration
	policies   []admissionregv1.ValidatingAdmissionPolicy
	bindings   []admissionregv1.ValidatingAdmissionPolicyBinding
	images     []injectedImages
	// What the revisions of the webhook are made of.
	services    []corev1.Service
	deployments []appsv1.Deployment
	configMaps  []corev1.ConfigMap
	// served is what the pods of the webhook serve, by namespace/name.
	served map[string]served
	// unread is why something is not here.
	unread map[string]error
}

// injectedImages is the parameter of the policy (manifests/policy/crd.yaml).
type injectedImages struct {
	metav1.ObjectMeta `json:"metadata"`
	Images            map[string][]string `json:"images"` // by part and revision
}

// served is what a TLS server shows.
type served struct {
	chain []*x509.Certificate
	err   error // of the handshake
}

// revision is one webhook with what belongs to it. What is not there is nil.
type revision struct {
	name       string // of its configuration
	hook       *admissionregv1.MutatingWebhook
	service    *corev1.Service
	deployment *appsv1.Deployment
	// settings are the environment and the flags of the webhook, by environment variable.
	settings map[string]string
}

// look reads the cluster. It fails if the API server does not answer at all.
func look(ctx context.Context, k *kube) (*snapshot, error) {
	s := &snapshot{now: time.Now(), served: map[string]served{}, unread: map[string]error{}}
	err := k.read(ctx, "/version", nil, &s.version)
	var status apierrors.APIStatus
	if err != nil && (!errors.As(err, &status) || apierrors.IsUnauthorized(err)) {
		return nil, fmt.Errorf("ask the API server: %w", err)
	} else if err != nil {
		s.unread[ofVersion] = fmt.Errorf("read the version: %w", err)
	}
	s.nodes = readList[corev1.Node](ctx, k, s, ofNodes, "/api/v1/nodes")
	s.namespaces = readList[corev1.Namespace](ctx, k, s, ofNamespaces, "/api/v1/namespaces")
	s.pods = readList[corev1.Pod](ctx, k, s, ofPods, "/api/v1/pods")
	const admission = "/apis/admissionregistration.k8s.io/v1/"
	s.hooks = readList[admissionregv1.MutatingWebhookConfiguration](ctx, k, s, ofConfiguration, admission+ofConfiguration)
	s.policies = readList[admissionregv1.ValidatingAdmissionPolicy](ctx, k, s, ofPolicies, admission+ofPolicies)
	s.bindings = readList[admissionregv1.ValidatingAdmissionPolicyBinding](ctx, k, s, ofBindings, admission+ofBindings)
	s.images = readList[injectedImages](ctx, k, s, ofImages, "/apis/cloister.dev/v1alpha1/"+ofImages)
	if apierrors.IsNotFound(s.unread[ofImages]) { // its definition is missing, which says enough
		delete(s.unread, ofImages)
	}
	for _, r := range s.revisions() {
		if ref := r.hook.ClientConfig.Service; ref != nil {
			s.services = append(s.services, readNamed[corev1.Service](ctx, k, s, ofServices, ref.Namespace, ref.Name)...)
		}
	}
	for _, namespace := range s.homes() {
		s.deployments = append(s.deployments, readList[appsv1.Deployment](ctx, k, s, ofDeployments, "/apis/apps/v1/namespaces/"+namespace+"/"+ofDeployments)...)
	}
	for _, r := range s.revisions() {
		for _, name := range configMapsOf(r.deployment) {
			s.configMaps = append(s.configMaps, readNamed[corev1.ConfigMap](ctx, k, s, ofConfigMaps, r.deployment.Namespace, name)...)
		}
	}
	for _, r := range s.revisions() {
		for _, p := range s.webhookPods(r) {
			s.shake(ctx, k, r, p)
		}
	}
	return s, nil
}

// readList reads a list, or notes why it cannot be read.
func readList[T any](ctx context.Context, k *kube, s *snapshot, what, path string) []T {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	items, err := list[T](ctx, k, path)
	if err != nil {
		s.unread[what] = fmt.Errorf("list %s: %w", what, err)
	}
	return items
}

// readNamed reads one object, if it is there, or notes why it cannot be read.
func readNamed[T any](ctx context.Context, k *kube, s *snapshot, what, namespace, name string) []T {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	var object T
	err := k.read(ctx, "/api/v1/namespaces/"+namespace+"/"+what+"/"+name, nil, &object)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		s.unread[what] = fmt.Errorf("get %s %s/%s: %w", what, namespace, name, err)
		return nil
	}
	return []T{object}
}

// shake notes what a pod of the webhook serves. A person's machine does not reach the Service, so the
// connection leads through the API server.
func (s *snapshot) shake(ctx context.Context, k *kube, r revision, pod *corev1.Pod) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	conn, err := k.dial(pod.Namespace, pod.Name, r.port(pod))
	if err != nil {
		s.unread[ofPortForward] = fmt.Errorf("connect to pod %s/%s: %w", pod.Namespace, pod.Name, err)
		return
	}
	defer conn.Close()
	// The chain is judged by a check, and nothing is sent.
	t := tls.Client(conn, &tls.Config{InsecureSkipVerify: true, ServerName: r.serverName()})
	err = t.HandshakeContext(ctx)
	s.served[pod.Namespace+"/"+pod.Name] = served{t.ConnectionState().PeerCertificates, err}
}

// homes lists the namespaces of the webhook's revisions.
func (s *snapshot) homes() []string {
	var list []string
	for _, r := range s.revisions() {
		if ref := r.hook.ClientConfig.Service; ref != nil && !slices.Contains(list, ref.Namespace) {
			list = append(list, ref.Namespace)
		}
	}
	return list
}

// revisions finds the webhook's revisions by the name of the webhook in their configurations.
func (s *snapshot) revisions() []revision {
	var list []revision
	for i := range s.hooks {
		for j := range s.hooks[i].Webhooks {
			hook := &s.hooks[i].Webhooks[j]
			if hook.Name != hookName {
				continue
			}
			r := revision{name: s.hooks[i].Name, hook: hook, settings: map[string]string{}}
			if ref := hook.ClientConfig.Service; ref != nil {
				if i := slices.IndexFunc(s.services, func(o corev1.Service) bool { return o.Namespace == ref.Namespace && o.Name == ref.Name }); i >= 0 {
					r.service = &s.services[i]
				}
			}
			if r.service != nil && len(r.service.Spec.Selector) > 0 {
				selector := labels.SelectorFromSet(r.service.Spec.Selector)
				if i := slices.IndexFunc(s.deployments, func(o appsv1.Deployment) bool {
					return o.Namespace == r.service.Namespace && selector.Matches(labels.Set(o.Spec.Template.Labels))
				}); i >= 0 {
					r.deployment = &s.deployments[i]
					r.settings = s.settings(r.deployment)
				}
			}
			list = append(list, r)
		}
	}
	return list
}

// webhookPods lists the pods behind a revision's Service that run.
func (s *snapshot) webhookPods(r revision) []*corev1.Pod {
	var list []*corev1.Pod
	if r.service == nil || len(r.service.Spec.Selector) == 0 {
		return nil
	}
	selector := labels.SelectorFromSet(r.service.Spec.Selector)
	for i := range s.pods {
		p := &s.pods[i]
		if p.Namespace == r.service.Namespace && p.Status.Phase == corev1.PodRunning && p.DeletionTimestamp == nil && selector.Matches(labels.Set(p.Labels)) {
			list = append(list, p)
		}
	}
	return list
}

// serverName is the name that API servers call the webhook by.
func (r *revision) serverName() string {
	ref := r.hook.ClientConfig.Service
	return ref.Name + "." + ref.Namespace + ".svc"
}

// port is the port of the pod that API servers reach through the Service; 0 if there is none.
func (r *revision) port(pod *corev1.Pod) int32 {
	wanted := int32(443) // the default of clientConfig.service.port
	if p := r.hook.ClientConfig.Service.Port; p != nil {
		wanted = *p
	}
	for _, p := range r.service.Spec.Ports {
		if p.Port != wanted {
			continue
		}
		if p.TargetPort.StrVal == "" {
			return cmp.Or(p.TargetPort.IntVal, p.Port)
		}
		for _, c := range pod.Spec.Containers {
			for _, port := range c.Ports {
				if port.Name == p.TargetPort.StrVal {
					return port.ContainerPort
				}
			}
		}
	}
	return 0
}

// configMapsOf lists the ConfigMaps that the first container takes its environment from.
func configMapsOf(d *appsv1.Deployment) []string {
	var list []string
	if d == nil || len(d.Spec.Template.Spec.Containers) == 0 {
		return nil
	}
	c := d.Spec.Template.Spec.Containers[0]
	for _, from := range c.EnvFrom {
		if from.ConfigMapRef != nil {
			list = append(list, from.ConfigMapRef.Name)
		}
	}
	for _, e := range c.Env {
		if e.ValueFrom != nil && e.ValueFrom.ConfigMapKeyRef != nil {
			list = append(list, e.ValueFrom.ConfigMapKeyRef.Name)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// settings reads the configuration of a webhook as webhook/main.go does: its flags before its environment,
// and there, as the kubelet does, env before envFrom.
func (s *snapshot) settings(d *appsv1.Deployment) map[string]string {
	settings := map[string]string{}
	if len(d.Spec.Template.Spec.Containers) == 0 {
		return settings
	}
	c := d.Spec.Template.Spec.Containers[0]
	data := func(name string) map[string]string {
		for _, m := range s.configMaps {
			if m.Namespace == d.Namespace && m.Name == name {
				return m.Data
			}
		}
		return nil
	}
	for _, from := range c.EnvFrom {
		if from.ConfigMapRef != nil {
			for key, value := range data(from.ConfigMapRef.Name) {
				settings[from.Prefix+key] = value
			}
		}
	}
	for _, e := range c.Env {
		settings[e.Name] = e.Value
		if e.ValueFrom != nil && e.ValueFrom.ConfigMapKeyRef != nil {
			settings[e.Name] = data(e.ValueFrom.ConfigMapKeyRef.Name)[e.ValueFrom.ConfigMapKeyRef.Key]
		}
	}
	args := slices.Concat(c.Command, c.Args)
	for i, arg := range args {
		name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if !strings.HasPrefix(arg, "-") {
			continue
		}
		if !joined && i+1 < len(args) {
			value = args[i+1]
		}
		settings[strings.ToUpper(strings.ReplaceAll(name, "-", "_"))] = value
	}
	return settings
}
