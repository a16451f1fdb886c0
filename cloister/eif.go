package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cloister.dev/cloister/eif"
)

func newEIF() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "eif COMMAND",
		Short: "Read and write enclave image files",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("name what to do with the enclave image file")
		},
	}
	cmd.AddCommand(newEIFBuild(), newEIFInspect(), newEIFExtract(), newEIFSign(), newEIFVerify(), newEIFPush(), newEIFPull())
	return cmd
}

// measurementsFormat is the flag of commands that print what an EIF measures.
type measurementsFormat struct{ format string }

// formatJSON is the format that nitro-cli prints.
const formatJSON = "json"

func (m *measurementsFormat) add(f *pflag.FlagSet) {
	f.StringVarP(&m.format, "format", "o", "text", "`format`: text, or json as nitro-cli prints it")
}

func (m *measurementsFormat) check() error {
	if m.format != "text" && m.format != formatJSON {
		return fmt.Errorf("there is no format %q: write text or json", m.format)
	}
	return nil
}

// print writes the registers, one a line, or as nitro-cli does.
func (m *measurementsFormat) print(w io.Writer, code *eif.Measurements) error {
	if m.format == formatJSON {
		return json.NewEncoder(w).Encode(struct{ Measurements *eif.Measurements }{code})
	}
	for _, r := range []struct {
		name  string
		value []byte
	}{{"PCR0", code.PCR0}, {"PCR1", code.PCR1}, {"PCR2", code.PCR2}, {"PCR8", code.PCR8}} {
		if r.value == nil {
			continue
		}
		if _, err := fmt.Fprintf(w, "%s  %x\n", r.name, r.value); err != nil {
			return err
		}
	}
	return nil
}
