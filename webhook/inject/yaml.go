package inject

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Document is one document of a YAML stream.
type Document struct {
	// Text is the document as it was read, comments included, without the separator before it, unless that
	// is the first line of all or follows another one.
	Text []byte
	// JSON is its content; null where there are only comments.
	JSON []byte
	// Templates are what pods are made from in it: nothing where it is of a kind that makes none.
	Templates []Template
}

// Template is what pods are made from.
type Template struct {
	// Kind and Name are those of the object that it lies in; Name is its generateName if it has none.
	Kind, Name string
	// At is the JSON pointer (RFC 6901) of the template in its document; that of a Pod is empty.
	At string
	// Pod is the template in JSON: its metadata and spec are those of a pod.
	Pod []byte
}

// Decode reads the template as this version knows it.
func (t Template) Decode() (*corev1.PodTemplateSpec, error) {
	var typed corev1.PodTemplateSpec
	if err := decode(t.Pod, &typed); err != nil {
		return nil, err
	}
	return &typed, nil
}

// FromYAML reads a stream of YAML or JSON documents and finds the pod templates of Pod, Deployment,
// StatefulSet, DaemonSet, ReplicaSet, ReplicationController, Job, CronJob, and of a List of them. A
// duplicate key is an error.
func FromYAML(docs []byte) ([]Document, error) {
	r := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(docs)))
	var out []Document
	for n := 1; ; n++ {
		text, err := r.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		d := Document{Text: text}
		if d.JSON, err = yaml.YAMLToJSONStrict(text); err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		if d.Templates, err = templates(d.JSON, ""); err != nil {
			return nil, fmt.Errorf("read YAML document %d: %w", n, err)
		}
		out = append(out, d)
	}
}

// templates returns the pod templates of the object that lies at a JSON pointer of its document.
func templates(object []byte, at string) ([]Template, error) {
	var head struct {
		Kind     string `json:"kind"`
		Metadata struct {
			Name         string `json:"name"`
			GenerateName string `json:"generateName"`
		} `json:"metadata"`
		Spec struct {
			Template    json.RawMessage `json:"template"`
			JobTemplate struct {
				Spec struct {
					Template json.RawMessage `json:"template"`
				} `json:"spec"`
			} `json:"jobTemplate"`
		} `json:"spec"`
		Items []json.RawMessage `json:"items"`
	}
	// What is no object of Kubernetes may have other fields of these names.
	var kind struct {
		Kind string `json:"kind"`
	}
	if err := decode(object, &kind); err != nil {
		return nil, err
	}
	t := Template{Kind: kind.Kind, At: at}
	switch kind.Kind {
	case "Pod", "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "ReplicationController", "Job", "CronJob", "List":
		if err := decode(object, &head); err != nil {
			return nil, fmt.Errorf("%s: %w", kind.Kind, err)
		}
		t.Name = cmp.Or(head.Metadata.Name, head.Metadata.GenerateName)
	default:
		return nil, nil
	}
	switch kind.Kind {
	case "Pod":
		t.Pod = object
	case "CronJob":
		t.At += "/spec/jobTemplate/spec/template"
		t.Pod = head.Spec.JobTemplate.Spec.Template
	case "List":
		var out []Template
		for i, item := range head.Items {
			found, err := templates(item, fmt.Sprintf("%s/items/%d", at, i))
			if err != nil {
				return nil, fmt.Errorf("item %d: %w", i, err)
			}
			out = append(out, found...)
		}
		return out, nil
	default:
		t.At += "/spec/template"
		t.Pod = head.Spec.Template
	}
	if len(t.Pod) == 0 {
		return nil, nil
	}
	return []Template{t}, nil
}
