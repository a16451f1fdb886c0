package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"cloister.dev/cloister/eif"
)

func TestEIFInspect(t *testing.T) {
	image, code := writeEIF(t)
	tests := map[string]struct {
		args   []string
		stdout string
	}{
		"text": {nil, fmt.Sprintf(`architecture  x86_64
kernel        6 bytes
cmdline       5 bytes
ramdisk       5 bytes
ramdisk       6 bytes
command line  "quiet"
PCR0  %x
PCR1  %x
PCR2  %x
`, code.PCR0, code.PCR1, code.PCR2)},
		"json": {[]string{"-o", "json"}, fmt.Sprintf(`{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"%x","PCR1":"%x","PCR2":"%x"}}`+"\n",
			code.PCR0, code.PCR1, code.PCR2)},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"eif", "inspect", image}, test.args...)...)
			r.want(t, 0)
			if diff := cmp.Diff(test.stdout, r.stdout); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
		})
	}
}

// eifInputs are files to build of, and a key with certificates.
type eifInputs struct {
	dir, kernel, cmdline, first, second, metadata string
	key, cert, otherCert, expired                 string
}

func newEIFInputs(t *testing.T) eifInputs {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block := func(typ string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}) }
	cert := func(name string, until time.Time) []byte {
		template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: until}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		return block("CERTIFICATE", der)
	}
	never := time.Date(2999, 1, 1, 0, 0, 0, 0, time.UTC)
	return eifInputs{
		dir:       t.TempDir(),
		kernel:    writeFile(t, "bzImage", []byte("kernel")),
		cmdline:   writeFile(t, "cmdline.txt", []byte("quiet\n")),
		first:     writeFile(t, "first", []byte("first")),
		second:    writeFile(t, "second", []byte("second")),
		metadata:  writeFile(t, "metadata.json", []byte(`{"b": 1, "a": [true]}`)),
		key:       writeFile(t, "key.pem", block("PRIVATE KEY", der)),
		cert:      writeFile(t, "cert.pem", cert("signer", never)),
		otherCert: writeFile(t, "other.pem", cert("other", never)),
		expired:   writeFile(t, "expired.pem", cert("expired", time.Unix(1, 0))),
	}
}

// build calls the command with all that it needs.
func (in *eifInputs) build(output string, more ...string) []string {
	return append([]string{"eif", "build", "--kernel", in.kernel, "--cmdline-file", in.cmdline, "--ramdisk", in.first, "--ramdisk", in.second,
		"--output", output}, more...)
}

func TestEIFBuild(t *testing.T) {
	in := newEIFInputs(t)
	_, code := writeEIF(t) // of the same kernel, command line and ramdisks
	image := filepath.Join(in.dir, "app.eif")
	r := call(t, "", in.build(image, "--arch", "aarch64", "--metadata", in.metadata, "--version", "2", "--build-time", "2024-01-02T03:04:05Z", "-o", "json")...)
	r.want(t, 0)
	want := fmt.Sprintf(`{"Measurements":{"HashAlgorithm":"Sha384 { ... }","PCR0":"%x","PCR1":"%x","PCR2":"%x"}}`+"\n", code.PCR0, code.PCR1, code.PCR2)
	if diff := cmp.Diff(want, r.stdout); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	e, err := eif.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	m, err := e.Metadata()
	if err != nil {
		t.Fatal(err)
	}
	wantInfo := eif.Metadata{ImageName: "bzImage", ImageVersion: "2", DockerInfo: []byte("null"), CustomMetadata: []byte(`{"a":[true],"b":1}`),
		BuildMetadata: eif.BuildMetadata{BuildTime: "2024-01-02T03:04:05Z", BuildTool: "cloister", BuildToolVersion: ownVersion(), OperatingSystem: "Linux", KernelVersion: "Unknown"}}
	if diff := cmp.Diff(wantInfo, *m); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	if e.Arch != eif.AArch64 {
		t.Errorf("architecture %s", e.Arch)
	}
	// The same again, in another folder, with the command line as an argument.
	again := filepath.Join(t.TempDir(), "again.eif")
	call(t, "", "eif", "build", "--kernel", in.kernel, "--cmdline", " quiet", "--ramdisk", in.first, "--ramdisk", in.second, "--arch", "aarch64",
		"--metadata", in.metadata, "--version", "2", "--build-time", "2024-01-02T03:04:05Z", "--output", again).want(t, 0)
	if read(t, image) != read(t, again) {
		t.Error("the same inputs give other bytes")
	}
	if info, err := os.Stat(image); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
}

