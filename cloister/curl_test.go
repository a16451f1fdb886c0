package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

const moduleID = "i-0123456789abcdef0-enc0123456789abcdef"

// fakeEnclave serves HTTPS with an attested certificate, as a gateway does, and counts the bytes of
// application data that reach it.
type fakeEnclave struct {
	addr     string
	root     string // file
	signer   *nsmdev.Signer
	received byteCount
}

// what a test changes about an enclave.
type enclaveOptions struct {
	pcrs      map[uint][]byte
	userData  string
	age       time.Duration
	otherKey  bool            // the document attests another key than the connection's
	plain     bool            // an ordinary certificate, without a document
	tunnel    func(*tls.Conn) // serves each connection instead of HTTP
	protocols []string        // that the tunnel chooses from
}

type byteCount struct {
	mu         sync.Mutex
	n          int
	handshakes int
	done       chan struct{} // gets one value per connection that has ended
}

// counted counts what is read from a connection after its handshake.
type counted struct {
	net.Conn
	c *byteCount
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.c.mu.Lock()
	c.c.n += n
	c.c.mu.Unlock()
	return n, err
}

// countedListener makes the handshake and counts what comes after it.
type countedListener struct {
	net.Listener
	config *tls.Config
	c      *byteCount
}

func (l countedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		t := tls.Server(c, l.config)
		if err := t.Handshake(); err != nil {
			t.Close()
			l.c.done <- struct{}{}
			continue
		}
		l.c.mu.Lock()
		l.c.handshakes++
		l.c.mu.Unlock()
		return counted{t, l.c}, nil
	}
}

// defaultPCRs are the registers that goodSet pins.
func defaultPCRs() map[uint][]byte {
	pcrs := map[uint][]byte{}
	for i := range uint(17) {
		pcrs[i] = bytes.Repeat([]byte{byte(0xa0 + i)}, workload.PCRSize)
	}
	return pcrs
}

func entry(label string, change func(*workload.Measurement)) workload.Measurement {
	pcrs := defaultPCRs()
	m := workload.Measurement{
		Label: label,
		PCR0:  hex.EncodeToString(pcrs[0]),
		PCR1:  hex.EncodeToString(pcrs[1]),
		PCR2:  hex.EncodeToString(pcrs[2]),
		PCR16: hex.EncodeToString(pcrs[16]),
	}
	if change != nil {
		change(&m)
	}
	return m
}

