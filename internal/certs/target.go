package certs

import (
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"strconv"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// Target is the object of the API that tells API servers which CA to believe.
type Target struct {
	kind schema.GroupVersionKind
	name string
	// fields finds the places of the caBundle.
	fields func(object map[string]any) ([]bundleField, error)
}

// bundleField is one place of a caBundle.
type bundleField struct {
	pointer string // RFC 6901
	value   string // base64, empty when there is none
}

// certificates returns what the place holds; nothing when somebody has written what is no certificates.
func (f bundleField) certificates() []*x509.Certificate {
	data, err := base64.StdEncoding.DecodeString(f.value)
	if err != nil {
		return nil
	}
	list, err := decodeCerts(data)
	if err != nil {
		return nil
	}
	return list
}

func (t Target) String() string { return t.kind.Kind + " " + t.name }

// MutatingWebhook is a MutatingWebhookConfiguration; each of its webhooks has a caBundle.
func MutatingWebhook(name string) Target {
	return Target{
		kind: schema.GroupVersionKind{Group: "admissionregistration.k8s.io", Version: "v1", Kind: "MutatingWebhookConfiguration"},
		name: name,
		fields: func(object map[string]any) ([]bundleField, error) {
			webhooks, _, err := unstructured.NestedSlice(object, "webhooks")
			if err != nil {
				return nil, err
			}
			var out []bundleField
			for i, w := range webhooks {
				webhook, ok := w.(map[string]any)
				if !ok {
					return nil, fmt.Errorf("webhook %d is not an object", i)
				}
				f, err := field(webhook, "/webhooks/"+strconv.Itoa(i)+"/clientConfig/caBundle", "clientConfig", "caBundle")
				if err != nil {
					return nil, err
				}
				out = append(out, f)
			}
			return out, nil
		},
	}
}

// APIService is an aggregated API.
func APIService(name string) Target {
	return Target{
		kind: schema.GroupVersionKind{Group: "apiregistration.k8s.io", Version: "v1", Kind: "APIService"},
		name: name,
		fields: func(object map[string]any) ([]bundleField, error) {
			f, err := field(object, "/spec/caBundle", "spec", "caBundle")
			return []bundleField{f}, err
		},
	}
}

func field(object map[string]any, pointer string, path ...string) (bundleField, error) {
	value, _, err := unstructured.NestedString(object, path...)
	return bundleField{pointer, value}, err
}
