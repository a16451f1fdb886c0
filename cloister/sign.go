package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"cloister.dev/cloister/workload/signed"
)

// sign is what `cloister sign` and `cloister verify` are told.
type sign struct {
	key  string // file
	file string
}

func newSign() *cobra.Command {
	var s sign
	cmd := &cobra.Command{
		Use:   "sign --key PRIVATE.pem [FILE|-]",
		Short: "Sign a measurement set",
		Long: `Prints the measurement set with a signature: a DSSE envelope with an in-toto statement. It can then be
kept and fetched anywhere, and every command that takes --measurements takes it together with --key and
the public key of its signer. What is signed counts for as long as the key does: to take a set back, clients
must get another one or another key.

The key is ECDSA on P-256 or P-384 or Ed25519, in PKCS #8 and PEM:

  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out private.pem
  openssl pkey -in private.pem -pubout -out public.pem`,
		Example: `  cloister measure -f deployment.yaml --eif base.eif | cloister sign --key private.pem >web.signed.json`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.check(args, "the private key that signs"); err != nil {
				return err
			}
			return failed(s.sign(cmd.InOrStdin(), cmd.OutOrStdout()))
		},
	}
	s.flags(cmd.Flags(), "private")
	return cmd
}

func newVerify() *cobra.Command {
	var s sign
	cmd := &cobra.Command{
		Use:   "verify --key PUBLIC.pem [FILE|-]",
		Short: "Check the signature of a measurement set and print the set",
		Long: `Checks that the key has signed the measurement set, and that the statement is strictly what "cloister
sign" makes. It prints the set without the signature, as "cloister measure" does, and nothing if it is refused.`,
		Example: `  cloister verify --key public.pem web.signed.json`,
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.check(args, "the public key of the signer"); err != nil {
				return err
			}
			return failed(s.verify(cmd.InOrStdin(), cmd.OutOrStdout()))
		},
	}
	s.flags(cmd.Flags(), "public")
	return cmd
}

func (s *sign) flags(f *pflag.FlagSet, kind string) {
	f.StringVar(&s.key, "key", "", "PEM `file` with the "+kind+" key")
}

// check reports errors of usage. The set comes from standard input if no file is named.
func (s *sign) check(args []string, key string) error {
	if s.key == "" {
		return fmt.Errorf("name %s with --key", key)
	}
	s.file = "-"
	if len(args) > 0 {
		s.file = args[0]
	}
	return nil
}

func (s *sign) sign(stdin io.Reader, stdout io.Writer) error {
	b, err := os.ReadFile(s.key)
	if err != nil {
		return err
	}
	key, err := signed.ParsePrivateKey(b)
	if err != nil {
		return fmt.Errorf("%s: %w", s.key, err)
	}
	if b, err = readInput(s.file, stdin); err != nil {
		return err
	}
	set, err := signed.Parse(b, nil)
	if errors.Is(err, signed.ErrSigned) {
		return fmt.Errorf("%s: the measurement set is signed already: sign what `cloister verify` prints of it", s.file)
	} else if err != nil {
		return fmt.Errorf("%s: %w", s.file, err)
	}
	if b, err = signed.Sign(set, key); err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s\n", b)
	return err
}

func (s *sign) verify(stdin io.Reader, stdout io.Writer) error {
	key, err := readPublicKey(s.key)
	if err != nil {
		return err
	}
	b, err := readInput(s.file, stdin)
	if err != nil {
		return err
	}
	set, err := parseMeasurements(b, key)
	if err != nil {
		return fmt.Errorf("%s: %w", s.file, err)
	}
	return json.NewEncoder(stdout).Encode(set)
}
