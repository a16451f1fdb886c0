package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spf13/pflag"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
	"cloister.dev/cloister/workload/signed"
)

// connectTimeout limits connecting, and then the TLS handshake.
const connectTimeout = 30 * time.Second

// rules are what the flags of every command that verifies documents say: which enclaves are accepted.
type rules struct {
	measurements []string
	key          string // file
	root         string
	maxAge       time.Duration
	allowDebug   bool
}

func (r *rules) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&r.measurements, "measurements", nil, "measurement set `file`; repeatable, then an entry of any of them is accepted")
	f.Var((*named)(&r.key), "key", "PEM `file` with the public key that has signed the measurement sets; unsigned ones are then refused")
	f.StringVar(&r.root, "root", "", "PEM `file` with the root certificate that is trusted instead of AWS's: for development")
	f.DurationVar(&r.maxAge, "max-age", attestation.DefaultMaxAge, "oldest attestation document that is accepted")
	f.BoolVar(&r.allowDebug, "allow-debug", false, "accept an enclave in debug mode, which its host can read")
}

// named is a flag with the name of a file without which less is demanded, signed or sealed. An empty name, as an
// unset variable of a script leaves it, must not mean that the flag is not there.
type named string

func (n *named) String() string { return string(*n) }
func (n *named) Type() string   { return "file" }

func (n *named) Set(s string) error {
	if s == "" {
		return errors.New("the name is empty: name a file, or leave the flag out")
	}
	*n = named(s)
	return nil
}

// check reports errors of usage.
func (r *rules) check() error {
	if r.maxAge <= 0 {
		return fmt.Errorf("--max-age %s accepts no document: write more than 0", r.maxAge)
	}
	if r.key != "" && len(r.measurements) == 0 {
		return errors.New("--key is of measurement sets: name them with --measurements")
	}
	return nil
}

// options reads the files that the flags name.
func (r *rules) options() (attestation.Options, error) {
	opts := attestation.Options{MaxAge: r.maxAge, AllowDebug: r.allowDebug}
	var err error
	if opts.Measurements, err = readMeasurements(r.measurements, r.key); err != nil {
		return opts, err
	}
	if r.root != "" {
		pem, err := os.ReadFile(r.root)
		if err != nil {
			return opts, err
		}
		if opts.Root, err = attestation.ParseRoot(pem); err != nil {
			return opts, fmt.Errorf("%s: %w", r.root, err)
		}
	}
	return opts, nil
}

// trust is what the flags of every command that connects to an enclave say: which enclaves are accepted,
// and where they are.
type trust struct {
	rules
	connectTo string
}

func (t *trust) flags(f *pflag.FlagSet) {
	t.rules.flags(f)
	f.StringVar(&t.connectTo, "connect-to", "", "connect to `HOST:PORT` instead of what the URL names")
}

// check reports errors of usage.
func (t *trust) check() error {
	if len(t.measurements) == 0 {
		return errors.New("name the measurement set with --measurements: without it nothing says which code may answer; `cloister measure -f FILE --eif FILE` prints one")
	}
	if _, _, err := net.SplitHostPort(t.connectTo); t.connectTo != "" && err != nil {
		return fmt.Errorf("--connect-to takes HOST:PORT: %w", err)
	}
	return t.rules.check()
}

// load reads the files that the flags name.
func (t *trust) load() (*attestation.Verifier, workload.MeasurementSet, error) {
	opts, err := t.options()
	if err != nil {
		return nil, nil, err
	}
	v, err := attestation.NewVerifier(opts)
	return v, opts.Measurements, err
}

// dial connects to addr, or to what --connect-to names.
func (t *trust) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if t.connectTo != "" {
		addr = t.connectTo
	}
	c, err := (&net.Dialer{Timeout: connectTimeout}).DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return untrusted{c}, nil
}

var errCut = errors.New("the connection was cut: it ended without TLS's close_notify, so what came may be a part")

// untrusted is a connection whose end proves nothing, since the host can end it: only close_notify inside
// TLS does (RFC 8446, section 6.1). crypto/tls takes io.EOF between two records for a proper end.
type untrusted struct{ net.Conn }

func (u untrusted) Read(b []byte) (int, error) {
	n, err := u.Conn.Read(b)
	if err == io.EOF {
		err = errCut
	}
	return n, err
}

// readMeasurements reads sets, signed ones if keyFile names the key of their signer.
func readMeasurements(files []string, keyFile string) (workload.MeasurementSet, error) {
	var key crypto.PublicKey
	if keyFile != "" {
		var err error
		if key, err = readPublicKey(keyFile); err != nil {
			return nil, err
		}
	}
	var set workload.MeasurementSet
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		s, err := parseMeasurements(b, key)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		set = append(set, s...)
	}
	return set, nil
}

// parseMeasurements reads a set that key has signed, or an unsigned one if key is nil.
func parseMeasurements(b []byte, key crypto.PublicKey) (workload.MeasurementSet, error) {
	set, err := signed.Parse(b, key)
	switch {
	case errors.Is(err, signed.ErrSigned):
		return nil, fmt.Errorf("%w: name the public key of its signer with --key", err)
	case errors.Is(err, signed.ErrUnsigned):
		return nil, fmt.Errorf("%w, and with --key only signed ones count: have it signed with `cloister sign`, or, where the file itself is trusted, use it without --key", err)
	}
	return set, err
}

func readPublicKey(file string) (crypto.PublicKey, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	key, err := signed.ParsePublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return key, nil
}
