package workload

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"regexp"
	"regexp/syntax"
)

// LogsOTLP as Manifest.Logs keeps the workload's output from the console: it leaves the enclave through
// the logging plugin alone.
const LogsOTLP = "otlp"

// TelemetryPort is where the telemetry plugin takes the workload's own OTLP over gRPC, on the loopback
// device: the port that every SDK tries unless told otherwise.
const TelemetryPort = 4317

const (
	maxRedactions = 64
	maxRedaction  = 4096 // bytes of one expression
	// maxSteps bounds all expressions together: one of ten bytes can ask for a program of megabytes, in
	// the webhook too, which compiles what anybody writes.
	maxSteps = 16 << 10
)

// OTLP says where telemetry goes: to a server of OTLP over gRPC, such as the collector's receiver for
// enclaves. The connection is TLS, and the enclave shows its attested certificate.
type OTLP struct {
	// Endpoint is "host:port".
	Endpoint string `json:"endpoint"`
	// CA holds PEM certificates of the authorities that the server's certificate may be of. It must be
	// for the endpoint's host.
	CA string `json:"ca"`
}

// Host is the endpoint's name or address.
func (c *OTLP) Host() string {
	host, _, _ := net.SplitHostPort(c.Endpoint)
	return host
}

// Authorities returns the certificates of CA.
func (c *OTLP) Authorities() (*x509.CertPool, error) {
	pool, err := parsePool(c.CA)
	if err != nil {
		return nil, fmt.Errorf("ca must hold the certificate of the server's authority: %w", err)
	}
	return pool, nil
}

// Validate implements PluginConfig.
func (c *OTLP) Validate() error { return errors.Join(c.problems()...) }

func (c *OTLP) problems() (errs []error) {
	if _, _, err := ParseEndpoint(c.Endpoint); err != nil {
		errs = append(errs, fmt.Errorf("endpoint %q: %w", c.Endpoint, err))
	}
	if _, err := c.Authorities(); err != nil {
		errs = append(errs, err)
	}
	return errs
}

// Endpoints implements PluginConfig.
func (c *OTLP) Endpoints() []string { return []string{c.Endpoint} }

// Redaction is what no line of the workload's output takes out of the enclave.
type Redaction struct {
	// Redact are regular expressions in RE2's syntax; what they match in a line is replaced, wherever
	// the line goes.
	Redact []string `json:"redact,omitempty"`
}

// Expressions returns the compiled expressions.
func (r *Redaction) Expressions() ([]*regexp.Regexp, error) {
	out, errs := r.compile()
	return out, errors.Join(errs...)
}

func (r *Redaction) compile() (out []*regexp.Regexp, errs []error) {
	if len(r.Redact) > maxRedactions {
		return nil, []error{fmt.Errorf("redact has %d expressions, at most %d are accepted", len(r.Redact), maxRedactions)}
	}
	total := 0
	for i, text := range r.Redact {
		if text == "" || len(text) > maxRedaction {
			errs = append(errs, errRedaction(i))
			continue
		}
		tree, err := syntax.Parse(text, syntax.Perl)
		if err != nil {
			errs = append(errs, fmt.Errorf("redact[%d] is not a regular expression: %w", i, err))
			continue
		}
		if total += steps(tree); total > maxSteps {
			return nil, append(errs, fmt.Errorf("redact[%d] makes the expressions too large, with about %d steps of at most %d: repeat less with {}", i, total, maxSteps))
		}
		re, err := regexp.Compile(text)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("redact[%d] is not a regular expression: %w", i, err))
		case re.MatchString(""):
			errs = append(errs, errRedaction(i))
		default:
			out = append(out, re)
		}
	}
	return out, errs
}

func errRedaction(i int) error {
	return fmt.Errorf("redact[%d] must match something, and be of at most %d bytes", i, maxRedaction)
}

// steps is about how many instructions an expression compiles to. Parsing bounds it: what repetitions in
// each other make together is at most 1000 (regexp/syntax).
func steps(re *syntax.Regexp) int {
	n := 1 + len(re.Rune)/8 // letters, or the ranges of a class, which are smaller than instructions
	for _, sub := range re.Sub {
		n += steps(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1)
	}
	return n
}

// LoggingStdout is the config of the built-in logging plugin "stdout", which prints the workload's output
// on the console.
type LoggingStdout struct{ Redaction }

// Validate implements PluginConfig.
func (c *LoggingStdout) Validate() error {
	_, err := c.Expressions()
	return err
}

// Endpoints implements PluginConfig.
func (c *LoggingStdout) Endpoints() []string { return nil }

// LoggingOTLP is the config of the built-in logging plugin "otlp", which sends the workload's output as
// log records, and prints it on the console too unless Manifest.Logs says otherwise.
type LoggingOTLP struct {
	OTLP
	Redaction
}

// Validate implements PluginConfig.
func (c *LoggingOTLP) Validate() error {
	_, errs := c.compile()
	return errors.Join(append(c.problems(), errs...)...)
}

// TelemetryOTLP is the config of the built-in telemetry plugin "otlp".
type TelemetryOTLP struct{ OTLP }

// Plugin returns the only plugin of a type that there can be one of, nil if there is none.
func (m *Manifest) Plugin(pluginType string) *Plugin {
	for i := range m.Plugins {
		if m.Plugins[i].Type == pluginType {
			return &m.Plugins[i]
		}
	}
	return nil
}

// validateTelemetry checks what logging and telemetry plugins have beyond the others.
func (m *Manifest) validateTelemetry(bad func(string, ...any)) {
	count := map[string]int{}
	for _, p := range m.Plugins {
		if p.Type != PluginLogging && p.Type != PluginTelemetry {
			continue
		}
		if count[p.Type]++; count[p.Type] == 2 {
			bad("there is more than one plugin of type %s: leave one", p.Type)
		}
		if p.Required {
			bad("plugin %q: required is not for the type %s, which never holds the workload up", p.Name, p.Type)
		}
		if len(p.Egress) > 0 {
			bad("plugin %q: egress is not for the type %s: its config names all that it reaches", p.Name, p.Type)
		}
	}
	for _, port := range m.Ports {
		if port.Port == TelemetryPort && count[PluginTelemetry] > 0 {
			bad("port %d is where the telemetry plugin takes the workload's own telemetry: serve another port", TelemetryPort)
		}
	}
	switch p := m.Plugin(PluginLogging); {
	case m.Logs == "":
	case m.Logs != LogsOTLP:
		bad("logs %q must be %s, or left out for the console", m.Logs, LogsOTLP)
	case p == nil || p.Builtin != "otlp":
		bad("logs is %s, and no logging plugin otlp would send them: add one, or remove logs", LogsOTLP)
	}
}
