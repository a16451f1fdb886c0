package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cloister.dev/cloister/eif"
)

// signing is what the flags of commands that sign an EIF say.
type signing struct{ key, cert string }

func (s *signing) add(f *pflag.FlagSet) {
	f.Var((*named)(&s.key), "sign-key", "PEM `file` with the private key that signs, on the curve P-256, P-384 or P-521")
	f.Var((*named)(&s.cert), "sign-cert", "PEM `file` with the key's certificate, which PCR8 measures")
}

// check reports errors of usage.
func (s *signing) check() error {
	if (s.key == "") != (s.cert == "") {
		return errors.New("a signature needs both --sign-key and --sign-cert")
	}
	return nil
}

// load returns the signer, or nil if there is none. Its certificate is valid today, or no enclave would start.
func (s *signing) load() (*eif.Signer, error) {
	if s.key == "" {
		return nil, nil
	}
	cert, err := os.ReadFile(s.cert)
	if err != nil {
		return nil, fmt.Errorf("read signing certificate: %w", err)
	}
	key, err := os.ReadFile(s.key)
	if err != nil {
		return nil, fmt.Errorf("read signing key: %w", err)
	}
	signer, err := eif.NewSigner(cert, key)
	if err != nil {
		return nil, fmt.Errorf("%s, %s: %w", s.cert, s.key, err)
	}
	if err := eif.CheckValidity(signer.Certificate(), time.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w", s.cert, err)
	}
	return signer, nil
}

type eifSign struct {
	output string
	format format
	signing
}

func newEIFSign() *cobra.Command {
	var s eifSign
	cmd := &cobra.Command{
		Use:   "sign FILE --sign-key FILE --sign-cert FILE [--output FILE]",
		Short: "Sign an enclave image file",
		Long: `Signs PCR0 of an enclave image file, in place or to another file. A signature that it has is replaced;
nothing else changes. The certificate becomes PCR8. The same key signs the same file with the same bytes.`,
		Example: `  cloister eif sign app.eif --sign-key key.pem --sign-cert cert.pem --output signed.eif`,
		Args:    exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.key == "" && s.cert == "" {
				return errors.New("name the key and its certificate with --sign-key and --sign-cert")
			}
			if err := s.signing.check(); err != nil {
				return err
			}
			return failed(s.run(cmd.Context(), cmd.OutOrStdout(), args[0]))
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.output, "output", "", "write the signed enclave image to this `file` (default: in place)")
	s.signing.add(f)
	s.format.add(f, measurementsUsage)
	return cmd
}

func (s *eifSign) run(ctx context.Context, stdout io.Writer, file string) error {
	signer, err := s.load()
	if err != nil {
		return err
	}
	r, err := eif.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	output := s.output
	if output == "" {
		output = file
	}
	var code *eif.Measurements
	err = replaceFile(ctx, output, func(w io.WriteSeeker) (err error) {
		code, err = eif.Sign(w, r, signer)
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	return printMeasurements(stdout, s.format, code)
}
