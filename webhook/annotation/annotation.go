// Package annotation is the one table of pod annotations under the prefix cloister.dev/. It does no I/O.
package annotation

import (
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/webhook/config"
)

// Prefix is the prefix of every annotation of ours.
const Prefix = "cloister.dev/"

// Keys of the annotations.
const (
	// Enclave names the container that runs in the enclave.
	Enclave = Prefix + "enclave"
	// Config is an EnclaveConfig as inline YAML.
	Config = Prefix + "config"
	// Measurements is written by the webhook for people; no client trusts it.
	Measurements = Prefix + "measurements"
)

// Annotation is one row of the table.
type Annotation struct {
	Key string
	// Type says for people what the value is.
	Type string
	// Default says for people what holds without it.
	Default string
	// Sentence says for people what it does.
	Sentence string
	// read takes a value over, or reports what is wrong with it.
	read func(value string, path *field.Path, into *Values) field.ErrorList
}

// Values are what the annotations of a pod say.
type Values struct {
	// Enclave names the container that runs in the enclave.
	Enclave string
	// Config is never nil, and empty where the annotation is missing or wrong.
	Config *config.EnclaveConfig
	// Measurements is as it stands in the pod.
	Measurements string
}

// Table lists all annotations that a pod may carry.
var Table = []Annotation{
	{
		Key: Enclave, Type: "container name", Default: "the pod is none of ours",
		Sentence: "The container of this name runs in an enclave. It is needed beside every other annotation of ours.",
		read: func(value string, path *field.Path, into *Values) field.ErrorList {
			into.Enclave = value
			if len(validation.IsDNS1123Label(value)) > 0 {
				return field.ErrorList{field.Invalid(path, value, "write the name of one container of the pod")}
			}
			return nil
		},
	},
	{
		Key: Config, Type: "EnclaveConfig (YAML)", Default: "the default of each field",
		Sentence: "Settings of the enclave, as below.",
		read: func(value string, path *field.Path, into *Values) field.ErrorList {
			c, errs := config.Parse(value, path)
			if len(errs) == 0 {
				into.Config = c
			}
			return errs
		},
	},
	{
		Key: Measurements, Type: "measurement (JSON)", Default: "the webhook writes it",
		Sentence: "PCR16 of the pod, for people to read; no client trusts it. A value that is not what the pod measures to is denied.",
		read: func(value string, _ *field.Path, into *Values) field.ErrorList {
			into.Measurements = value
			return nil
		},
	},
}

// Any reports whether there is an annotation under our prefix.
func Any(annotations map[string]string) bool {
	for k := range annotations {
		if ours(k) {
			return true
		}
	}
	return false
}

// ours tells whether a key is under our prefix, in any case: API servers accept annotations with capital
// letters (k8s.io/apimachinery/pkg/api/validation, ValidateAnnotations), and such a typo must not run in
// the open either.
func ours(key string) bool {
	return len(key) >= len(Prefix) && strings.EqualFold(key[:len(Prefix)], Prefix)
}

// Read reads the annotations under our prefix. It reports every unknown key, every value that is not valid,
// and that Enclave is missing although another key is there: a typo must not run in the open.
func Read(annotations map[string]string, path *field.Path) (Values, field.ErrorList) {
	values := Values{Config: &config.EnclaveConfig{}}
	var errs field.ErrorList
	for _, a := range Table {
		if v, ok := annotations[a.Key]; ok {
			errs = append(errs, a.read(v, path.Key(a.Key), &values)...)
		}
	}
	var unknown []string
	for k := range annotations {
		if ours(k) && !slices.ContainsFunc(Table, func(a Annotation) bool { return a.Key == k }) {
			unknown = append(unknown, k)
		}
	}
	slices.Sort(unknown)
	for _, k := range unknown {
		errs = append(errs, field.Forbidden(path.Key(k), "there is no such annotation, "+hint(k)))
	}
	if _, ok := annotations[Enclave]; !ok {
		errs = append(errs, field.Required(path.Key(Enclave), "other annotations under cloister.dev/ are there, so name the container that runs in the enclave, or remove them all"))
	}
	return values, errs
}

// hint says what the author of an unknown key may have meant.
func hint(key string) string {
	keys, suffixes := make([]string, len(Table)), make([]string, len(Table))
	for i, a := range Table {
		keys[i], suffixes[i] = a.Key, strings.TrimPrefix(a.Key, Prefix)
	}
	// The common prefix would make every key look alike.
	if n := config.Nearest(strings.ToLower(key[len(Prefix):]), suffixes); n != "" {
		return fmt.Sprintf("did you mean %q?", Prefix+n)
	}
	return "known are " + strings.Join(keys, ", ")
}
