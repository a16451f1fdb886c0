package main

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
)

// Labels of namespaces.
const (
	labelInjection = "cloister.dev/injection"
	labelRevision  = "cloister.dev/rev"
	enabled        = "enabled"
)

// Names in manifests/.
const (
	policyName    = "cloister"
	configuration = "00-cloister"
	// installer is the label app.kubernetes.io/name of the pods that put the seccomp profile on nodes.
	installer = "cloister-seccomp"
)

// Fixes that more than one finding has.
const (
	applyWebhook = "apply manifests/webhook again"
	applyPolicy  = "apply manifests/policy again"
)

// checks is all that is looked at, in the order of the report.
var checks = []check{
	{"version", []string{ofVersion}, checkVersion},
	{"kubelets", []string{ofNodes}, checkKubelets},
	{"configuration", []string{ofConfiguration}, checkConfiguration},
	{"webhook", []string{ofConfiguration, ofServices, ofDeployments}, checkWebhook},
	{"certificate", []string{ofConfiguration, ofServices, ofPods, ofPortForward}, checkCertificate},
	{"policy", []string{ofPolicies, ofBindings}, checkPolicy},
	{"images", []string{ofBindings, ofImages, ofConfiguration, ofServices, ofDeployments, ofConfigMaps}, checkImages},
	{"labels", []string{ofNamespaces, ofConfiguration}, checkLabels},
	{"injectors", []string{ofNamespaces, ofConfiguration}, checkInjectors},
	{"meshes", []string{ofNamespaces, ofConfiguration}, checkMeshes},
	{"pod-security", []string{ofNamespaces, ofConfiguration, ofServices, ofDeployments, ofConfigMaps}, checkPodSecurity},
	{"devices", []string{ofNodes, ofConfiguration, ofServices, ofDeployments, ofConfigMaps}, checkDevices},
	{"seccomp", []string{ofNodes, ofPods, ofConfiguration, ofServices, ofDeployments, ofConfigMaps}, checkSeccomp},
	{"missed", []string{ofPods, ofNamespaces, ofConfiguration}, checkMissed},
	{"annotations", []string{ofPods, ofNamespaces}, checkAnnotations},
}

// Minor versions of Kubernetes 1.
const (
	// minimum is where ValidatingAdmissionPolicy v1 and the preStop sleep of manifests/ are, and native sidecars are on.
	minimum = 30
	// always is where native sidecars cannot be switched off any more (KEP-753).
	always = 33
)

// minor reads a version as API servers and kubelets write it, such as v1.37.2 and v1.31.4-eks-aeac579.
func minor(gitVersion string) (int, bool) {
	rest, found := strings.CutPrefix(gitVersion, "v1.")
	digits := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if digits >= 0 {
		rest = rest[:digits]
	}
	n, err := strconv.Atoi(rest)
	return n, found && err == nil
}

func checkVersion(s *snapshot) []finding {
	v := s.version.GitVersion
	n, known := minor(v)
	switch {
	case !known:
		return []finding{{levelWarning, fmt.Sprintf("the API server says that it is version %q, which is not understood", v), fmt.Sprintf("see that it is 1.%d or newer", minimum)}}
	case n < minimum:
		return []finding{{levelError, fmt.Sprintf("the API server is %s, which lacks what the installation is made of", v), fmt.Sprintf("upgrade Kubernetes to 1.%d or newer", minimum)}}
	case n < always:
		return []finding{{levelWarning, fmt.Sprintf("the API server is %s: native sidecars are on unless its feature gate SidecarContainers is off, which cannot be seen from here", v),
			"see that kube-apiserver does not run with --feature-gates=SidecarContainers=false"}}
	}
	return good(nil, "the API server is %s, where native sidecars are on", v)
}

