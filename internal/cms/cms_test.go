package cms_test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"cloister.dev/cloister/internal/cms"
	"cloister.dev/cloister/internal/cms/cmstest"
)

const vectors = "../../../shared/vectors/kms/"

var testKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func seal(t testing.TB, content []byte, shape cmstest.Shape) []byte {
	t.Helper()
	b, err := cmstest.Seal(&testKey().PublicKey, content, shape)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// An answer of the real KMS.
func TestVector(t *testing.T) {
	text, err := os.ReadFile(vectors + "enclaver-hello.key.pem")
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("the vectors of other projects are not here")
	} else if err != nil {
		t.Fatal(err)
	}
	message, err := os.ReadFile(vectors + "enclaver-hello.ber")
	if err != nil {
		t.Fatal(err)
	}
	b, _ := pem.Decode(text)
	key, err := x509.ParsePKCS8PrivateKey(b.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	got, err := cms.Open(key.(*rsa.PrivateKey), message)
	if err != nil || !strings.HasPrefix(strings.ToLower(string(got)), "hello") {
		t.Errorf("got %q, %v", got, err)
	}

	// One whose key is not there is read as far as that.
	if message, err = os.ReadFile(vectors + "aws-sdk-c-w-ctx.ber"); err != nil {
		t.Fatal(err)
	}
	if _, err := cms.Open(testKey(), message); err != cms.ErrOpen {
		t.Errorf("a message for another key: %v", err)
	}
}

func TestOpen(t *testing.T) {
	for name, shape := range map[string]cmstest.Shape{
		"as KMS":            {},
		"definite":          {Definite: true},
		"one piece":         {Pieces: []int{1 << 20}},
		"pieces":            {Pieces: []int{16, 0, 5}},
		"definite pieces":   {Definite: true, Pieces: []int{7}},
		"issuer and serial": {IssuerAndSerial: true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{0, 1, 15, 16, 17, 4096} {
				want := make([]byte, size)
				rand.Read(want)
				got, err := cms.Open(testKey(), seal(t, want, shape))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%d bytes: got %d bytes, %v", size, len(got), err)
				}
			}
		})
	}
}

// Whatever is wrong with the key or with the padding, the error is the same.
func TestOneError(t *testing.T) {
	key := &testKey().PublicKey
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	secret, iv := make([]byte, 32), make([]byte, 16)
	padded := func(secret, last []byte) []byte {
		block := append(bytes.Repeat([]byte{'x'}, 32-len(last)), last...)
		b, err := cmstest.SealPadded(key, secret, iv, block, cmstest.Shape{})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	forOther, err := cmstest.Seal(&other.PublicKey, []byte("secret"), cmstest.Shape{})
	if err != nil {
		t.Fatal(err)
	}
	short, err := rsa.GenerateKey(rand.Reader, 3072)
	if err != nil {
		t.Fatal(err)
	}
	forShort, err := cmstest.Seal(&short.PublicKey, []byte("secret"), cmstest.Shape{})
	if err != nil {
		t.Fatal(err)
	}
	for name, message := range map[string][]byte{
		"another key":              forOther,
		"another key's size":       forShort,
		"padding 0":                padded(secret, []byte{0}),
		"padding 17":               padded(secret, bytes.Repeat([]byte{17}, 17)),
		"padding 255":              padded(secret, []byte{255}),
		"padding not all the same": padded(secret, []byte{2, 3, 3}),
		"key of 16 bytes":          padded(secret[:16], []byte{1}),
		"key of 31 bytes":          padded(secret[:31], []byte{1}),
		"no key":                   padded(nil, []byte{1}),
	} {
		if got, err := cms.Open(testKey(), message); err != cms.ErrOpen || got != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// Every message that differs in one bit has the same content or none.
func TestChanged(t *testing.T) {
	want := []byte("the content")
	message := seal(t, want, cmstest.Shape{Pieces: []int{3}})
	opened := 0
	for i := 0; i < len(message)*8; i += 7 {
		changed := bytes.Clone(message)
		changed[i/8] ^= 1 << (i % 8)
		// The first block of CBC can be changed through iv: authenticity comes from TLS, not from here.
		if got, err := cms.Open(testKey(), changed); err == nil && len(got) > len(want)+16 {
			t.Errorf("bit %d: got %d bytes", i, len(got))
		} else if err == nil {
			opened++
		}
	}
	if opened > len(message) {
		t.Errorf("%d of %d changed messages were opened", opened, len(message)*8/7)
	}
	for n := range len(message) {
		if _, err := cms.Open(testKey(), message[:n]); err == nil {
			t.Errorf("the first %d bytes were opened", n)
		}
	}
}

func TestRefused(t *testing.T) {
	good := seal(t, []byte("content"), cmstest.Shape{})
	replace := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("the message has no %x", old)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	for name, tt := range map[string]struct {
		message []byte
		want    string
	}{
		"nothing":         {nil, "in the middle"},
		"too long":        {make([]byte, cms.MaxSize+1), "at most 65536"},
		"followed":        {append(bytes.Clone(good), 0), "follows"},
		"signed data":     {replace("\x01\x07\x03", "\x01\x07\x02"), "no EnvelopedData"},
		"AES-128":         {replace("\x03\x04\x01\x2a", "\x03\x04\x01\x02"), "AES-256"},
		"SHA-512":         {replace("\x03\x04\x02\x01", "\x03\x04\x02\x03"), "RSAES-OAEP"},
		"PKCS #1 v1.5":    {replace("\x0d\x01\x01\x07", "\x0d\x01\x01\x01"), "RSAES-OAEP"},
		"version 3":       {replace("\x02\x01\x02", "\x02\x01\x03"), "version"},
		"very deep":       {bytes.Repeat([]byte{0x30, 0x80}, 1000), "too deep"},
		"primitive, open": {[]byte{0x04, 0x80, 0, 0}, "length"},
		"length of 4":     {[]byte{0x30, 0x84, 0, 0, 0, 0}, "length"},
		"long tag":        {[]byte{0x3f, 0x81, 0x01, 0}, "tag"},
	} {
		if got, err := cms.Open(testKey(), tt.message); err == nil || got != nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %q, %v; want an error with %q", name, got, err, tt.want)
		}
	}
}

func FuzzOpen(f *testing.F) {
	for _, shape := range []cmstest.Shape{{}, {Definite: true}, {Pieces: []int{3}}, {IssuerAndSerial: true}} {
		f.Add(seal(f, []byte("content"), shape))
	}
	f.Fuzz(func(t *testing.T, message []byte) {
		got, err := cms.Open(testKey(), message)
		if err == nil && len(got) > len(message) {
			t.Errorf("%d bytes from a message of %d", len(got), len(message))
		}
		if err != nil && got != nil {
			t.Errorf("%q with %v", got, err)
		}
	})
}
