package state

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/client/interceptor"

	"cloister.dev/cloister/controller/scrape"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
)

var start = time.Date(2026, 11, 24, 9, 0, 0, 0, time.UTC)

// makePod is a confidential pod of the Deployment web whose sidecar runs.
func makePod(name string) *corev1.Pod {
	yes := true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "test", Name: name, UID: types.UID("uid of " + name),
			Annotations:     map[string]string{"cloister.dev/enclave": "app"},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web-1", UID: "set", Controller: &yes}},
		},
		Spec: corev1.PodSpec{InitContainers: []corev1.Container{{Name: "cloister-sidecar"}}},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIP: "10.0.0.1",
			Conditions:            []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}},
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "cloister-sidecar", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}},
			ContainerStatuses:     []corev1.ContainerStatus{{Name: "app", ContainerID: "c://1"}},
		},
	}
}

func snapshot(phase podsock.EnclaveState_Phase, failed bool) *podmetrics.Snapshot {
	return &podmetrics.Snapshot{Phase: phase, Generation: 1, StepFailed: failed, Attested: phase >= podsock.EnclaveState_PHASE_BOOTED && phase < podsock.EnclaveState_PHASE_ENDED}
}

// cluster is an API server with a Deployment web and its ReplicaSet, and counts writes.
type cluster struct {
	client.Client
	writes int
}

func newCluster(t *testing.T, objects ...client.Object) *cluster {
	t.Helper()
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), appsv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	yes := true
	objects = append(objects, &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{
		Namespace: "test", Name: "web-1", UID: "set",
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "web", UID: "deployment", Controller: &yes}},
	}})
	c := &cluster{}
	c.Client = fake.NewClientBuilder().WithScheme(scheme).WithObjects(objects...).WithStatusSubresource(&corev1.Pod{}).
		WithInterceptorFuncs(interceptor.Funcs{
			Create: func(ctx context.Context, w client.WithWatch, o client.Object, opts ...client.CreateOption) error {
				c.writes++
				return w.Create(ctx, o, opts...)
			},
			SubResourceApply: func(ctx context.Context, w client.Client, sub string, o runtime.ApplyConfiguration, opts ...client.SubResourceApplyOption) error {
				c.writes++
				return w.SubResource(sub).Apply(ctx, o, opts...)
			},
		}).Build()
	return c
}

