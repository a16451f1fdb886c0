// Package resolve finds the digests of tags while pods wait for their admission: cached, bounded in time
// and number, and without credentials, since the webhook reads nobody's Secrets.
//
// Whoever may create pods makes the webhook connect to a host of their choice. It asks for a digest and
// shows nothing of the answer else; by TLS with a trusted certificate, except for registries that the
// installer lists; and never on its own node or link, where the cloud's metadata are.
package resolve

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"

	"cloister.dev/cloister/internal/registry"
)

const (
	// longest is how long one look-up may take. The API server waits for an admission for 5 s.
	longest = 3 * time.Second
	// keep is how long a tag has the digest that was seen last.
	keep = 30 * time.Second
	// keepFailure is how long a registry that failed is not asked for the same again: replicas come in crowds.
	keepFailure = 5 * time.Second
	// most bounds the answers that are kept, atOnce the look-ups at one time.
	most, atOnce = 4096, 64
	// maxReference is the longest image reference that is looked at, in bytes: a host (RFC 1035) with its port, and
	// name and tag as long as registries take them (OCI distribution specification, "Pulling manifests").
	maxReference = 253 + len(":65535/") + 255 + len(":") + 128
	// maxCause is what of a registry's answer is logged, in bytes.
	maxCause = 1024
)

// Resolver resolves tags. It must be made by New.
type Resolver struct {
	client  registry.Client
	log     *slog.Logger
	now     func() time.Time
	timeout time.Duration

	lookups singleflight.Group
	slots   chan struct{}

	mu      sync.Mutex
	answers map[string]answer
}

// answer is what became of one image reference.
type answer struct {
	pinned string
	err    error
	until  time.Time
}

// New returns a resolver that reaches the registries of plainHTTP, HOST or HOST:PORT, without TLS too.
func New(plainHTTP []string, log *slog.Logger) *Resolver {
	dialer := net.Dialer{Control: refuse}
	return newResolver(registry.Client{PlainHTTP: plainHTTP, Transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		ForceAttemptHTTP2:      true,
		MaxIdleConns:           atOnce,
		IdleConnTimeout:        time.Minute,
		MaxResponseHeaderBytes: 64 << 10,
	}}, log, time.Now)
}

func newResolver(client registry.Client, log *slog.Logger, now func() time.Time) *Resolver {
	return &Resolver{client: client, log: log, now: now, timeout: longest, slots: make(chan struct{}, atOnce), answers: map[string]answer{}}
}

// refuse is the Control of a net.Dialer: it sees the address behind a name.
func refuse(_, address string, _ syscall.RawConn) error {
	a, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	if ip := a.Addr().Unmap(); ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsUnspecified() || ip.IsMulticast() || ip == awsMetadata {
		return fmt.Errorf("%s is no address of a registry", ip)
	}
	return nil
}

// awsMetadata is the instance metadata service by IPv6 (AWS EC2 user guide, "IMDS").
var awsMetadata = netip.MustParseAddr("fd00:ec2::254")

// Resolve returns image, a reference without digest, with the digest that its registry has for it. The
// error is a sentence for the author of the pod.
func (r *Resolver) Resolve(ctx context.Context, image string) (string, error) {
	if len(image) > maxReference { // nobody has checked the pod yet, and the answer would be kept
		return "", fmt.Errorf("its tag cannot be resolved: the reference has %d bytes, at most %d are possible", len(image), maxReference)
	}
	a, ok := r.kept(image)
	if !ok {
		done := r.lookups.DoChan(image, func() (any, error) { return r.lookUp(image), nil })
		select {
		case got := <-done:
			a = got.Val.(answer)
		case <-ctx.Done():
			a.err = errors.New("its registry does not answer in time")
		}
	}
	if a.err != nil {
		return "", fmt.Errorf("its tag cannot be resolved: %w; name the image by digest, which `cloister pin -f FILE` does with your own access to the registry", a.err)
	}
	return a.pinned, nil
}

// kept returns what became of an image, unless that is too long ago.
func (r *Resolver) kept(image string) (answer, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.answers[image]
	return a, ok && r.now().Before(a.until)
}

// lookUp asks the registry, on behalf of all who wait for the same image.
func (r *Resolver) lookUp(image string) answer {
	// Another look-up may have ended since the caller looked.
	if a, ok := r.kept(image); ok {
		return a
	}
	ctx, cancel := context.WithTimeout(context.Background(), r.timeout)
	defer cancel()
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return answer{err: errors.New("too many tags are looked up at the same time")}
	}
	begin := r.now()
	var a answer
	a.pinned, a.err = r.client.Pin(ctx, image)
	a.until = r.now().Add(keep)
	if a.err != nil {
		a.until = r.now().Add(keepFailure)
		r.log.Warn("tag not resolved", "image", image, "error", a.err.Error(), "cause", fmt.Sprintf("%.*s", maxCause, fmt.Sprint(errors.Unwrap(a.err))))
		a.err = errors.New(a.err.Error()) // only the sentence is kept: what is behind it has what the registry sent
	} else {
		r.log.Info("tag resolved", "image", a.pinned, "duration", r.now().Sub(begin).String())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.answers) >= most {
		clear(r.answers)
	}
	r.answers[image] = a
	return a
}
