package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/eif"
	"cloister.dev/cloister/internal/ramdisk"
	"cloister.dev/cloister/webhook/annotation"
	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/workload"
)

// shortPCR is how many hexadecimal digits of PCR16 name an entry that has no other name.
const shortPCR = 12

type measure struct {
	files []string
	eif   string
	label string
	tags
}

func newMeasure() *cobra.Command {
	var m measure
	cmd := &cobra.Command{
		Use:   "measure [-f FILE...] --eif FILE [--pin never|resolve]",
		Short: "Compute which measurements a confidential pod will show",
		Long: `Reads pods and workloads (Deployment, StatefulSet, DaemonSet, Job, CronJob, ...) as their author wrote
them and prints the measurement set that clients hand to "cloister curl --measurements". Nothing is
read from a cluster, and from registries only with --pin resolve. Each pod template with the annotation cloister.dev/enclave gives one entry.
A sealed EIF holds the workload: -f is not needed, and is refused where it says something else.

On stderr it says what the host of the enclave can still read and change.`,
		Example: `  cloister measure -f deployment.yaml --eif base.eif >measurements.json
  kubectl kustomize . | cloister measure -f - --eif base.eif --label canary
  cloister measure --eif app.eif`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if m.eif == "" {
				return errors.New("name the enclave image with --eif: a measurement set must pin the code (PCR0, PCR1, PCR2 of that file) as well as the workload (PCR16 of the YAML); the base image is /base.eif in the initboot image, and `make run` leaves it in ~/.cache/cloister/out")
			}
			if err := m.check(); err != nil {
				return err
			}
			err := m.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			if errors.Is(err, errNoWorkload) {
				return err
			}
			return failed(err)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&m.files, "filename", "f", nil, "YAML or JSON `file` with one or more documents; repeatable; - is standard input")
	f.StringVar(&m.eif, "eif", "", "enclave image `file` that gives PCR0, PCR1 and PCR2")
	f.StringVar(&m.label, "label", "", "`name` of the entries (default: the image's tag, else the start of PCR16)")
	m.add(f, pinNever)
	return cmd
}

var errNoWorkload = errors.New("this enclave image holds no workload, as a base image: name the YAML files to measure with -f, or - for standard input")

func (m *measure) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer) error {
	code, sealed, err := measureEIF(m.eif)
	if err != nil {
		return err
	}
	if len(m.files) == 0 {
		if sealed == nil {
			return errNoWorkload
		}
		return m.sealed(code, sealed, stdout, stderr)
	}
	var set workload.MeasurementSet
	refused := 0
	for _, file := range m.files {
		pods, n, err := enclavePods(ctx, file, stdin, stderr, m.resolver())
		if err != nil {
			return err
		}
		refused += n
		for _, p := range pods {
			canonical, err := p.manifest.Canonical()
			if err != nil {
				return fmt.Errorf("%s: %w", p.what, err)
			}
			if sealed != nil && !bytes.Equal(sealed, canonical) {
				return fmt.Errorf("%s: it gives PCR16 %x, and %s is sealed with the workload of PCR16 %x: build it again with `cloister build -f`",
					p.what, workload.PCR16(canonical), m.eif, workload.PCR16(sealed))
			}
			entry := m.entry(code, canonical, p.image)
			m.say(stderr, p.what, entry, p.warnings)
			if !slices.Contains(set, entry) {
				set = append(set, entry)
			}
		}
	}
	switch {
	case refused > 0:
		return errors.New("nothing was measured: the webhook would deny what is listed above")
	case len(set) == 0:
		return errNoPod
	}
	return json.NewEncoder(stdout).Encode(set)
}

// sealed measures the workload in a sealed EIF.
func (m *measure) sealed(code *eif.Measurements, canonical []byte, stdout, stderr io.Writer) error {
	manifest, err := workload.Parse(canonical)
	if err != nil {
		return fmt.Errorf("%s: its workload manifest cannot be used: %w", m.eif, err)
	}
	entry := m.entry(code, canonical, "")
	m.say(stderr, m.eif, entry, inject.HostAccess(manifest))
	return json.NewEncoder(stdout).Encode(workload.MeasurementSet{entry})
}

// say tells people what was measured, and what the host can still read and change.
func (m *measure) say(stderr io.Writer, what string, entry workload.Measurement, warnings []string) {
	fmt.Fprintf(stderr, "%s: measured as %s\n", what, entry.Label)
	for _, sentence := range warnings {
		fmt.Fprintf(stderr, "  %s\n", sentence)
	}
}

