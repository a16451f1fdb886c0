package main

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/metadata/fake"

	"cloister.dev/cloister/webhook/inject"
)

// TestNamespaces: the level that a namespace enforces is known soon after its label says so, and where it
// is not known the answer is empty.
func TestNamespaces(t *testing.T) {
	namespace := func(name, level string) *metav1.PartialObjectMetadata {
		n := &metav1.PartialObjectMetadata{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"cloister.dev/injection": "enabled"}},
		}
		if level != "" {
			n.Labels[inject.EnforceLabel] = level
		}
		return n
	}
	scheme := runtime.NewScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	other := namespace("other", "baseline")
	delete(other.Labels, "cloister.dev/injection")
	client := fake.NewSimpleMetadataClient(scheme, namespace("strict", "restricted"), namespace("unlabelled", ""), other)
	n := newNamespaces(client)
	if got := n.enforced("strict"); got != "" {
		t.Errorf("before it runs it knows %q", got)
	}

	ctx, stop := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	ended.Go(func() { n.run(ctx, slog.New(slog.DiscardHandler)) })
	defer ended.Wait()
	defer stop()
	becomes := func(name, want string) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); n.enforced(name) != want; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("namespace %s enforces %q, want %q", name, n.enforced(name), want)
			}
		}
	}
	becomes("strict", "restricted")
	for _, name := range []string{"unlabelled", "other", "missing"} {
		becomes(name, "")
	}
	resource := client.Resource(corev1.SchemeGroupVersion.WithResource("namespaces"))
	if _, err := resource.(fake.MetadataClient).UpdateFake(namespace("unlabelled", "baseline"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("unlabelled", "baseline")
	if err := resource.Delete(t.Context(), "strict", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	becomes("strict", "")
}
