package admit

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/controller-runtime/pkg/client"

	"cloister.dev/cloister/webhook/inject"
)

// component is the source of Events.
const component = "cloister-webhook"

const (
	// maxWaiting is how many denials may wait to be reported; more are dropped and counted.
	maxWaiting = 256
	// maxMessage is the most that an Event's message may have, in bytes.
	maxMessage = 1024
	// maxOwners is how many owners are remembered before all are forgotten.
	maxOwners = 1024
	// maxOwner is how long the strings of an owner may be together, in bytes: two names, a kind and a uid.
	maxOwner = 1024
)

// Events reports denied pods on what creates them: nobody else sees the answer to a ReplicaSet or a Job. Equal
// ones become one Event with a count, and of an owner with many only the first are written, as client-go's recorder
// does it. No admission waits for it.
type Events struct {
	client   client.Client // without a cache
	log      *slog.Logger
	waiting  chan denial
	dropped  prometheus.Counter
	owners   map[ownerKey]*corev1.ObjectReference // by the pod's own owner
	recorder record.EventRecorder
	stop     func()
}

// ownerKey has a namespace since who creates a pod may name any uid as its owner's.
type ownerKey struct {
	namespace string
	uid       types.UID
}

type denial struct {
	namespace string
	owner     metav1.OwnerReference
	reason    string
	message   string
}

// NewEvents returns an Events that writes with c once it runs. Its metric is registered with reg.
func NewEvents(c client.Client, log *slog.Logger, reg prometheus.Registerer) *Events {
	e := &Events{
		client: c, log: log, waiting: make(chan denial, maxWaiting), owners: map[ownerKey]*corev1.ObjectReference{},
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "injection_events_dropped_total", Help: "Denials that were not reported as Events because too many waited.",
		}),
	}
	reg.MustRegister(e.dropped)
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(sink{c})
	e.recorder = broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: component})
	e.stop = broadcaster.Shutdown
	return e
}

// Run writes Events until ctx ends.
func (e *Events) Run(ctx context.Context) {
	defer e.stop()
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-e.waiting:
			about, err := e.about(ctx, d.namespace, d.owner)
			if err != nil {
				e.log.Error("report a denied pod", "namespace", d.namespace, "error", err.Error())
				continue
			}
			e.recorder.Event(about, corev1.EventTypeWarning, d.reason, d.message)
		}
	}
}

// denied takes what is to be said about a pod that was not admitted. A pod of its own has no Event: its author got
// the answer.
func (e *Events) denied(req *admissionv1.AdmissionRequest, errs field.ErrorList) {
	if e == nil || (req.DryRun != nil && *req.DryRun) {
		return
	}
	var pod metav1.PartialObjectMetadata
	if err := json.Unmarshal(req.Object.Raw, &pod); err != nil {
		return
	}
	owner := metav1.GetControllerOf(&pod)
	// Nobody has checked the pod yet, and some of its owner is kept.
	if owner == nil || len(owner.APIVersion)+len(owner.Kind)+len(owner.Name)+len(owner.UID) > maxOwner {
		return
	}
	reason, sentence := inject.ReasonOf(errs[0])
	message := fmt.Sprintf("A pod was denied. %s %s", sentence, sentences(errs))
	if len(message) > maxMessage {
		message = strings.ToValidUTF8(message[:maxMessage-3], "") + "..."
	}
	select {
	case e.waiting <- denial{req.Namespace, *owner, string(reason), message}:
	default:
		e.dropped.Inc()
	}
}

// above says which owners have an owner that a person deals with rather.
var above = map[string]string{"ReplicaSet": "apps/v1", "Job": "batch/v1"}

// about is the object that a person deals with: the Deployment behind a ReplicaSet, the CronJob behind a Job, else the
// pod's controller.
func (e *Events) about(ctx context.Context, namespace string, owner metav1.OwnerReference) (*corev1.ObjectReference, error) {
	key := ownerKey{namespace, owner.UID}
	if ref := e.owners[key]; ref != nil {
		return ref, nil
	}
	of := &owner
	if above[of.Kind] == of.APIVersion {
		var between metav1.PartialObjectMetadata
		between.APIVersion, between.Kind = of.APIVersion, of.Kind
		err := e.client.Get(ctx, client.ObjectKey{Namespace: namespace, Name: of.Name}, &between)
		if err != nil && !apierrors.IsNotFound(err) {
			return nil, fmt.Errorf("read owner: %w", err)
		}
		if next := metav1.GetControllerOf(&between); err == nil && next != nil {
			of = next
		}
	}
	if len(e.owners) >= maxOwners {
		clear(e.owners)
	}
	ref := &corev1.ObjectReference{APIVersion: of.APIVersion, Kind: of.Kind, Namespace: namespace, Name: of.Name, UID: of.UID}
	e.owners[key] = ref
	return ref, nil
}

// sink is where client-go's recorder writes.
type sink struct{ client client.Client }

func (s sink) Create(event *corev1.Event) (*corev1.Event, error) {
	return event, s.client.Create(context.Background(), event)
}

func (s sink) Update(event *corev1.Event) (*corev1.Event, error) {
	return event, s.client.Update(context.Background(), event)
}

func (s sink) Patch(event *corev1.Event, data []byte) (*corev1.Event, error) {
	event = event.DeepCopy()
	return event, s.client.Patch(context.Background(), event, client.RawPatch(types.StrategicMergePatchType, data))
}
