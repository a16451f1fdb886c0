// Package admit answers the API server's admission reviews of pods with what package inject decides.
package admit

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	admissionv1 "k8s.io/api/admission/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"

	"cloister.dev/cloister/webhook/inject"
)

// Results of an admission, as in the metric and the audit annotation.
const (
	// resultInjected: the pod was patched.
	resultInjected = "injected"
	// resultSkipped: the pod has no annotation under our prefix.
	resultSkipped = "skipped"
	// resultDenied: the pod asks for what cannot be.
	resultDenied = "denied"
)

// Handler admits pods. It has no side effects beyond its metrics, one log line a pod and, unless it is a dry run,
// an Event about a denial.
type Handler struct {
	// Enforced returns the level that Pod Security enforces in a namespace, or "" where it is not known. Without it
	// none is.
	Enforced func(namespace string) string

	options    inject.Options
	resolve    inject.Resolver
	events     *Events
	log        *slog.Logger
	injections *prometheus.CounterVec
	seconds    prometheus.Histogram
}

// New returns a Handler whose metrics are registered with reg. Resolve finds the digests of tags. Without events it
// reports none.
func New(options inject.Options, resolve inject.Resolver, events *Events, log *slog.Logger, reg prometheus.Registerer) *Handler {
	h := &Handler{
		options: options,
		resolve: resolve,
		events:  events,
		log:     log,
		injections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "injections_total",
			Help: "Admission reviews of pods by result (injected, skipped, denied) and, of a denial, the reason of its first sentence.",
		}, []string{"result", "reason"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "injection_seconds",
			Help:    "Time to decide about one pod.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
	}
	reg.MustRegister(h.injections, h.seconds)
	return h
}

// Handle decides about one pod. A denial has code 403, reason Invalid, all sentences in its message, and
// each as a cause of its own.
func (h *Handler) Handle(ctx context.Context, req admission.Request) admission.Response {
	start := time.Now()
	options := h.options
	if h.Enforced != nil {
		options.Enforced = h.Enforced(req.Namespace)
	}
	ops, warnings, errs := inject.PatchTagged(ctx, req.Object.Raw, options, h.resolve)
	h.seconds.Observe(time.Since(start).Seconds())

	if len(errs) > 0 {
		reason, _ := inject.ReasonOf(errs[0])
		h.injections.WithLabelValues(resultDenied, string(reason)).Inc()
		h.events.denied(&req.AdmissionRequest, errs)
		// Only where, never what: values may be secrets.
		fields := make([]string, len(errs))
		for i, e := range errs {
			fields[i] = e.Field
		}
		h.logPod(ctx, &req, "pod denied", slog.String("reason", string(reason)), slog.Any("fields", fields))
		return denied(req, reason, errs)
	}
	if len(ops) == 0 {
		h.injections.WithLabelValues(resultSkipped, "").Inc()
		return audited(admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{Allowed: true}}, resultSkipped)
	}
	patch, err := json.Marshal(ops)
	if err != nil {
		return admission.Errored(http.StatusInternalServerError, err)
	}
	h.injections.WithLabelValues(resultInjected, "").Inc()
	h.logPod(ctx, &req, "pod injected", slog.Int("operations", len(ops)))
	patchType := admissionv1.PatchTypeJSONPatch
	r := audited(admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{
		Allowed: true, Patch: patch, PatchType: &patchType, Warnings: warnings,
	}}, resultInjected)
	for _, op := range ops {
		if measurements, ok := op.Value.(string); ok && op.Path == inject.MeasurementsPath {
			r.AuditAnnotations["measurements"] = measurements
		}
	}
	return r
}

// logPod logs about a pod, whose own namespace is empty when it comes from a template.
func (h *Handler) logPod(ctx context.Context, req *admission.Request, message string, attrs ...slog.Attr) {
	h.log.LogAttrs(ctx, slog.LevelInfo, message, append([]slog.Attr{
		slog.String("namespace", req.Namespace), slog.String("pod", req.Name), slog.String("uid", string(req.UID)),
		slog.Bool("dryRun", req.DryRun != nil && *req.DryRun),
	}, attrs...)...)
}

// audited adds what the API server writes to its audit log, under the name of the webhook.
func audited(r admission.Response, result string) admission.Response {
	r.AuditAnnotations = map[string]string{"result": result}
	return r
}

// sentences joins all of what is wrong.
func sentences(errs field.ErrorList) string {
	list := make([]string, len(errs))
	for i, e := range errs {
		list[i] = e.Error()
	}
	return strings.Join(list, "; ")
}

func denied(req admission.Request, reason inject.Reason, errs field.ErrorList) admission.Response {
	causes := make([]metav1.StatusCause, len(errs))
	for i, e := range errs {
		causes[i] = metav1.StatusCause{Type: metav1.CauseType(e.Type), Message: e.ErrorBody(), Field: e.Field}
	}
	r := admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{
		Result: &metav1.Status{
			Status:  metav1.StatusFailure,
			Code:    http.StatusForbidden,
			Reason:  metav1.StatusReasonInvalid,
			Message: sentences(errs),
			Details: &metav1.StatusDetails{Kind: "Pod", Name: req.Name, Causes: causes},
		},
	}}
	r = audited(r, resultDenied)
	r.AuditAnnotations["reason"] = string(reason)
	r.AuditAnnotations["reasons"] = strconv.Itoa(len(errs))
	return r
}