var errNoPod = fmt.Errorf("no pod template has the annotation %s: add it, with the name of the container that runs in the enclave", annotation.Enclave)

// enclavePod is a pod template with a container that runs in an enclave.
type enclavePod struct {
	what     string // for people: where it was found
	template *corev1.PodTemplateSpec
	manifest *workload.Manifest
	image    string // as its author wrote it, with its digest
	warnings []string
}

// enclavePods derives the workload manifests of the pod templates in a file. What the webhook would deny is
// written to stderr and counted.
func enclavePods(ctx context.Context, file string, stdin io.Reader, stderr io.Writer, resolve inject.Resolver) (pods []enclavePod, refused int, err error) {
	docs, err := readInput(file, stdin)
	if err != nil {
		return nil, 0, err
	}
	found, err := templates(docs)
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", file, err)
	}
	for _, t := range found {
		p := enclavePod{what: fmt.Sprintf("%s: %s %s", file, t.Kind, t.Name)}
		if p.template, err = t.Decode(); err != nil {
			return nil, 0, fmt.Errorf("%s: %w", p.what, err)
		}
		if !annotation.Any(p.template.Annotations) {
			continue
		}
		if inject.HasManifest(&p.template.Spec) {
			return nil, 0, fmt.Errorf("%s: it is injected already: measure the file that its author wrote", p.what)
		}
		var errs field.ErrorList
		p.manifest, p.image, p.warnings, errs = inject.DeriveTagged(ctx, &p.template.ObjectMeta, &p.template.Spec, resolve)
		for _, e := range errs {
			reason, _ := inject.ReasonOf(e)
			fmt.Fprintf(stderr, "%s: %s: %v\n", p.what, reason, e)
		}
		if len(errs) > 0 {
			refused++
			continue
		}
		pods = append(pods, p)
	}
	return pods, refused, nil
}

// templates returns the pod templates of a stream of documents.
func templates(docs []byte) ([]inject.Template, error) {
	list, err := inject.FromYAML(docs)
	if err != nil {
		return nil, err
	}
	var out []inject.Template
	for _, d := range list {
		out = append(out, d.Templates...)
	}
	return out, nil
}

// entry is what an enclave with that code and that workload manifest shows.
func (m *measure) entry(code *eif.Measurements, canonical []byte, image string) workload.Measurement {
	e := workload.Measurement{
		Label: m.label,
		PCR0:  hex.EncodeToString(code.PCR0),
		PCR1:  hex.EncodeToString(code.PCR1),
		PCR2:  hex.EncodeToString(code.PCR2),
		PCR16: hex.EncodeToString(workload.PCR16(canonical)),
	}
	if e.Label == "" {
		e.Label = tag(image)
	}
	if e.Label == "" {
		e.Label = e.PCR16[:shortPCR]
	}
	return e
}

// tag returns the tag of a reference REPOSITORY:TAG@DIGEST, or an empty string if it has none.
func tag(image string) string {
	rest, _, _ := strings.Cut(image, "@")
	t, err := name.NewTag(rest, name.StrictValidation)
	if err != nil {
		return ""
	}
	return t.TagStr()
}

// measureEIF measures an EIF; the workload manifest in it is nil if it is not sealed.
func measureEIF(file string) (code *eif.Measurements, sealed []byte, err error) {
	r, err := eif.Open(file)
	if err != nil {
		return nil, nil, fmt.Errorf("read enclave image: %w", err)
	}
	defer r.Close()
	if code, err = r.Measure(); err != nil {
		return nil, nil, fmt.Errorf("measure enclave image %s: %w", file, err)
	}
	sealed, err = ramdisk.Manifest(r)
	if n := len(r.Ramdisks()); errors.Is(err, ramdisk.ErrNotSealed) && n > 1 {
		// The others may take the place of what is in the first.
		err = fmt.Errorf("it has %d ramdisks and is not sealed, but a base EIF has one: take the base EIF, or build it with `cloister build`", n)
	}
	if err != nil && !errors.Is(err, ramdisk.ErrNotSealed) {
		return nil, nil, fmt.Errorf("read enclave image %s: %w", file, err)
	}
	return code, sealed, nil
}

func readInput(file string, stdin io.Reader) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(file)
}
