// Package state writes what becomes of enclaves where people look: pod conditions and Events on the
// owners of pods. Only the leader does it. The conditions tell operators, and readiness gates, what the
// host says; no client trusts them.
package state

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corev1apply "k8s.io/client-go/applyconfigurations/core/v1"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"cloister.dev/cloister/controller/scrape"
)

// Types of pod conditions.
const (
	// EnclaveReady: the workload runs in its enclave.
	EnclaveReady corev1.PodConditionType = "cloister.dev/EnclaveReady"
	// Attested: the enclave has shown the expected PCRs to initboot, which runs on the host.
	Attested corev1.PodConditionType = "cloister.dev/Attested"
)

// component is the field manager of conditions and the source of Events.
const component = "cloister-controller"

const (
	concurrency = 16
	// maxMessage is the most that an Event's message may have, in bytes.
	maxMessage = 1024
	// maxPrefix is the most of a pod's name that an Event's begins with, in bytes.
	maxPrefix = 200
	// forget is the time after which an Event may be sent again; API servers keep Events for an hour.
	forget = time.Hour
)

// Writer writes the state of all pods after every round of the scraper.
type Writer struct {
	scraper *scrape.Scraper
	client  client.Client // without a cache
	log     *slog.Logger

	pods   *prometheus.GaugeVec
	events *prometheus.CounterVec

	mu   sync.Mutex
	sent map[string]time.Time // Events, by namespace and name
}

// New returns a writer. The client must not read from a cache: it reads owners, rarely.
func New(scraper *scrape.Scraper, c client.Client, log *slog.Logger, reg prometheus.Registerer) *Writer {
	w := &Writer{
		scraper: scraper, client: c, log: log, sent: map[string]time.Time{},
		pods: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cloister_controller_pods", Help: "Confidential pods by the state of their enclave. The leader knows.",
		}, []string{"reason"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cloister_controller_events_total", Help: "Events that were written, by reason.",
		}, []string{"reason"}),
	}
	reg.MustRegister(w.pods, w.events)
	return w
}