func checkKubelets(s *snapshot) []finding {
	var old, gated, unknown []string
	for _, n := range s.nodes {
		if n.Status.NodeInfo.OperatingSystem == "windows" {
			continue // confidential pods are for Linux
		}
		v := n.Status.NodeInfo.KubeletVersion
		line := fmt.Sprintf("%s (%s)", n.Name, v)
		switch m, known := minor(v); {
		case !known:
			unknown = append(unknown, line)
		case m < minimum:
			old = append(old, line)
		case m < always:
			gated = append(gated, line)
		}
	}
	var found []finding
	if old != nil {
		found = append(found, finding{levelError, "kubelets are too old for what is injected: " + some(old), fmt.Sprintf("upgrade them to 1.%d or newer", minimum)})
	}
	if gated != nil {
		found = append(found, finding{levelWarning, "kubelets whose feature gate SidecarContainers may be off, which cannot be seen from here: " + some(gated), "see that it is on, as it is by default"})
	}
	if unknown != nil {
		found = append(found, finding{levelWarning, "kubelets whose version is not understood: " + some(unknown), fmt.Sprintf("see that they are 1.%d or newer", minimum)})
	}
	return good(found, "native sidecars are on in the kubelets of %s", plural(len(s.nodes), "node"))
}

func checkConfiguration(s *snapshot) []finding {
	revisions := s.revisions()
	if len(revisions) == 0 {
		return []finding{{levelError, "there is no MutatingWebhookConfiguration with the webhook " + hookName + ": no pod is injected", "install Cloister: apply manifests/base"}}
	}
	var found []finding
	var names []string
	for _, r := range revisions {
		names = append(names, r.name)
		add := func(l level, fix, format string, args ...any) {
			found = append(found, finding{l, r.name + " " + fmt.Sprintf(format, args...), fix})
		}
		h := r.hook
		if h.FailurePolicy != nil && *h.FailurePolicy != admissionregv1.Fail {
			add(levelError, applyWebhook, "has failurePolicy %s: while the webhook is away, pods are admitted without injection", *h.FailurePolicy)
		}
		if !asksForPods(h) {
			add(levelError, applyWebhook, "has no rule for pods on CREATE: the webhook is never asked")
		}
		if !empty(h.ObjectSelector) || len(h.MatchConditions) > 0 {
			add(levelError, applyWebhook, "has an objectSelector or matchConditions: the webhook is not asked about every pod of a labelled namespace")
		}
		if matches(h.NamespaceSelector, labels.Set{corev1.LabelMetadataName: "unlabelled"}) {
			add(levelWarning, applyWebhook, "also takes namespaces that are not labelled %s=%s: while the webhook is away, no pod of theirs is created", labelInjection, enabled)
		}
		if h.ReinvocationPolicy == nil || *h.ReinvocationPolicy != admissionregv1.IfNeededReinvocationPolicy {
			add(levelWarning, applyWebhook, "lacks reinvocationPolicy IfNeeded: what injectors after it change is not looked at again")
		}
		if h.ClientConfig.Service == nil {
			add(levelWarning, applyWebhook, "names no Service: the webhook behind it is not looked at")
		}
	}
	return good(found, "%s asks the webhook about every pod of labelled namespaces and fails closed", some(names))
}

// asksForPods tells whether a webhook is asked about pods that are created.
func asksForPods(h *admissionregv1.MutatingWebhook) bool {
	either := func(list []string, value string) bool {
		return slices.Contains(list, value) || slices.Contains(list, "*")
	}
	return slices.ContainsFunc(h.Rules, func(r admissionregv1.RuleWithOperations) bool {
		operation := slices.Contains(r.Operations, admissionregv1.Create) || slices.Contains(r.Operations, admissionregv1.OperationAll)
		scope := r.Scope == nil || *r.Scope != admissionregv1.ClusterScope
		return operation && scope && either(r.APIGroups, "") && either(r.APIVersions, "v1") &&
			(either(r.Resources, "pods") || slices.Contains(r.Resources, "*/*"))
	})
}

func empty(s *metav1.LabelSelector) bool {
	return s == nil || len(s.MatchLabels) == 0 && len(s.MatchExpressions) == 0
}

