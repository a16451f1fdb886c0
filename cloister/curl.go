package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
)

// exitHTTPError is curl's exit code for --fail and a status of 400 or above.
const exitHTTPError = 22

type curl struct {
	trust
	http11  bool
	maxTime float64

	method  string
	headers []string
	token   string // file
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
stderr. Options that curl has too mean what they mean there.

A token comes from a file, so that it is in no list of processes and in no shell's history. It is sent
only to the enclave that was verified: redirects are shown, not followed.`,
		Example: `  cloister curl --measurements measurements.json https://shop.example/
  cloister curl --measurements measurements.json --root dev-root.pem --connect-to 127.0.0.1:8443 https://shop/
  cloister curl --measurements measurements.json --bearer-token-file token https://shop.example/orders`,
		Args: exactly("URL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			req, err := c.request(cmd.Context(), args[0], cmd.InOrStdin())
			if err != nil {
				return err
			}
			if err := c.check(); err != nil {
				return err
			}
			return c.run(req, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f := cmd.Flags()
	c.flags(f)
	f.BoolVar(&c.http11, "http1.1", false, "use HTTP/1.1")
	f.Float64Var(&c.maxTime, "max-time", 0, "most `seconds` that the whole may take")
	f.StringVarP(&c.method, "request", "X", "", "request `method` (default GET, with -d POST)")
	f.StringArrayVarP(&c.headers, "header", "H", nil, "request header `\"Name: value\"`; repeatable")
	f.StringVar(&c.token, "bearer-token-file", "", "`file` with a token for the header Authorization (RFC 6750)")
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
	if c.token != "" && given.Get("Authorization") != "" {
		return nil, errors.New("--bearer-token-file and -H set the same header, Authorization: leave one out")
	}
	return req, nil
}

// bearerToken is a token in the syntax of RFC 6750, section 2.1.
var bearerToken = regexp.MustCompile(`^[A-Za-z0-9._~+/-]+=*$`)

// readToken reads a bearer token. Its errors never show what the file holds.
func readToken(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if !bearerToken.MatchString(token) {
		return "", fmt.Errorf("%s does not hold one bearer token: write the token alone, without \"Bearer\" or quotes, into the file", file)
	}
	return token, nil
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
	verifier, set, err := c.load()
	if err != nil {
		return failed(err)
	}
	if c.token != "" {
		token, err := readToken(c.token)
		if err != nil {
			return failed(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
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

func (c *curl) client(v *attestation.Verifier) *http.Client {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(!c.http11)
	offer := []string{"h2", "http/1.1"}
	if c.http11 {
		offer = offer[1:] // http.Transport offers nothing here by itself
	}
	return &http.Client{
		Transport: &http.Transport{
			// No proxy of the environment: it would be one more party that chooses who answers.
			DialContext:         c.dial,
			TLSClientConfig:     v.ClientConfig(&tls.Config{NextProtos: offer}),
			TLSHandshakeTimeout: connectTimeout,
			Protocols:           protocols,
			DisableCompression:  true, // the body as it is
			DisableKeepAlives:   true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
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
		sent := req.Header.Clone()
		if sent.Get("Authorization") != "" {
			sent.Set("Authorization", "[not shown]")
		}
		printHeaders(stderr, "> ", fmt.Sprintf("%s %s %s", req.Method, req.URL.RequestURI(), res.Proto), sent)
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
