package vault

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials/endpointcreds"
	"github.com/aws/aws-sdk-go-v2/service/kms"
	"github.com/aws/aws-sdk-go-v2/service/kms/types"
	"github.com/aws/smithy-go"
	"golang.org/x/sync/errgroup"

	"cloister.dev/cloister/internal/amazontrust"
	"cloister.dev/cloister/internal/cms"
	"cloister.dev/cloister/workload"
)

const (
	// recipientBits is the size of the key that KMS encrypts its answers for: what its documents call
	// RSA-2048 (developer guide, "Cryptographic attestation").
	recipientBits = 2048
	// batchTimeout bounds a batch, well within the five minutes that KMS accepts a document for.
	batchTimeout = time.Minute
	// parallel is how many requests of a batch are under way at a time.
	parallel = 8
	// maxReason is the most of an error of KMS's that is passed on, in bytes.
	maxReason = 300
)

// Dial connects to host:port.
type Dial func(ctx context.Context, address string) (net.Conn, error)

// Ciphertext is something that KMS shall decrypt.
type Ciphertext struct {
	// Name is for errors.
	Name string
	Blob []byte
	// Context is what it was encrypted with (API reference, Decrypt, EncryptionContext).
	Context map[string]string
}

// KMS decrypts by attestation. TLS to the service ends here, so its host carries ciphertext; the answers
// are encrypted once more, for a key that only the attestation document of this enclave names.
type KMS struct {
	vault       *Vault
	client      *kms.Client
	credentials aws.CredentialsProvider
	transports  []*http.Transport
}

// NewKMS returns a client of the service that config names, which is reached with dial. Credentials dials
// what serves the pod's AWS credentials, as the container credentials endpoint of the AWS SDKs does. It
// must be closed.
func (v *Vault) NewKMS(config *workload.KMS, dial Dial, credentials func(context.Context) (net.Conn, error)) (*KMS, error) {
	roots, err := config.Roots()
	if err != nil {
		return nil, fmt.Errorf("kms.ca: %w", err)
	}
	if roots == nil {
		roots = amazontrust.Roots()
	}
	service := &http.Transport{
		DialContext:       func(ctx context.Context, _, address string) (net.Conn, error) { return dial(ctx, address) },
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true,
	}
	sidecar := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return credentials(ctx) },
	}
	provider := aws.NewCredentialsCache(endpointcreds.New("http://sidecar/", func(o *endpointcreds.Options) {
		o.HTTPClient = client(sidecar)
		o.Retryer = aws.NopRetryer{} // the batch is tried again
	}))
	return &KMS{
		vault: v,
		client: kms.New(kms.Options{
			Region:       config.Region,
			BaseEndpoint: aws.String(config.URL()),
			HTTPClient:   client(service),
			Credentials:  provider,
		}),
		credentials: provider,
		transports:  []*http.Transport{service, sidecar},
	}, nil
}

// client does not follow redirects: there is nowhere else to go.
func client(t *http.Transport) *http.Client {
	return &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// Close closes what k has open.
func (k *KMS) Close() {
	for _, t := range k.transports {
		t.CloseIdleConnections()
	}
}

// Decrypt returns the plaintexts of a batch, in its order. The batch has one RSA key, made for it, and one
// attestation document. Errors are one sentence, without anything secret; when one ciphertext cannot be
// decrypted none is returned.
func (k *KMS) Decrypt(ctx context.Context, batch []Ciphertext) (plaintexts [][]byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	// First, so that an error of the sidecar's does not look like one of KMS's.
	if _, err := k.credentials.Retrieve(ctx); err != nil {
		return nil, fmt.Errorf("get the pod's AWS credentials from the sidecar: %s", reason(err))
	}
	key, err := rsa.GenerateKey(rand.Reader, recipientBits)
	if err != nil {
		return nil, fmt.Errorf("create a key for KMS: %w", err)
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("create a key for KMS: %w", err)
	}
	document, err := k.vault.module.Attest(ctx, nil, nil, public)
	if err != nil {
		return nil, fmt.Errorf("attest a key for KMS: %w", err)
	}
	plaintexts = make([][]byte, len(batch))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(parallel)
	for i, c := range batch {
		group.Go(func() (err error) {
			plaintexts[i], err = k.decrypt(ctx, c, key, document)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		for _, p := range plaintexts {
			clear(p)
		}
		return nil, err
	}
	return plaintexts, nil
}

func (k *KMS) decrypt(ctx context.Context, c Ciphertext, key *rsa.PrivateKey, document []byte) ([]byte, error) {
	out, err := k.client.Decrypt(ctx, &kms.DecryptInput{
		CiphertextBlob:    c.Blob,
		EncryptionContext: c.Context,
		Recipient: &types.RecipientInfo{
			AttestationDocument:    document,
			KeyEncryptionAlgorithm: types.KeyEncryptionMechanismRsaesOaepSha256,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("decrypt %s by KMS: %s", c.Name, reason(err))
	}
	// A service that does not look at the document cannot tell this enclave from anybody else.
	if len(out.Plaintext) > 0 || len(out.CiphertextForRecipient) == 0 {
		clear(out.Plaintext)
		return nil, fmt.Errorf("decrypt %s by KMS: the answer is not encrypted for this enclave, so the service ignores attestation", c.Name)
	}
	plaintext, err := cms.Open(key, out.CiphertextForRecipient)
	if err != nil {
		return nil, fmt.Errorf("decrypt %s by KMS: %w", c.Name, err)
	}
	return plaintext, nil
}

// reason is why a request failed, in one short sentence: what the service answered, or what kept the
// request from being answered.
func reason(err error) string {
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		text := strings.TrimSuffix(cmp.Or(api.ErrorCode(), "error")+": "+api.ErrorMessage(), ": ")
		return oneLine(text)
	}
	// Below it is what the connection said, without the SDK's account of its tries.
	if sent, ok := errors.AsType[*url.Error](err); ok {
		err = sent.Err
	}
	return oneLine(err.Error())
}

func oneLine(text string) string {
	text = strings.ToValidUTF8(strings.Join(strings.Fields(text), " "), "")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}

// UseCertificate makes chain, PEM, what clients get that do not ask for the attested certificate. Key is
// its private key in PEM; it must be that of the chain's first certificate.
func (v *Vault) UseCertificate(chain string, key []byte) error {
	c, err := tls.X509KeyPair([]byte(chain), key)
	if err != nil {
		return fmt.Errorf("use the certificate with its key: %w", err)
	}
	v.imported.Store(&c)
	return nil
}
