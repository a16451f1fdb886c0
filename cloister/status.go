package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/duration"

	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
)

// forPeople is said of every measurement that comes from a cluster.
const forPeople = "PCR16 is what the cluster says, for people to read. What a client trusts is computed without it: cloister measure -f FILE --eif FILE"

type status struct {
	namespace string
	all       bool
	output    string
}

// podStatus is one confidential pod as the cluster describes it.
type podStatus struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	Phase     string `json:"phase"` // of the pod, or Terminating
	Ready     bool   `json:"ready"`
	Restarts  int32  `json:"restarts"` // of all containers
	// ClaimedPCR16 is what the webhook has computed; nobody has attested it.
	ClaimedPCR16 string `json:"claimedPCR16,omitempty"`
	// Booted says that initboot has booted an enclave and compared its PCRs.
	Booted bool `json:"booted"`
	// Console says that the console, which holds the run of the workload, runs.
	Console bool `json:"console"`
	// Enclave is the same in a word or two, and a reason where it waits or has ended.
	Enclave string `json:"enclave"`
	// Message is the last termination message of the console or of Cloister's containers.
	Message string    `json:"message,omitempty"`
	Created time.Time `json:"created"`
}

func newStatus() *cobra.Command {
	var s status
	cmd := &cobra.Command{
		Use:   "status [-n NAMESPACE | -A] [-o json]",
		Short: "List the confidential pods of a cluster",
		Long: `Lists the pods with the annotation cloister.dev/enclave in the cluster of the current kubeconfig, and
how far their enclaves are:

  booting   no enclave yet, or it has not shown its PCRs
  booted    the enclave waits for the workload
  running   the console, and with it the workload, runs
  waiting, ended   with the reason or the exit code
  NOT INJECTED     the pod runs in the open: its namespace lacks the label cloister.dev/injection=enabled

All of this is the cluster's word. It proves nothing; "cloister curl" does.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if s.all && s.namespace != "" {
				return errors.New("-A means every namespace and -n means one: leave one out")
			}
			if s.output != "" && s.output != "json" {
				return fmt.Errorf("there is no output format %q, only json", s.output)
			}
			return failed(s.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr()))
		},
	}
	f := cmd.Flags()
	f.StringVarP(&s.namespace, "namespace", "n", "", "`namespace` (default that of the kubeconfig's context)")
	f.BoolVarP(&s.all, "all-namespaces", "A", false, "every namespace")
	f.StringVarP(&s.output, "output", "o", "", "output `format`: json")
	return cmd
}

func (s *status) run(ctx context.Context, stdout, stderr io.Writer) error {
	k, kubeconfig, err := findCluster("", "")
	if err != nil {
		return err
	}
	namespace := s.namespace
	if namespace == "" && !s.all {
		if namespace, _, err = kubeconfig.Namespace(); err != nil {
			return fmt.Errorf("find the namespace: %w", err)
		}
	}
	path := "/api/v1/pods"
	if namespace != "" {
		path = "/api/v1/namespaces/" + namespace + "/pods"
	}
	pods, err := list[corev1.Pod](ctx, k, path)
	if err != nil {
		return fmt.Errorf("list pods: %w", err)
	}
	found := []podStatus{}
	for i := range pods {
		if pods[i].Annotations[annotation.Enclave] != "" {
			found = append(found, describePod(&pods[i]))
		}
	}
	slices.SortFunc(found, func(a, b podStatus) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Pod, b.Pod))
	})
	if s.output == "json" {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(map[string][]podStatus{"pods": found})
	}
	if len(found) == 0 {
		where := "in namespace " + namespace
		if s.all {
			where = "in any namespace"
		}
		fmt.Fprintf(stderr, "There is no confidential pod %s: a pod is one when it has the annotation %s.\n", where, annotation.Enclave)
		return nil
	}
	if err := printPods(stdout, found, time.Now()); err != nil {
		return err
	}
	fmt.Fprintln(stderr, forPeople)
	return nil
}

func describePod(pod *corev1.Pod) podStatus {
	s := podStatus{
		Namespace: pod.Namespace, Pod: pod.Name, Phase: string(pod.Status.Phase), Created: pod.CreationTimestamp.UTC(),
	}
	s.Ready = ready(pod)
	if pod.DeletionTimestamp != nil {
		s.Phase = "Terminating" // as kubectl says it
	}
	var measured struct{ PCR16 string }
	if json.Unmarshal([]byte(pod.Annotations[annotation.Measurements]), &measured) == nil {
		s.ClaimedPCR16 = printable(measured.PCR16)
	}
	isInitboot := func(c corev1.Container) bool { return c.Name == inject.Initboot }
	if !slices.ContainsFunc(pod.Spec.InitContainers, isInitboot) {
		s.Enclave = "NOT INJECTED"
		return s
	}

	// The console last: of two messages its own is the one about the workload.
	var initboot, console corev1.ContainerStatus
	var ended time.Time
	for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		s.Restarts += c.RestartCount
		switch c.Name {
		case inject.Initboot:
			initboot = c
		case pod.Annotations[annotation.Enclave]:
			console = c
		case inject.Sidecar:
		default:
			continue
		}
		for _, state := range []corev1.ContainerState{c.LastTerminationState, c.State} {
			if t := state.Terminated; t != nil && t.Message != "" && !t.FinishedAt.Time.Before(ended) {
				s.Message, ended = printable(t.Message), t.FinishedAt.Time
			}
		}
	}
	s.Console = console.State.Running != nil
	s.Booted = initboot.State.Running != nil && initboot.Started != nil && *initboot.Started
	switch {
	case console.State.Terminated != nil:
		s.Enclave = fmt.Sprintf("ended (exit %d)", console.State.Terminated.ExitCode)
	case initboot.State.Terminated != nil:
		s.Enclave = fmt.Sprintf("ended (initboot: exit %d)", initboot.State.Terminated.ExitCode)
	case initboot.State.Running == nil:
		s.Enclave = waiting(initboot)
	case !s.Booted:
		s.Enclave = "booting"
	case s.Console:
		s.Enclave = "running"
	case waitsForOthers(console):
		s.Enclave = "booted"
	default:
		s.Enclave = waiting(console)
	}
	return s
}

// waitsForOthers tells whether a container has not had its turn yet.
func waitsForOthers(c corev1.ContainerStatus) bool {
	w := c.State.Waiting
	return w == nil || slices.Contains([]string{"", "PodInitializing", "ContainerCreating"}, w.Reason)
}

// waiting is why a container waits. Without a status the pod has no node yet.
func waiting(c corev1.ContainerStatus) string {
	if w := c.State.Waiting; w != nil && w.Reason != "" {
		return fmt.Sprintf("waiting (%s)", printable(w.Reason))
	}
	return "waiting"
}

// printable makes text from the cluster one line that does nothing to a terminal.
func printable(s string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s))
}

func printPods(w io.Writer, list []podStatus, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAMESPACE\tPOD\tPHASE\tREADY\tRESTARTS\tPCR16\tENCLAVE\tAGE\tLAST MESSAGE")
	for _, s := range list {
		ready := "no"
		if s.Ready {
			ready = "yes"
		}
		pcr16 := s.ClaimedPCR16
		if len(pcr16) > shortPCR {
			pcr16 = pcr16[:shortPCR]
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\n", s.Namespace, s.Pod, s.Phase, ready, s.Restarts,
			cmp.Or(pcr16, "-"), s.Enclave, duration.HumanDuration(now.Sub(s.Created)), cmp.Or(s.Message, "-"))
	}
	return t.Flush()
}
