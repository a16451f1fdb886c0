package admit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/go-logr/logr"
	admissionv1 "k8s.io/api/admission/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

// maxReview is the largest review in bytes that is read: the object, which API servers limit to 3 MB, the old
// one, and what else is in a request, as in controller-runtime.
const maxReview = 7 << 20

const (
	// usualReview is what a review hardly exceeds, in bytes.
	usualReview = 64 << 10
	// largeAtOnce is how many larger ones are worked on at a time: each takes a multiple of its size, and who sends
	// many must not take the memory that all pods of the cluster are decided about with.
	largeAtOnce = 2
	// patience is for one of those to wait: API servers wait no longer.
	patience = 5 * time.Second
)

// HTTP serves admission reviews of the API admission.k8s.io/v1. It stands in for the server of
// controller-runtime's Webhook, which decodes a review twice and builds a logger of six values: that costs as
// much as the whole decision. Panics are answered as there.
func (h *Handler) HTTP() http.Handler {
	// What is logged about a pod is logged once, in Handle.
	hook := &admission.Webhook{Handler: h, LogConstructor: func(base logr.Logger, _ *admission.Request) logr.Logger { return base }}
	large := make(chan struct{}, largeAtOnce)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength < 0 || r.ContentLength > usualReview {
			// The context does not end with the client as long as there is something to read.
			ctx, cancel := context.WithTimeout(r.Context(), patience)
			defer cancel()
			select {
			case large <- struct{}{}:
				defer func() { <-large }()
			case <-ctx.Done():
				http.Error(w, "too many large reviews at a time: try again later", http.StatusServiceUnavailable)
				return
			}
		}
		review, err := readReview(w, r)
		if err != nil {
			h.log.Error("request is no admission review", "error", err.Error())
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		response := hook.Handle(r.Context(), admission.Request{AdmissionRequest: *review.Request})
		w.Header().Set("Content-Type", "application/json")
		answer := admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: &response.AdmissionResponse}
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			h.log.Error("the answer was not sent", "uid", string(response.UID), "error", err.Error())
		}
	})
}

// readReview reads what API servers send. A review of another version is an error.
func readReview(w http.ResponseWriter, r *http.Request) (*admissionv1.AdmissionReview, error) {
	if t := r.Header.Get("Content-Type"); t != "application/json" {
		return nil, fmt.Errorf("the content type is %q: send application/json", t)
	}
	var body bytes.Buffer
	if r.ContentLength > 0 {
		// ReadFrom grows a buffer that has less room. Who says that much will come has not sent it yet.
		body.Grow(int(min(r.ContentLength, usualReview)) + bytes.MinRead)
	}
	if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, maxReview)); err != nil {
		return nil, fmt.Errorf("read request: %w", err)
	}
	var review admissionv1.AdmissionReview
	if err := utiljson.Unmarshal(body.Bytes(), &review); err != nil {
		return nil, fmt.Errorf("decode request: %w", err)
	}
	if want := admissionv1.SchemeGroupVersion.String(); review.APIVersion != want || review.Kind != "AdmissionReview" || review.Request == nil {
		return nil, fmt.Errorf("it is a %q of %q: send an AdmissionReview of %s with a request", review.Kind, review.APIVersion, want)
	}
	return &review, nil
}
