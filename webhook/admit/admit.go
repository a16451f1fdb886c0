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

// Handler admits pods. It has no side effects beyond its metrics and one log line a pod, so a dry run is
// like any other.
type Handler struct {
	options    inject.Options
	resolve    inject.Resolver
	log        *slog.Logger
	injections *prometheus.CounterVec
	seconds    prometheus.Histogram
}

// New returns a Handler whose metrics are registered with reg. Resolve finds the digests of tags.
func New(options inject.Options, resolve inject.Resolver, log *slog.Logger, reg prometheus.Registerer) *Handler {
	h := &Handler{
		options: options,
		resolve: resolve,
		log:     log,
		injections: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "injections_total",
			Help: "Admission reviews of pods by result (injected, skipped, denied) and, of a denial, the type of its first reason.",
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
	ops, warnings, errs := inject.PatchTagged(ctx, req.Object.Raw, h.options, h.resolve)
	h.seconds.Observe(time.Since(start).Seconds())
	// The pod's own namespace is empty when it comes from a template.
	log := h.log.With("namespace", req.Namespace, "pod", req.Name, "uid", string(req.UID), "dryRun", req.DryRun != nil && *req.DryRun)

	if len(errs) > 0 {
		h.injections.WithLabelValues(resultDenied, string(errs[0].Type)).Inc()
		// Only where, never what: values may be secrets.
		fields := make([]string, len(errs))
		for i, e := range errs {
			fields[i] = e.Field
		}
		log.Info("pod denied", "fields", fields)
		return denied(req, errs)
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
	log.Info("pod injected", "operations", len(ops))
	patchType := admissionv1.PatchTypeJSONPatch
	return audited(admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{
		Allowed: true, Patch: patch, PatchType: &patchType, Warnings: warnings,
	}}, resultInjected)
}

// audited adds what the API server writes to its audit log, under the name of the webhook.
func audited(r admission.Response, result string) admission.Response {
	r.AuditAnnotations = map[string]string{"result": result}
	return r
}

func denied(req admission.Request, errs field.ErrorList) admission.Response {
	sentences := make([]string, len(errs))
	causes := make([]metav1.StatusCause, len(errs))
	for i, e := range errs {
		sentences[i] = e.Error()
		causes[i] = metav1.StatusCause{Type: metav1.CauseType(e.Type), Message: e.ErrorBody(), Field: e.Field}
	}
	r := admission.Response{AdmissionResponse: admissionv1.AdmissionResponse{
		Result: &metav1.Status{
			Status:  metav1.StatusFailure,
			Code:    http.StatusForbidden,
			Reason:  metav1.StatusReasonInvalid,
			Message: strings.Join(sentences, "; "),
			Details: &metav1.StatusDetails{Kind: "Pod", Name: req.Name, Causes: causes},
		},
	}}
	r = audited(r, resultDenied)
	r.AuditAnnotations["reasons"] = strconv.Itoa(len(errs))
	return r
}
