package registry

import (
	"context"
	"encoding/base64"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// host is a server's HOST:PORT.
func host(s *httptest.Server) string { return s.Listener.Addr().String() }

func serve(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

func quiet() http.Handler { return registry.New(registry.Logger(log.New(io.Discard, "", 0))) }

func TestPin(t *testing.T) {
	inner := quiet()
	s := serve(t, inner.ServeHTTP)
	// An index of images of several platforms: its digest is what counts.
	index, err := random.Index(100, 1, 3)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host(s) + "/team/app:1.2")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index); err != nil {
		t.Fatal(err)
	}
	latest, err := name.ParseReference(host(s) + "/team/app")
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(latest, index); err != nil {
		t.Fatal(err)
	}
	digest, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}

	private := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "u" || password != "p" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			http.Error(w, "secret of the registry", http.StatusUnauthorized)
			return
		}
		r.Host = host(s)
		inner.ServeHTTP(w, r)
	})
	answering := func(code int) string {
		return host(serve(t, func(w http.ResponseWriter, r *http.Request) {
			http.Error(w, "secret of the registry", code)
		}))
	}
	encrypted := httptest.NewUnstartedServer(inner)
	encrypted.Config.ErrorLog = log.New(io.Discard, "", 0) // the client's refusal
	encrypted.StartTLS()
	t.Cleanup(encrypted.Close)
	silent, err := net.Listen("tcp", "127.0.0.1:0") // nobody accepts
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	elsewhere := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			http.Redirect(w, r, "http://localhost:1/metadata", http.StatusFound)
		}
	})
	loop := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v2/" {
			http.Redirect(w, r, r.URL.Path, http.StatusFound)
		}
	})

	plain := []string{"127.0.0.1"}
	for name, tt := range map[string]struct {
		image  string
		client Client
		want   string // of the error; empty for the index
	}{
		"tag":                   {image: host(s) + "/team/app:1.2", client: Client{PlainHTTP: plain}},
		"no tag":                {image: host(s) + "/team/app", client: Client{PlainHTTP: []string{host(s)}}},
		"not listed":            {image: host(s) + "/team/app:1.2", want: "does not speak TLS"},
		"other port listed":     {image: host(s) + "/team/app:1.2", client: Client{PlainHTTP: []string{"127.0.0.1:1"}}, want: "does not speak TLS"},
		"digest":                {image: host(s) + "/team/app@" + digest.String(), client: Client{PlainHTTP: plain}, want: "has a digest already"},
		"no reference":          {image: "UPPER/app:1", want: `"UPPER/app:1" is not an image reference`},
		"missing tag":           {image: host(s) + "/team/app:2", client: Client{PlainHTTP: plain}, want: "the registry " + host(s) + " has no team/app:2"},
		"without credentials":   {image: host(private) + "/team/app:1.2", client: Client{PlainHTTP: plain}, want: "refuses access to team/app"},
		"with credentials":      {image: host(private) + "/team/app:1.2", client: Client{PlainHTTP: plain, Keychain: keychain{"u", "p"}}},
		"with wrong ones":       {image: host(private) + "/team/app:1.2", client: Client{PlainHTTP: plain, Keychain: keychain{"u", "q"}}, want: "refuses access"},
		"error":                 {image: answering(500) + "/a:1", client: Client{PlainHTTP: plain}, want: "answers with HTTP status 500"},
		"too many":              {image: answering(429) + "/a:1", client: Client{PlainHTTP: plain}, want: "was asked too often"},
		"no registry":           {image: answering(200) + "/a:1", client: Client{PlainHTTP: plain}, want: "does not answer as one"},
		"untrusted certificate": {image: host(encrypted) + "/a:1", want: "has a certificate that is not trusted"},
		"silent":                {image: silent.Addr().String() + "/a:1", client: Client{PlainHTTP: plain}, want: "does not answer in time"},
		"closed":                {image: closed.Addr().String() + "/a:1", client: Client{PlainHTTP: plain}, want: "cannot be reached"},
		"closed, not listed":    {image: closed.Addr().String() + "/a:1", want: "cannot be reached"},
		"no such name":          {image: "registry.invalid/a:1", want: "has a name that does not resolve"},
		"redirect elsewhere":    {image: host(elsewhere) + "/a:1", client: Client{PlainHTTP: plain}, want: "does not speak TLS"},
		"redirect for ever":     {image: host(loop) + "/a:1", client: Client{PlainHTTP: plain}, want: "does not answer as one"},
	} {
		t.Run(name, func(t *testing.T) {
			limit := 10 * time.Second
			if name == "silent" {
				limit = 100 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			got, err := tt.client.Pin(ctx, tt.image)
			switch {
			case tt.want == "" && (err != nil || got != tt.image+"@"+digest.String()):
				t.Errorf("got %q, %v", got, err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			case err != nil && strings.Contains(err.Error(), "secret"):
				t.Errorf("the error quotes the registry: %v", err)
			}
		})
	}
}

type keychain [2]string

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte(k[0] + ":" + k[1]))}), nil
}

func TestParse(t *testing.T) {
	const digest = "@sha256:0123456789012345678901234567890123456789012345678901234567890123"
	c := Client{PlainHTTP: ParseList("registry.svc.cluster.local:5000,node")}
	for image, want := range map[string]string{
		"registry.svc.cluster.local:5000/nginx": "http",
		"registry.svc.cluster.example/nginx":    "https",
		"node:1234/nginx":                       "http",
		"node.example/nginx":                    "https",
		"registry.example/nginx:1.2":            "https",
		"nginx":                                 "https",
	} {
		ref, err := c.ParseDigest(image + digest)
		if err != nil || ref.Context().Scheme() != want {
			t.Errorf("%s: %s, %v; want %s", image, ref.Context().Scheme(), err, want)
		}
		if _, err := c.ParseDigest(image); err == nil {
			t.Errorf("%s has no digest", image)
		}
	}
	if diff := cmp.Diff([]string(nil), ParseList("")); diff != "" {
		t.Errorf("empty list (-want +got):\n%s", diff)
	}
}

// A registry cannot keep anybody busy by redirects.
func TestRedirects(t *testing.T) {
	var requests atomic.Int32
	loop := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v2/" {
			return
		}
		if requests.Add(1) > 100 {
			panic(http.ErrAbortHandler)
		}
		http.Redirect(w, r, r.URL.Path, http.StatusFound)
	})
	client := Client{PlainHTTP: []string{"127.0.0.1"}}
	ref, err := client.Parse(host(loop) + "/a@sha256:" + strings.Repeat("0", 64))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Get(ref, client.Options(t.Context())...); err == nil || requests.Load() != 1+maxRedirects {
		t.Errorf("%d requests, %v", requests.Load(), err)
	}
}