// Start works until ctx ends. It implements manager.Runnable, which runs it on the leader only.
func (w *Writer) Start(ctx context.Context) error {
	for {
		round := w.scraper.Round()
		// A leader that has just started may not have asked yet, and nothing is known then.
		if w.scraper.Warm() == nil {
			if observations, err := w.scraper.Observe(ctx); err == nil {
				w.write(ctx, observations, time.Now())
			} else if ctx.Err() == nil {
				w.log.Error("write the state of enclaves", "error", err.Error())
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-round:
		}
	}
}

// write brings conditions up to date and sends the Events that have not been sent.
func (w *Writer) write(ctx context.Context, observations []scrape.Observation, now time.Time) {
	counts := map[Reason]int{}
	var group errgroup.Group
	group.SetLimit(concurrency)
	for _, o := range observations {
		r := reason(o)
		counts[r]++
		group.Go(func() error {
			if err := w.pod(ctx, o, r, now); err != nil && ctx.Err() == nil {
				w.log.Error("write the state of an enclave", "namespace", o.Pod.Namespace, "pod", o.Pod.Name, "error", err.Error())
			}
			return nil
		})
	}
	group.Wait()
	for r := range table {
		if r != Lost {
			w.pods.WithLabelValues(string(r)).Set(float64(counts[r]))
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, at := range w.sent {
		if now.Sub(at) > forget {
			delete(w.sent, name)
		}
	}
}

// pod writes the state of one pod. One that is being deleted gets no more conditions.
func (w *Writer) pod(ctx context.Context, o scrape.Observation, r Reason, now time.Time) error {
	if o.Pod.DeletionTimestamp == nil {
		if err := w.conditions(ctx, o.Pod, r, now); err != nil {
			return err
		}
		if table[r].event {
			// Once for each start of the console: enclaves that do not boot are many.
			if err := w.event(ctx, o.Pod, r, console(o.Pod).ContainerID, "", now); err != nil {
				return err
			}
		}
	}
	for id, why := range lost(o.Pod, now) {
		if err := w.event(ctx, o.Pod, Lost, id, why, now); err != nil {
			return err
		}
	}
	return nil
}

// conditions applies both conditions, unless the pod has them.
func (w *Writer) conditions(ctx context.Context, pod *corev1.Pod, r Reason, now time.Time) error {
	m := table[r]
	changed := false
	var list []*corev1apply.PodConditionApplyConfiguration
	for _, c := range []struct {
		kind   corev1.PodConditionType
		status corev1.ConditionStatus
	}{{EnclaveReady, m.ready}, {Attested, m.attested}} {
		since := metav1.NewTime(now)
		old := condition(pod, c.kind)
		if old != nil && old.Status == c.status {
			since = old.LastTransitionTime
		}
		if old == nil || old.Status != c.status || old.Reason != string(r) || old.Message != m.sentence {
			changed = true
		}
		list = append(list, corev1apply.PodCondition().WithType(c.kind).WithStatus(c.status).
			WithReason(string(r)).WithMessage(m.sentence).WithLastTransitionTime(since))
	}
	if !changed {
		return nil
	}
	// The uid keeps the words about one pod from a later one of the same name.
	apply := corev1apply.Pod(pod.Name, pod.Namespace).WithUID(pod.UID).WithStatus(corev1apply.PodStatus().WithConditions(list...))
	err := w.client.Status().Apply(ctx, apply, client.FieldOwner(component), client.ForceOwnership)
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // it is gone
		return nil
	}
	if err != nil {
		return fmt.Errorf("write conditions: %w", err)
	}
	return nil
}

func condition(pod *corev1.Pod, kind corev1.PodConditionType) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// event reports on the owner of a pod what happened, once for each key. The Event's name follows from the
// key, so that a new leader does not repeat what another has sent.
func (w *Writer) event(ctx context.Context, pod *corev1.Pod, r Reason, key, detail string, now time.Time) error {
	sum := sha256.Sum256([]byte(string(pod.UID) + " " + string(r) + " " + key))
	// The API server would refuse a longer name in every round, and pods may have names of 253 bytes.
	name := strings.TrimRight(pod.Name[:min(len(pod.Name), maxPrefix)], "-.") + "." + hex.EncodeToString(sum[:8])
	full := pod.Namespace + "/" + name
	w.mu.Lock()
	_, done := w.sent[full]
	w.mu.Unlock()
	if done {
		return nil
	}
	about, err := w.owner(ctx, pod)
	if err != nil {
		return err
	}
	message := "Pod " + pod.Name + ": " + table[r].sentence
	if detail != "" {
		message += " Its console says: " + detail
	}
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage], "")
	}
	at := metav1.NewTime(now)
	err = w.client.Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: pod.Namespace, Name: name},
		InvolvedObject: about,
		Reason:         string(r),
		Message:        message,
		Type:           corev1.EventTypeWarning,
		Source:         corev1.EventSource{Component: component},
		FirstTimestamp: at,
		LastTimestamp:  at,
		Count:          1,
	})
	switch {
	case err == nil:
		w.events.WithLabelValues(string(r)).Inc()
	case apierrors.IsAlreadyExists(err):
	// The namespace is going, and nobody reads there any more.
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) || apierrors.IsNotFound(err):
	default:
		return fmt.Errorf("write Event: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent[full] = now
	return nil
}

// owner is the object that a person deals with: the Deployment behind a ReplicaSet, else the pod's
// controller, else the pod.
func (w *Writer) owner(ctx context.Context, pod *corev1.Pod) (corev1.ObjectReference, error) {
	of := metav1.GetControllerOf(pod)
	if of == nil {
		return corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}, nil
	}
	if of.Kind == "ReplicaSet" && of.APIVersion == "apps/v1" {
		var set metav1.PartialObjectMetadata
		set.APIVersion, set.Kind = of.APIVersion, of.Kind
		err := w.client.Get(ctx, client.ObjectKey{Namespace: pod.Namespace, Name: of.Name}, &set)
		if err != nil && !apierrors.IsNotFound(err) {
			return corev1.ObjectReference{}, fmt.Errorf("read owner: %w", err)
		}
		if above := metav1.GetControllerOf(&set); err == nil && above != nil {
			of = above
		}
	}
	return corev1.ObjectReference{APIVersion: of.APIVersion, Kind: of.Kind, Namespace: pod.Namespace, Name: of.Name, UID: of.UID}, nil
}
