// Package logging is the built-in logging plugin: it takes what the workload writes to its standard output
// and error, line by line, replaces what must not leave the enclave, and hands the lines to the console, to
// an exporter of OTLP, or to both.
package logging

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	common "go.opentelemetry.io/proto/slim/otlp/common/v1"
	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
	resource "go.opentelemetry.io/proto/slim/otlp/resource/v1"

	"cloister.dev/cloister/enclaved/otlp"
)

const (
	// maxLine is the most of a line, in bytes, that is held back until its end is seen. A longer one goes
	// on in pieces. Where something must not leave it does not: whoever chooses a part of a line could move
	// the cut into the middle of a secret, which no expression matches then.
	maxLine = 64 << 10

	// Records are sent when there are batch of them, and at the latest after delay.
	batch = 512
	delay = 200 * time.Millisecond

	redacted = "[redacted]"
	scope    = "cloister.dev/logging"
)

// withheld stands for a line that is too long to be looked through.
var withheld = fmt.Appendf(nil, "[redacted: a line of more than %d bytes]\n", maxLine)

// Streams of a workload, as the attribute log.iostream has them (OpenTelemetry semantic conventions).
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// Exporter sends log records and never waits.
type Exporter interface {
	Logs(*logs.ResourceLogs)
}

// Config of the plugin.
type Config struct {
	// Redact is what is replaced in each line.
	Redact []*regexp.Regexp
	// Exporter is nil when the lines go to the console alone.
	Exporter Exporter
	// Silent keeps them from the console.
	Silent bool
	// Resource is what the records come from.
	Resource *resource.Resource
}

// Plugin is the plugin of one workload.
type Plugin struct {
	cfg     Config
	records otlp.Batch[*logs.LogRecord]
}

// New returns a plugin that holds nothing yet.
func New(cfg Config) *Plugin {
	return &Plugin{cfg: cfg, records: otlp.Batch[*logs.LogRecord]{Size: batch, Delay: delay, Send: func(records []*logs.LogRecord) {
		cfg.Exporter.Logs(&logs.ResourceLogs{
			Resource:  cfg.Resource,
			ScopeLogs: []*logs.ScopeLogs{{Scope: &common.InstrumentationScope{Name: scope}, LogRecords: records}},
		})
	}}}
}

// Start implements plugin.InProcess.
func (p *Plugin) Start() error { return nil }

// Shutdown implements plugin.InProcess: the exporter gets what is pending.
func (p *Plugin) Shutdown() { p.records.Flush() }

// Lines returns a writer for one stream of the workload. Console gets what may be seen there, in whole
// lines with their ends; its errors are Write's. Close hands on a last line without end.
func (p *Plugin) Lines(stream string, console io.Writer) io.WriteCloser {
	return &lines{plugin: p, stream: stream, console: console}
}

type lines struct {
	plugin  *Plugin
	stream  string
	console io.Writer
	rest    []byte // a line whose end has not come yet
	skip    bool   // the line is withheld, up to its end
}

func (l *lines) Write(b []byte) (int, error) {
	l.rest = append(l.rest, b...)
	used := 0
	var out []byte
	for used < len(l.rest) {
		text, n := l.next(l.rest[used:])
		if n == 0 {
			break
		}
		out = append(out, text...)
		used += n
	}
	l.rest = append(l.rest[:0], l.rest[used:]...)
	return len(b), l.print(out)
}

// next takes n bytes from the beginning of b and returns what may leave of them. It takes none when more
// must come first.
func (l *lines) next(b []byte) (out []byte, n int) {
	n = bytes.IndexByte(b, '\n') + 1
	switch {
	case l.skip && n == 0:
		return nil, len(b)
	case l.skip:
		l.skip = false
		return nil, n
	case n > 0:
		return l.plugin.line(l.stream, b[:n]), n
	case len(b) < maxLine:
		return nil, 0
	case len(l.plugin.cfg.Redact) > 0:
		l.skip = true
		return l.plugin.record(l.stream, withheld), len(b)
	}
	return l.plugin.line(l.stream, b[:maxLine]), maxLine
}

func (l *lines) Close() error {
	if len(l.rest) == 0 {
		return nil
	}
	out := l.plugin.line(l.stream, l.rest)
	l.rest = nil
	return l.print(out)
}

func (l *lines) print(out []byte) error {
	if len(out) == 0 || l.plugin.cfg.Silent {
		return nil
	}
	_, err := l.console.Write(out)
	return err
}

// line takes a line with its end and returns what may leave of it.
func (p *Plugin) line(stream string, line []byte) []byte {
	text, end := bytes.CutSuffix(line, []byte("\n"))
	for _, re := range p.cfg.Redact {
		text = re.ReplaceAllLiteral(text, []byte(redacted))
	}
	if end {
		text = append(text[:len(text):len(text)], '\n')
	}
	return p.record(stream, text)
}

// record exports a line that may leave, and returns it.
func (p *Plugin) record(stream string, line []byte) []byte {
	if p.cfg.Exporter != nil {
		now := uint64(time.Now().UnixNano())
		p.records.Add(&logs.LogRecord{
			TimeUnixNano: now, ObservedTimeUnixNano: now,
			Body:       str(strings.ToValidUTF8(strings.TrimSuffix(strings.TrimSuffix(string(line), "\n"), "\r"), "\uFFFD")),
			Attributes: []*common.KeyValue{{Key: "log.iostream", Value: str(stream)}},
		})
	}
	return line
}

func str(s string) *common.AnyValue {
	return &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: s}}
}
