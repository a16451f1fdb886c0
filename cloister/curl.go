package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

const (
	connectTimeout = 30 * time.Second

	// exitHTTPError is curl's exit code for --fail and a status of 400 or above.
	exitHTTPError = 22
)

type curl struct {
	measurements []string
	root         string
	maxAge       time.Duration
	allowDebug   bool

	connectTo string
	http11    bool
	maxTime   float64

	method  string
	headers []string
	data    []string
	output  string
	include bool
	fail    bool
	verbose bool
}

func newCurl() *cobra.Command {
	var c curl
	cmd := &cobra.Command{
		Use:   "curl --measurements FILE [flags] URL",
		Short: "Send an HTTP request to an enclave that proves what it runs",
		Long: `Connects, checks in the TLS handshake that the other end is an enclave with one of the given
measurements, and only then sends the request. It prints the body on stdout and what was verified on
stderr. Options that curl has too mean what they mean there.`,
		Example: `  cloister curl --measurements measurements.json https://shop.example/
  cloister curl --measurements measurements.json --root dev-root.pem --connect-to 127.0.0.1:8443 https://shop/`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := c.request(cmd.Context(), args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			if len(c.measurements) == 0 {
				return errors.New("name the measurement set with --measurements: without it nothing says which code may answer; `cloister measure -f FILE --eif FILE` prints one")
			}
			if _, _, err := net.SplitHostPort(c.connectTo); c.connectTo != "" && err != nil {
				return fmt.Errorf("--connect-to takes HOST:PORT: %w", err)
			}
			return c.run(req, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&c.measurements, "measurements", nil, "measurement set `file`; repeatable, then an entry of any of them is accepted")
	f.StringVar(&c.root, "root", "", "PEM `file` with the root certificate that is trusted instead of AWS's: for development")
	f.DurationVar(&c.maxAge, "max-age", attestation.DefaultMaxAge, "oldest attestation document that is accepted")
	f.BoolVar(&c.allowDebug, "allow-debug", false, "accept an enclave in debug mode, which its host can read")
	f.StringVar(&c.connectTo, "connect-to", "", "connect to `HOST:PORT` instead of what the URL names")
	f.BoolVar(&c.http11, "http1.1", false, "use HTTP/1.1")
	f.Float64Var(&c.maxTime, "max-time", 0, "most `seconds` that the whole may take")
	f.StringVarP(&c.method, "request", "X", "", "request `method` (default GET, with -d POST)")
	f.StringArrayVarP(&c.headers, "header", "H", nil, "request header `\"Name: value\"`; repeatable")
	f.StringArrayVarP(&c.data, "data", "d", nil, "request body; @FILE reads a file, @- standard input; several are joined with &")
	f.StringVarP(&c.output, "output", "o", "", "write the body to `file`")
	f.BoolVarP(&c.include, "include", "i", false, "print the response's status and headers too")
	f.BoolVarP(&c.fail, "fail", "f", false, "print no body and exit 22 when the status is 400 or above")
	f.BoolVarP(&c.verbose, "verbose", "v", false, "print the headers, the attestation document and what the host can do on stderr")
	return cmd
}

// request makes the request of the command line. Its errors are errors of usage.
func (c *curl) request(ctx context.Context, arg string, stdin io.Reader) (*http.Request, error) {
	u, err := url.Parse(arg)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%s is no https:// URL, and only TLS can prove which code answers", arg)
	}
	method, body := c.method, io.Reader(http.NoBody)
	if len(c.data) > 0 {
		data, err := readData(c.data, stdin)
		if err != nil {
			return nil, err
		}
		body = strings.NewReader(data)
		if method == "" {
			method = http.MethodPost
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "cloister")
	req.Header.Set("Accept", "*/*")
	if len(c.data) > 0 {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	given := http.Header{}
	for _, h := range c.headers {
		name, value, ok := strings.Cut(h, ":")
		if !ok || name == "" {
			return nil, fmt.Errorf("header %q is not of the form \"Name: value\"", h)
		}
		given.Add(name, strings.TrimSpace(value))
	}
	for name, values := range given {
		req.Header[name] = values
	}
	if host := given.Get("Host"); host != "" {
		req.Host = host
	}
	return req, nil
}

// readData joins the values of -d as curl does.
func readData(values []string, stdin io.Reader) (string, error) {
	parts := make([]string, len(values))
	for i, v := range values {
		file, ok := strings.CutPrefix(v, "@")
		if !ok {
			parts[i] = v
			continue
		}
		b, err := readInput(file, stdin)
		if err != nil {
			return "", err
		}
		parts[i] = strings.NewReplacer("\r", "", "\n", "").Replace(string(b))
	}
	return strings.Join(parts, "&"), nil
}

// run sends the request and prints what comes back.
func (c *curl) run(req *http.Request, stdout, stderr io.Writer) error {
	set, err := readMeasurements(c.measurements)
	if err != nil {
		return failed(err)
	}
	opts := attestation.Options{MaxAge: c.maxAge, AllowDebug: c.allowDebug, Measurements: set}
	if c.root != "" {
		pem, err := os.ReadFile(c.root)
		if err != nil {
			return failed(err)
		}
		if opts.Root, err = attestation.ParseRoot(pem); err != nil {
			return failed(fmt.Errorf("%s: %w", c.root, err))
		}
	}
	verifier, err := attestation.NewVerifier(opts)
	if err != nil {
		return failed(err)
	}

	ctx := req.Context()
	if c.maxTime > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(c.maxTime*float64(time.Second)))
		defer cancel()
	}
	res, err := c.client(verifier).Do(req.WithContext(ctx))
	if err != nil {
		return failed(explain(err))
	}
	defer res.Body.Close()
	// From the verifier's cache: the handshake would have failed otherwise.
	document, err := verifier.Document(*res.TLS)
	if err != nil {
		return failed(err)
	}
	entry, err := set.Match(document.PCRs)
	if err != nil {
		return failed(err)
	}
	printVerified(stderr, document, entry)
	if c.verbose {
		printDocument(stderr, document, time.Now())
	}
	return c.print(req, res, stdout, stderr)
}

func readMeasurements(files []string) (workload.MeasurementSet, error) {
	var set workload.MeasurementSet
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		s, err := workload.ParseMeasurements(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		set = append(set, s...)
	}
	return set, nil
}

func (c *curl) client(v *attestation.Verifier) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(!c.http11)
	offer := []string{"h2", "http/1.1"}
	if c.http11 {
		offer = offer[1:] // http.Transport offers nothing here by itself
	}
	dialer := &net.Dialer{Timeout: connectTimeout}
	return &http.Client{
		Transport: &http.Transport{
			// No proxy of the environment: it would be one more party that chooses who answers.
			DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
				if c.connectTo != "" {
					addr = c.connectTo
				}
				conn, err := dialer.DialContext(ctx, network, addr)
				if err != nil {
					return nil, err
				}
				return wholeConn{conn}, nil
			},
			TLSClientConfig:     v.ClientConfig(&tls.Config{NextProtos: offer}),
			TLSHandshakeTimeout: connectTimeout,
			Protocols:           protocols,
			DisableCompression:  true, // the body as it is
			DisableKeepAlives:   true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// errCut is the end of a connection that TLS's close_notify did not announce.
var errCut = errors.New("the connection was cut: the enclave did not end it")

// wholeConn is a connection below TLS that only the enclave can end. crypto/tls takes io.EOF between two
// records for the end of the data, but anybody on the way can make one (RFC 8446, section 6.1), and a part
// of an answer that ends with its connection would pass for the whole.
type wholeConn struct{ net.Conn }

func (c wholeConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err == io.EOF {
		err = errCut
	}
	return n, err
}

// explain turns an error of http.Client into a sentence.
func explain(err error) error {
	if refused, ok := refusal(err); ok {
		return refused
	}
	var u *url.Error
	if errors.As(err, &u) {
		if u.Timeout() {
			return fmt.Errorf("%s did not answer in time: %w", u.URL, u.Err)
		}
		return fmt.Errorf("ask %s: %w", u.URL, u.Err)
	}
	return err
}

func (c *curl) print(req *http.Request, res *http.Response, stdout, stderr io.Writer) error {
	if c.verbose {
		printHeaders(stderr, "> ", fmt.Sprintf("%s %s %s", req.Method, req.URL.RequestURI(), res.Proto), req.Header)
		printHeaders(stderr, "< ", res.Proto+" "+res.Status, res.Header)
	}
	if c.fail && res.StatusCode >= 400 {
		return failure{exitHTTPError, fmt.Errorf("%s answers %s", req.URL, res.Status)}
	}
	out := stdout
	if c.output != "" {
		f, err := os.Create(c.output)
		if err != nil {
			return failed(err)
		}
		defer f.Close()
		out = f
	}
	if c.include {
		printHeaders(out, "", res.Proto+" "+res.Status, res.Header)
	}
	if _, err := io.Copy(out, res.Body); err != nil {
		return failed(fmt.Errorf("read the body: %w", err))
	}
	return nil
}

// printHeaders prints a first line and headers as HTTP/1.1 has them, each line after prefix.
func printHeaders(w io.Writer, prefix, first string, h http.Header) {
	var b strings.Builder
	b.WriteString(first + "\r\n")
	h.Write(&b) // to memory: no error
	for line := range strings.Lines(b.String() + "\r\n") {
		fmt.Fprint(w, prefix+line)
	}
}
