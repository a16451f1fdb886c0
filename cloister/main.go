// Cloister is the command for people who use confidential pods: it computes what an enclave must show,
// and talks to enclaves that show it.
//
// It exits 0 on success, 1 when something was refused or failed, 2 when it was called wrongly, and 22
// for `cloister curl --fail` and an HTTP error.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(execute(ctx, newRoot()))
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:               "cloister",
		Short:             "Measure confidential pods and talk to them",
		SilenceErrors:     true,
		SilenceUsage:      true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.AddCommand(newMeasure(), newSign(), newVerify(), newBuild(), newInject(), newPin(), newCurl(), newProxy(), newStatus(), newDoctor(), newEIF(), newAttestation())
	return root
}

// exactly demands one argument for each name.
func exactly(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) != len(names) {
			return fmt.Errorf("name %s and nothing else: %d given", strings.Join(names, " and "), len(args))
		}
		return nil
	}
}

// failure is an error of a command that was called rightly, and its exit code.
type failure struct {
	code int
	error
}

func (f failure) Unwrap() error { return f.error }

// failed makes err an ordinary failure; nil stays nil.
func failed(err error) error {
	if err == nil {
		return nil
	}
	return failure{1, err}
}

// execute runs the command, prints its error, if any, and returns the exit code.
func execute(ctx context.Context, root *cobra.Command) int {
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "cloister: %v\n", err)
	var f failure
	if errors.As(err, &f) {
		return f.code
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "See %s --help.\n", cmd.CommandPath())
	return 2
}
