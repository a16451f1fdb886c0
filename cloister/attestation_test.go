package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// archivedAt is when the documents of these tests are made.
var archivedAt = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// newSigner returns a signer and the file of its root.
func newSigner(t *testing.T) (*nsmdev.Signer, string) {
	t.Helper()
	certPEM, keyPEM, err := nsmdev.NewRoot(archivedAt.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(certPEM, keyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return signer, writeFile(t, "root.pem", certPEM)
}

func signedDocument(t *testing.T, signer *nsmdev.Signer, change func(*nsmdev.Document)) []byte {
	t.Helper()
	d := nsmdev.Document{ModuleID: moduleID, Timestamp: archivedAt, PCRs: defaultPCRs(), Nonce: []byte{1, 2}, UserData: []byte{}}
	if change != nil {
		change(&d)
	}
	doc, err := signer.Sign(d)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

func TestAttestationVerify(t *testing.T) {
	signer, root := newSigner(t)
	doc := writeFile(t, "doc.bin", signedDocument(t, signer, nil))
	debug := writeFile(t, "debug.bin", signedDocument(t, signer, func(d *nsmdev.Document) {
		d.PCRs = map[uint][]byte{0: make([]byte, 48)}
	}))
	changed := signedDocument(t, signer, nil)
	changed[len(changed)-1] ^= 1
	tampered := writeFile(t, "tampered.bin", changed)
	set := writeSet(t, entry("1.4.0", nil))
	other := writeSet(t, entry("1.5.0", func(m *workload.Measurement) { m.PCR16 = strings.Repeat("ff", 48) }))
	minuteLater := archivedAt.Add(time.Minute).Format(time.RFC3339)

	tests := map[string]struct {
		args   []string
		code   int
		stdout []string // parts
		stderr string
	}{
		"at its own time":         {args: []string{doc, "--root", root, "--at", "document"}, stdout: []string{"verified  module      " + moduleID, "verified  made        2026-03-01T12:00:00Z", "verified  PCR0        a0a0", "verified  nonce       0102", "no measurement set was compared", development}},
		"at a time":               {args: []string{doc, "--root", root, "--at", minuteLater}, stdout: []string{development}},
		"with everything":         {args: []string{doc, "--root", root, "--at", minuteLater, "--nonce", "0102", "--measurements", set}, stdout: []string{"verified  label       1.4.0"}},
		"one of two sets":         {args: []string{doc, "--root", root, "--at", "document", "--measurements", other, "--measurements", set}, stdout: []string{"1.4.0"}},
		"debug, allowed":          {args: []string{debug, "--root", root, "--at", "document", "--allow-debug"}, stdout: []string{"debug mode: the enclave's host can read it", "PCR0        000000"}},
		"an hour later, if asked": {args: []string{doc, "--root", root, "--at", archivedAt.Add(time.Hour).Format(time.RFC3339), "--max-age", "1h"}, stdout: []string{moduleID}},

		"now":               {args: []string{doc, "--root", root}, code: 1, stderr: "attestation refused (age)"},
		"an hour later":     {args: []string{doc, "--root", root, "--at", archivedAt.Add(time.Hour).Format(time.RFC3339)}, code: 1, stderr: "attestation refused (age)"},
		"AWS's root":        {args: []string{doc, "--at", "document"}, code: 1, stderr: "attestation refused (chain)"},
		"tampered":          {args: []string{tampered, "--root", root, "--at", "document"}, code: 1, stderr: "attestation refused (signature)"},
		"other nonce":       {args: []string{doc, "--root", root, "--at", "document", "--nonce", "0103"}, code: 1, stderr: "attestation refused (nonce)"},
		"other workload":    {args: []string{doc, "--root", root, "--at", "document", "--measurements", other}, code: 1, stderr: "the enclave is not the measured one: it does not match \"1.5.0\"\n  PCR16  expected  ffff"},
		"debug":             {args: []string{debug, "--root", root, "--at", "document"}, code: 1, stderr: "attestation refused (debug)"},
		"no document":       {args: []string{set, "--root", root, "--at", "document"}, code: 1, stderr: "attestation refused (format)"},
		"no file":           {args: []string{"absent.bin"}, code: 1, stderr: "absent.bin"},
		"no root":           {args: []string{doc, "--root", set}, code: 1, stderr: "no PEM block"},
		"no measurements":   {args: []string{doc, "--measurements", root}, code: 1, stderr: "read measurement set"},
		"nothing":           {code: 2, stderr: "name FILE and nothing else"},
		"two files":         {args: []string{doc, doc}, code: 2, stderr: "name FILE and nothing else"},
		"--at no time":      {args: []string{doc, "--at", "yesterday"}, code: 2, stderr: "--at takes a time as 2026-01-31T12:00:00Z"},
		"--nonce no hex":    {args: []string{doc, "--nonce", "xyz"}, code: 2, stderr: "--nonce takes one or more bytes in hexadecimal"},
		"--nonce empty":     {args: []string{doc, "--nonce", ""}, code: 2, stderr: "--nonce takes one or more bytes in hexadecimal"},
		"--max-age 0":       {args: []string{doc, "--max-age", "0s"}, code: 2, stderr: "--max-age 0s accepts no document"},
		"--key of nothing":  {args: []string{doc, "--key", root}, code: 2, stderr: "name them with --measurements"},
		"-o yaml":           {args: []string{doc, "-o", "yaml"}, code: 2, stderr: "write text or json"},
		"an unknown option": {args: []string{doc, "--insecure"}, code: 2, stderr: "unknown flag"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"attestation", "verify"}, tc.args...)...)
			r.want(t, tc.code, tc.stderr)
			for _, part := range tc.stdout {
				if !strings.Contains(r.stdout, part) {
					t.Errorf("stdout lacks %q:\n%s", part, r.stdout)
				}
			}
			if tc.code != 0 && r.stdout != "" {
				t.Errorf("a refused document is printed:\n%s", r.stdout)
			}
		})
	}
	call(t, "", "attestation").want(t, 2, "name what to do")
}

