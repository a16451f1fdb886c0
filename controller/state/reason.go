package state

import (
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"

	"cloister.dev/cloister/controller/scrape"
	"cloister.dev/cloister/internal/podmetrics"
	"cloister.dev/cloister/internal/podsock"
	"cloister.dev/cloister/webhook/annotation"
)

// Reason is the state of a pod's enclave in one word.
type Reason string

// Reasons of conditions and Events.
const (
	Booting         Reason = "EnclaveBooting"
	BootFails       Reason = "EnclaveBootFails"
	Booted          Reason = "EnclaveBooted"
	Starting        Reason = "WorkloadStarting"
	WaitingForImage Reason = "WaitingForImage"
	Running         Reason = "WorkloadRunning"
	Draining        Reason = "WorkloadDraining"
	Ended           Reason = "WorkloadEnded"
	NoAnswer        Reason = "SidecarDoesNotAnswer"
	// Lost is reported as an Event only: the state that follows it is Ended.
	Lost Reason = "EnclaveLost"
)

// meaning is one row of the table below.
type meaning struct {
	ready, attested corev1.ConditionStatus
	event           bool // reported as a Warning on the owner, too
	sentence        string
}

const (
	yes     = corev1.ConditionTrue
	no      = corev1.ConditionFalse
	unknown = corev1.ConditionUnknown
)

// table says what each reason means: for the conditions EnclaveReady and Attested, the Event and the
// people who read them.
var table = map[Reason]meaning{
	Booting:         {no, no, false, "The enclave is booting."},
	BootFails:       {no, no, true, "The enclave does not boot and is started again and again: the pod's own Events say at which step."},
	Booted:          {no, yes, false, "The enclave has booted and waits for the pod's init containers and the workload's turn."},
	Starting:        {no, yes, false, "The image is being fetched and unpacked inside the enclave."},
	WaitingForImage: {no, yes, true, "The image cannot be fetched and is tried again and again: the pod's own Events say why."},
	Running:         {yes, yes, false, "The workload runs in the enclave."},
	Draining:        {no, yes, false, "The workload is being stopped: clients are asked to leave."},
	Ended:           {no, no, false, "The workload has ended, and its enclave with it."},
	NoAnswer:        {unknown, unknown, false, "The sidecar has not answered the controller for 15 s."},
	Lost:            {no, no, true, "The enclave was lost while the workload ran."},
}

// reason derives the state of a pod:
//
//	sidecar       answer             step failed  reason
//	not running   -                  -            Booting, or Ended when the pod has ended
//	running       none, or too old   -            NoAnswer
//	running       booting, or none   no           Booting
//	              of initboot
//	running       booting            yes          BootFails
//	running       booted             -            Booted
//	running       starting           no           Starting
//	running       starting           yes          WaitingForImage: until the workload has been started
//	                                              nothing else is tried again
//	running       running            -            Running
//	running       draining           -            Draining
//	running       ended              -            Ended
func reason(o scrape.Observation) Reason {
	if p := o.Pod.Status.Phase; p == corev1.PodSucceeded || p == corev1.PodFailed {
		return Ended
	}
	if !scrape.Serving(o.Pod) {
		return Booting
	}
	if o.Snapshot == nil {
		return NoAnswer
	}
	switch s := o.Snapshot; s.Phase {
	case podsock.EnclaveState_PHASE_BOOTED:
		return Booted
	case podsock.EnclaveState_PHASE_STARTING:
		return ifFailed(s, WaitingForImage, Starting)
	case podsock.EnclaveState_PHASE_RUNNING:
		return Running
	case podsock.EnclaveState_PHASE_DRAINING:
		return Draining
	case podsock.EnclaveState_PHASE_ENDED:
		return Ended
	default:
		return ifFailed(s, BootFails, Booting)
	}
}

func ifFailed(s *podmetrics.Snapshot, yes, no Reason) Reason {
	if s.StepFailed {
		return yes
	}
	return no
}

// exitLost is the console's exit code when it has none of the workload.
const exitLost = 125

// recently is the age up to which a lost enclave is reported, so that a controller that starts does not
// tell old stories.
const recently = 10 * time.Minute

// lost returns the ends of the console that a lost enclave has caused, by container id. The sentence is
// the console's termination message: the exit code alone may be the workload's.
func lost(pod *corev1.Pod, now time.Time) map[string]string {
	out := map[string]string{}
	c := console(pod)
	for _, s := range []corev1.ContainerState{c.State, c.LastTerminationState} {
		t := s.Terminated
		if t == nil || t.ExitCode != exitLost || now.Sub(t.FinishedAt.Time) > recently {
			continue
		}
		if strings.HasPrefix(t.Message, "the enclave was lost") || strings.HasPrefix(t.Message, "initboot was lost") {
			out[t.ContainerID] = strings.TrimSpace(t.Message)
		}
	}
	return out
}

// console is the status of the container that stands for the workload; empty before it has one.
func console(pod *corev1.Pod) corev1.ContainerStatus {
	for _, c := range pod.Status.ContainerStatuses {
		if c.Name == pod.Annotations[annotation.Enclave] {
			return c
		}
	}
	return corev1.ContainerStatus{}
}