func startEnclave(t *testing.T, o enclaveOptions, handler http.Handler) *fakeEnclave {
	t.Helper()
	now := time.Now()
	certPEM, keyPEM, err := nsmdev.NewRoot(now.Add(-24 * time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	attested := key
	if o.otherKey {
		if attested, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	spki, err := x509.MarshalPKIXPublicKey(attested.Public())
	if err != nil {
		t.Fatal(err)
	}
	if o.pcrs == nil {
		o.pcrs = defaultPCRs()
	}
	if o.userData == "" {
		o.userData = attestation.UserDataServer
	}
	doc, err := signer.Sign(nsmdev.Document{
		ModuleID: moduleID, Timestamp: now.Add(-o.age), PCRs: o.pcrs, PublicKey: spki, UserData: []byte(o.userData),
	})
	if err != nil {
		t.Fatal(err)
	}
	der, err := attestation.NewCertificate(key, doc, now.Add(-time.Hour), now.Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if o.plain {
		template := &x509.Certificate{NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour)}
		if der, err = x509.CreateCertificate(rand.Reader, template, template, key.Public(), key); err != nil {
			t.Fatal(err)
		}
	}

	e := &fakeEnclave{signer: signer, root: filepath.Join(t.TempDir(), "root.pem")}
	if err := os.WriteFile(e.root, certPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e.addr = l.Addr().String()
	e.received.done = make(chan struct{}, 10)
	server := &http.Server{Handler: handler, TLSConfig: &tls.Config{
		MinVersion:   tls.VersionTLS13,
		NextProtos:   []string{"h2", "http/1.1"},
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
	}}
	// http.Server serves HTTP/2 only on a *tls.Conn, so the counter sits below TLS for requests that pass
	// and above it for those that must not be sent.
	go func() {
		if o.tunnel != nil {
			serveTunnel(countedListener{l, server.TLSConfig, &e.received}, o)
			return
		}
		if handler == nil {
			server.Handler = http.NotFoundHandler()
			server.Serve(countedListener{l, server.TLSConfig, &e.received})
			return
		}
		server.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() {
		l.Close()
		server.Close()
	})
	return e
}

// serveTunnel hands out streams, as a tcp port of a gateway does, which chooses no protocol.
func serveTunnel(l countedListener, o enclaveOptions) {
	l.config = l.config.Clone()
	l.config.NextProtos = o.protocols
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			o.tunnel(c.(counted).Conn.(*tls.Conn))
		}()
	}
}

func writeSet(t *testing.T, set ...workload.Measurement) string {
	t.Helper()
	b, err := json.Marshal(workload.MeasurementSet(set))
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "set.json", b)
}

func writeFile(t *testing.T, name string, b []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// result is what a call of the command gives.
type result struct {
	code           int
	stdout, stderr string
}

func call(t *testing.T, stdin string, args ...string) result {
	t.Helper()
	var out, err bytes.Buffer
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&out)
	root.SetErr(&err)
	code := execute(t.Context(), root)
	return result{code, out.String(), err.String()}
}

func (r result) want(t *testing.T, code int, inStderr ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, s := range inStderr {
		if !strings.Contains(r.stderr, s) {
			t.Errorf("stderr lacks %q", s)
		}
	}
	if t.Failed() {
		t.Logf("stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
	}
}

// describe answers with what the request was.
var describe = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.Header().Set("X-Test", "yes")
	switch r.URL.Path {
	case "/missing":
		w.WriteHeader(http.StatusNotFound)
	case "/elsewhere":
		http.Redirect(w, r, "/", http.StatusFound)
		return
	}
	if token := r.Header.Get("Authorization"); token != "" {
		fmt.Fprintf(w, "%s ", token)
	}
	fmt.Fprintf(w, "%s %s %s %s a=%s type=%s body=%s", r.Proto, r.Method, r.Host, r.URL.Path, r.Header.Get("A"), r.Header.Get("Content-Type"), body)
})

func TestCurl(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, describe)
	set := writeSet(t, entry("1.4.0", nil))
	base := []string{"curl", "--root", e.root, "--measurements", set, "--connect-to", e.addr}
	out := filepath.Join(t.TempDir(), "out")
	upload := writeFile(t, "upload", []byte("from\na file"))

	tests := map[string]struct {
		args   []string
		stdin  string
		code   int
		stdout string
	}{
		"http/2":    {args: []string{"https://shop.example/a"}, stdout: "HTTP/2.0 GET shop.example /a a= type= body="},
		"http/1.1":  {args: []string{"--http1.1", "https://shop.example/a"}, stdout: "HTTP/1.1 GET shop.example /a a= type= body="},
		"method":    {args: []string{"-X", "DELETE", "https://s/a"}, stdout: "HTTP/2.0 DELETE s /a a= type= body="},
		"header":    {args: []string{"-H", "A: b", "-H", "Host: other", "https://s/a"}, stdout: "HTTP/2.0 GET other /a a=b type= body="},
		"data":      {args: []string{"-d", "x=1", "-d", "y=2", "https://s/"}, stdout: "HTTP/2.0 POST s / a= type=application/x-www-form-urlencoded body=x=1&y=2"},
		"data type": {args: []string{"-d", "{}", "-H", "content-type: application/json", "-X", "PUT", "https://s/"}, stdout: "HTTP/2.0 PUT s / a= type=application/json body={}"},
		"data file": {args: []string{"-d", "@" + upload, "-d", "@-", "https://s/"}, stdin: "typed\n", stdout: "HTTP/2.0 POST s / a= type=application/x-www-form-urlencoded body=froma file&typed"},
		"not found": {args: []string{"https://s/missing"}, stdout: "HTTP/2.0 GET s /missing a= type= body="},
		"fail":      {args: []string{"-f", "https://s/missing"}, code: exitHTTPError},
		"redirect":  {args: []string{"https://s/elsewhere"}, stdout: "<a href=\"/\">Found</a>.\n\n"},
		"output":    {args: []string{"-o", out, "https://s/a"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, test.stdin, append(base, test.args...)...)
			r.want(t, test.code, "verified  label   1.4.0")
			if r.stdout != test.stdout {
				t.Errorf("stdout is %q, want %q", r.stdout, test.stdout)
			}
		})
	}
	if b, err := os.ReadFile(out); err != nil || !strings.HasPrefix(string(b), "HTTP/2.0 GET s /a") {
		t.Errorf("the output file has %q, %v", b, err)
	}
}

