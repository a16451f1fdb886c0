package plugin

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"cloister.dev/cloister/enclaved/gateway"
	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/workload"
)

// app is the content of the test's plugin, enclaved the path of the real program.
var (
	app      []byte
	enclaved string
)

func TestMain(m *testing.M) {
	process.Helper()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "plugin")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		build := exec.Command("go", "build", "-o", dir+"/", "./testdata/app", "..")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the test's programs: %v\n%s", err, out)
			return 1
		}
		enclaved = filepath.Join(dir, "enclaved")
		if app, err = os.ReadFile(filepath.Join(dir, "app")); err != nil {
			panic(err)
		}
		if code := m.Run(); code != 0 {
			return code
		}
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}())
}

// appPlugin is an entry of the manifest for the test's plugin.
func appPlugin(name string) workload.Plugin {
	return workload.Plugin{
		Name: name, Type: workload.PluginAuthentication, Image: &workload.Image{Digest: "sha256:" + strings.Repeat("a", 64)},
		Required: true, Headers: []string{"x-set"}, TimeoutMs: 2000,
	}
}

// config starts plugins; it skips where nobody may make namespaces.
func config(t *testing.T, plugins ...workload.Plugin) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: a plugin has namespaces and a root of its own")
	}
	m := &workload.Manifest{APIVersion: workload.APIVersion, Image: workload.Image{Digest: "sha256:" + strings.Repeat("b", 64)}, Plugins: plugins}
	if _, err := m.Canonical(); err != nil {
		t.Fatal(err)
	}
	return Config{
		Manifest: m, Dir: t.TempDir(), Self: enclaved, Children: process.NewChildren(),
		Image: func(_ context.Context, _ workload.Image, root string, progress func(string, string)) (*image.Config, error) {
			progress("unpacking", "")
			return &image.Config{Entrypoint: []string{"/app"}}, os.WriteFile(filepath.Join(root, "app"), app, 0o755)
		},
		Dial:     func(context.Context, string) (net.Conn, error) { return nil, errors.New("no way out in this test") },
		Progress: func(string, string) {},
	}
}

