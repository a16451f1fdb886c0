// Initboot boots the enclave of a pod and holds its life; the same binary is the console, which stands
// for the container that runs in the enclave.
//
//	initboot serve [--driver=process|qemu|nitro] [--plain-http-registries=HOST:PORT,...]
//	                                             boot the enclave and serve the pod socket
//	initboot console --grace-period=30s          run the workload, with its output and exit code
//	initboot install seccomp [--folder=/var/lib/kubelet/seccomp/profiles]
//	                                             write the seccomp profile for AF_VSOCK to the node, and stay
//	initboot probe boot                          succeed when the enclave has booted
//	initboot probe startup [--initial-delay=0s] [--timeout=1s]
//	                                             succeed when the workload has started
package main

import (
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
)

// commands by name. Each gets its arguments and returns the exit code.
var commands = map[string]func(args []string) int{
	"serve":           serve,
	"console":         runConsole,
	"install seccomp": installSeccomp,
	"probe boot":      probeBoot,
	"probe startup":   probeStartup,
}

func main() {
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("component", "initboot"))
	args := os.Args[1:]
	for words := 1; words <= min(2, len(args)); words++ {
		name := args[0]
		if words == 2 {
			name += " " + args[1]
		}
		if run, ok := commands[name]; ok {
			os.Exit(run(args[words:]))
		}
	}
	fmt.Fprintln(os.Stderr, "usage: initboot serve|console|install seccomp|probe boot|probe startup [flags]")
	os.Exit(2)
}

// flags returns a flag set that writes errors and usage to stderr.
func flags(name string) *flag.FlagSet { return flag.NewFlagSet("initboot "+name, flag.ContinueOnError) }

// parse parses args and refuses what is left over.
func parse(f *flag.FlagSet, args []string, stderr io.Writer) bool {
	f.SetOutput(stderr)
	if err := f.Parse(args); err != nil {
		return false
	}
	if f.NArg() > 0 {
		fmt.Fprintf(stderr, "%s: unexpected argument %q\n", f.Name(), f.Arg(0))
		return false
	}
	return true
}