// matches tells whether a selector of a webhook matches: one that is missing matches all.
func matches(s *metav1.LabelSelector, set labels.Set) bool {
	if s == nil {
		return true
	}
	selector, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && selector.Matches(set)
}

func checkWebhook(s *snapshot) []finding {
	var found []finding
	var replicas []string
	for _, r := range s.revisions() {
		ref := r.hook.ClientConfig.Service
		if ref == nil {
			continue
		}
		if r.service == nil {
			found = append(found, finding{levelError, fmt.Sprintf("the Service %s/%s of %s is missing: every pod in labelled namespaces is refused", ref.Namespace, ref.Name, r.name), applyWebhook})
			continue
		}
		d := r.deployment
		if d == nil {
			found = append(found, finding{levelError, fmt.Sprintf("no Deployment is behind the Service %s/%s of %s: every pod in labelled namespaces is refused", ref.Namespace, ref.Name, r.name), applyWebhook})
			continue
		}
		name, wanted, ready := d.Namespace+"/"+d.Name, int32(1), d.Status.ReadyReplicas
		if d.Spec.Replicas != nil {
			wanted = *d.Spec.Replicas
		}
		why := fmt.Sprintf("kubectl -n %s describe pods and logs deployment/%s say why", d.Namespace, d.Name)
		switch {
		case wanted == 0:
			found = append(found, finding{levelError, fmt.Sprintf("the webhook %s is scaled to zero: every pod in labelled namespaces is refused", name),
				fmt.Sprintf("kubectl -n %s scale deployment/%s --replicas=2", d.Namespace, d.Name)})
		case ready == 0:
			found = append(found, finding{levelError, fmt.Sprintf("no replica of the webhook %s is ready: every pod in labelled namespaces is refused", name), why})
		case ready < wanted:
			found = append(found, finding{levelWarning, fmt.Sprintf("only %d of %d replicas of the webhook %s are ready", ready, wanted, name), why})
		case wanted == 1:
			found = append(found, finding{levelWarning, fmt.Sprintf("the webhook %s has one replica: pods in labelled namespaces are refused whenever it restarts", name),
				fmt.Sprintf("kubectl -n %s scale deployment/%s --replicas=2", d.Namespace, d.Name)})
		default:
			replicas = append(replicas, fmt.Sprintf("%s (%d)", name, ready))
		}
	}
	if found == nil && replicas == nil {
		return []finding{{levelWarning, "there is no webhook to look at", "see the check configuration"}}
	}
	return good(found, "all replicas of the webhook are ready: %s", some(replicas))
}

// Times left at which something should have been renewed long ago (internal/certs): a serving certificate
// is replaced when a third of its day is left, and a CA when a third of its year is.
const (
	servingLeft = 4 * time.Hour
	caLeft      = 90 * 24 * time.Hour
)