func (c *cluster) leader() *Writer {
	return New(nil, c, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
}

func (c *cluster) pod(t *testing.T, name string) *corev1.Pod {
	t.Helper()
	var pod corev1.Pod
	if err := c.Get(t.Context(), client.ObjectKey{Namespace: "test", Name: name}, &pod); err != nil {
		t.Fatal(err)
	}
	return &pod
}

func (c *cluster) events(t *testing.T) []corev1.Event {
	t.Helper()
	var list corev1.EventList
	if err := c.List(t.Context(), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

func TestReason(t *testing.T) {
	booting, ended := makePod("a"), makePod("a")
	booting.Status.InitContainerStatuses = nil
	ended.Status.Phase = corev1.PodSucceeded
	for name, tt := range map[string]struct {
		pod      *corev1.Pod
		snapshot *podmetrics.Snapshot
		want     Reason
	}{
		"sidecar not running": {booting, nil, Booting},
		"pod has ended":       {ended, nil, Ended},
		"no answer":           {makePod("a"), nil, NoAnswer},
		"no initboot":         {makePod("a"), snapshot(podsock.EnclaveState_PHASE_UNSPECIFIED, false), Booting},
		"booting":             {makePod("a"), snapshot(podsock.EnclaveState_PHASE_BOOTING, false), Booting},
		"boot fails":          {makePod("a"), snapshot(podsock.EnclaveState_PHASE_BOOTING, true), BootFails},
		"booted":              {makePod("a"), snapshot(podsock.EnclaveState_PHASE_BOOTED, false), Booted},
		"starting":            {makePod("a"), snapshot(podsock.EnclaveState_PHASE_STARTING, false), Starting},
		"no image":            {makePod("a"), snapshot(podsock.EnclaveState_PHASE_STARTING, true), WaitingForImage},
		"running":             {makePod("a"), snapshot(podsock.EnclaveState_PHASE_RUNNING, false), Running},
		"draining":            {makePod("a"), snapshot(podsock.EnclaveState_PHASE_DRAINING, false), Draining},
		"ended":               {makePod("a"), snapshot(podsock.EnclaveState_PHASE_ENDED, false), Ended},
	} {
		t.Run(name, func(t *testing.T) {
			got := reason(scrape.Observation{Pod: tt.pod, Snapshot: tt.snapshot})
			if got != tt.want {
				t.Errorf("%s, want %s", got, tt.want)
			}
			// The sidecar derives Attested on its own; both must say the same.
			if s := tt.snapshot; s != nil && (table[got].attested == yes) != s.Attested {
				t.Errorf("attested is %s, and %v on /metrics", table[got].attested, s.Attested)
			}
		})
	}
}

func TestTable(t *testing.T) {
	for r, m := range table {
		if m.ready == "" || m.attested == "" || !strings.HasSuffix(m.sentence, ".") {
			t.Errorf("%s: %+v", r, m)
		}
		if m.ready == yes && m.attested != yes {
			t.Errorf("%s: ready without being attested", r)
		}
	}
}

func TestConditions(t *testing.T) {
	pod := makePod("a")
	c := newCluster(t, pod)
	w := c.leader()
	write := func(s *podmetrics.Snapshot, now time.Time) []corev1.PodCondition {
		w.write(t.Context(), []scrape.Observation{{Pod: c.pod(t, "a"), Snapshot: s}}, now)
		return slices.DeleteFunc(c.pod(t, "a").Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == corev1.PodReady })
	}
	want := func(r Reason, ready, attested corev1.ConditionStatus, readySince, attestedSince time.Time) []corev1.PodCondition {
		make := func(kind corev1.PodConditionType, status corev1.ConditionStatus, since time.Time) corev1.PodCondition {
			return corev1.PodCondition{Type: kind, Status: status, Reason: string(r), Message: table[r].sentence, LastTransitionTime: metav1.NewTime(since.Local())}
		}
		return []corev1.PodCondition{make(EnclaveReady, ready, readySince), make(Attested, attested, attestedSince)}
	}
	check := func(got, want []corev1.PodCondition) {
		t.Helper()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	later, latest := start.Add(time.Minute), start.Add(time.Hour)
	check(write(snapshot(podsock.EnclaveState_PHASE_STARTING, false), start), want(Starting, no, yes, start, start))
	check(write(snapshot(podsock.EnclaveState_PHASE_RUNNING, false), later), want(Running, yes, yes, later, start))
	writes := c.writes
	check(write(snapshot(podsock.EnclaveState_PHASE_RUNNING, false), latest), want(Running, yes, yes, later, start))
	if c.writes != writes {
		t.Error("what has not changed was written")
	}
	check(write(nil, latest), want(NoAnswer, unknown, unknown, latest, latest))
	if got := condition(c.pod(t, "a"), corev1.PodReady); got == nil || got.Status != yes {
		t.Errorf("the kubelet's condition is %v", got)
	}
	if n := testutil.ToFloat64(w.pods.WithLabelValues(string(NoAnswer))); n != 1 {
		t.Errorf("%v pods without an answer in the metric", n)
	}

	// Another pod of that name has come, or none.
	stale := scrape.Observation{Pod: makePod("gone"), Snapshot: snapshot(podsock.EnclaveState_PHASE_RUNNING, false)}
	if err := w.pod(t.Context(), stale, Running, latest); err != nil {
		t.Error(err)
	}

	// One that is being deleted is left alone.
	deleted := c.pod(t, "a")
	deleted.DeletionTimestamp = &metav1.Time{Time: latest}
	writes = c.writes
	w.write(t.Context(), []scrape.Observation{{Pod: deleted}}, latest)
	if c.writes != writes {
		t.Error("a pod that is being deleted was written")
	}
}

// TestEvents: one Event on the owner for one thing that happened, whoever leads.
func TestEvents(t *testing.T) {
	terminated := func(pod *corev1.Pod, code int32, message string) *corev1.Pod {
		pod.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{
			ContainerID: "c://0", ExitCode: code, Message: message, FinishedAt: metav1.NewTime(start.Add(-time.Minute)),
		}
		return pod
	}
	running := snapshot(podsock.EnclaveState_PHASE_RUNNING, false)
	waiting := snapshot(podsock.EnclaveState_PHASE_STARTING, true)
	alone := makePod("a")
	alone.OwnerReferences = nil
	job := makePod("a")
	job.OwnerReferences[0] = metav1.OwnerReference{APIVersion: "batch/v1", Kind: "Job", Name: "work", UID: "job", Controller: new(true)}
	long := strings.Repeat("a", 199) + "-" + strings.Repeat("b", 53)
	for name, tt := range map[string]struct {
		pod      *corev1.Pod
		snapshot *podmetrics.Snapshot
		now      time.Time
		reason   Reason // "" for no Event
		owner    string
		message  string
	}{
		"waits":                  {makePod("a"), waiting, start, WaitingForImage, "Deployment web", "Pod a: The image cannot be fetched and is tried again and again: the pod's own Events say why."},
		"does not boot":          {makePod("a"), snapshot(podsock.EnclaveState_PHASE_BOOTING, true), start, BootFails, "Deployment web", "Pod a: The enclave does not boot and is started again and again: the pod's own Events say at which step."},
		"pod without owner":      {alone, waiting, start, WaitingForImage, "Pod a", "Pod a: " + table[WaitingForImage].sentence},
		"pod of a job":           {job, waiting, start, WaitingForImage, "Job work", "Pod a: " + table[WaitingForImage].sentence},
		"enclave lost":           {terminated(makePod("a"), 125, "the enclave was lost: killed\n"), running, start, Lost, "Deployment web", "Pod a: The enclave was lost while the workload ran. Its console says: the enclave was lost: killed"},
		"initboot lost":          {terminated(makePod("a"), 125, "initboot was lost, and the enclave with it"), running, start, Lost, "Deployment web", "Pod a: The enclave was lost while the workload ran. Its console says: initboot was lost, and the enclave with it"},
		"the workload's own 125": {terminated(makePod("a"), 125, ""), running, start, "", "", ""},
		"workload not startable": {terminated(makePod("a"), 125, "the image has no command"), running, start, "", "", ""},
		"another exit code":      {terminated(makePod("a"), 1, "the enclave was lost: says the workload"), running, start, "", "", ""},
		"lost long ago":          {terminated(makePod("a"), 125, "the enclave was lost: killed"), running, start.Add(time.Hour), "", "", ""},
		"nothing happened":       {makePod("a"), running, start, "", "", ""},
		"pod with a long name":   {makePod(long), waiting, start, WaitingForImage, "Deployment web", "Pod " + long + ": " + table[WaitingForImage].sentence},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t, tt.pod)
			first := c.leader()
			for _, w := range []*Writer{first, first, c.leader()} {
				w.write(t.Context(), []scrape.Observation{{Pod: tt.pod, Snapshot: tt.snapshot}}, tt.now)
			}
			list := c.events(t)
			if tt.reason == "" {
				if len(list) != 0 {
					t.Errorf("Events: %v", list)
				}
				return
			}
			if len(list) != 1 {
				t.Fatalf("%d Events", len(list))
			}
			e := list[0]
			if e.Reason != string(tt.reason) || e.InvolvedObject.Kind+" "+e.InvolvedObject.Name != tt.owner || e.Message != tt.message || e.Type != "Warning" {
				t.Errorf("%s %s on %v: %s", e.Type, e.Reason, e.InvolvedObject, e.Message)
			}
			if wrong := validation.IsDNS1123Subdomain(e.Name); len(wrong) > 0 {
				t.Errorf("the name %q: %v", e.Name, wrong)
			}
		})
	}
}

// The next enclave of the pod is another story; a console that says a lot is cut.
func TestEventAgain(t *testing.T) {
	pod := makePod("a")
	c := newCluster(t, pod)
	w := c.leader()
	for _, id := range []string{"c://1", "c://2"} {
		pod.Status.ContainerStatuses[0].State.Terminated = &corev1.ContainerStateTerminated{
			ContainerID: id, ExitCode: 125, Message: "the enclave was lost: " + strings.Repeat("ü", 2000), FinishedAt: metav1.NewTime(start),
		}
		w.write(t.Context(), []scrape.Observation{{Pod: pod, Snapshot: snapshot(podsock.EnclaveState_PHASE_ENDED, false)}}, start)
	}
	list := c.events(t)
	if len(list) != 2 {
		t.Fatalf("%d Events of two enclaves", len(list))
	}
	for _, e := range list {
		if len(e.Message) > 1024 || !strings.HasSuffix(e.Message, "ü") {
			t.Errorf("%d bytes: …%s", len(e.Message), e.Message[len(e.Message)-4:])
		}
	}
	if n := testutil.ToFloat64(w.events.WithLabelValues(string(Lost))); n != 2 {
		t.Errorf("%v Events in the metric", n)
	}
}
