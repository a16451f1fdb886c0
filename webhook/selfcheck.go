package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"cloister.dev/cloister/internal/certs"
)

// selfCheck asks this replica to inject a pod, as an API server would: by TLS, and believing what the caBundle
// holds. An answer is good for as long as neither the certificate nor the caBundle changes: asking all the time
// would take a busy replica out of service.
type selfCheck struct {
	source *certs.Source
	url    string

	mu    sync.Mutex
	roots *x509.CertPool   // that the last good answer was believed with
	cert  *tls.Certificate // that it was served with
}

// ready returns nil when API servers can use this replica.
func (c *selfCheck) ready(ctx context.Context) error {
	if err := c.source.Ready(); err != nil {
		return err
	}
	cert, err := c.source.GetCertificate(nil)
	if err != nil {
		return err
	}
	roots := c.source.Roots()
	c.mu.Lock()
	defer c.mu.Unlock()
	if cert == c.cert && roots.Equal(c.roots) {
		return nil
	}
	if err := c.ask(ctx, roots); err != nil {
		return fmt.Errorf("ask this replica for an injection: %w", err)
	}
	c.cert, c.roots = cert, roots
	return nil
}

// ask sends one review.
func (c *selfCheck) ask(ctx context.Context, roots *x509.CertPool) error {
	body, err := json.Marshal(selfReview)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, ServerName: c.source.ServerName(), Time: c.source.Now, MinVersion: tls.VersionTLS13},
	}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var review admissionv1.AdmissionReview
	if err := json.NewDecoder(resp.Body).Decode(&review); err != nil {
		return fmt.Errorf("decode answer: %w", err)
	}
	switch r := review.Response; {
	case r == nil || r.UID != selfReview.Request.UID:
		return errors.New("the answer is to nothing that was asked")
	case !r.Allowed:
		return fmt.Errorf("denied: %s", r.Result.Message)
	case len(r.Patch) == 0:
		return errors.New("the pod was not injected")
	}
	return nil
}

// selfReview is the dry run of a pod with an enclave.
var selfReview = admissionv1.AdmissionReview{
	TypeMeta: metav1.TypeMeta{APIVersion: admissionv1.SchemeGroupVersion.String(), Kind: "AdmissionReview"},
	Request: &admissionv1.AdmissionRequest{
		UID:       types.UID("self"),
		Kind:      metav1.GroupVersionKind{Version: "v1", Kind: "Pod"},
		Resource:  metav1.GroupVersionResource{Version: "v1", Resource: "pods"},
		Name:      "self",
		Operation: admissionv1.Create,
		DryRun:    new(true),
		Object: runtime.RawExtension{Object: &corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Name: "self", Annotations: map[string]string{"cloister.dev/enclave": "app"}},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{
				Name:  "app",
				Image: "cloister.dev/self@sha256:0000000000000000000000000000000000000000000000000000000000000000",
			}}},
		}},
	},
}
