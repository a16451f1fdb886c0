package main

import (
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

	"cloister.dev/cloister/eif"
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
		Use:   "measure -f FILE [-f FILE...] --eif FILE [--pin never|resolve]",
		Short: "Compute which measurements a confidential pod will show",
		Long: `Reads pods and workloads (Deployment, StatefulSet, DaemonSet, Job, CronJob, ...) as their author wrote
them and prints the measurement set that clients hand to "cloister curl --measurements". Nothing is
read from a cluster, and from registries only with --pin resolve. Each pod template with the annotation cloister.dev/enclave gives one entry.

On stderr it says what the host of the enclave can still read and change.`,
		Example: `  cloister measure -f deployment.yaml --eif base.eif >measurements.json
  kubectl kustomize . | cloister measure -f - --eif base.eif --label canary`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(m.files) == 0 {
				return errors.New("name the YAML files to measure with -f, or - for standard input")
			}
			if m.eif == "" {
				return errors.New("name the enclave image with --eif: a measurement set must pin the code (PCR0, PCR1, PCR2 of that file) as well as the workload (PCR16 of the YAML); the base image is /base.eif in the initboot image, and `make run` leaves it in ~/.cache/cloister/out")
			}
			if err := m.check(); err != nil {
				return err
			}
			return failed(m.run(cmd.Context(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()))
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&m.files, "filename", "f", nil, "YAML or JSON `file` with one or more documents; repeatable; - is standard input")
	f.StringVar(&m.eif, "eif", "", "enclave image `file` that gives PCR0, PCR1 and PCR2")
	f.StringVar(&m.label, "label", "", "`name` of the entries (default: the image's tag, else the start of PCR16)")
	m.add(f, pinNever)
	return cmd
}

func (m *measure) run(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer) error {
	code, err := measureEIF(m.eif)
	if err != nil {
		return err
	}
	var set workload.MeasurementSet
	refused := 0
	for _, file := range m.files {
		docs, err := readInput(file, stdin)
		if err != nil {
			return err
		}
		found, err := templates(docs)
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		for _, t := range found {
			what := fmt.Sprintf("%s: %s %s", file, t.Kind, t.Name)
			template, err := t.Decode()
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			if !annotation.Any(template.Annotations) {
				continue
			}
			if inject.HasManifest(&template.Spec) {
				return fmt.Errorf("%s: it is injected already: measure the file that its author wrote", what)
			}
			manifest, image, warnings, errs := inject.DeriveTagged(ctx, &template.ObjectMeta, &template.Spec, m.resolver())
			if len(errs) > 0 {
				for _, e := range errs {
					reason, _ := inject.ReasonOf(e)
					fmt.Fprintf(stderr, "%s: %s: %v\n", what, reason, e)
				}
				refused++
				continue
			}
			entry, err := m.entry(code, manifest, image)
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			fmt.Fprintf(stderr, "%s: measured as %s\n", what, entry.Label)
			for _, sentence := range warnings {
				fmt.Fprintf(stderr, "  %s\n", sentence)
			}
			if !slices.Contains(set, entry) {
				set = append(set, entry)
			}
		}
	}
	switch {
	case refused > 0:
		return errors.New("nothing was measured: the webhook would deny what is listed above")
	case len(set) == 0:
		return fmt.Errorf("no pod template has the annotation %s: add it, with the name of the container that runs in the enclave", annotation.Enclave)
	}
	return json.NewEncoder(stdout).Encode(set)
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

// entry is what an enclave with that code and that workload shows.
func (m *measure) entry(code *eif.Measurements, manifest *workload.Manifest, image string) (workload.Measurement, error) {
	canonical, err := manifest.Canonical()
	if err != nil {
		return workload.Measurement{}, err
	}
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
	return e, nil
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

func measureEIF(file string) (*eif.Measurements, error) {
	r, err := eif.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read enclave image: %w", err)
	}
	defer r.Close()
	code, err := r.Measure()
	if err != nil {
		return nil, fmt.Errorf("measure enclave image %s: %w", file, err)
	}
	return code, nil
}

func readInput(file string, stdin io.Reader) ([]byte, error) {
	if file == "-" {
		return io.ReadAll(stdin)
	}
	return os.ReadFile(file)
}