func checkCertificate(s *snapshot) []finding {
	var found []finding
	pods, first := 0, time.Time{}
	for _, r := range s.revisions() {
		if r.service == nil {
			continue
		}
		bundle := certificates(r.hook.ClientConfig.CABundle)
		logs := fmt.Sprintf("read the logs of the webhook: kubectl -n %s logs -l %s", r.service.Namespace, labels.SelectorFromSet(r.service.Spec.Selector))
		if len(bundle) == 0 {
			found = append(found, finding{levelError, r.name + " has no caBundle, so API servers trust no answer: every pod in labelled namespaces is refused", logs})
			continue
		}
		roots := x509.NewCertPool()
		for _, c := range bundle {
			roots.AddCert(c)
		}
		for _, p := range s.webhookPods(r) {
			name := p.Namespace + "/" + p.Name
			shown, asked := s.served[name]
			if !asked {
				continue
			}
			pods++
			if shown.err != nil || len(shown.chain) == 0 {
				found = append(found, finding{levelError, fmt.Sprintf("the webhook's pod %s does not answer with TLS: %v", name, cmp.Or(shown.err, errors.New("no certificate"))), logs})
				continue
			}
			leaf, between := shown.chain[0], x509.NewCertPool()
			for _, c := range shown.chain[1:] {
				between.AddCert(c)
			}
			chains, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: r.serverName(), CurrentTime: s.now})
			if err != nil {
				found = append(found, finding{levelError, fmt.Sprintf("the caBundle of %s does not verify what the pod %s serves, so API servers refuse its answers: %v", r.name, name, err), logs})
				continue
			}
			if first.IsZero() || leaf.NotAfter.Before(first) {
				first = leaf.NotAfter
			}
			if leaf.NotAfter.Sub(s.now) < servingLeft {
				found = append(found, finding{levelWarning, fmt.Sprintf("the certificate of the pod %s expires %s and was not renewed in time", name, until(leaf.NotAfter, s.now)), logs})
			}
			if ca := chains[0][len(chains[0])-1]; ca.NotAfter.Sub(s.now) < caLeft {
				found = append(found, finding{levelWarning, fmt.Sprintf("the certificate authority of %s expires %s and was not rotated in time", r.name, until(ca.NotAfter, s.now)), logs})
			}
		}
	}
	if found == nil && pods == 0 {
		return []finding{{levelWarning, "no pod of the webhook runs, so there is no certificate to look at", "see the checks configuration and webhook"}}
	}
	return good(found, "the caBundle verifies what %s of the webhook serve; the first certificate expires %s, and is renewed before", plural(pods, "pod"), until(first, s.now))
}

// certificates reads PEM; nothing where it is something else.
func certificates(data []byte) []*x509.Certificate {
	var list []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return list
		}
		if c, err := x509.ParseCertificate(block.Bytes); err == nil {
			list = append(list, c)
		}
	}
}

// policyBindings lists the bindings of our policy that refuse.
func (s *snapshot) policyBindings() []admissionregv1.ValidatingAdmissionPolicyBinding {
	var list []admissionregv1.ValidatingAdmissionPolicyBinding
	for _, b := range s.bindings {
		if b.Spec.PolicyName == policyName && slices.Contains(b.Spec.ValidationActions, admissionregv1.Deny) {
			list = append(list, b)
		}
	}
	return list
}

func checkPolicy(s *snapshot) []finding {
	i := slices.IndexFunc(s.policies, func(p admissionregv1.ValidatingAdmissionPolicy) bool { return p.Name == policyName })
	if i < 0 {
		return []finding{{levelError, "the ValidatingAdmissionPolicy " + policyName + " is missing: nothing refuses forged pods and later changes of images", "apply manifests/policy"}}
	}
	var found []finding
	if p := s.policies[i].Spec.FailurePolicy; p != nil && *p != admissionregv1.Fail {
		found = append(found, finding{levelError, fmt.Sprintf("the policy %s has failurePolicy %s: what it cannot judge is admitted", policyName, *p), applyPolicy})
	}
	bindings := s.policyBindings()
	if len(bindings) == 0 {
		found = append(found, finding{levelError, "no ValidatingAdmissionPolicyBinding makes the policy " + policyName + " deny: it has no effect", applyPolicy})
	} else if !slices.ContainsFunc(bindings, func(b admissionregv1.ValidatingAdmissionPolicyBinding) bool { return b.Spec.MatchResources == nil }) {
		found = append(found, finding{levelWarning, "each binding of the policy " + policyName + " narrows what it is asked about: the other pods are not judged", applyPolicy})
	}
	return good(found, "the policy %s denies what was not injected, also while the webhook is away", policyName)
}

