package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spf13/pflag"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

// connectTimeout limits connecting, and then the TLS handshake.
const connectTimeout = 30 * time.Second

// trust is what the flags of every command that connects to an enclave say: which enclaves are accepted,
// and where they are.
type trust struct {
	measurements []string
	root         string
	maxAge       time.Duration
	allowDebug   bool
	connectTo    string
}

func (t *trust) flags(f *pflag.FlagSet) {
	f.StringArrayVar(&t.measurements, "measurements", nil, "measurement set `file`; repeatable, then an entry of any of them is accepted")
	f.StringVar(&t.root, "root", "", "PEM `file` with the root certificate that is trusted instead of AWS's: for development")
	f.DurationVar(&t.maxAge, "max-age", attestation.DefaultMaxAge, "oldest attestation document that is accepted")
	f.BoolVar(&t.allowDebug, "allow-debug", false, "accept an enclave in debug mode, which its host can read")
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
	return nil
}

// load reads the files that the flags name.
func (t *trust) load() (*attestation.Verifier, workload.MeasurementSet, error) {
	set, err := readMeasurements(t.measurements)
	if err != nil {
		return nil, nil, err
	}
	opts := attestation.Options{MaxAge: t.maxAge, AllowDebug: t.allowDebug, Measurements: set}
	if t.root != "" {
		pem, err := os.ReadFile(t.root)
		if err != nil {
			return nil, nil, err
		}
		if opts.Root, err = attestation.ParseRoot(pem); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", t.root, err)
		}
	}
	v, err := attestation.NewVerifier(opts)
	return v, set, err
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