// TestEIFBuildVectors makes the unsigned files of AWS's builder by the command.
func TestEIFBuildVectors(t *testing.T) {
	const vectors = "../../shared/vectors/eif/"
	if _, err := os.Stat(vectors); errors.Is(err, fs.ErrNotExist) {
		t.Skipf("no test vectors: %s is absent", vectors)
	}
	for name, more := range map[string][]string{
		"two_ramdisks": nil,
		"metadata":     {"--name", "my-enclave", "--version", "my-enclave", "--metadata", vectors + "inputs/metadata.json"},
	} {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "app.eif")
			call(t, "", append([]string{"eif", "build", "--kernel", vectors + "inputs/bzImage", "--cmdline-file", vectors + "inputs/cmdline.txt",
				"--ramdisk", vectors + "inputs/rd1.cpio.gz", "--ramdisk", vectors + "inputs/rd2.cpio.gz", "--build-time", "2024-01-02T03:04:05.000000006+00:00",
				"--build-tool", "nitro-cli", "--build-tool-version", "1.4.2", "--img-kernel", "6.1.90", "--output", image}, more...)...).want(t, 0)
			if read(t, image) != read(t, vectors+name+".eif") {
				t.Error("it is not the file of AWS's builder")
			}
		})
	}
}

func TestEIFSignVerify(t *testing.T) {
	in := newEIFInputs(t)
	at := func(name string) string { return filepath.Join(in.dir, name) }
	build := func(output string, more ...string) {
		t.Helper()
		call(t, "", in.build(output, append(more, "--build-time", "2024-01-02T03:04:05Z")...)...).want(t, 0)
	}
	build(at("unsigned.eif"))
	build(at("signed.eif"), "--sign-key", in.key, "--sign-cert", in.cert)
	r := call(t, "", "eif", "sign", at("unsigned.eif"), "--sign-key", in.key, "--sign-cert", in.cert, "--output", at("later.eif"), "-o", "json")
	r.want(t, 0)
	if !strings.Contains(r.stdout, `"PCR8":"`) || read(t, at("later.eif")) != read(t, at("signed.eif")) {
		t.Errorf("signed later it is another file than signed at once: %s", r.stdout)
	}

	verify := func(code int, want string, args ...string) {
		t.Helper()
		v := call(t, "", append([]string{"eif", "verify"}, args...)...)
		v.want(t, code, want)
		if (code == 0) != strings.Contains(v.stdout, "PCR8  ") {
			t.Errorf("stdout is %q", v.stdout)
		}
	}
	verify(0, `signed by "CN=signer", serial number 7, valid until 2999-01-01T00:00:00Z`, at("signed.eif"))
	verify(0, "signed by", at("later.eif"), "--cert", in.cert)
	verify(1, "another certificate", at("signed.eif"), "--cert", in.otherCert)
	verify(1, "not signed", at("unsigned.eif"))
	call(t, "", "eif", "inspect", at("signed.eif")).want(t, 0)

	// In place, through a link: another signature in place of the first; the file keeps its permissions.
	if err := errors.Join(os.Chmod(at("signed.eif"), 0o600), os.Symlink("signed.eif", at("link"))); err != nil {
		t.Fatal(err)
	}
	call(t, "", "eif", "sign", at("link"), "--sign-key", in.key, "--sign-cert", in.otherCert).want(t, 0)
	verify(0, "CN=other", at("signed.eif"), "--cert", in.otherCert)
	if info, err := os.Lstat(at("signed.eif")); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if info, err := os.Lstat(at("link")); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Error("the link is gone")
	}
}

func TestEIFExtract(t *testing.T) {
	in := newEIFInputs(t)
	image, dir := filepath.Join(in.dir, "app.eif"), filepath.Join(in.dir, "parts", "of it")
	call(t, "", in.build(image, "--sign-key", in.key, "--sign-cert", in.cert)...).want(t, 0)
	r := call(t, "", "eif", "extract", image, "--dir", dir)
	r.want(t, 0)
	var names []string
	for _, n := range []string{"kernel", "cmdline", "metadata.json", "ramdisk0", "ramdisk1", "signature.cbor"} {
		names = append(names, filepath.Join(dir, n))
	}
	if diff := cmp.Diff(strings.Join(names, "\n")+"\n", r.stdout); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	for name, want := range map[string]string{"kernel": "kernel", "cmdline": "quiet", "ramdisk0": "first", "ramdisk1": "second"} {
		if got := read(t, filepath.Join(dir, name)); got != want {
			t.Errorf("%s = %q", name, got)
		}
	}
	call(t, "", "eif", "extract", image, "--dir", dir).want(t, 1, "is not empty")
	call(t, "", "eif", "extract", image, "--dir", image).want(t, 1, "not a directory")
	call(t, "", "eif", "extract", image).want(t, 2, "--dir")
}