func checkImages(s *snapshot) []finding {
	var found []finding
	for _, b := range s.policyBindings() {
		if b.Spec.ParamRef == nil || b.Spec.ParamRef.Name == "" {
			continue
		}
		name := b.Spec.ParamRef.Name
		i := slices.IndexFunc(s.images, func(o injectedImages) bool { return o.Name == name })
		if i < 0 {
			found = append(found, finding{levelError, fmt.Sprintf("there is no InjectedImages %s, which the policy reads: every confidential pod is refused", name), "run hack/install.sh again, or write it as docs/webhook.md says"})
			continue
		}
		for _, r := range s.revisions() {
			for _, part := range []struct{ prefix, setting string }{{"initboot", "INITBOOT_IMAGE"}, {"sidecar", "SIDECAR_IMAGE"}} {
				image := r.settings[part.setting]
				if image != "" && !s.images[i].allow(part.prefix, image) {
					found = append(found, finding{levelError, fmt.Sprintf("the webhook of %s injects the image %s, which InjectedImages %s does not list: its pods are refused", r.name, image, name), "add it to images." + part.prefix + " there"})
				}
			}
		}
	}
	return good(found, "the policy allows the images that the webhook injects")
}

// allow tells whether the policy lets an image be injected as a part.
func (o *injectedImages) allow(part, image string) bool {
	for key, images := range o.Images {
		if strings.HasPrefix(key, part) && slices.Contains(images, image) {
			return true
		}
	}
	return false
}

// living lists the namespaces that are not being deleted.
func (s *snapshot) living() []*corev1.Namespace {
	var list []*corev1.Namespace
	for i := range s.namespaces {
		if s.namespaces[i].DeletionTimestamp == nil {
			list = append(list, &s.namespaces[i])
		}
	}
	return list
}

// takenBy lists the revisions that are asked about the pods of a namespace.
func (s *snapshot) takenBy(n *corev1.Namespace) []revision {
	var list []revision
	for _, r := range s.revisions() {
		if matches(r.hook.NamespaceSelector, labels.Set(n.Labels)) {
			list = append(list, r)
		}
	}
	return list
}

// labelled lists the living namespaces whose pods the webhook is asked about.
func (s *snapshot) labelled() []*corev1.Namespace {
	return slices.DeleteFunc(s.living(), func(n *corev1.Namespace) bool { return len(s.takenBy(n)) == 0 })
}

func checkLabels(s *snapshot) []finding {
	var found []finding
	for _, n := range s.living() {
		for key := range n.Labels {
			if strings.HasPrefix(strings.ToLower(key), annotation.Prefix) && key != labelInjection && key != labelRevision {
				found = append(found, finding{levelWarning, fmt.Sprintf("namespace %s has the label %s, which says nothing to Cloister", n.Name, key), fmt.Sprintf("known are %s and %s", labelInjection, labelRevision)})
			}
		}
		value, there := n.Labels[labelInjection]
		rev, named := n.Labels[labelRevision]
		taken := s.takenBy(n)
		if value != enabled {
			if there && value != "disabled" || named {
				found = append(found, finding{levelWarning, fmt.Sprintf("namespace %s has labels of Cloister without effect: %s is not %q", n.Name, labelInjection, enabled), label(n.Name)})
			}
			continue
		}
		switch {
		case len(taken) > 1:
			found = append(found, finding{levelError, fmt.Sprintf("two revisions of the webhook take the pods of namespace %s: %s and %s", n.Name, taken[0].name, taken[1].name), "make the namespaceSelectors of the two exclude each other"})
		case len(taken) == 1 || len(s.revisions()) == 0:
		case named:
			found = append(found, finding{levelError, fmt.Sprintf("namespace %s names the revision %q, which is not installed: its confidential pods are refused", n.Name, rev), fmt.Sprintf("install it, or kubectl label namespace %s %s-", n.Name, labelRevision)})
		default:
			found = append(found, finding{levelWarning, fmt.Sprintf("the label of namespace %s has no effect: the webhook never takes the pods of kube-system and of its own namespace", n.Name), fmt.Sprintf("kubectl label namespace %s %s-, and put confidential pods elsewhere", n.Name, labelInjection)})
		}
	}
	if n := len(s.labelled()); n > 0 {
		return good(found, "the webhook takes the pods of %s", plural(n, "namespace"))
	}
	return good(found, "no namespace has the label %s=%s", labelInjection, enabled)
}

