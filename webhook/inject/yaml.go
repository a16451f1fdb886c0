package inject

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Workload is a pod template that a YAML document holds.
type Workload struct {
	Kind, Name string
	// PodTemplate is what pods are made from; of a Pod, its own metadata and spec.
	PodTemplate corev1.PodTemplateSpec
}

// FromYAML returns the pod templates in a stream of YAML or JSON documents, in their order: those of
// Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, ReplicationController, Job, CronJob, and of a List
// of them. Documents of other kinds are passed over. A duplicate key is an error.
func FromYAML(docs []byte) ([]Workload, error) {
	r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(docs)))
	var out []Workload
	for n := 1; ; n++ {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		data, err := yaml.YAMLToJSONStrict(doc)
		if err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		found, err := fromJSON(data)
		if err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		out = append(out, found...)
	}
}

func fromJSON(data []byte) ([]Workload, error) {
	var head struct {
		Kind     string            `json:"kind"`
		Metadata metav1.ObjectMeta `json:"metadata"`
		Items    []json.RawMessage `json:"items"`
	}
	if err := decode(data, &head); err != nil {
		return nil, err
	}
	w := Workload{Kind: head.Kind, Name: head.Metadata.Name}
	var err error
	switch head.Kind {
	case "Pod":
		err = decode(data, &w.PodTemplate)
	case "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job":
		var o struct {
			Spec struct {
				Template corev1.PodTemplateSpec `json:"template"`
			} `json:"spec"`
		}
		err = decode(data, &o)
		w.PodTemplate = o.Spec.Template
	case "CronJob":
		var o struct {
			Spec struct {
				JobTemplate struct {
					Spec struct {
						Template corev1.PodTemplateSpec `json:"template"`
					} `json:"spec"`
				} `json:"jobTemplate"`
			} `json:"spec"`
		}
		err = decode(data, &o)
		w.PodTemplate = o.Spec.JobTemplate.Spec.Template
	case "List":
		var out []Workload
		for i, item := range head.Items {
			found, err := fromJSON(item)
			if err != nil {
				return nil, fmt.Errorf("item %d: %w", i, err)
			}
			out = append(out, found...)
		}
		return out, nil
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s %q: %w", w.Kind, w.Name, err)
	}
	return []Workload{w}, nil
}