// TestEIFBuildRefuses: what fails writes nothing, and changes nothing that is there.
func TestEIFBuildRefuses(t *testing.T) {
	in := newEIFInputs(t)
	image := filepath.Join(in.dir, "app.eif")
	sign := []string{"--sign-key", in.key, "--sign-cert", in.cert}
	replace := func(flag string, value ...string) []string {
		args := in.build(image)
		i := slices.Index(args, flag)
		return slices.Concat(args[:i], value, args[i+2:])
	}
	device := filepath.Join(t.TempDir(), "device") // not one that the machine needs, should the check be missing
	if err := unix.Mkfifo(device, 0o600); err != nil {
		t.Fatal(err)
	}
	many := in.build(image)
	for range 28 {
		many = append(many, "--ramdisk", in.second)
	}
	tests := map[string]struct {
		args []string
		code int
		want string
	}{
		"no kernel":           {replace("--kernel"), 2, "--kernel"},
		"no command line":     {replace("--cmdline-file"), 2, "one of --cmdline and --cmdline-file"},
		"two command lines":   {in.build(image, "--cmdline", ""), 2, "one of --cmdline and --cmdline-file"},
		"no ramdisk":          {[]string{"eif", "build", "--kernel", in.kernel, "--cmdline", "c", "--output", image}, 2, "--ramdisk"},
		"30 ramdisks":         {many, 2, "at most 29"},
		"29 and a signature":  {append(many[:len(many)-2:len(many)-2], sign...), 1, "33 sections with the signature"},
		"no output":           {replace("--output"), 2, "--output"},
		"architecture":        {in.build(image, "--arch", "arm"), 2, `no architecture "arm"`},
		"build time":          {in.build(image, "--build-time", "yesterday"), 2, "--build-time takes a time"},
		"key alone":           {in.build(image, "--sign-key", in.key), 2, "both --sign-key and --sign-cert"},
		"certificate alone":   {in.build(image, "--sign-cert", in.cert), 2, "both --sign-key and --sign-cert"},
		"format":              {in.build(image, "-o", "yaml"), 2, "write text or json"},
		"argument":            {in.build(image, "x"), 2, "unknown command"},
		"absent kernel":       {replace("--kernel", "--kernel", "/nonexistent"), 1, "read kernel: open /nonexistent: no such file"},
		"empty kernel":        {replace("--kernel", "--kernel", "/dev/null"), 1, "/dev/null is not a regular file"},
		"kernel is a folder":  {replace("--kernel", "--kernel", in.dir), 1, "not a regular file"},
		"absent ramdisk":      {in.build(image, "--ramdisk", "/nonexistent"), 1, "read ramdisk: open /nonexistent"},
		"absent command line": {replace("--cmdline-file", "--cmdline-file", "/nonexistent"), 1, "read command line: open /nonexistent"},
		"command line":        {replace("--cmdline-file", "--cmdline", "a\x00b"), 1, "NUL"},
		"absent metadata":     {in.build(image, "--metadata", "/nonexistent"), 1, "read metadata: open /nonexistent"},
		"empty metadata":      {in.build(image, "--metadata", "/dev/null"), 1, "is not JSON"},
		"metadata":            {in.build(image, "--metadata", in.cmdline), 1, in.cmdline + " is not JSON"},
		"key for certificate": {in.build(image, "--sign-key", in.key, "--sign-cert", in.key), 1, "must be a certificate in PEM form"},
		"certificate as key":  {in.build(image, "--sign-key", in.cert, "--sign-cert", in.cert), 1, "no unencrypted private key"},
		"expired certificate": {in.build(image, "--sign-key", in.key, "--sign-cert", in.expired), 1, "valid from 1970-01-01T00:00:00Z to 1970-01-01T00:00:01Z"},
		"output folder":       {replace("--output", "--output", "/nonexistent/app.eif"), 1, "write /nonexistent/app.eif: no such file or directory"},
		"output is a folder":  {replace("--output", "--output", in.dir), 1, "not a regular file"},
		"output is a device":  {replace("--output", "--output", device), 1, "not a regular file"},
		"sign: no key":        {[]string{"eif", "sign", image}, 2, "--sign-key and --sign-cert"},
		"sign: key alone":     {[]string{"eif", "sign", image, "--sign-key", in.key}, 2, "both"},
		"sign: no file":       {append([]string{"eif", "sign"}, sign...), 2, "name FILE and nothing else"},
		"sign: format":        {append([]string{"eif", "sign", image, "-o", "x"}, sign...), 2, "write text or json"},
		"sign: not an EIF":    {append([]string{"eif", "sign", image}, sign...), 1, "fewer than the 548"},
		"sign: absent":        {append([]string{"eif", "sign", "/nonexistent"}, sign...), 1, "open /nonexistent"},
		"verify: absent cert": {[]string{"eif", "verify", image, "--cert", "/nonexistent"}, 1, "read certificate: open /nonexistent"},
		"verify: not a cert":  {[]string{"eif", "verify", image, "--cert", in.key}, 1, "must be a certificate in PEM form"},
		"empty sign key":      {in.build(image, "--sign-key", "", "--sign-cert", ""), 2, "the name is empty"},
		"verify: empty cert":  {[]string{"eif", "verify", image, "--cert", ""}, 2, "the name is empty"},
		"verify: format":      {[]string{"eif", "verify", image, "-o", "x"}, 2, "write text or json"},
		"extract: not an EIF": {[]string{"eif", "extract", image, "--dir", in.dir}, 1, "fewer than the 548"},
	}
	const before = "what is there already"
	if err := os.WriteFile(image, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", test.args...)
			r.want(t, test.code, "cloister: ", test.want)
			if lines := strings.Count(r.stderr, "\n"); r.stdout != "" || lines > test.code {
				t.Errorf("stdout is %q, stderr has %d lines", r.stdout, lines)
			}
			if got := read(t, image); got != before {
				t.Errorf("the output that was there is now %q", got)
			}
			if entries, err := os.ReadDir(in.dir); err != nil || len(entries) != 1 {
				t.Errorf("%v is left, %v", entries, err)
			}
		})
	}
}

