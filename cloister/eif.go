package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

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

// measurementsUsage is of the flag -o of commands that print what an EIF measures.
const measurementsUsage = "text, or json as nitro-cli prints it"

// printMeasurements writes the registers, one a line, or as nitro-cli does.
func printMeasurements(w io.Writer, f format, code *eif.Measurements) error {
	if f == formatJSON {
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
