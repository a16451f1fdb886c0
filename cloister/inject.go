package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	jsonpatch "github.com/evanphx/json-patch/v5"
	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"cloister.dev/cloister/webhook/inject"
)

// Formats of the output of inject.
const (
	outputYAML  = "yaml"
	outputPatch = "patch"
)

type injection struct {
	file    string
	output  string
	options inject.Options
	cpus    string // ENCLAVE_CPUS and DEVICE_GROUP of the installation
	group   string
	tags
}

func newInject() *cobra.Command {
	var i injection
	cmd := &cobra.Command{
		Use:   "inject -f FILE|- [-o yaml|patch] [--pin resolve|never]",
		Short: "Do offline what the webhook does to a pod",
		Long: `Reads pods and workloads (Deployment, StatefulSet, DaemonSet, Job, CronJob, ..., and Lists of them) and
turns each pod template with the annotation cloister.dev/enclave into that of a confidential pod: byte for
byte what the webhook of an installation with these images makes of it. The webhook has nothing more to
do to pods that are made from the result.

  -o yaml    every document: an injected one without its comments and with sorted fields, others as they are
  -o patch   a JSON patch (RFC 6902) a line for each document, empty where there is nothing to do

Warnings are on stderr. If one pod is denied, so are all, with every reason on stderr.`,
		Example: `  cloister inject -f deployment.yaml --initboot-image registry.example/initboot@sha256:… \
    --sidecar-image registry.example/sidecar@sha256:… | kubectl apply -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := i.check(); err != nil {
				return err
			}
			i.options.PlainHTTP = i.plain
			return failed(i.run(cmd.Context(), i.resolver(), cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()))
		},
	}
	f := cmd.Flags()
	f.StringVarP(&i.file, "filename", "f", "", "YAML or JSON `file` with one or more documents; - is standard input")
	f.StringVarP(&i.output, "output", "o", outputYAML, "`format`: yaml or patch")
	f.StringVar(&i.options.Driver, "driver", cmp.Or(os.Getenv("DRIVER"), inject.DriverProcess), "the installation's `DRIVER`")
	f.StringVar(&i.options.HugePages, "hugepages", cmp.Or(os.Getenv("HUGEPAGES"), "2Mi"), "the installation's `HUGEPAGES`, with driver nitro")
	f.StringVar(&i.cpus, "enclave-cpus", os.Getenv("ENCLAVE_CPUS"), "the installation's `ENCLAVE_CPUS`, with driver nitro")
	f.StringVar(&i.group, "device-group", os.Getenv("DEVICE_GROUP"), "the installation's `DEVICE_GROUP`, with driver nitro")
	f.StringVar(&i.options.InitbootImage, "initboot-image", os.Getenv("INITBOOT_IMAGE"), "the installation's `INITBOOT_IMAGE`")
	f.StringVar(&i.options.SidecarImage, "sidecar-image", os.Getenv("SIDECAR_IMAGE"), "the installation's `SIDECAR_IMAGE`")
	i.add(f, pinResolve)
	return cmd
}

func (i *injection) check() error {
	const where = "it is in the ConfigMap cloister-install of the namespace cloister-system; the flag's default comes from the environment"
	switch {
	case i.file == "":
		return errors.New("name the YAML file with -f, or - for standard input")
	case i.output != outputYAML && i.output != outputPatch:
		return fmt.Errorf("there is no output %q: write yaml or patch", i.output)
	case i.options.InitbootImage == "":
		return errors.New("name the image of initboot with --initboot-image: " + where)
	case i.options.SidecarImage == "":
		return errors.New("name the image of the sidecar with --sidecar-image: " + where)
	}
	if err := i.options.Read(i.cpus, i.group); err != nil {
		return err
	}
	return i.tags.check()
}

func (i *injection) run(ctx context.Context, resolve inject.Resolver, stdin io.Reader, stdout, stderr io.Writer) error {
	text, err := readInput(i.file, stdin)
	if err != nil {
		return err
	}
	docs, err := inject.FromYAML(text)
	if err != nil {
		return fmt.Errorf("%s: %w", i.file, err)
	}
	var out bytes.Buffer
	denied := false
	for n, d := range docs {
		ops := []inject.Op{}
		for _, t := range d.Templates {
			what := fmt.Sprintf("%s: %s %s", i.file, t.Kind, t.Name)
			more, warnings, errs := inject.PatchTagged(ctx, t.Pod, i.options, resolve)
			for _, e := range errs {
				denied = true
				reason, _ := inject.ReasonOf(e)
				fmt.Fprintf(stderr, "%s: %s: %v\n", what, reason, e)
			}
			for _, w := range warnings {
				fmt.Fprintf(stderr, "%s: Warning: %s\n", what, w)
			}
			for _, op := range more {
				op.Path = t.At + op.Path
				ops = append(ops, op)
			}
		}
		if denied {
			continue
		}
		if err := i.write(&out, n, d, ops); err != nil {
			return fmt.Errorf("%s: write document %d: %w", i.file, n+1, err)
		}
	}
	if denied {
		return errors.New("nothing was injected: the webhook would deny what is listed above")
	}
	_, err = out.WriteTo(stdout)
	return err
}

// write writes the n-th document, from 0, with its patch applied, or the patch itself.
func (i *injection) write(out *bytes.Buffer, n int, d inject.Document, ops []inject.Op) error {
	patch, err := json.Marshal(ops)
	if err != nil {
		return err
	}
	if i.output == outputPatch {
		if !bytes.Equal(d.JSON, []byte("null")) {
			fmt.Fprintf(out, "%s\n", patch)
		}
		return nil
	}
	text := d.Text
	if len(ops) > 0 {
		decoded, err := jsonpatch.DecodePatch(patch)
		if err != nil {
			return err
		}
		patched, err := decoded.Apply(d.JSON)
		if err != nil {
			return err
		}
		if text, err = yaml.JSONToYAML(patched); err != nil {
			return err
		}
	}
	if n > 0 && !bytes.HasPrefix(text, []byte("---")) { // which a document that follows two separators has
		out.WriteString("---\n")
	}
	out.Write(text)
	if len(text) > 0 && text[len(text)-1] != '\n' {
		out.WriteByte('\n')
	}
	return nil
}
