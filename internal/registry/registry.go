// Package registry reaches image registries (OCI distribution specification 1.1): which of them may be
// asked without TLS, and which digest a tag has.
package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// Client reaches registries. Its zero value does so by TLS and without credentials.
type Client struct {
	// PlainHTTP lists the registries, HOST or HOST:PORT, that may be reached without TLS. Whoever is on the
	// way reads and changes what they say, credentials included.
	PlainHTTP []string
	// Keychain has the credentials; nil has none.
	Keychain authn.Keychain
	// Transport carries the requests; nil is remote.DefaultTransport.
	Transport http.RoundTripper
}

// ParseList reads a list of PlainHTTP, separated by commas.
func ParseList(list string) []string {
	if list == "" {
		return nil
	}
	return strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
}

// Parse reads an image reference.
func (c *Client) Parse(image string) (name.Reference, error) {
	ref, err := name.ParseReference(image)
	if err != nil {
		return nil, fmt.Errorf("%q is not an image reference", image)
	}
	if c.plain(ref.Context().RegistryStr()) {
		return name.ParseReference(image, name.Insecure)
	}
	return ref, nil
}

// ParseDigest reads an image reference that has a digest.
func (c *Client) ParseDigest(image string) (name.Digest, error) {
	ref, err := c.Parse(image)
	if err != nil {
		return name.Digest{}, err
	}
	digest, ok := ref.(name.Digest)
	if !ok {
		return name.Digest{}, fmt.Errorf("the image %q must be a reference with a digest (NAME@sha256:…)", image)
	}
	return digest, nil
}

func (c *Client) plain(host string) bool {
	bare, _, err := net.SplitHostPort(host)
	if err != nil {
		bare = host
	}
	return slices.Contains(c.PlainHTTP, host) || slices.Contains(c.PlainHTTP, bare)
}

// maxRedirects is how often one request may be sent elsewhere: package remote follows redirects for ever.
const maxRedirects = 10

// RoundTripper carries requests as c does: by TLS except to registries of PlainHTTP, whatever a redirect says,
// and after no more than maxRedirects of them.
func (c *Client) RoundTripper() http.RoundTripper {
	inner := c.Transport
	if inner == nil {
		inner = remote.DefaultTransport
	}
	return roundTripper(func(r *http.Request) (*http.Response, error) {
		if r.URL.Scheme != "https" && !c.plain(r.URL.Host) {
			return nil, errPlain
		}
		redirects := 0
		for res := r.Response; res != nil && res.Request != nil; res = res.Request.Response {
			redirects++
		}
		if redirects > maxRedirects {
			return nil, fmt.Errorf("more than %d redirects", maxRedirects)
		}
		return inner.RoundTrip(r)
	})
}

// Options are those of package remote for requests as c makes them.
func (c *Client) Options(ctx context.Context) []remote.Option {
	keys := c.Keychain
	if keys == nil {
		keys = authn.NewMultiKeychain()
	}
	return []remote.Option{
		remote.WithContext(ctx), remote.WithTransport(c.RoundTripper()), remote.WithAuthFromKeychain(keys), remote.WithUserAgent("cloister"),
	}
}

var errPlain = errors.New("it would have to be asked without TLS, which the installation does not list it for")

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// maxRequests is for one digest: the look for TLS, a token, the digest, and redirects of each.
const maxRequests = 16

// Pin asks the registry of an image reference without digest for its digest, that of an index where it is
// one, and returns the reference with it: NAME[:TAG]@DIGEST. The error says in a few words what is wrong
// and nothing of what the registry answered.
func (c *Client) Pin(ctx context.Context, image string) (string, error) {
	ref, err := c.Parse(image)
	if err != nil {
		return "", err
	}
	if _, ok := ref.(name.Tag); !ok {
		return "", fmt.Errorf("%q has a digest already", image)
	}
	inner, requests := c.RoundTripper(), atomic.Int32{}
	limited := roundTripper(func(r *http.Request) (*http.Response, error) {
		if requests.Add(1) > maxRequests {
			return nil, errors.New("too many requests for one digest")
		}
		return inner.RoundTrip(r)
	})
	d, err := remote.Head(ref, append(c.Options(ctx), remote.WithTransport(limited), remote.WithRetryBackoff(remote.Backoff{Steps: 1}))...)
	if err != nil {
		return "", &PinError{Image: image, err: err, sentence: Explain(ctx, ref, err)}
	}
	if d.Digest.Algorithm != "sha256" {
		return "", fmt.Errorf("the registry %s answers with a digest that is not SHA-256", ref.Context().RegistryStr())
	}
	return image + "@" + d.Digest.String(), nil
}

// PinError is why a tag has no digest. Its text may be shown to anybody; what it wraps may quote the
// registry.
type PinError struct {
	Image    string
	err      error
	sentence string
}

func (e *PinError) Error() string { return e.sentence }

func (e *PinError) Unwrap() error { return e.err }

// Explain says in a sentence why a request for ref failed, and nothing of what the registry answered.
func Explain(ctx context.Context, ref name.Reference, err error) string {
	registry := ref.Context().RegistryStr()
	var (
		answer      *transport.Error
		dns         *net.DNSError
		op          *net.OpError
		certificate *tls.CertificateVerificationError
	)
	switch {
	case errors.As(err, &answer) && answer.StatusCode == http.StatusNotFound:
		return fmt.Sprintf("the registry %s has no %s", registry, strings.TrimPrefix(ref.Name(), registry+"/"))
	case errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden):
		return fmt.Sprintf("the registry %s refuses access to %s", registry, ref.Context().RepositoryStr())
	case errors.As(err, &answer) && answer.StatusCode == http.StatusTooManyRequests:
		return fmt.Sprintf("the registry %s was asked too often", registry)
	case errors.As(err, &answer):
		return fmt.Sprintf("the registry %s answers with HTTP status %d", registry, answer.StatusCode)
	case ctx.Err() != nil:
		return fmt.Sprintf("the registry %s does not answer in time", registry)
	case errors.As(err, &dns):
		return fmt.Sprintf("the registry %s has a name that does not resolve", registry)
	case errors.As(err, &op):
		return fmt.Sprintf("the registry %s cannot be reached", registry)
	case errors.As(err, &certificate):
		return fmt.Sprintf("the registry %s has a certificate that is not trusted", registry)
	case errors.Is(err, errPlain) || errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Sprintf("the registry %s does not speak TLS and is not listed as one that need not", registry)
	}
	return fmt.Sprintf("the registry %s does not answer as one", registry)
}
