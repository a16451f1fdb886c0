package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
)

// atDocument is the value of --at for the document's own time.
const atDocument = "document"

type attestationVerify struct {
	rules
	at     string
	nonce  string
	format format
}

func newAttestationVerify() *cobra.Command {
	var v attestationVerify
	cmd := &cobra.Command{
		Use:   "verify FILE [flags]",
		Short: "Verify an attestation document",
		Long: `Checks a document of a Nitro enclave (COSE_Sign1 in CBOR, as the Nitro Security Module gives it): its
form, its signature, its certificates up to the one root that is trusted, its age, that the enclave is not
in debug mode, and what the flags name. It prints what is proven on stdout, or the reason of the refusal on
stderr.

A document is valid for some hours only. --at document verifies an archived one at the time that it names
itself: that shows who made it, not that it is fresh, which only a nonce shows.

It exits 0 when the document is verified, 1 when it is refused, 2 when the command was called wrongly.`,
		Example: `  cloister attestation verify attestation.bin --nonce 8f3c… --measurements measurements.json
  cloister attestation verify archived.bin --at document -o json`,
		Args: exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var opts attestation.Options
			var err error
			if cmd.Flags().Changed("nonce") {
				if opts.Nonce, err = parseNonce(v.nonce); err != nil {
					return err
				}
			}
			if v.at != "" && v.at != atDocument {
				if opts.Now, err = time.Parse(time.RFC3339, v.at); err != nil {
					return fmt.Errorf("--at takes a time as 2026-01-31T12:00:00Z, or %q, not %q", atDocument, v.at)
				}
			}
			if err := v.rules.check(); err != nil {
				return err
			}
			return failed(v.run(opts, args[0], cmd.InOrStdin(), cmd.OutOrStdout()))
		},
	}
	f := cmd.Flags()
	v.rules.flags(f)
	f.StringVar(&v.at, "at", "", "`time` at which the document must be valid (RFC 3339), or \"document\" for its own (default now)")
	f.StringVar(&v.nonce, "nonce", "", "nonce that must be in the document, in `hex`adecimal")
	v.format.add(f, "text or json")
	return cmd
}

// run verifies the document; given has what the flags of this command say.
func (v *attestationVerify) run(given attestation.Options, file string, stdin io.Reader, stdout io.Writer) error {
	opts, err := v.rules.options()
	if err != nil {
		return err
	}
	opts.Nonce, opts.Now = given.Nonce, given.Now
	doc, err := readInput(file, stdin)
	if err != nil {
		return err
	}
	if v.at == atDocument {
		claimed, err := attestation.ParseUnverified(doc)
		if err != nil {
			return err
		}
		opts.Now = claimed.Timestamp
	}
	d, err := attestation.Verify(doc, opts)
	if err != nil {
		return inWords(err)
	}
	return printAttestation(stdout, v.format, d, opts.Measurements)
}
