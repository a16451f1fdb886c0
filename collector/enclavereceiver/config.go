package enclavereceiver

import (
	"crypto"
	"errors"
	"fmt"
	"os"
	"time"

	"go.opentelemetry.io/collector/component"
	"go.opentelemetry.io/collector/config/configgrpc"
	"go.opentelemetry.io/collector/config/configoptional"
	"go.opentelemetry.io/collector/confmap"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload/signed"
)

const (
	defaultEndpoint = "localhost:4317"

	// A connection is ended gracefully after this long, so that an enclave shows a new document before
	// the one that it connected with is too old: enclaves renew theirs every 5 minutes, and gRPC adds up
	// to a tenth.
	connectionAge   = 8 * time.Minute
	connectionGrace = time.Minute
)

// Config is the receiver's configuration.
type Config struct {
	// ServerConfig is that of every gRPC receiver. TLS must be set, with the server's certificate and
	// without authorities for clients.
	configgrpc.ServerConfig `mapstructure:",squash"`
	// Measurements is a file with the measurement set that enclaves must match, as `cloister measure`
	// prints it.
	Measurements string `mapstructure:"measurements"`
	// MeasurementsKey is a PEM file with the public key that has signed the set (`cloister sign`). Without
	// it the set must be unsigned.
	MeasurementsKey string `mapstructure:"measurements_key"`
	// Root is a PEM file with the root certificate of attestation documents, instead of AWS's.
	Root string `mapstructure:"root"`
	// MaxAge is the oldest document that is accepted.
	MaxAge time.Duration `mapstructure:"max_age"`
	// AllowDebug accepts enclaves in debug mode, which their host can read.
	AllowDebug bool `mapstructure:"allow_debug"`
}

func createDefaultConfig() component.Config {
	c := &Config{ServerConfig: configgrpc.NewDefaultServerConfig(), MaxAge: attestation.DefaultMaxAge}
	c.NetAddr.Endpoint = defaultEndpoint
	keepalive := configgrpc.NewDefaultKeepaliveServerConfig()
	parameters := configgrpc.NewDefaultKeepaliveServerParameters()
	parameters.MaxConnectionAge, parameters.MaxConnectionAgeGrace = connectionAge, connectionGrace
	keepalive.ServerParameters = configoptional.Some(parameters)
	c.Keepalive = configoptional.Some(keepalive)
	return c
}

// Unmarshal implements confmap.Unmarshaler. A measurements_key without a value, as an unset variable of the
// environment leaves it, must not mean that nobody need have signed.
func (c *Config) Unmarshal(conf *confmap.Conf) error {
	if err := conf.Unmarshal(c); err != nil {
		return err
	}
	if conf.IsSet("measurements_key") && c.MeasurementsKey == "" {
		return errors.New("measurements_key is empty: set the file with the public key, or leave it out")
	}
	return nil
}

// Validate implements component.Config.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.NetAddr.Endpoint == "" {
		bad("endpoint is empty: set the address to listen on, such as 0.0.0.0:4317")
	}
	if !c.TLS.HasValue() || c.TLS.Get().CertFile == "" && len(c.TLS.Get().CertPem) == 0 {
		bad("tls has no certificate: set cert_file and key_file, which enclaves check against the ca of their plugin")
	} else if c.TLS.Get().ClientCAFile != "" {
		bad("tls.client_ca_file must not be set: enclaves have no authority, measurements and root decide")
	}
	if c.Measurements == "" {
		bad("measurements is empty: set the file with the measurement set that enclaves must match (cloister measure)")
	}
	if c.MaxAge <= 0 {
		bad("max_age must be positive")
	}
	return errors.Join(errs...)
}

// verifier reads the files.
func (c *Config) verifier() (*attestation.ClientVerifier, error) {
	b, err := os.ReadFile(c.Measurements)
	if err != nil {
		return nil, fmt.Errorf("read measurements: %w", err)
	}
	opts := attestation.Options{MaxAge: c.MaxAge, AllowDebug: c.AllowDebug}
	var key crypto.PublicKey
	if c.MeasurementsKey != "" {
		file, err := os.ReadFile(c.MeasurementsKey)
		if err != nil {
			return nil, fmt.Errorf("read measurements_key: %w", err)
		}
		if key, err = signed.ParsePublicKey(file); err != nil {
			return nil, fmt.Errorf("%s: %w", c.MeasurementsKey, err)
		}
	}
	opts.Measurements, err = signed.Parse(b, key)
	switch {
	case errors.Is(err, signed.ErrSigned):
		return nil, fmt.Errorf("%s: %w: set measurements_key to the file with the public key of its signer", c.Measurements, err)
	case errors.Is(err, signed.ErrUnsigned):
		return nil, fmt.Errorf("%s: %w, and with measurements_key only a signed one counts: have it signed with cloister sign", c.Measurements, err)
	case err != nil:
		return nil, fmt.Errorf("%s: %w", c.Measurements, err)
	}
	if c.Root != "" {
		if b, err = os.ReadFile(c.Root); err != nil {
			return nil, fmt.Errorf("read root: %w", err)
		}
		if opts.Root, err = attestation.ParseRoot(b); err != nil {
			return nil, fmt.Errorf("%s: %w", c.Root, err)
		}
	}
	return attestation.NewClientVerifier(opts)
}