// The token reaches the verified enclave and nothing else.
func TestCurlBearerToken(t *testing.T) {
	const token = "eyJhbGciOiJFUzI1NiJ9.e30.c2ln-_~+/=="
	file := writeFile(t, "token", []byte(token+"\n"))
	e := startEnclave(t, enclaveOptions{}, describe)
	args := []string{"curl", "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "--connect-to", e.addr, "--bearer-token-file"}

	r := call(t, "", append(args, file, "-v", "https://s/a")...)
	r.want(t, 0, "> Authorization: [not shown]")
	if r.stdout != "Bearer "+token+" HTTP/2.0 GET s /a a= type= body=" {
		t.Errorf("stdout is %q", r.stdout)
	}
	if strings.Contains(r.stderr, token) {
		t.Errorf("the token is on stderr: %s", r.stderr)
	}
	if r := call(t, "", append(args, file, "-i", "https://s/elsewhere")...); !strings.HasPrefix(r.stdout, "HTTP/2.0 302 ") {
		t.Errorf("a redirect is followed: %q", r.stdout)
	}

	for name, content := range map[string]string{"empty": "\n", "two": token + "\n" + token, "with its scheme": "Bearer " + token, "header": token + "\r\nHost: other"} {
		r := call(t, "", append(args, writeFile(t, "bad", []byte(content)), "https://s/a")...)
		r.want(t, 1, "does not hold one bearer token")
		if strings.Contains(r.stderr, "eyJ") {
			t.Errorf("%s: the token is on stderr: %s", name, r.stderr)
		}
	}
	call(t, "", append(args, "/nonexistent", "https://s/a")...).want(t, 1, "no such file")
	call(t, "", append(args, file, "-H", "authorization: Basic eA==", "https://s/a")...).want(t, 2, "leave one out")
}

func TestCurlReport(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, describe)
	set := writeSet(t, entry("old", func(m *workload.Measurement) { m.PCR16 = strings.Repeat("00", 48) }), entry("new", nil))
	r := call(t, "", "curl", "--root", e.root, "--measurements", set, "-v", "-i", "https://"+e.addr+"/")
	r.want(t, 0)
	want := fmt.Sprintf(`verified  module  %s
verified  PCR0    %s
verified  PCR1    %s
verified  PCR2    %s
verified  PCR16   %s
verified  label   new
DEVELOPMENT, not a real enclave
`, moduleID, strings.Repeat("a0", 48), strings.Repeat("a1", 48), strings.Repeat("a2", 48), strings.Repeat("b0", 48))
	if !strings.HasPrefix(r.stderr, want) {
		t.Errorf("stderr is\n%s\nand should begin with\n%s", r.stderr, want)
	}
	r.want(t, 0, "document  use     \"cloister/1 tls-server\"", "document  PCR3    a3a3", "the host can read: stdout, stderr and termination message", "the host can read: who connects", "the host can change: ",
		"> GET / HTTP/2.0\r\n", "> User-Agent: cloister\r\n", "< HTTP/2.0 200 OK\r\n", "< X-Test: yes\r\n")
	if !strings.HasPrefix(r.stdout, "HTTP/2.0 200 OK\r\n") || !strings.Contains(r.stdout, "\r\n\r\nHTTP/2.0 GET") {
		t.Errorf("stdout is %q", r.stdout)
	}
}

// An answer without a length ends with its connection. Only the enclave may end it: a host that cuts the
// connection below TLS must not make a part of the answer pass for the whole.
func TestCurlCut(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(*tls.Conn) error
		code int
	}{
		"ended by the enclave": {(*tls.Conn).Close, 0},
		"cut on the way":       {func(c *tls.Conn) error { return c.NetConn().Close() }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			e := startEnclave(t, enclaveOptions{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\npay 10")
				test.end(c.(*tls.Conn))
			}))
			r := call(t, "", "curl", "--http1.1", "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "https://"+e.addr+"/")
			r.want(t, test.code)
			if test.code != 0 {
				r.want(t, test.code, "the connection was cut")
			}
		})
	}
}

