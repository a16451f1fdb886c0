package e2e

import (
	"encoding/json"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"cloister.dev/cloister/workload"
)

// A measurement that differs in one digit ends the connection before a byte of the request is sent.
func TestMismatch(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	pod := c.appPod(t, "app")
	right, entry := c.measure(t, pod)
	ns.create(t, pod)
	ns.ready(t, "app", 1)
	workloadAddr := ns.forward(t, "pod/app", 8080)
	var sent atomic.Int64
	addr := countingProxy(t, workloadAddr, &sent)

	requests := func() string { return c.answer(t, workloadAddr, right, "/count") }
	if got := c.answer(t, addr, right, "/echo?hello"); got != "hello" {
		t.Fatalf("the right set: got %q", got)
	}
	before := requests()
	if before != "1" || sent.Load() == 0 {
		t.Fatalf("the right set: %s requests arrived and %d bytes were sent, so the counts of this test are wrong", before, sent.Load())
	}

	for name, change := range map[string]func(*workload.Measurement){
		"PCR0":  func(m *workload.Measurement) { m.PCR0 = flipDigit(m.PCR0) },
		"PCR1":  func(m *workload.Measurement) { m.PCR1 = flipDigit(m.PCR1) },
		"PCR2":  func(m *workload.Measurement) { m.PCR2 = flipDigit(m.PCR2) },
		"PCR16": func(m *workload.Measurement) { m.PCR16 = flipDigit(m.PCR16) },
	} {
		t.Run(name, func(t *testing.T) {
			wrong := entry
			change(&wrong)
			sent.Store(0)
			r := c.curl(t, addr, setFile(t, wrong), "/echo?hello")
			if r.code != 1 || r.stdout != "" {
				t.Errorf("exit code %d, stdout %q, want 1 and nothing", r.code, r.stdout)
			}
			for _, want := range []string{name, fields(t, wrong)[name].(string), fields(t, entry)[name].(string)} {
				if !strings.Contains(r.stderr, want) {
					t.Errorf("stderr lacks %q: %s", want, r.stderr)
				}
			}
			if n := sent.Load(); n != 0 {
				t.Errorf("%d bytes of application data were sent", n)
			}
			if after := requests(); after != before {
				t.Errorf("the workload counts %s requests, before it was %s", after, before)
			}
		})
	}
}

// A set that pins only the code, or only the workload, is refused before anything is dialled.
func TestSetThatPinsTooLittle(t *testing.T) {
	c := e2e(t)
	_, entry := c.measure(t, c.appPod(t, "app"))
	var dialled atomic.Int64
	addr := listen(t, func(conn net.Conn) {
		dialled.Add(1)
		conn.Close()
	})
	for name, tt := range map[string]struct {
		entry map[string]string
		want  string
	}{
		"only code":      {map[string]string{"PCR0": entry.PCR0, "PCR1": entry.PCR1, "PCR2": entry.PCR2}, "pins no workload"},
		"only workload":  {map[string]string{"PCR16": entry.PCR16}, "pins no code"},
		"half the code":  {map[string]string{"PCR1": entry.PCR1, "PCR16": entry.PCR16}, "pins no code"},
		"nothing":        {map[string]string{}, "pins no workload"},
		"unknown member": {map[string]string{"PCR0": entry.PCR0, "PCR16": entry.PCR16, "PCR": "0"}, `"PCR"`},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := json.Marshal(map[string]any{"measurements": []any{tt.entry}})
			if err != nil {
				t.Fatal(err)
			}
			r := c.curl(t, addr, writeFile(t, "set.json", b), "/")
			if r.code != 1 || !strings.Contains(r.stderr, tt.want) {
				t.Errorf("exit code %d, stderr %q, want a refusal with %q", r.code, r.stderr, tt.want)
			}
		})
	}
	if n := dialled.Load(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}

func flipDigit(hex string) string {
	if hex[0] == 'a' {
		return "b" + hex[1:]
	}
	return "a" + hex[1:]
}

// countingProxy passes connections on to target and adds to sent the payload of the client's TLS
// records that can hold application data: those of type 23 that are longer than an encrypted alert
// (2 bytes, content type, tag of 16 bytes: RFC 8446, section 5.2). A client that finishes the
// handshake counts as well: it has accepted the server.
func countingProxy(t *testing.T, target string, sent *atomic.Int64) string {
	return listen(t, func(client net.Conn) {
		defer client.Close()
		server, err := net.Dial("tcp", target)
		if err != nil {
			return
		}
		defer server.Close()
		go func() {
			defer server.Close()
			for {
				const applicationData, alert = 23, 2 + 1 + 16
				record := make([]byte, 5)
				if _, err := io.ReadFull(client, record); err != nil {
					return
				}
				length := int(record[3])<<8 | int(record[4])
				record = append(record, make([]byte, length)...)
				if _, err := io.ReadFull(client, record[5:]); err != nil {
					return
				}
				if record[0] == applicationData && length > alert {
					sent.Add(int64(length))
				}
				if _, err := server.Write(record); err != nil {
					return
				}
			}
		}()
		io.Copy(client, server)
	})
}
