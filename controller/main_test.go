package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"

	"cloister.dev/cloister/internal/certs"
)

// objects reads a file of manifests/base.
func objects(t *testing.T, file string) (out []*unstructured.Unstructured) {
	t.Helper()
	b, err := os.ReadFile("../manifests/base/" + file)
	if err != nil {
		t.Fatal(err)
	}
	for d := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(b), 4096); ; {
		var o unstructured.Unstructured
		if err := d.Decode(&o.Object); errors.Is(err, io.EOF) {
			return out
		} else if err != nil {
			t.Fatal(err)
		}
		out = append(out, &o)
	}
}

// TestManifests: what the program calls by name is called so in the manifests.
func TestManifests(t *testing.T) {
	found := map[string]bool{}
	for _, o := range objects(t, "controller.yaml") {
		found[o.GetKind()+" "+o.GetName()] = true
	}
	for _, want := range []string{"Service " + name, "APIService " + apiService, "Deployment " + name} {
		if !found[want] {
			t.Errorf("controller.yaml has no %s", want)
		}
	}
}

// TestPermissions: the controller may do this and nothing else.
func TestPermissions(t *testing.T) {
	got := map[string][]string{}
	for _, o := range objects(t, "controller-rbac.yaml") {
		if o.GetKind() != "Role" && o.GetKind() != "ClusterRole" {
			continue
		}
		var role rbacv1.ClusterRole
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &role); err != nil {
			t.Fatal(err)
		}
		for _, r := range role.Rules {
			for _, resource := range r.Resources {
				for _, group := range r.APIGroups {
					for _, named := range append(r.ResourceNames, "")[:max(1, len(r.ResourceNames))] {
						key := o.GetKind() + " " + group + "/" + resource + " " + named
						got[key] = append(got[key], r.Verbs...)
					}
				}
			}
		}
	}
	want := map[string][]string{
		"Role /secrets ":                                               {"create"},
		"Role /secrets " + secret:                                      {"get", "update"},
		"Role coordination.k8s.io/leases ":                             {"create"},
		"Role coordination.k8s.io/leases " + name:                      {"get", "update"},
		"ClusterRole /pods ":                                           {"list", "watch"},
		"ClusterRole /pods/status ":                                    {"patch"},
		"ClusterRole /events ":                                         {"create"},
		"ClusterRole apps/replicasets ":                                {"get"},
		"ClusterRole events.k8s.io/events ":                            {"create", "patch"},
		"ClusterRole apiregistration.k8s.io/apiservices " + apiService: {"get", "patch"},
	}
	for key, verbs := range got {
		if !slices.Equal(verbs, want[key]) {
			t.Errorf("%s: %v, want %v", key, verbs, want[key])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d rules, want %d", len(got), len(want))
	}
}

// listener counts the notices of a new certificate.
type listener chan struct{}

func (l listener) Enqueue() { l <- struct{}{} }

func TestCertificate(t *testing.T) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	service := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": map[string]any{"name": apiService}, "spec": map[string]any{},
	}}
	c := certificate{&certs.Source{
		Client: fake.NewClientBuilder().WithScheme(scheme).WithObjects(service).Build(), Namespace: "cloister-system",
		Secret: secret, Service: name, Target: certs.APIService(apiService), Log: slog.New(slog.DiscardHandler), Now: time.Now,
	}}
	if cert, key := c.CurrentCertKeyContent(); cert != nil || key != nil {
		t.Error("there is a certificate before one was issued")
	}
	notices := make(listener, 1)
	c.AddListener(notices)
	if err := c.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-notices
	pair, err := tls.X509KeyPair(c.CurrentCertKeyContent())
	if err != nil {
		t.Fatal(err)
	}
	if err := pair.Leaf.VerifyHostname("cloister-controller.cloister-system.svc"); err != nil {
		t.Error(err)
	}
}
