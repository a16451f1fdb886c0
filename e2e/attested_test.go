package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// An unmodified nginx behind a Service answers from an enclave, and the client says what it verified.
func TestAttested(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	nginx := deployment(c.nginxPod(t, "nginx"), 1)
	set, entry := c.measure(t, nginx)
	ns.create(t, nginx)
	ns.create(t, service("nginx", 80))
	ns.ready(t, "nginx", 1)
	addr := ns.forward(t, "service/nginx", 443)

	r := c.curl(t, addr, set, "/", "-v")
	if r.code != 0 {
		t.Fatalf("exit code %d: %s", r.code, r.stderr)
	}
	if !strings.Contains(r.stdout, "Welcome to nginx") {
		t.Errorf("this is not nginx's page: %s", r.stdout)
	}
	for _, want := range []string{
		"verified", "PCR0", entry.PCR0, "PCR1", entry.PCR1, "PCR2", entry.PCR2, "PCR16", entry.PCR16,
		"DEVELOPMENT, not a real enclave",
	} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("stderr lacks %q: %s", want, r.stderr)
		}
	}

	// Nobody takes a development enclave for a real one: that needs --root.
	r = c.cloister(t, "curl", "--measurements", set, "--connect-to", addr, "https://app.example/")
	if r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "chain") {
		t.Errorf("without --root: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}

	// A fresh document by nonce, which others can verify from the file.
	document := filepath.Join(t.TempDir(), "attestation.bin")
	r = c.cloister(t, "attestation", "fetch", "--root", c.root, "--measurements", set, "--connect-to", addr, "--nonce", "c0ffee", "--save", document, "https://app.example")
	if r.code != 0 || !strings.Contains(r.stdout, "nonce       c0ffee") || !strings.Contains(r.stdout, "DEVELOPMENT, not a real enclave") {
		t.Errorf("attestation fetch: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}
	r = c.cloister(t, "attestation", "verify", document, "--root", c.root, "--measurements", set, "--nonce", "c0ffee", "-o", "json")
	if r.code != 0 || !strings.Contains(r.stdout, `"development":true`) || !strings.Contains(r.stdout, entry.PCR16) {
		t.Errorf("attestation verify: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}
	r = c.cloister(t, "attestation", "verify", document, "--root", c.root, "--nonce", "c0ffef")
	if r.code != 1 || r.stdout != "" || !strings.Contains(r.stderr, "nonce") {
		t.Errorf("attestation verify with another nonce: exit code %d, stdout %q, stderr %s", r.code, r.stdout, r.stderr)
	}
}
