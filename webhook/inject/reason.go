package inject

import (
	"regexp"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Reason is why a pod is denied, in one word: the label of the metric, the reason of the Event and what the command
// line puts before the sentence. A denial has a sentence of its own for each thing that is wrong; the reason says
// what part of the pod to look at.
type Reason string

// Reasons of denials.
const (
	Unreadable         Reason = "Unreadable"
	ConfigRefused      Reason = "ConfigRefused"
	MeasurementsForged Reason = "MeasurementsForged"
	AnnotationRefused  Reason = "AnnotationRefused"
	ImageRefused       Reason = "ImageRefused"
	EnvironmentRefused Reason = "EnvironmentRefused"
	VolumeRefused      Reason = "VolumeRefused"
	PortRefused        Reason = "PortRefused"
	ProbeOrHookRefused Reason = "ProbeOrHookRefused"
	SecurityRefused    Reason = "SecurityRefused"
	ResourcesRefused   Reason = "ResourcesRefused"
	ContainerRefused   Reason = "ContainerRefused"
	LevelRefused       Reason = "LevelRefused"
	PodRefused         Reason = "PodRefused"
)

// reasons is the table of all reasons: the first whose fields match is the one of an error.
var reasons = []struct {
	reason   Reason
	fields   *regexp.Regexp
	sentence string // for Events and people
}{
	{Unreadable, regexp.MustCompile(`^pod$`), "The pod cannot be decoded."},
	{ConfigRefused, regexp.MustCompile(`^metadata\.annotations\[cloister\.dev/config\]`), "The annotation cloister.dev/config asks for what cannot be."},
	{MeasurementsForged, regexp.MustCompile(`^metadata\.annotations\[cloister\.dev/measurements\]`), "The annotation cloister.dev/measurements is not what the pod measures to."},
	{AnnotationRefused, regexp.MustCompile(`^metadata\.annotations`), "The annotations under cloister.dev do not fit the pod."},
	{ImageRefused, regexp.MustCompile(`\.image$|\.imagePullPolicy$|^spec\.imagePullSecrets`), "An image cannot be used for an enclave."},
	{EnvironmentRefused, regexp.MustCompile(`\.env(From)?(\[|$)`), "The environment holds what an enclave cannot be given."},
	{VolumeRefused, regexp.MustCompile(`\.volume(s|Mounts|Devices)(\[|$)`), "A volume cannot be mounted into an enclave."},
	{PortRefused, regexp.MustCompile(`\.ports(\[|$)`), "A port cannot be served from an enclave."},
	{ProbeOrHookRefused, regexp.MustCompile(`Probe(\.|$)|\.lifecycle(\.|$)`), "A probe or lifecycle hook cannot be run in an enclave."},
	{SecurityRefused, regexp.MustCompile(`\.securityContext(\.|$)`), "The security context asks for what an enclave cannot have."},
	{ResourcesRefused, regexp.MustCompile(`\.resources(\.|$)`), "The resources cannot be those of an enclave."},
	{ContainerRefused, regexp.MustCompile(`^spec\.(initContainers|containers)`), "A container cannot be as it is in a pod with an enclave."},
	{LevelRefused, regexp.MustCompile(`^metadata\.namespace$`), "The namespace enforces a stricter Pod Security level than what is injected passes."},
	{PodRefused, regexp.MustCompile(`^`), "The pod asks for what a pod with an enclave cannot have."},
}

// ReasonOf returns the reason of one of the errors of a denial, and the reason's sentence.
func ReasonOf(err *field.Error) (Reason, string) {
	i := 0
	for !reasons[i].fields.MatchString(err.Field) {
		i++ // the last row matches all
	}
	return reasons[i].reason, reasons[i].sentence
}
