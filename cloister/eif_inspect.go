package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
)

func newEIFInspect() *cobra.Command {
	var f format
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Check an enclave image file and print what is in it",
		Long: `Checks all of the file, the signature included if there is one, and prints its sections and its
measurements. The metadata is not measured: whoever passed the file on may have changed it.`,
		Example: `  cloister eif inspect app.eif
  cloister eif inspect app.eif -o json`,
		Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return failed(inspectEIF(cmd.OutOrStdout(), args[0], f))
		},
	}
	f.add(cmd.Flags(), measurementsUsage)
	return cmd
}

func inspectEIF(w io.Writer, file string, f format) error {
	r, err := eif.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	code, err := r.Measure()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if f == formatJSON {
		return printMeasurements(w, f, code)
	}
	cmdline, err := r.Cmdline()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	metadata, err := r.Metadata()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	fmt.Fprintf(w, "architecture  %s\n", r.Arch)
	for _, s := range r.Sections() {
		fmt.Fprintf(w, "%-12s  %d bytes\n", s.Type, s.Size)
	}
	fmt.Fprintf(w, "command line  %q\n", cmdline)
	if metadata != nil {
		fmt.Fprintf(w, "name          %q %q, built %q by %q %q\n", metadata.ImageName, metadata.ImageVersion,
			metadata.BuildMetadata.BuildTime, metadata.BuildMetadata.BuildTool, metadata.BuildMetadata.BuildToolVersion)
	}
	return printMeasurements(w, f, code)
}
