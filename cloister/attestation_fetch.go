package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
)

const (
	// attestationPath is where a gateway answers with fresh documents.
	attestationPath = "/.well-known/cloister/attestation"
	// fetchTimeout limits the whole request: a document takes milliseconds, and at most 16 wait before it.
	fetchTimeout = time.Minute
	// randomNonce is the size of a nonce of ours, in bytes; the gateway takes at most maxNonce.
	randomNonce, maxNonce = 32, 64
)

type attestationFetch struct {
	trust
	nonce  string
	format format
	save   string
}

func newAttestationFetch() *cobra.Command {
	var a attestationFetch
	cmd := &cobra.Command{
		Use:   "fetch --measurements FILE [flags] URL",
		Short: "Ask an enclave for a fresh attestation document and verify it",
		Long: `Connects as "cloister curl" does, asks the enclave for a document with a nonce, and verifies it by the same
flags. It prints what is proven on stdout; --save keeps the document, as evidence that others can verify
with "cloister attestation verify".

The nonce shows that the document was made after it was chosen; without --nonce it is random. Such a
document says nothing about a connection: that is what the handshake is verified for.`,
		Example: `  cloister attestation fetch --measurements measurements.json https://shop.example
  cloister attestation fetch --measurements measurements.json --nonce 8f3c… --save attestation.bin https://shop.example`,
		Args: exactly("URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, err := url.Parse(args[0])
			if err != nil {
				return err
			}
			if u.Scheme != "https" || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "" {
				return fmt.Errorf("%s is not of the form https://HOST[:PORT]", args[0])
			}
			nonce := make([]byte, randomNonce)
			rand.Read(nonce)
			if cmd.Flags().Changed("nonce") {
				if nonce, err = parseNonce(a.nonce); err != nil {
					return err
				}
				if len(nonce) > maxNonce {
					return fmt.Errorf("--nonce has %d bytes, and an enclave takes at most %d", len(nonce), maxNonce)
				}
			}
			if err := a.check(); err != nil {
				return err
			}
			u.Path, u.RawQuery = attestationPath, "nonce="+hex.EncodeToString(nonce)
			return failed(a.run(cmd.Context(), u, nonce, cmd.OutOrStdout()))
		},
	}
	f := cmd.Flags()
	a.trust.flags(f)
	f.StringVar(&a.nonce, "nonce", "", "nonce in `hex`adecimal, 1 to 64 bytes (default random)")
	f.StringVar(&a.save, "save", "", "write the document to `file`")
	a.format.add(f, "text or json")
	return cmd
}

func (a *attestationFetch) run(ctx context.Context, u *url.URL, nonce []byte, stdout io.Writer) error {
	opts, err := a.options()
	if err != nil {
		return err
	}
	opts.Chains = new(attestation.Chains) // the document's chain is that of the connection
	verifier, err := attestation.NewVerifier(opts)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	doc, err := a.ask(ctx, verifier, u)
	if err != nil {
		return explain(err)
	}
	opts.Nonce = nonce
	d, err := attestation.Verify(doc, opts)
	if err != nil {
		return inWords(err)
	}
	if a.save != "" {
		err := replaceFile(ctx, a.save, func(w io.WriteSeeker) error {
			_, err := w.Write(doc)
			return err
		})
		if err != nil {
			return err
		}
	}
	return printAttestation(stdout, a.format, d, opts.Measurements)
}

// ask returns the document that the enclave at u answers with, unverified.
func (a *attestationFetch) ask(ctx context.Context, v *attestation.Verifier, u *url.URL) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "cloister")
	res, err := (&curl{trust: a.trust}).client(v).Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, attestation.MaxDocumentSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the document: %w", err)
	}
	switch {
	case res.StatusCode == http.StatusServiceUnavailable && res.Header.Get("Retry-After") != "":
		return nil, errors.New("the enclave has too many requests for attestation documents: try again")
	case res.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s answers %s instead of an attestation document: name an HTTP port of the enclave itself", u.Host, res.Status)
	}
	return body, nil
}
