package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"strings"
	"testing"

	"cloister.dev/cloister/workload"
)

// keyPair writes a new key of a signer into two files.
func keyPair(t *testing.T) (private, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	private = writeFile(t, "private.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if der, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		t.Fatal(err)
	}
	return private, writeFile(t, "public.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// signSet writes a signed form of a file with a set.
func signSet(t *testing.T, private, set string) string {
	t.Helper()
	r := call(t, "", "sign", "--key", private, set)
	r.want(t, 0)
	return writeFile(t, "signed.json", []byte(r.stdout))
}

func TestSign(t *testing.T) {
	private, public := keyPair(t)
	_, stranger := keyPair(t)
	set := writeSet(t, entry("1.4.0", nil), entry("1.5.0", nil))
	plain, err := os.ReadFile(set)
	if err != nil {
		t.Fatal(err)
	}
	signed := signSet(t, private, set)
	envelope, err := os.ReadFile(signed)
	if err != nil {
		t.Fatal(err)
	}
	changed := strings.Replace(string(envelope), `"payload":"ey`, `"payload":"eyA`, 1)
	for name, tt := range map[string]struct {
		args   []string
		stdin  string
		code   int
		stdout string
		stderr string
	}{
		"verify":                    {args: []string{"verify", "--key", public, signed}, stdout: string(plain) + "\n"},
		"verify, standard input":    {args: []string{"verify", "--key", public}, stdin: string(envelope), stdout: string(plain) + "\n"},
		"verify, a hyphen":          {args: []string{"verify", "--key", public, "-"}, stdin: string(envelope), stdout: string(plain) + "\n"},
		"sign, standard input":      {args: []string{"sign", "--key", private, "-"}, stdin: string(plain), stdout: string(envelope)}, // Ed25519 has no randomness
		"another key":               {args: []string{"verify", "--key", stranger, signed}, code: 1, stderr: signed + ": verify measurement set: the signature is not that of the given key"},
		"changed":                   {args: []string{"verify", "--key", public}, stdin: changed, code: 1, stderr: "-: verify measurement set: "},
		"verify what is not signed": {args: []string{"verify", "--key", public, set}, code: 1, stderr: set + ": the measurement set is not signed, and with --key only signed ones count"},
		"sign what is signed":       {args: []string{"sign", "--key", private, signed}, code: 1, stderr: "signed already: sign what `cloister verify` prints"},
		"sign what is no set":       {args: []string{"sign", "--key", private}, stdin: "{}", code: 1, stderr: "-: read measurement set: the measurement set is empty"},
		"sign with the public key":  {args: []string{"sign", "--key", public, set}, code: 1, stderr: public + ": the file holds a PEM block"},
		"verify with the private":   {args: []string{"verify", "--key", private, signed}, code: 1, stderr: private + ": the file holds a PEM block"},
		"no such key":               {args: []string{"verify", "--key", set + "x", signed}, code: 1, stderr: "no such file"},
		"no such file":              {args: []string{"sign", "--key", private, set + "x"}, code: 1, stderr: "no such file"},
		"sign without key":          {args: []string{"sign", set}, code: 2, stderr: "name the private key that signs with --key"},
		"verify without key":        {args: []string{"verify", signed}, code: 2, stderr: "name the public key of the signer with --key"},
		"two files":                 {args: []string{"verify", "--key", public, signed, signed}, code: 2, stderr: "accepts at most 1 arg"},
	} {
		t.Run(name, func(t *testing.T) {
			r := call(t, tt.stdin, tt.args...)
			r.want(t, tt.code, tt.stderr)
			if r.stdout != tt.stdout {
				t.Errorf("stdout is %q, want %q", r.stdout, tt.stdout)
			}
		})
	}
}

// TestSignedMeasurements: a signed set counts with the key of its signer, and with that key nothing else does.
func TestSignedMeasurements(t *testing.T) {
	private, public := keyPair(t)
	_, stranger := keyPair(t)
	e := startEnclave(t, enclaveOptions{}, describe)
	other := writeSet(t, entry("old", func(m *workload.Measurement) { m.PCR16 = m.PCR0 }))
	plain := writeSet(t, entry("1.4.0", nil))
	signed := signSet(t, private, plain)
	for name, tt := range map[string]struct {
		args []string
		code int
		want string
	}{
		"signed":                    {[]string{"--measurements", signed, "--key", public}, 0, "label   1.4.0"},
		"two signed ones":           {[]string{"--measurements", signSet(t, private, other), "--measurements", signed, "--key", public}, 0, "label   1.4.0"},
		"signed, for another":       {[]string{"--measurements", signSet(t, private, other), "--key", public}, 1, "PCR16"},
		"signed, without key":       {[]string{"--measurements", signed}, 1, signed + ": the measurement set is signed, and nothing says whose signature counts: name the public key of its signer with --key"},
		"signed by another":         {[]string{"--measurements", signed, "--key", stranger}, 1, "the signature is not that of the given key"},
		"not signed":                {[]string{"--measurements", plain, "--key", public}, 1, plain + ": the measurement set is not signed, and with --key only signed ones count"},
		"one of two is not signed":  {[]string{"--measurements", signed, "--measurements", other, "--key", public}, 1, other + ": the measurement set is not signed"},
		"one of two, and no key":    {[]string{"--measurements", plain, "--measurements", signed}, 1, signed + ": the measurement set is signed"},
		"a key without a name":      {[]string{"--measurements", plain, "--key", ""}, 2, "the name is empty"},
		"the private key":           {[]string{"--measurements", signed, "--key", private}, 1, "openssl pkey -pubout"},
		"key without any signature": {[]string{"--measurements", plain, "--key", plain}, 1, "no PEM block"},
	} {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"curl", "--root", e.root, "--connect-to", e.addr, "https://s/a"}, tt.args...)...)
			r.want(t, tt.code, tt.want)
			if (r.stdout != "") != (tt.code == 0) {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
	// Every other command reads them by the same flags.
	call(t, "", "proxy", "--root", e.root, "--listen", "127.0.0.1:0", "--measurements", signed, "tcp://s:1").want(t, 1, "name the public key of its signer with --key")
}
