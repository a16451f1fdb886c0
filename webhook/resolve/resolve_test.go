package resolve

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	fake "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"cloister.dev/cloister/internal/registry"
)

// upstream is a registry that counts the look-ups of digests.
type upstream struct {
	*httptest.Server
	lookups atomic.Int32
	held    chan struct{}                 // gets each look-up that hold holds
	hold    atomic.Pointer[chan struct{}] // of look-ups, until it is closed
}

func newUpstream(t *testing.T) *upstream {
	t.Helper()
	u := &upstream{held: make(chan struct{})}
	inner := fake.New(fake.Logger(log.New(io.Discard, "", 0)))
	u.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead && strings.Contains(r.URL.Path, "/manifests/") && strings.Contains(r.UserAgent(), "cloister") {
			u.lookups.Add(1)
			if hold := u.hold.Load(); hold != nil {
				select {
				case u.held <- struct{}{}:
				case <-*hold:
				}
				<-*hold
			}
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(u.Close)
	return u
}

// push gives the tag another image and returns its reference and its digest.
func (u *upstream) push(t *testing.T, tag string) (image string, digest v1.Hash) {
	t.Helper()
	image = u.Listener.Addr().String() + "/app:" + tag
	ref, err := name.ParseReference(image)
	if err != nil {
		t.Fatal(err)
	}
	img, err := random.Image(10, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	if digest, err = img.Digest(); err != nil {
		t.Fatal(err)
	}
	return image, digest
}

// clock is a time that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func local(c *clock) *Resolver {
	r := newResolver(registry.Client{PlainHTTP: []string{"127.0.0.1"}}, slog.New(slog.DiscardHandler), c.Now)
	r.timeout = time.Minute // a busy machine is no failure
	return r
}

// TestCache: a tag is asked for again after a while, and finds where it moved.
func TestCache(t *testing.T) {
	u, c := newUpstream(t), &clock{now: time.Unix(1, 0)}
	r := local(c)
	image, first := u.push(t, "1")
	check := func(want v1.Hash, lookups int32) {
		t.Helper()
		got, err := r.Resolve(t.Context(), image)
		if err != nil || got != image+"@"+want.String() || u.lookups.Load() != lookups {
			t.Errorf("%q after %d look-ups, %v; want %s after %d", got, u.lookups.Load(), err, want, lookups)
		}
	}
	check(first, 1)
	_, second := u.push(t, "1")
	c.move(keep - 1)
	check(first, 1)
	c.move(1)
	check(second, 2)
}

// TestFailure: a failure is kept for a shorter time, and says what to do.
func TestFailure(t *testing.T) {
	u, c := newUpstream(t), &clock{now: time.Unix(1, 0)}
	r := local(c)
	image := u.Listener.Addr().String() + "/app:1"
	for _, lookups := range []int32{1, 1, 2} {
		_, err := r.Resolve(t.Context(), image)
		if err == nil || !strings.Contains(err.Error(), "has no app:1; name the image by digest, which `cloister pin -f FILE` does") || u.lookups.Load() != lookups {
			t.Errorf("%v after %d look-ups, want %d", err, u.lookups.Load(), lookups)
		}
		c.move(keepFailure / 2)
	}
	c.move(keepFailure)
	_, want := u.push(t, "1")
	if got, err := r.Resolve(t.Context(), image); err != nil || got != image+"@"+want.String() {
		t.Errorf("%q, %v", got, err)
	}
}

// TestTogether: replicas that come together ask once, and one that cannot wait does not hold the others.
func TestTogether(t *testing.T) {
	u := newUpstream(t)
	r := local(&clock{now: time.Unix(1, 0)})
	image, digest := u.push(t, "1")
	hold := make(chan struct{})
	u.hold.Store(&hold)

	impatient, cancel := context.WithCancel(t.Context())
	gone := make(chan error)
	go func() {
		_, err := r.Resolve(impatient, image)
		gone <- err
	}()
	<-u.held
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if got, err := r.Resolve(t.Context(), image); err != nil || got != image+"@"+digest.String() {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	cancel()
	if err := <-gone; err == nil || !strings.Contains(err.Error(), "does not answer in time") {
		t.Errorf("the impatient one got %v", err)
	}
	close(hold)
	wg.Wait()
	if n := u.lookups.Load(); n != 1 {
		t.Errorf("%d look-ups", n)
	}
}

// TestBounded: what is kept has an end.
func TestBounded(t *testing.T) {
	c := &clock{now: time.Unix(1, 0)}
	r := local(c)
	for i := range most + 10 {
		r.Resolve(t.Context(), fmt.Sprintf("NO REFERENCE %d", i))
	}
	if n := len(r.answers); n > most || n < 10 {
		t.Errorf("%d answers are kept", n)
	}
}

// TestBoundedBytes: neither a long reference nor what a registry sends is kept.
func TestBoundedBytes(t *testing.T) {
	body := strings.Repeat("x", 32<<10)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Error(w, body, http.StatusInternalServerError)
	}))
	t.Cleanup(s.Close)
	var logged bytes.Buffer
	c := &clock{now: time.Unix(1, 0)}
	r := newResolver(registry.Client{PlainHTTP: []string{"127.0.0.1"}}, slog.New(slog.NewJSONHandler(&logged, nil)), c.Now)
	for _, image := range []string{strings.Repeat("a", maxReference+1), strings.Repeat("A", 1<<20)} {
		if _, err := r.Resolve(t.Context(), image); err == nil || !strings.Contains(err.Error(), "at most 644 are possible") {
			t.Errorf("a long reference: %.200v", err)
		}
	}
	if len(r.answers) != 0 {
		t.Errorf("%d answers about long references are kept", len(r.answers))
	}
	if _, err := r.Resolve(t.Context(), s.Listener.Addr().String()+"/app:1"); err == nil || !strings.Contains(err.Error(), "HTTP status 500") {
		t.Errorf("%.200v", err)
	}
	for image, a := range r.answers {
		if kept := fmt.Sprintf("%#v", a.err); len(kept) > 1024 || errors.Unwrap(a.err) != nil {
			t.Errorf("%s: %d bytes are kept", image, len(kept))
		}
	}
	if logged.Len() > 4*maxCause {
		t.Errorf("%d bytes were logged", logged.Len())
	}
}

// TestRefuse: no pod makes the webhook ask the node, its link, or the cloud's metadata.
func TestRefuse(t *testing.T) {
	for address, refused := range map[string]bool{
		"127.0.0.1:5000":          true,
		"[::1]:5000":              true,
		"[::ffff:127.0.0.1]:5000": true,
		"169.254.169.254:80":      true,
		"[fe80::1]:443":           true,
		"[fd00:ec2::254]:80":      true,
		"0.0.0.0:443":             true,
		"224.0.0.1:443":           true,
		"nonsense":                true,
		"10.96.0.10:5000":         false, // a registry in the cluster
		"192.0.2.1:443":           false,
		"[2001:db8::1]:443":       false,
		"[::ffff:192.0.2.1]:443":  false,
	} {
		if err := refuse("tcp", address, nil); (err != nil) != refused {
			t.Errorf("%s: %v", address, err)
		}
	}
	u := newUpstream(t)
	image, _ := u.push(t, "1")
	_, err := New([]string{"127.0.0.1"}, slog.New(slog.DiscardHandler)).Resolve(t.Context(), image)
	if err == nil || !strings.Contains(err.Error(), "cannot be reached") || u.lookups.Load() != 0 {
		t.Errorf("a registry on the node: %v", err)
	}
	if errors.Unwrap(err) == nil {
		t.Error("the cause is lost")
	}
}