func start(t *testing.T, c Config) *Set {
	t.Helper()
	s, err := Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

func ask(s *Set, path string) *gateway.Verdict {
	r := httptest.NewRequest(http.MethodPost, "https://shop.example"+path, strings.NewReader("body"))
	r.Header = http.Header{"X-A": {"1", "2"}, "Cookie": {"a=b", "c=d"}, "X-Remove": {"1"}}
	return s.Authorize(r)
}

func TestAuthorize(t *testing.T) {
	s := start(t, config(t, appPlugin("app")))
	unavailable := &gateway.Verdict{
		Status: 503, Response: http.Header{"Retry-After": {"1"}},
		Body: "The plugin app, which must check this request, gives no answer: try again.\n",
	}
	passed := &gateway.Verdict{Set: http.Header{}, Response: http.Header{}}
	tests := map[string]*gateway.Verdict{
		"/":             passed,
		"/deny":         {Status: 401, Body: "no", Set: http.Header{}, Response: http.Header{"Www-Authenticate": {"Test"}, "X-Reason": {"because"}}},
		"/deny/plainly": {Status: 403, Set: http.Header{}, Response: http.Header{}},
		"/deny/status":  unavailable,
		"/deny/header":  unavailable,
		"/hang":         unavailable,
		"/set":          {Set: http.Header{"X-Set": {"1", "2"}}, Remove: []string{"X-Remove"}, Response: http.Header{"X-Answer": {"yes"}}},
		"/set/unlisted": unavailable,
		"/set/value":    unavailable,
		"/set/host":     unavailable,
		"/set/query":    unavailable,
	}
	for path, want := range tests {
		t.Run(path, func(t *testing.T) {
			if diff := cmp.Diff(want, ask(s, path)); diff != "" {
				t.Errorf("verdict (-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff([]string{"x-set"}, s.Headers()); diff != "" {
		t.Error(diff)
	}
}

// What a plugin sees is what the workload would get.
func TestRequest(t *testing.T) {
	first, second := appPlugin("first"), appPlugin("second")
	s := start(t, config(t, first, second))
	// The second plugin of a chain sees what the first has set, so the first must pass this one.
	s.plugins = s.plugins[1:]
	v := ask(s, "/see?q=%2f&x")
	want := `{"headers":{":authority":"shop.example",":method":"POST",":path":"/see?q=%2f\u0026x","cookie":"a=b; c=d","x-a":"1,2","x-remove":"1"},` +
		`"host":"shop.example","method":"POST","path":"/see?q=%2f\u0026x","protocol":"HTTP/1.1"}`
	if diff := cmp.Diff(want, v.Body); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	v = ask(s, "/see?q=\xff")
	if !strings.Contains(v.Body, `"path":"/see?q=!"`) {
		t.Errorf("what is no UTF-8: %+v", v)
	}
	r := httptest.NewRequest(http.MethodGet, "https://shop.example/see", nil)
	r.Header = http.Header{"X-Set": {"0"}, "X-Remove": {"1"}, "X-Latin": {"caf\xe9"}}
	got := request(r, &gateway.Verdict{Set: http.Header{"X-Set": {"1"}}, Remove: []string{"X-Remove"}}).GetAttributes().GetRequest().GetHttp().GetHeaders()
	if diff := cmp.Diff(map[string]string{":authority": "shop.example", ":method": "GET", ":path": "/see", "x-set": "1", "x-latin": "caf!"}, got); diff != "" {
		t.Errorf("headers for the next plugin (-want +got):\n%s", diff)
	}
}

func TestSurroundings(t *testing.T) {
	p := appPlugin("app")
	if err := p.SetConfig(json.RawMessage(`{"a": "$$(HOME)"}`)); err != nil {
		t.Fatal(err)
	}
	s := start(t, config(t, appPlugin("other"), p))
	s.plugins = s.plugins[1:]
	want := `{"capabilities":"0000000000000000","config":"{\"a\":\"$$(HOME)\"}","gid":65537,"pid":1,"root":false,"tmp":true,"uid":65537,"up":0,"vsock":false}`
	if diff := cmp.Diff(want, ask(s, "/self").Body); diff != "" {
		t.Errorf("what it finds (-want +got):\n%s", diff)
	}
}

func TestWayOut(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { echo.Close() })
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			io.Copy(c, c)
			c.Close()
		}
	}()
	p := appPlugin("app")
	p.Egress = []string{"down.example:80", "echo.example:80"}
	c := config(t, p)
	c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		if address != "echo.example:80" {
			return nil, errors.New("it cannot be reached")
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", echo.Addr().String())
	}
	s := start(t, c)
	for address, want := range map[string]string{
		"echo.example:80":  "word",
		"down.example:80":  "502 Bad Gateway",
		"other.example:80": "403 Forbidden",
		"ECHO.example:80":  "403 Forbidden",
		"echo.example:443": "403 Forbidden",
	} {
		if got := ask(s, "/connect?"+address).Body; got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// A plugin that ends, or that falls silent, is started again. Until it serves, requests fail where it is
// required, and else pass.
func TestDeath(t *testing.T) {
	optional := appPlugin("optional")
	optional.Required = false
	for name, path := range map[string]string{"ends": "/exit", "falls silent": "/freeze"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := start(t, config(t, appPlugin("app")))
			ask(s, path)
			eventually(t, "it is down", func() bool { return ask(s, "/").Status == 503 })
			eventually(t, "it is back", func() bool { return ask(s, "/").Status == 0 })
		})
		t.Run(name+", optional", func(t *testing.T) {
			t.Parallel()
			s := start(t, config(t, optional))
			eventually(t, "it serves", func() bool { return ask(s, "/deny").Status == 401 })
			for _, unanswered := range []string{"/hang", "/set/unlisted"} {
				if v := ask(s, unanswered); v.Status != 503 {
					t.Errorf("%s, while it runs: status %d, want 503", unanswered, v.Status)
				}
			}
			ask(s, path)
			eventually(t, "requests pass", func() bool { return ask(s, "/deny").Status == 0 })
			eventually(t, "it is back", func() bool { return ask(s, "/deny").Status == 401 })
		})
	}
}

// A start waits for a plugin that is required, says why, and can be given up.
func TestNeverServes(t *testing.T) {
	other, err := net.Listen("unix", filepath.Join(t.TempDir(), "other.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	link, _ := json.Marshal(map[string]string{"link": other.Addr().String()})
	for name, test := range map[string]struct{ config, said string }{
		"silent":                           {`{"silent":true}`, "waiting for nothing"},
		"a link to a socket of enclaved's": {string(link), "does not serve yet"},
		"ends at once":                     {`{"silent":1}`, "ended with status 2"},
	} {
		t.Run(name, func(t *testing.T) {
			p := appPlugin("app")
			if err := p.SetConfig(json.RawMessage(test.config)); err != nil {
				t.Fatal(err)
			}
			c := config(t, p)
			ctx, cancel := context.WithCancelCause(t.Context())
			var mu sync.Mutex
			var said []string
			c.Progress = func(step, failure string) {
				mu.Lock()
				defer mu.Unlock()
				said = append(said, step+": "+failure)
				if strings.Contains(failure, test.said) {
					cancel(errors.New("given up"))
				}
			}
			time.AfterFunc(30*time.Second, func() { cancel(errors.New("too late")) })
			_, err := Start(ctx, c)
			if err == nil || err.Error() != "given up" {
				t.Errorf("got %v; it said %q", err, said)
			}
		})
	}
}

// The built-in oidc, as a process, finds its issuer by the proxy, and refuses and passes tokens.
func TestOIDC(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	const issuer = "https://example.com"
	encode := func(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/.well-known/") {
			fmt.Fprintf(w, `{"issuer":%q,"jwks_uri":%q}`, issuer, issuer+"/keys")
			return
		}
		fmt.Fprintf(w, `{"keys":[{"kty":"RSA","kid":"1","n":%q,"e":%q}]}`, encode(key.N.Bytes()), encode(big.NewInt(int64(key.E)).Bytes()))
	}))
	t.Cleanup(server.Close)
	p := workload.Plugin{Name: "tokens", Type: workload.PluginAuthentication, Builtin: "oidc", Required: true, TimeoutMs: 2000}
	raw, _ := json.Marshal(workload.OIDC{
		Issuer: issuer, Audience: "shop", CA: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})),
	})
	if err := p.SetConfig(raw); err != nil {
		t.Fatal(err)
	}
	c := config(t, p)
	c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
		if address != "example.com:443" {
			return nil, fmt.Errorf("%s is somewhere else", address)
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", server.Listener.Addr().String())
	}
	s := start(t, c)
	authorize := func(authorization string) *gateway.Verdict {
		r := httptest.NewRequest(http.MethodGet, "https://shop.example/", nil)
		if authorization != "" {
			r.Header.Set("Authorization", authorization)
		}
		return s.Authorize(r)
	}
	if v := authorize(""); v.Status != 401 || v.Response.Get("Www-Authenticate") != `Bearer realm="cloister"` {
		t.Errorf("without a token: %+v", v)
	}
	in := encode([]byte(`{"alg":"RS256","kid":"1"}`)) + "." + encode(fmt.Appendf(nil, `{"iss":%q,"aud":"shop","sub":"ada","exp":%d}`, issuer, time.Now().Add(time.Minute).Unix()))
	sum := sha256.Sum256([]byte(in))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	want := &gateway.Verdict{Set: http.Header{"X-Cloister-Sub": {"ada"}, "X-Cloister-Iss": {issuer}}, Response: http.Header{}}
	if diff := cmp.Diff(want, authorize("Bearer "+in+"."+encode(signature))); diff != "" {
		t.Errorf("with a token (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"x-cloister-iss", "x-cloister-scope", "x-cloister-sub"}, s.Headers()); diff != "" {
		t.Error(diff)
	}
}

func TestNoPlugins(t *testing.T) {
	s, err := Start(t.Context(), Config{Manifest: &workload.Manifest{}})
	if s != nil || err != nil {
		t.Errorf("%v, %v", s, err)
	}
}

// FuzzProxyRequest: the proxy connects to nothing but what is allowed, whatever a plugin writes.
func FuzzProxyRequest(f *testing.F) {
	f.Add([]byte("CONNECT a.example:1 HTTP/1.1\r\nHost: a\r\n\r\n"))
	f.Add([]byte("CONNECT b.example:1 HTTP/1.1\r\n\r\n"))
	f.Add([]byte("GET http://b.example:1/ HTTP/1.1\r\nHost: b\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &proxy{allowed: []string{"a.example:1"}, dial: func(_ context.Context, address string) (net.Conn, error) {
			if address != "a.example:1" {
				t.Errorf("it connects to %q", address)
			}
			return nil, errors.New("far enough")
		}}
		mine, theirs := net.Pipe()
		go func() {
			io.Copy(mine, bytes.NewReader(b))
			mine.Close()
		}()
		go io.Copy(io.Discard, mine)
		p.connect(t.Context(), theirs)
	})
}