func TestAttestationVerifyJSON(t *testing.T) {
	signer, root := newSigner(t)
	doc := signedDocument(t, signer, func(d *nsmdev.Document) { d.PCRs = map[uint][]byte{0: bytes.Repeat([]byte{0xa0}, 48)} })
	r := call(t, string(doc), "attestation", "verify", "-", "--root", root, "--at", "document", "-o", "json")
	r.want(t, 0)
	want := `{"development":true,"debug":false,"moduleID":"` + moduleID + `","timestamp":"2026-03-01T12:00:00Z","pcrs":{"PCR0":"` +
		strings.Repeat("a0", 48) + `"},"nonce":"0102","userData":"","publicKey":null}` + "\n"
	if diff := cmp.Diff(want, r.stdout); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestAttestationVerifyVectors verifies real documents of AWS enclaves below the built-in root. They are
// other people's and not part of the repository.
func TestAttestationVerifyVectors(t *testing.T) {
	const vectors = "../../shared/vectors/attestation"
	files, err := filepath.Glob(filepath.Join(vectors, "*.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Skipf("no test vectors: %s is absent", vectors)
	}
	aws := writeFile(t, "aws.pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: attestation.AWSRoot().Raw}))
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			args := []string{"attestation", "verify", file, "-o", "json"}
			if strings.Contains(file, "_debug_") {
				call(t, "", append(args, "--at", "document")...).want(t, 1)
				args = append(args, "--allow-debug")
			}
			call(t, "", args...).want(t, 1, "attestation refused (age)")
			r := call(t, "", append(args, "--at", "document", "--root", aws)...)
			if strings.Contains(file, "_tampered_") {
				r.want(t, 1, "attestation refused (signature)")
				return
			}
			r.want(t, 0)
			var got struct{ Development bool }
			if err := json.Unmarshal([]byte(r.stdout), &got); err != nil || got.Development {
				t.Errorf("got %v, %v from\n%s", got, err, r.stdout)
			}
		})
	}
}

