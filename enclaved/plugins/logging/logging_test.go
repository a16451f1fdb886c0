package logging

import (
	"bytes"
	"errors"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	logs "go.opentelemetry.io/proto/slim/otlp/logs/v1"
)

// sent remembers the bodies of what was exported, one list for each call.
type sent struct {
	mu    sync.Mutex // flushes come from a timer too
	calls [][]string
}

func (s *sent) Logs(r *logs.ResourceLogs) {
	var bodies []string
	for _, record := range r.GetScopeLogs()[0].GetLogRecords() {
		bodies = append(bodies, record.GetAttributes()[0].GetValue().GetStringValue()+": "+record.GetBody().GetStringValue())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls = append(s.calls, bodies)
}

// snapshot returns the calls so far.
func (s *sent) snapshot() [][]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

func (s *sent) all() (out []string) {
	for _, c := range s.snapshot() {
		out = append(out, c...)
	}
	return out
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	for name, tt := range map[string]struct {
		writes  []string
		redact  string
		silent  bool
		console string
		records []string
	}{
		"lines":              {writes: []string{"one\ntwo\n"}, console: "one\ntwo\n", records: []string{"one", "two"}},
		"in pieces":          {writes: []string{"o", "ne\nt", "wo", "\n"}, console: "one\ntwo\n", records: []string{"one", "two"}},
		"without an end":     {writes: []string{"one\nlast"}, console: "one\nlast", records: []string{"one", "last"}},
		"empty line":         {writes: []string{"\n\n"}, console: "\n\n", records: []string{"", ""}},
		"of Windows":         {writes: []string{"one\r\n"}, console: "one\r\n", records: []string{"one"}},
		"silent":             {writes: []string{"one\n"}, silent: true, records: []string{"one"}},
		"redacted":           {writes: []string{"a token=5ecr3t b token=other\n"}, redact: `token=\S+`, console: "a [redacted] b [redacted]\n", records: []string{"a [redacted] b [redacted]"}},
		"redacted in pieces": {writes: []string{"token=5e", "cr3t"}, redact: `token=5ecr3t`, console: "[redacted]", records: []string{"[redacted]"}},
		"longer than a line": {writes: []string{long, "y\n"}, console: long + "y\n", records: []string{long, "y"}},
		"longer than can be looked through": {
			// Neither piece would have matched.
			writes: []string{long[:maxLine-8] + "token=5e", "cr3t", " x\ny\n" + long, long + "\nz"}, redact: `token=5ecr3t`,
			console: string(withheld) + "y\n" + string(withheld) + "z",
			records: []string{"[redacted: a line of more than 65536 bytes]", "y", "[redacted: a line of more than 65536 bytes]", "z"},
		},
		"long and whole": {writes: []string{long + "token=5ecr3t\n"}, redact: `token=5ecr3t`, console: long + "[redacted]\n", records: []string{long + "[redacted]"}},
		"not UTF-8":      {writes: []string{"a\xffb\n"}, console: "a\xffb\n", records: []string{"a\uFFFDb"}},
	} {
		t.Run(name, func(t *testing.T) {
			exporter := &sent{}
			cfg := Config{Exporter: exporter, Silent: tt.silent}
			if tt.redact != "" {
				cfg.Redact = []*regexp.Regexp{regexp.MustCompile(tt.redact)}
			}
			p := New(cfg)
			if err := p.Start(); err != nil {
				t.Fatal(err)
			}
			var console bytes.Buffer
			w := p.Lines(Stderr, &console)
			for _, text := range tt.writes {
				if n, err := w.Write([]byte(text)); n != len(text) || err != nil {
					t.Errorf("Write returned %d, %v", n, err)
				}
			}
			if err := w.Close(); err != nil {
				t.Error(err)
			}
			p.Shutdown()
			for i := range tt.records {
				tt.records[i] = "stderr: " + tt.records[i]
			}
			if diff := cmp.Diff(tt.records, exporter.all()); diff != "" {
				t.Errorf("records (-want +got):\n%s", diff)
			}
			if console.String() != tt.console {
				t.Errorf("the console shows %q, want %q", console.String(), tt.console)
			}
		})
	}
}

func TestConsoleAlone(t *testing.T) {
	var console bytes.Buffer
	p := New(Config{Redact: []*regexp.Regexp{regexp.MustCompile("b")}})
	w := p.Lines(Stdout, &console)
	w.Write([]byte("abc\n"))
	p.Shutdown()
	if console.String() != "a[redacted]c\n" {
		t.Errorf("the console shows %q", console.String())
	}
	w = p.Lines(Stdout, broken{})
	if _, err := w.Write([]byte("x\n")); err == nil {
		t.Error("the console's error is lost")
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errors.New("gone") }

// Records wait for company, but not for long, and keep their order.
func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		exporter := &sent{}
		p := New(Config{Exporter: exporter, Silent: true})
		w := p.Lines(Stdout, nil)
		w.Write([]byte("a\n"))
		time.Sleep(delay / 2)
		w.Write([]byte("b\n"))
		if len(exporter.snapshot()) != 0 {
			t.Errorf("sent %v at once", exporter.snapshot())
		}
		time.Sleep(delay)
		synctest.Wait()
		w.Write([]byte(strings.Repeat("c\n", batch)))
		if len(exporter.snapshot()) != 2 || len(exporter.snapshot()[0]) != 2 || len(exporter.snapshot()[1]) != batch {
			t.Errorf("%d calls", len(exporter.snapshot()))
		}
	})
}
