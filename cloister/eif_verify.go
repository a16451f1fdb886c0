package main

import (
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/eif"
)

type eifVerify struct {
	cert   string
	format format
}

func newEIFVerify() *cobra.Command {
	var v eifVerify
	cmd := &cobra.Command{
		Use:   "verify FILE [--cert FILE]",
		Short: "Verify the signature of an enclave image file",
		Long: `Verifies that an enclave image file is whole, that it is signed, and that the certificate is valid today, as
Nitro does before it starts an enclave. Anyone can sign with a certificate of their own: say with --cert
whose it must be, or compare PCR8.`,
		Example: `  cloister eif verify app.eif --cert cert.pem`,
		Args:    exactly("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return failed(v.run(cmd.OutOrStdout(), cmd.ErrOrStderr(), args[0]))
		},
	}
	f := cmd.Flags()
	f.Var((*named)(&v.cert), "cert", "PEM `file` with the certificate that must have signed")
	v.format.add(f, measurementsUsage)
	return cmd
}

func (v *eifVerify) run(stdout, stderr io.Writer, file string) error {
	var signer *x509.Certificate
	if v.cert != "" {
		b, err := os.ReadFile(v.cert)
		if err != nil {
			return fmt.Errorf("read certificate: %w", err)
		}
		if signer, err = eif.ParseCertificate(b); err != nil {
			return fmt.Errorf("%s: %w", v.cert, err)
		}
	}
	r, err := eif.Open(file)
	if err != nil {
		return err
	}
	defer r.Close()
	code, cert, err := r.Verify(signer, time.Now())
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	fmt.Fprintf(stderr, "%s: signed by %q, serial number %x, valid until %s\n", file, cert.Subject, cert.SerialNumber, cert.NotAfter.UTC().Format(time.RFC3339))
	if signer == nil {
		fmt.Fprintln(stderr, "Whose certificate that is was not checked: name it with --cert, or compare PCR8.")
	}
	return printMeasurements(stdout, v.format, code)
}
