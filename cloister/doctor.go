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

	"github.com/spf13/cobra"
)

type doctor struct {
	kubeconfig string
	context    string
	output     string
}

// level says how much a finding matters.
type level string

const (
	levelOK      level = "ok"
	levelWarning level = "warning" // something may go wrong, or could not be seen
	levelError   level = "error"   // pods are refused, run in the open, or soon will
)

// finding is what a check has to say.
type finding struct {
	Level level `json:"level"`
	// Sentence says what was found.
	Sentence string `json:"sentence"`
	// Fix says what to do; empty if Level is levelOK.
	Fix string `json:"fix,omitempty"`
}

// line is one line of the report.
type line struct {
	Check string `json:"check"`
	finding
}

func newDoctor() *cobra.Command {
	var d doctor
	cmd := &cobra.Command{
		Use:   "doctor [--kubeconfig FILE] [--context NAME] [-o json]",
		Short: "Check the installation in a cluster and what may keep pods from their enclaves",
		Long: `Reads the cluster of the current kubeconfig, changes nothing, and prints a line for each thing that it
has looked at: ok, warning or error, what was found, and what to do. It exits 1 if there is an error.

What the kubeconfig's user may not read is not checked, and the line says so. docs/doctor.md lists the
checks and the permissions.

All of this is the cluster's word. It proves nothing; "cloister curl" does.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if d.output != "" && d.output != "json" {
				return fmt.Errorf("there is no output format %q, only json", d.output)
			}
			return failed(d.run(cmd.Context(), cmd.OutOrStdout()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&d.kubeconfig, "kubeconfig", "", "kubeconfig `file` (default what KUBECONFIG names, else ~/.kube/config)")
	f.StringVar(&d.context, "context", "", "`name` of a context of the kubeconfig (default its current one)")
	f.StringVarP(&d.output, "output", "o", "", "output `format`: json")
	return cmd
}

func (d *doctor) run(ctx context.Context, stdout io.Writer) error {
	k, _, err := findCluster(d.kubeconfig, d.context)
	if err != nil {
		return err
	}
	s, err := look(ctx, k)
	if err != nil {
		return err
	}
	report := diagnose(s)
	if d.output == "json" {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		err = enc.Encode(map[string][]line{"findings": report})
	} else {
		err = printFindings(stdout, report)
	}
	if err != nil {
		return err
	}
	count := func(l level) (n int) {
		for _, found := range report {
			if found.Level == l {
				n++
			}
		}
		return n
	}
	if n := count(levelError); n > 0 {
		return fmt.Errorf("%s and %s were found", plural(n, "error"), plural(count(levelWarning), "warning"))
	}
	return nil
}

func printFindings(w io.Writer, report []line) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, l := range report {
		text := l.Sentence
		if l.Fix != "" {
			text += "; fix: " + l.Fix
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", l.Level, l.Check, text)
	}
	return t.Flush()
}

// check is one thing that is looked at.
type check struct {
	name string
	// needs lists what of the cluster the check cannot do without.
	needs []string
	// run reports at least one finding.
	run func(*snapshot) []finding
}

// diagnose makes all checks. Its order is that of the table.
func diagnose(s *snapshot) []line {
	var all []line
	for _, c := range checks {
		found := notMade(s, c)
		if found == nil {
			found = c.run(s)
		}
		for _, f := range found {
			all = append(all, line{c.name, finding{f.Level, printable(f.Sentence), printable(f.Fix)}})
		}
	}
	return all
}

// notMade says why a check cannot be made; nil if it can.
func notMade(s *snapshot, c check) []finding {
	var errs []error
	var missing []string
	for _, what := range c.needs {
		if err := s.unread[what]; err != nil {
			missing = append(missing, what)
			errs = append(errs, err)
		}
	}
	if errs == nil {
		return nil
	}
	return []finding{{
		Level:    levelWarning,
		Sentence: "not checked: " + strings.ReplaceAll(errors.Join(errs...).Error(), "\n", ", "),
		Fix:      "run it as somebody who may read " + strings.Join(missing, ", ") + ": docs/doctor.md lists the permissions",
	}}
}

// good is the only finding of a check that found nothing wrong.
func good(found []finding, format string, args ...any) []finding {
	if len(found) > 0 {
		return found
	}
	return []finding{{Level: levelOK, Sentence: fmt.Sprintf(format, args...)}}
}

// some lists names in order, the first few of many.
func some(names []string) string {
	const most = 4
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	if n := len(names); n > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most-1], ", "), n-most+1)
	}
	return strings.Join(names, ", ")
}

func plural(n int, what string) string {
	if n == 1 {
		return fmt.Sprint("1 ", what)
	}
	return fmt.Sprint(n, " ", what, "s")
}

// until is a time to come in words.
func until(t, now time.Time) string {
	d := t.Sub(now)
	if d < 48*time.Hour {
		return "in " + cmp.Or(strings.TrimSuffix(d.Round(time.Minute).String(), "0s"), "0m")
	}
	return fmt.Sprintf("in %d days", int(d.Hours()/24))
}