func TestAttestationFetch(t *testing.T) {
	var e *fakeEnclave
	var got []byte                        // the nonce of the last request
	var change func(*nsmdev.Document)     // of the next answer
	var instead func(http.ResponseWriter) // of an answer
	e = startEnclave(t, enclaveOptions{}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if instead != nil {
			instead(w)
			return
		}
		if r.URL.Path != "/.well-known/cloister/attestation" || len(r.URL.Query()) != 1 {
			t.Errorf("asked for %s", r.URL)
		}
		got, _ = hex.DecodeString(r.URL.Query().Get("nonce"))
		d := nsmdev.Document{ModuleID: moduleID, Timestamp: time.Now(), PCRs: defaultPCRs(), Nonce: got}
		if change != nil {
			change(&d)
		}
		doc, err := e.signer.Sign(d)
		if err != nil {
			t.Error(err)
		}
		w.Write(doc)
	}))
	set := writeSet(t, entry("1.4.0", nil))
	fetch := func(args ...string) result {
		t.Helper()
		change, instead = nil, nil
		return call(t, "", append([]string{"attestation", "fetch", "--root", e.root, "--measurements", set, "--connect-to", e.addr, "https://shop.example"}, args...)...)
	}
	broken := func(c func(*nsmdev.Document), i func(http.ResponseWriter)) result {
		t.Helper()
		change, instead = c, i
		return call(t, "", "attestation", "fetch", "--root", e.root, "--measurements", set, "--connect-to", e.addr, "https://shop.example/", "--save", filepath.Join(t.TempDir(), "doc"))
	}

	r := fetch()
	r.want(t, 0)
	first := got
	if len(first) != randomNonce || !strings.Contains(r.stdout, "verified  nonce       "+hex.EncodeToString(first)) || !strings.Contains(r.stdout, development) {
		t.Errorf("with the nonce %x it prints\n%s", first, r.stdout)
	}
	if fetch().want(t, 0); bytes.Equal(first, got) {
		t.Error("the random nonce is the same twice")
	}

	file := filepath.Join(t.TempDir(), "doc.bin")
	r = fetch("--nonce", "c0ffee", "--save", file, "-o", "json")
	r.want(t, 0)
	var printed struct {
		Development  bool
		Nonce, Label string
	}
	if err := json.Unmarshal([]byte(r.stdout), &printed); err != nil || !printed.Development || printed.Nonce != "c0ffee" || printed.Label != "1.4.0" {
		t.Errorf("got %+v, %v from\n%s", printed, err, r.stdout)
	}
	call(t, "", "attestation", "verify", file, "--root", e.root, "--measurements", set, "--nonce", "c0ffee").want(t, 0)

	for name, tc := range map[string]struct {
		change  func(*nsmdev.Document)
		instead func(http.ResponseWriter)
		want    string
	}{
		"another nonce":    {change: func(d *nsmdev.Document) { d.Nonce = []byte{1} }, want: "attestation refused (nonce)"},
		"no nonce":         {change: func(d *nsmdev.Document) { d.Nonce = nil }, want: "attestation refused (nonce)"},
		"an old document":  {change: func(d *nsmdev.Document) { d.Timestamp = d.Timestamp.Add(-16 * time.Minute) }, want: "attestation refused (age)"},
		"another workload": {change: func(d *nsmdev.Document) { d.PCRs[16] = make([]byte, 48) }, want: "the enclave is not the measured one"},
		"a page":           {instead: func(w http.ResponseWriter) { w.Write([]byte("<html>")) }, want: "attestation refused (format)"},
		"a long answer":    {instead: func(w http.ResponseWriter) { w.Write(make([]byte, 1<<20)) }, want: "more than 16384"},
		"busy": {instead: func(w http.ResponseWriter) {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusServiceUnavailable)
		}, want: "too many requests for attestation documents: try again"},
		"not found": {instead: func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) }, want: "shop.example answers 404 Not Found instead of an attestation document"},
	} {
		t.Run(name, func(t *testing.T) {
			r := broken(tc.change, tc.instead)
			r.want(t, 1, tc.want)
			if r.stdout != "" {
				t.Errorf("it prints\n%s", r.stdout)
			}
		})
	}

	// The connection is verified first.
	other := writeSet(t, entry("1.5.0", func(m *workload.Measurement) { m.PCR0 = strings.Repeat("ff", 48) }))
	call(t, "", "attestation", "fetch", "--root", e.root, "--measurements", other, "--connect-to", e.addr, "https://shop.example").
		want(t, 1, "not one byte of the request was sent: the enclave is not the measured one")

	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no measurements": {[]string{"https://shop.example"}, "name the measurement set"},
		"http":            {[]string{"--measurements", set, "http://shop.example"}, "not of the form https://HOST[:PORT]"},
		"a path":          {[]string{"--measurements", set, "https://shop.example/a"}, "not of the form"},
		"long nonce":      {[]string{"--measurements", set, "--nonce", strings.Repeat("00", 65), "https://shop.example"}, "at most 64"},
		"empty nonce":     {[]string{"--measurements", set, "--nonce", "", "https://shop.example"}, "--nonce takes"},
	} {
		t.Run(name, func(t *testing.T) {
			call(t, "", append([]string{"attestation", "fetch"}, tc.args...)...).want(t, 2, tc.want)
		})
	}
}
