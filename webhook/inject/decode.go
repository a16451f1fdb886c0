package inject

import (
	"bytes"
	"encoding/json"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utiljson "k8s.io/apimachinery/pkg/util/json"
	kjson "sigs.k8s.io/json"
)

// decode reads JSON as the API server does: field names are case-sensitive.
func decode(data []byte, into any) error { return utiljson.Unmarshal(data, into) }

// mentionsUs tells whether a pod, as JSON, could have an annotation, a container or a variable of ours. All
// of them have our name in them, in whatever case, plain or with an escape by \u. Most pods of a cluster do
// not, and need not be decoded.
func mentionsUs(pod []byte) bool {
	const name = "cloister"
	for i := 0; i+len(name) <= len(pod); i++ {
		if pod[i]|0x20 == name[0] && strings.EqualFold(string(pod[i:i+len(name)]), name) {
			return true
		}
	}
	return bytes.Contains(pod, []byte(`\u`))
}

// decodePod reads what is decided about, each of spec.containers as it stands there, and what in each of them
// this version does not know.
func decodePod(data []byte) (meta *metav1.ObjectMeta, spec *corev1.PodSpec, raw []json.RawMessage, unknown [][]error, err error) {
	var pod struct {
		Metadata struct {
			Annotations map[string]string `json:"annotations"`
		} `json:"metadata"`
		Spec struct {
			corev1.PodSpec
			Containers []json.RawMessage `json:"containers"`
		} `json:"spec"`
	}
	if err := decode(data, &pod); err != nil {
		return nil, nil, nil, nil, err
	}
	spec, raw = &pod.Spec.PodSpec, pod.Spec.Containers
	spec.Containers, unknown = make([]corev1.Container, len(raw)), make([][]error, len(raw))
	for i := range raw {
		if unknown[i], err = kjson.UnmarshalStrict(raw[i], &spec.Containers[i], kjson.DisallowUnknownFields); err != nil {
			return nil, nil, nil, nil, err
		}
	}
	return &metav1.ObjectMeta{Annotations: pod.Metadata.Annotations}, spec, raw, unknown, nil
}

// container is what is kept of the named container, as it stands in the pod. It is empty where this version
// knows all of it, and can write it itself.
type container struct {
	Env             []json.RawMessage `json:"env"`
	EnvFrom         []json.RawMessage `json:"envFrom"`
	VolumeMounts    []json.RawMessage `json:"volumeMounts"`
	Resources       json.RawMessage   `json:"resources"`
	SecurityContext json.RawMessage   `json:"securityContext"`
}

// renamed is an entry of env or envFrom with another value of some of its fields; one that is "" is removed.
// Raw is the entry as it stands, with fields that this version does not know.
func renamed(raw json.RawMessage, fields map[string]string) (map[string]json.RawMessage, error) {
	var v map[string]json.RawMessage
	if err := decode(raw, &v); err != nil {
		return nil, err
	}
	for name, value := range fields {
		if value == "" {
			delete(v, name)
		} else {
			v[name] = jsonText(value)
		}
	}
	return v, nil
}