// label is the command that labels a namespace.
func label(namespace string) string {
	return fmt.Sprintf("kubectl label --overwrite namespace %s %s=%s", namespace, labelInjection, enabled)
}

func checkInjectors(s *snapshot) []finding {
	first := configuration // of our configurations
	for i, r := range s.revisions() {
		if i == 0 || r.name < first {
			first = r.name
		}
	}
	var found []finding
	var after []string
	for i := range s.hooks {
		c := &s.hooks[i]
		var namespaces []string
		for j := range c.Webhooks {
			h := &c.Webhooks[j]
			if h.Name == hookName || !asksForPods(h) {
				continue
			}
			for _, n := range s.labelled() {
				if matches(h.NamespaceSelector, labels.Set(n.Labels)) {
					namespaces = append(namespaces, n.Name)
				}
			}
		}
		switch {
		case namespaces == nil:
		case c.Name < first:
			found = append(found, finding{levelError, fmt.Sprintf("the injector %s changes pods of %s before %s sees what their authors wrote: what it adds may be measured, and clients refuse such pods", c.Name, some(namespaces), first),
				fmt.Sprintf("give its MutatingWebhookConfiguration a name that sorts after %s, or exclude these namespaces from it", first)})
		default:
			after = append(after, c.Name)
		}
	}
	if after == nil {
		return good(found, "no other injector changes pods before the webhook")
	}
	return good(found, "other injectors change pods of labelled namespaces after the webhook, which is the right order: %s", some(after))
}

// meshes are known by how they mark namespaces: Istio by labels, Linkerd by an annotation.
var meshes = []struct {
	name, exclude string
	marks         func(*corev1.Namespace) bool
}{
	{"Istio", "traffic.sidecar.istio.io/excludeInboundPorts", func(n *corev1.Namespace) bool {
		return n.Labels["istio-injection"] == "enabled" || n.Labels["istio.io/rev"] != "" || n.Labels["istio.io/dataplane-mode"] == "ambient"
	}},
	{"Linkerd", "config.linkerd.io/skip-inbound-ports", func(n *corev1.Namespace) bool {
		value := n.Annotations["linkerd.io/inject"]
		return value != "" && value != "disabled"
	}},
}

func checkMeshes(s *snapshot) []finding {
	var found []finding
	for _, m := range meshes {
		var names []string
		for _, n := range s.labelled() {
			if m.marks(n) {
				names = append(names, n.Name)
			}
		}
		if names != nil {
			found = append(found, finding{levelWarning, fmt.Sprintf("%s of %s: the mesh's TLS ends outside of the enclave and proves nothing of it, and its proxy stands before the attested port", some(names), m.name),
				fmt.Sprintf("keep the ports of enclaves out of the mesh with the pod annotation %s", m.exclude)})
		}
	}
	return good(found, "no labelled namespace is in a mesh of Istio or Linkerd")
}

// options are those that a revision is installed with; an error where they are not what the webhook takes.
func (r *revision) options() (inject.Options, error) {
	o := inject.Options{Driver: r.settings["DRIVER"], HugePages: cmp.Or(r.settings["HUGEPAGES"], "2Mi")}
	return o, o.Read(r.settings["ENCLAVE_CPUS"], r.settings["DEVICE_GROUP"])
}

func checkPodSecurity(s *snapshot) []finding {
	var found []finding
	unlabelled := 0
	for _, n := range s.labelled() {
		level := n.Labels[inject.EnforceLabel]
		if level == "" {
			unlabelled++
			continue
		}
		for _, r := range s.takenBy(n) {
			opts, err := r.options()
			if err != nil {
				found = append(found, finding{levelWarning, fmt.Sprintf("not checked for namespace %s: the settings of %s are not understood: %v", n.Name, r.name, err), "see the environment of the webhook's Deployment"})
			} else if most, refused := inject.TooStrict(opts, level); refused {
				found = append(found, finding{levelError, fmt.Sprintf("namespace %s enforces the Pod Security level %s, and what is injected with the driver %s needs %s: its confidential pods are refused", n.Name, level, opts.Driver, most),
					fmt.Sprintf("kubectl label --overwrite namespace %s %s=%s", n.Name, inject.EnforceLabel, most)})
			}
		}
	}
	if unlabelled > 0 {
		return good(found, "no labelled namespace enforces a level that is too strict; %s without the label %s, where the cluster's default holds, which the API does not show", plural(unlabelled, "namespace"), inject.EnforceLabel)
	}
	return good(found, "no labelled namespace enforces a level that is too strict")
}

