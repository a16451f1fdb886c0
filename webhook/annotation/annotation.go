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
	// Sentence says for people what it does.
	Sentence string
	// Validate reports what is wrong with a value.
	Validate func(value string, path *field.Path) field.ErrorList
}

// Table lists all annotations that a pod may carry.
var Table = []Annotation{
	{
		Key: Enclave, Type: "container name", Validate: validateName,
		Sentence: "The container of this name runs in an enclave.",
	},
	{
		Key: Config, Type: "EnclaveConfig (YAML)", Validate: validateConfig,
		Sentence: "Settings of the enclave: memory, cpus, ports, egress, plugins.",
	},
	{
		Key: Measurements, Type: "measurement (JSON)", Validate: func(string, *field.Path) field.ErrorList { return nil },
		Sentence: "Written by the webhook for people to read; no client trusts it.",
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

// Check reports every unknown key under our prefix, every value that is not valid, and that Enclave is
// missing although another key under our prefix is there: a typo must not run in the open.
func Check(annotations map[string]string, path *field.Path) field.ErrorList {
	var errs field.ErrorList
	keys := make([]string, 0, len(Table))
	for _, a := range Table {
		keys = append(keys, a.Key)
		if v, ok := annotations[a.Key]; ok {
			errs = append(errs, a.Validate(v, path.Key(a.Key))...)
		}
	}
	var unknown []string
	for k := range annotations {
		if ours(k) && !slices.Contains(keys, k) {
			unknown = append(unknown, k)
		}
	}
	slices.Sort(unknown)
	for _, k := range unknown {
		hint := "known are " + strings.Join(keys, ", ")
		// The common prefix would make every key look alike.
		if n := config.Nearest(strings.ToLower(k[len(Prefix):]), suffixes(keys)); n != "" {
			hint = fmt.Sprintf("did you mean %q?", Prefix+n)
		}
		errs = append(errs, field.Forbidden(path.Key(k), "there is no such annotation, "+hint))
	}
	if _, ok := annotations[Enclave]; !ok {
		errs = append(errs, field.Required(path.Key(Enclave), "other annotations under cloister.dev/ are there, so name the container that runs in the enclave, or remove them all"))
	}
	return errs
}

func suffixes(keys []string) []string {
	out := make([]string, len(keys))
	for i, k := range keys {
		out[i] = strings.TrimPrefix(k, Prefix)
	}
	return out
}

func validateName(value string, path *field.Path) field.ErrorList {
	if len(validation.IsDNS1123Label(value)) > 0 {
		return field.ErrorList{field.Invalid(path, value, "write the name of one container of the pod")}
	}
	return nil
}

func validateConfig(value string, path *field.Path) field.ErrorList {
	_, errs := config.Parse(value, path)
	return errs
}