// Two files are one set: during a rollout either entry is good.
func TestCurlTwoSets(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, describe)
	other := writeSet(t, entry("other", func(m *workload.Measurement) { m.PCR0 = strings.Repeat("00", 48) }))
	args := []string{"curl", "--root", e.root, "https://" + e.addr + "/", "--measurements", other}
	call(t, "", args...).want(t, 1)
	call(t, "", append(args, "--measurements", writeSet(t, entry("this", nil)))...).want(t, 0, "label   this")
}

// Whatever is wrong, nothing of the request leaves the client.
func TestCurlRefuses(t *testing.T) {
	flip := func(s string) string { return "f" + s[1:] }
	debug := defaultPCRs()
	for _, i := range []uint{0, 1, 2} {
		debug[i] = make([]byte, workload.PCRSize)
	}
	good := []workload.Measurement{entry("1.4.0", nil)}
	tests := map[string]struct {
		enclave enclaveOptions
		set     []workload.Measurement
		awsRoot bool
		args    []string
		want    []string
	}{
		"one register": {
			set: []workload.Measurement{entry("1.4.0", func(m *workload.Measurement) { m.PCR16 = flip(m.PCR16) })},
			want: []string{
				`not one byte of the request was sent: the enclave is not the measured one: it does not match "1.4.0"`,
				"\n  PCR16  expected  f0" + strings.Repeat("b0", 47) + "\n         seen      " + strings.Repeat("b0", 48) + "\n",
			},
		},
		"several registers": {
			set: []workload.Measurement{entry("", func(m *workload.Measurement) {
				m.PCR0, m.PCR2, m.PCR16 = flip(m.PCR0), flip(m.PCR2), flip(m.PCR16)
			})},
			want: []string{"  PCR0   expected  f0a0", "  PCR2   expected  f2a2", "  PCR16  expected  f0b0"},
		},
		"closest of two": {
			set: []workload.Measurement{
				entry("far", func(m *workload.Measurement) { m.PCR0, m.PCR16 = flip(m.PCR0), flip(m.PCR16) }),
				entry("near", func(m *workload.Measurement) { m.PCR16 = flip(m.PCR16) }),
			},
			want: []string{`it matches none of the 2 entries, the closest is "near"`, "PCR16"},
		},
		"register that is not shown": {
			set:     []workload.Measurement{entry("", func(m *workload.Measurement) { m.PCR8 = strings.Repeat("01", 48) })},
			enclave: enclaveOptions{pcrs: func() map[uint][]byte { p := defaultPCRs(); delete(p, 8); return p }()},
			want:    []string{"PCR8", "seen      not in the document"},
		},
		"AWS root":    {set: good, awsRoot: true, want: []string{"attestation refused (chain)"}},
		"other key":   {set: good, enclave: enclaveOptions{otherKey: true}, want: []string{"attestation refused (public_key)"}},
		"user_data":   {set: good, enclave: enclaveOptions{userData: attestation.UserDataClient}, want: []string{"attestation refused (user_data)"}},
		"too old":     {set: good, enclave: enclaveOptions{age: 20 * time.Minute}, want: []string{"attestation refused (age)"}},
		"max-age":     {set: good, enclave: enclaveOptions{age: time.Minute}, args: []string{"--max-age", "30s"}, want: []string{"attestation refused (age)", "at most 30s"}},
		"debug":       {set: []workload.Measurement{entry("", func(m *workload.Measurement) { m.PCR0, m.PCR1, m.PCR2 = hex.EncodeToString(debug[0]), "", "" })}, enclave: enclaveOptions{pcrs: debug}, want: []string{"attestation refused (debug)"}},
		"no document": {set: good, enclave: enclaveOptions{plain: true}, want: []string{"attestation refused (certificate)", "without an attestation document"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			e := startEnclave(t, test.enclave, nil)
			out := filepath.Join(t.TempDir(), "out")
			args := append([]string{"curl", "--measurements", writeSet(t, test.set...), "-d", "secret", "-o", out, "https://" + e.addr + "/secret"}, test.args...)
			if !test.awsRoot {
				args = append(args, "--root", e.root)
			}
			r := call(t, "", args...)
			r.want(t, 1, append(test.want, "not one byte of the request was sent: ")...)
			if r.stdout != "" || strings.Contains(r.stderr, "verified") {
				t.Errorf("a refused enclave gives output: %q, %q", r.stdout, r.stderr)
			}
			if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
				t.Error("an output file was made")
			}
			select {
			case <-e.received.done:
			case <-time.After(10 * time.Second):
				t.Fatal("the server has seen no failed handshake")
			}
			e.received.mu.Lock()
			defer e.received.mu.Unlock()
			if e.received.n != 0 || e.received.handshakes != 0 {
				t.Errorf("%d bytes in %d sessions reached the server", e.received.n, e.received.handshakes)
			}
		})
	}
}