// uses tells whether a revision has the driver.
func (s *snapshot) uses(driver string) bool {
	return slices.ContainsFunc(s.revisions(), func(r revision) bool { return r.settings["DRIVER"] == driver })
}

// enclaveNodes lists the nodes that offer Nitro enclaves.
func (s *snapshot) enclaveNodes() []*corev1.Node {
	var list []*corev1.Node
	for i := range s.nodes {
		if q := s.nodes[i].Status.Allocatable[inject.NitroEnclaves]; !q.IsZero() {
			list = append(list, &s.nodes[i])
		}
	}
	return list
}

func checkDevices(s *snapshot) []finding {
	if !s.uses(inject.DriverNitro) {
		return good(nil, "the driver %s needs no devices and no huge pages", inject.DriverProcess)
	}
	nodes := s.enclaveNodes()
	if len(nodes) == 0 {
		return []finding{{levelError, "no node offers " + string(inject.NitroEnclaves) + ": confidential pods find no place", "start instances with Nitro enclaves enabled, and AWS's Nitro enclaves device plugin on them"}}
	}
	var found []finding
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	for _, r := range s.revisions() {
		if r.settings["DRIVER"] != inject.DriverNitro {
			continue
		}
		pages := corev1.ResourceHugePagesPrefix + cmp.Or(r.settings["HUGEPAGES"], "2Mi")
		var without []string
		for _, n := range nodes {
			if q := n.Status.Allocatable[corev1.ResourceName(pages)]; q.IsZero() {
				without = append(without, n.Name)
			}
		}
		if without != nil {
			found = append(found, finding{levelError, fmt.Sprintf("nodes with Nitro enclaves have no %s, of which %s makes the enclaves' memory: %s", pages, r.name, some(without)),
				"reserve them in /etc/nitro_enclaves/allocator.yaml and restart the allocator and then the kubelet, or set HUGEPAGES of the webhook to the size that the nodes have"})
		}
	}
	return good(found, "%s offer Nitro enclaves and huge pages: %s", plural(len(nodes), "node"), some(names))
}

func checkSeccomp(s *snapshot) []finding {
	if !s.uses(inject.DriverNitro) {
		return good(nil, "the driver %s needs no seccomp profile on the nodes", inject.DriverProcess)
	}
	has, lacks := map[string]bool{}, map[string]bool{}
	for i := range s.pods {
		p := &s.pods[i]
		if p.Labels["app.kubernetes.io/name"] == installer && ready(p) {
			has[p.Spec.NodeName] = true
		}
		if !localhostProfile(p) {
			continue
		}
		for _, c := range p.Status.InitContainerStatuses {
			// The runtime loads the profile when it makes the container.
			if c.Name == inject.Initboot && c.State.Running != nil {
				has[p.Spec.NodeName] = true
			}
			if w := c.State.Waiting; w != nil && w.Reason == "CreateContainerError" && strings.Contains(w.Message, "seccomp") {
				lacks[p.Spec.NodeName] = true
			}
		}
	}
	var bad, unseen []string
	for _, n := range s.enclaveNodes() {
		if lacks[n.Name] {
			bad = append(bad, n.Name)
		} else if !has[n.Name] {
			unseen = append(unseen, n.Name)
		}
	}
	var found []finding
	if bad != nil {
		found = append(found, finding{levelError, "containers cannot be made for want of their seccomp profile on " + some(bad), "apply manifests/seccomp, and the kubelet tries again"})
	}
	if unseen != nil {
		found = append(found, finding{levelWarning, "whether the seccomp profile is there cannot be seen, since profiles are not in the API, and neither its installer nor a confidential pod runs on " + some(unseen), "apply manifests/seccomp, or look for " + inject.VsockProfile + " below /var/lib/kubelet/seccomp there"})
	}
	return good(found, "the installer of the seccomp profile, or a pod with the profile, runs on every node with Nitro enclaves")
}