// TestReplaceFileMode: what nobody else may read stays so.
func TestReplaceFileMode(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := t.TempDir()
	there := filepath.Join(dir, "there")
	if err := os.WriteFile(there, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(there, 0o640); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{"new": 0o600, "there": 0o640} {
		err := replaceFile(t.Context(), filepath.Join(dir, name), func(w io.WriteSeeker) error {
			_, err := io.WriteString(w, "secret")
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v, want %v, %v", name, info.Mode(), want, err)
		}
	}
}

// TestReplaceFileInterrupted: what is interrupted leaves nothing.
func TestReplaceFileInterrupted(t *testing.T) {
	dir := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	err := replaceFile(ctx, filepath.Join(dir, "out"), func(w io.WriteSeeker) error {
		if _, err := io.WriteString(w, "half"); err != nil {
			t.Errorf("the first write: %v", err)
		}
		stop()
		_, err := io.WriteString(w, "other half")
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("%v is left, %v", entries, err)
	}
}

// stopAfter is a context that ends after some looks at it.
type stopAfter struct {
	context.Context
	looks int
}

func (s *stopAfter) Err() error {
	if s.looks--; s.looks < 0 {
		return context.Canceled
	}
	return nil
}

// TestExtractInterrupted: the sections that are written already are taken away again.
func TestExtractInterrupted(t *testing.T) {
	image, _ := writeEIF(t)
	parent := t.TempDir()
	there := filepath.Join(parent, "there")
	if err := os.Mkdir(there, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{there, filepath.Join(parent, "absent")} {
		if err := extractEIF(&stopAfter{t.Context(), 3}, io.Discard, image, dir); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", dir, err)
		}
	}
	if entries, err := os.ReadDir(there); err != nil || len(entries) != 0 {
		t.Errorf("%v is left, %v", entries, err)
	}
	if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
		t.Errorf("%v is left, %v", entries, err)
	}
}

func TestEIFRefuses(t *testing.T) {
	image, _ := writeEIF(t)
	damaged := writeFile(t, "damaged.eif", []byte(strings.Replace(read(t, image), "second", "SECOND", 1)))
	tests := map[string]struct {
		args []string
		code int
		want string
	}{
		"no command":             {nil, 2, "name what to do"},
		"unknown command":        {[]string{"paint"}, 2, `unknown command "paint"`},
		"inspect: no file":       {[]string{"inspect"}, 2, "name FILE and nothing else"},
		"inspect: format":        {[]string{"inspect", image, "-o", "yaml"}, 2, "write text or json"},
		"inspect: absent file":   {[]string{"inspect", "/nonexistent"}, 1, "no such file"},
		"inspect: a folder":      {[]string{"inspect", t.TempDir()}, 1, "not a regular file"},
		"inspect: a device":      {[]string{"inspect", "/dev/null"}, 1, "not a regular file"},
		"inspect: damaged image": {[]string{"inspect", damaged}, 1, "the file is damaged"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			r := call(t, "", append([]string{"eif"}, test.args...)...)
			r.want(t, test.code, "cloister: ", test.want)
			if r.stdout != "" {
				t.Errorf("stdout is %q", r.stdout)
			}
		})
	}
}