// The counter of TestCurlRefuses does count.
func TestCountedServerCounts(t *testing.T) {
	e := startEnclave(t, enclaveOptions{}, nil)
	call(t, "", "curl", "--http1.1", "--root", e.root, "--measurements", writeSet(t, entry("", nil)), "-d", "secret", "https://"+e.addr+"/").want(t, 0)
	e.received.mu.Lock()
	defer e.received.mu.Unlock()
	if e.received.n == 0 || e.received.handshakes != 1 {
		t.Errorf("%d bytes in %d sessions were counted", e.received.n, e.received.handshakes)
	}
}

func TestCurlAllowDebug(t *testing.T) {
	pcrs := defaultPCRs()
	pcrs[0] = make([]byte, workload.PCRSize)
	e := startEnclave(t, enclaveOptions{pcrs: pcrs}, describe)
	set := writeSet(t, entry("", func(m *workload.Measurement) { m.PCR0 = hex.EncodeToString(pcrs[0]) }))
	call(t, "", "curl", "--allow-debug", "--root", e.root, "--measurements", set, "https://"+e.addr+"/").want(t, 0, "verified")
}

func TestCurlFailures(t *testing.T) {
	set := writeSet(t, entry("", nil))
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts and stays silent
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	codeOnly := writeFile(t, "code.json", fmt.Appendf(nil, `{"measurements":[{"PCR0":"%s"}]}`, strings.Repeat("a0", 48)))
	workloadOnly := writeFile(t, "workload.json", fmt.Appendf(nil, `{"measurements":[{"PCR16":"%s"}]}`, strings.Repeat("a0", 48)))
	url := "https://" + l.Addr().String() + "/"
	tests := map[string]struct {
		args []string
		code int
		want string
	}{
		"no measurements":   {[]string{url}, 2, "--measurements"},
		"http":              {[]string{"--measurements", set, "http://127.0.0.1/"}, 2, "no https:// URL"},
		"no scheme":         {[]string{"--measurements", set, "127.0.0.1"}, 2, "no https:// URL"},
		"no URL":            {[]string{"--measurements", set}, 2, "name URL and nothing else"},
		"unknown flag":      {[]string{"--insecure", url}, 2, "unknown flag"},
		"bad header":        {[]string{"--measurements", set, "-H", "x", url}, 2, "Name: value"},
		"bad connect-to":    {[]string{"--measurements", set, "--connect-to", "x", url}, 2, "HOST:PORT"},
		"pins code only":    {[]string{"--measurements", codeOnly, url}, 1, "pins no workload"},
		"pins no code":      {[]string{"--measurements", workloadOnly, url}, 1, "pins no code"},
		"no such set":       {[]string{"--measurements", "/nonexistent", url}, 1, "no such file"},
		"root is no PEM":    {[]string{"--measurements", set, "--root", set, url}, 1, "no PEM block"},
		"silence":           {[]string{"--measurements", set, "--max-time", "0.1", url}, 1, "did not answer in time"},
		"nobody listens":    {[]string{"--measurements", set, "--connect-to", "127.0.0.1:1", url}, 1, "connection refused"},
		"environment proxy": {[]string{"--measurements", set, "--connect-to", "127.0.0.1:1", "https://name.invalid/"}, 1, "connection refused"},
	}
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:2")
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			call(t, "", append([]string{"curl"}, test.args...)...).want(t, test.code, "cloister: ", test.want)
		})
	}
}

func TestCurlInterrupted(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if c, err := l.Accept(); err == nil {
			cancel()
			io.Copy(io.Discard, c)
		}
	}()
	root := newRoot()
	root.SetArgs([]string{"curl", "--measurements", writeSet(t, entry("", nil)), "https://" + l.Addr().String()})
	root.SetErr(io.Discard)
	if code := execute(ctx, root); code != 1 {
		t.Errorf("exit code %d", code)
	}
}
