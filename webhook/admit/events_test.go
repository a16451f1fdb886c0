package admit

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
)

// typo is a pod that is denied, of an owner.
func typo(apiVersion, kind, name string) []byte {
	owner := ""
	if kind != "" {
		owner = fmt.Sprintf(`,"ownerReferences":[{"apiVersion":%q,"kind":%q,"name":%q,"uid":%q,"controller":true}]`, apiVersion, kind, name, "uid-"+name)
	}
	return fmt.Appendf(nil, `{"metadata":{"annotations":{"cloister.dev/enclav":"app"}%s},"spec":{"containers":[{"name":"app","image":"x"}]}}`, owner)
}

// events returns the Events of the namespace, by what they are about, once f likes them.
func events(t *testing.T, c client.Client, f func(map[string]corev1.Event) bool) map[string]corev1.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		var list corev1.EventList
		if err := c.List(t.Context(), &list, client.InNamespace("payments")); err != nil {
			t.Fatal(err)
		}
		seen := map[string]corev1.Event{}
		for _, e := range list.Items {
			seen[e.InvolvedObject.Kind+"/"+e.InvolvedObject.Name] = e
		}
		if len(seen) == len(list.Items) && f(seen) {
			return seen
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the Events are %+v", list.Items)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func TestEvents(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, batchv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	of := func(apiVersion, kind, name, owner string) metav1.ObjectMeta {
		m := metav1.ObjectMeta{Namespace: "payments", Name: name}
		if owner != "" {
			m.OwnerReferences = []metav1.OwnerReference{{APIVersion: apiVersion, Kind: kind, Name: owner, UID: "uid", Controller: new(true)}}
		}
		return m
	}
	c := fake.NewClientBuilder().WithScheme(scheme).WithObjects(
		&appsv1.ReplicaSet{ObjectMeta: of("apps/v1", "Deployment", "web-1", "web")},
		&appsv1.ReplicaSet{ObjectMeta: of("", "", "alone", "")},
		&batchv1.Job{ObjectMeta: of("batch/v1", "CronJob", "nightly-1", "nightly")},
	).Build()
	e := NewEvents(c, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	h := New(options, nil, e, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); e.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })

	send(t, h, typo("apps/v1", "ReplicaSet", "dry"), true)
	send(t, h, typo("", "", ""), false)
	for range 3 {
		send(t, h, typo("apps/v1", "ReplicaSet", "web-1"), false)
	}
	send(t, h, typo("apps/v1", "ReplicaSet", "alone"), false)
	send(t, h, typo("apps/v1", "ReplicaSet", "gone"), false)
	send(t, h, typo("batch/v1", "Job", "nightly-1"), false)
	send(t, h, typo("apps/v1", "StatefulSet", "db"), false)
	send(t, h, typo("example.com/v1", "ReplicaSet", "web-1-of-others"), false)

	seen := events(t, c, func(m map[string]corev1.Event) bool {
		return len(m) == 6 && m["Deployment/web"].Count == 3
	})
	for _, name := range []string{"Deployment/web", "ReplicaSet/alone", "ReplicaSet/gone", "CronJob/nightly", "StatefulSet/db", "ReplicaSet/web-1-of-others"} {
		e, ok := seen[name]
		if !ok {
			t.Errorf("no Event about %s", name)
			continue
		}
		if e.Reason != "AnnotationRefused" || e.Type != corev1.EventTypeWarning || !strings.Contains(e.Message, "did you mean") || e.Source.Component != component {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

// TestForgedOwner: a pod that names another namespace's owner by its uid changes nothing there, and an owner of any
// size is not kept.
func TestForgedOwner(t *testing.T) {
	e := NewEvents(fake.NewClientBuilder().Build(), slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	owner := metav1.OwnerReference{APIVersion: "apps/v1", Kind: "StatefulSet", Name: "db", UID: "uid"}
	forged := owner
	forged.Name = "forged"
	for _, of := range []struct {
		namespace string
		owner     metav1.OwnerReference
	}{{"evil", forged}, {"payments", owner}} {
		got, err := e.about(t.Context(), of.namespace, of.owner)
		if err != nil || got.Namespace != of.namespace || got.Name != of.owner.Name {
			t.Errorf("%s: %+v, %v", of.namespace, got, err)
		}
	}
	h := New(options, nil, e, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	send(t, h, typo("apps/v1", "StatefulSet", strings.Repeat("x", 1<<20)), false)
	if n := len(e.waiting); n != 0 {
		t.Errorf("%d denials wait", n)
	}
}

// TestEventsNeverBlock: nobody reads them, and pods are answered.
func TestEventsNeverBlock(t *testing.T) {
	reg := prometheus.NewRegistry()
	e := NewEvents(fake.NewClientBuilder().Build(), slog.New(slog.DiscardHandler), reg)
	h := New(options, nil, e, slog.New(slog.DiscardHandler), reg)
	for range maxWaiting + 5 {
		if send(t, h, typo("apps/v1", "ReplicaSet", "web-1"), false).Allowed {
			t.Fatal("admitted")
		}
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "injection_events_dropped_total" {
			if n := f.GetMetric()[0].GetCounter().GetValue(); n != 5 {
				t.Errorf("%v dropped", n)
			}
			return
		}
	}
	t.Error("no metric of what was dropped")
}
