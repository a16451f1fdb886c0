package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	admissionregv1 "k8s.io/api/admissionregistration/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"
)

// doctor returns the lines of `cloister doctor` that begin so: with a level, or with nothing.
func (c *cluster) doctor(t *testing.T, level string, args ...string) (lines []string, r result) {
	t.Helper()
	r = c.cloister(t, append([]string{"doctor"}, args...)...)
	for line := range strings.Lines(r.stdout) {
		if strings.HasPrefix(line, level) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines, r
}

// A healthy cluster has no error, and its certificates were looked at.
func TestDoctor(t *testing.T) {
	c := e2e(t)
	c.wellSoon(t)
	lines, r := c.doctor(t, "")
	t.Logf("cloister doctor\n%s%s", r.stdout, r.stderr)
	found := false
	for _, line := range lines {
		found = found || strings.HasPrefix(line, "ok") && strings.Contains(line, "the caBundle verifies what 2 pods of the webhook serve")
		if strings.Contains(line, "not checked") {
			t.Errorf("%s", line)
		}
	}
	if !found {
		t.Errorf("nothing is said of the certificates of the webhook's two pods")
	}
}

// wellSoon waits until what other tests did to the webhook is over.
func (c *cluster) wellSoon(t *testing.T) {
	t.Helper()
	eventually(t, time.Minute, "a healthy cluster", func() (bool, string) {
		errors, r := c.doctor(t, "error")
		return r.code == 0 && len(errors) == 0, r.stdout + r.stderr
	})
}

// What is broken is found, with the namespace's name, and nothing else is.
func TestDoctorFinds(t *testing.T) {
	c := e2e(t)
	c.wellSoon(t)
	label := func(t *testing.T, ns *namespace, key, value string) {
		t.Helper()
		patch := fmt.Appendf(nil, `{"metadata":{"labels":{%q:%q}}}`, key, value)
		if _, err := c.kube.CoreV1().Namespaces().Patch(t.Context(), ns.name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		breaks func(t *testing.T) (ns *namespace)
		check  string
		want   string // part of the only error
	}{
		"a pod from before the label": {func(t *testing.T) *namespace {
			ns := c.namespace(t, false)
			ns.create(t, c.appPod(t, "early"))
			label(t, ns, "cloister.dev/injection", "enabled")
			return ns
		}, "missed", "created before the namespace was labelled, or while no webhook was asked: early; fix: delete them"},
		"no label": {func(t *testing.T) *namespace {
			ns := c.namespace(t, false)
			ns.create(t, c.appPod(t, "open"))
			return ns
		}, "missed", "the webhook does not take the namespace: open; fix: kubectl label"},
		"a typo": {func(t *testing.T) *namespace {
			ns := c.namespace(t, false)
			pod := c.appPod(t, "typo")
			pod.Annotations = map[string]string{"cloister.dev/enclav": "app"}
			ns.create(t, pod)
			return ns
		}, "annotations", `did you mean "cloister.dev/enclave"?`},
		"Pod Security": {func(t *testing.T) *namespace {
			ns := c.namespace(t, true)
			label(t, ns, "pod-security.kubernetes.io/enforce", "restricted")
			return ns
		}, "pod-security", "enforces the Pod Security level restricted"},
		"no such revision": {func(t *testing.T) *namespace {
			ns := c.namespace(t, true)
			label(t, ns, "cloister.dev/rev", "nobody")
			return ns
		}, "labels", `names the revision "nobody"`},
		"an injector before ours": {func(t *testing.T) *namespace {
			ns := c.namespace(t, true)
			ns.injectorBefore(t)
			return ns
		}, "injectors", "the injector 00-before-"},
	} {
		t.Run(name, func(t *testing.T) {
			ns := tt.breaks(t)
			errors, r := c.doctor(t, "error")
			if r.code != 1 || !strings.Contains(r.stderr, "1 error and ") {
				t.Errorf("exit code %d: %s", r.code, r.stderr)
			}
			if len(errors) != 1 || strings.Fields(errors[0])[1] != tt.check || !strings.Contains(errors[0], ns.name) || !strings.Contains(errors[0], tt.want) {
				t.Errorf("it says %q, want %s: %s of %s", errors, tt.check, tt.want, ns.name)
			}
		})
	}
}

// injectorBefore registers an injector that comes before ours, of this namespace only. Nobody answers for it.
func (ns *namespace) injectorBefore(t *testing.T) {
	t.Helper()
	ignore, none, url := admissionregv1.Ignore, admissionregv1.SideEffectClassNone, "https://127.0.0.1:1/"
	configurations := ns.kube.AdmissionregistrationV1().MutatingWebhookConfigurations()
	name := "00-before-" + ns.name
	if _, err := configurations.Create(t.Context(), &admissionregv1.MutatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Webhooks: []admissionregv1.MutatingWebhook{{
			Name: "inject.example.com", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, FailurePolicy: &ignore,
			ClientConfig:      admissionregv1.WebhookClientConfig{URL: &url},
			NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: ns.name}},
			Rules: []admissionregv1.RuleWithOperations{{
				Operations: []admissionregv1.OperationType{admissionregv1.Create},
				Rule:       admissionregv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}},
			}},
		}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := configurations.Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// Whoever may read nothing gets no verdict, and the roles in docs/doctor.md are all that one needs.
func TestDoctorPermissions(t *testing.T) {
	c := e2e(t)
	c.wellSoon(t)
	ns := c.namespace(t, false)
	kubeconfig := ns.kubeconfig(t, "default")

	lines, r := c.doctor(t, "", "--kubeconfig", kubeconfig)
	if r.code != 0 {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
	for _, line := range lines {
		// Everybody may ask for the version.
		if checked := !strings.Contains(line, "not checked: list "); checked != strings.HasPrefix(line, "ok       version ") {
			t.Errorf("without permissions: %s", line)
		}
	}

	ns.permit(t, "default")
	eventually(t, time.Minute, "with the roles of docs/doctor.md every check is made", func() (bool, string) {
		_, r := c.doctor(t, "", "--kubeconfig", kubeconfig)
		return r.code == 0 && !strings.Contains(r.stdout, "not checked"), r.stdout + r.stderr
	})
}

// kubeconfig is one of a ServiceAccount.
func (ns *namespace) kubeconfig(t *testing.T, account string) (file string) {
	t.Helper()
	token, err := ns.kube.CoreV1().ServiceAccounts(ns.name).CreateToken(t.Context(), account, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	config, err := clientcmd.LoadFromFile(os.Getenv("KUBECONFIG"))
	if err != nil {
		t.Fatal(err)
	}
	config.AuthInfos = map[string]*clientcmdapi.AuthInfo{config.Contexts[config.CurrentContext].AuthInfo: {Token: token.Status.Token}}
	b, err := clientcmd.Write(*config)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "kubeconfig", b)
}

// permit gives a ServiceAccount the roles of docs/doctor.md until the test ends.
func (ns *namespace) permit(t *testing.T, account string) {
	t.Helper()
	doc, err := os.ReadFile("../docs/doctor.md")
	if err != nil {
		t.Fatal(err)
	}
	_, block, _ := strings.Cut(string(doc), "```yaml\n")
	block, _, _ = strings.Cut(block, "```")
	first, second, ok := strings.Cut(block, "---\n")
	var wide rbacv1.ClusterRole
	var narrow rbacv1.Role
	if err := yaml.UnmarshalStrict([]byte(first), &wide); err != nil || !ok {
		t.Fatalf("docs/doctor.md: %v", err)
	}
	if err := yaml.UnmarshalStrict([]byte(second), &narrow); err != nil {
		t.Fatalf("docs/doctor.md: %v", err)
	}
	name := "doctor-" + ns.name
	wide.Name, narrow.Name = name, name
	subjects := []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Namespace: ns.name, Name: account}}
	rbac := ns.kube.RbacV1()
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		for _, err := range []error{
			rbac.ClusterRoles().Delete(ctx, name, metav1.DeleteOptions{}),
			rbac.ClusterRoleBindings().Delete(ctx, name, metav1.DeleteOptions{}),
			rbac.Roles(systemNamespace).Delete(ctx, name, metav1.DeleteOptions{}),
			rbac.RoleBindings(systemNamespace).Delete(ctx, name, metav1.DeleteOptions{}),
		} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	if _, err := rbac.ClusterRoles().Create(t.Context(), &wide, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := rbac.ClusterRoleBindings().Create(t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: name},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := rbac.Roles(systemNamespace).Create(t.Context(), &narrow, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := rbac.RoleBindings(systemNamespace).Create(t.Context(), &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Subjects: subjects,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: name},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}