// localhostProfile tells whether initboot has a seccomp profile of the node.
func localhostProfile(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.InitContainers, func(c corev1.Container) bool {
		return c.Name == inject.Initboot && c.SecurityContext != nil && c.SecurityContext.SeccompProfile != nil &&
			c.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeLocalhost
	})
}

func ready(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// alive tells whether a pod has work to do.
func alive(p *corev1.Pod) bool {
	return p.DeletionTimestamp == nil && p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed
}

func injected(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == inject.Initboot })
}

// reasons are why a pod was missed, the first that holds.
var reasons = []struct {
	holds         func(s *snapshot, n *corev1.Namespace, p *corev1.Pod) bool
	sentence, fix string // each with one %s: the namespace
}{
	{
		func(_ *snapshot, _ *corev1.Namespace, p *corev1.Pod) bool {
			return p.Annotations[corev1.MirrorPodAnnotationKey] != ""
		},
		"static pods of namespace %s run in the open, whatever the API shows of them: the kubelet runs them from files of its node, whatever a webhook says",
		"make Deployments or DaemonSets of them in namespace %s",
	},
	{
		func(s *snapshot, n *corev1.Namespace, _ *corev1.Pod) bool { return len(s.takenBy(n)) == 0 },
		"annotated pods of namespace %s run in the open, because the webhook does not take the namespace",
		"kubectl label --overwrite namespace %s " + labelInjection + "=" + enabled + ", and create them again",
	},
	{
		func(*snapshot, *corev1.Namespace, *corev1.Pod) bool { return true },
		"annotated pods of namespace %s run in the open: they were created before the namespace was labelled, or while no webhook was asked",
		"delete them in namespace %s, and what they come from makes new ones",
	},
}

func checkMissed(s *snapshot) []finding {
	var found []finding
	confidential := 0
	for _, n := range s.living() {
		missed := make([][]string, len(reasons))
		for i := range s.pods {
			p := &s.pods[i]
			if p.Namespace != n.Name || p.Annotations[annotation.Enclave] == "" || !alive(p) {
				continue
			}
			if static := p.Annotations[corev1.MirrorPodAnnotationKey] != ""; injected(p) && !static {
				confidential++
				continue
			}
			for r := range reasons {
				if reasons[r].holds(s, n, p) {
					missed[r] = append(missed[r], p.Name)
					break
				}
			}
		}
		for r, names := range missed {
			if names != nil {
				found = append(found, finding{levelError, fmt.Sprintf(reasons[r].sentence, n.Name) + ": " + some(names), fmt.Sprintf(reasons[r].fix, n.Name)})
			}
		}
	}
	return good(found, "no annotated pod runs in the open; %s", plural(confidential, "confidential pod"))
}

func checkAnnotations(s *snapshot) []finding {
	var found []finding
	living := map[string]bool{}
	for _, n := range s.living() {
		living[n.Name] = true
	}
	for i := range s.pods {
		p := &s.pods[i]
		if injected(p) || !alive(p) || !living[p.Namespace] || !annotation.Any(p.Annotations) {
			continue // the webhook has read those of injected pods
		}
		if _, errs := annotation.Read(p.Annotations, field.NewPath("metadata", "annotations")); len(errs) > 0 {
			found = append(found, finding{levelError, fmt.Sprintf("pod %s/%s runs in the open and has annotations that would be denied: %v", p.Namespace, p.Name, errs.ToAggregate()), "mend them in what the pod comes from, and create it again"})
		}
	}
	return good(found, "no pod that was not injected has a wrong annotation")
}
