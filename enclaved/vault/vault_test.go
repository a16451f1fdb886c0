package vault_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hf/nsm/response"
	"go.uber.org/goleak"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/internal/nsm"
	"cloister.dev/cloister/internal/nsm/nsmtest"
	"cloister.dev/cloister/workload"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var manifest = []byte(`{"apiVersion":"cloister.dev/v1alpha1"}`)

// newVault returns a vault that ends with the test.
func newVault(t *testing.T, module *nsmtest.Module) (*vault.Vault, *nsm.Module) {
	t.Helper()
	client := nsm.New(nsm.NewDevelopment(module.Dial))
	v := vault.New(client)
	t.Cleanup(func() {
		v.Close()
		client.Close()
	})
	return v, client
}

func TestMeasure(t *testing.T) {
	module := nsmtest.New(t)
	v, _ := newVault(t, module)
	if _, err := v.Certificate(nil); !errors.Is(err, vault.ErrNotMeasured) {
		t.Errorf("certificate before Measure: %v", err)
	}
	if _, err := v.FreshDocument(t.Context(), nil); !errors.Is(err, vault.ErrNotMeasured) {
		t.Errorf("document before Measure: %v", err)
	}

	document, err := v.Measure(t.Context(), manifest)
	if err != nil {
		t.Fatal(err)
	}
	options := attestation.Options{Root: module.Root(), Measurements: module.Measurements(manifest)}
	d, err := attestation.Verify(document, options)
	if err != nil {
		t.Fatal(err)
	}
	if d.UserData != nil || d.Nonce != nil || d.PublicKey != nil {
		t.Errorf("the first document has user data %x, nonce %x, public key %x", d.UserData, d.Nonce, d.PublicKey)
	}

	certificate, err := v.Certificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(certificate.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	inside, err := attestation.DocumentFromCertificate(parsed)
	if err != nil {
		t.Fatal(err)
	}
	options.UserData, options.PublicKey = []byte("cloister/1 tls-server"), parsed.RawSubjectPublicKeyInfo
	if _, err := attestation.Verify(inside, options); err != nil {
		t.Error(err)
	}

	// A certificate for the other direction, of the same key.
	client, err := v.ClientCertificate(&tls.CertificateRequestInfo{})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := v.ClientCertificate(&tls.CertificateRequestInfo{}); err != nil || again != client {
		t.Errorf("a young client certificate was made again (%v)", err)
	}
	own, err := x509.ParseCertificate(client.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if inside, err = attestation.DocumentFromCertificate(own); err != nil {
		t.Fatal(err)
	}
	options.UserData = []byte("cloister/1 tls-client")
	if _, err := attestation.Verify(inside, options); err != nil {
		t.Error(err)
	}

	fresh, err := v.FreshDocument(t.Context(), []byte("nonce"))
	if err != nil {
		t.Fatal(err)
	}
	options = attestation.Options{Root: module.Root(), Measurements: module.Measurements(manifest), Nonce: []byte("nonce")}
	if d, err = attestation.Verify(fresh, options); err != nil {
		t.Fatal(err)
	}
	if d.UserData != nil || d.PublicKey != nil {
		t.Errorf("the fresh document has user data %x, public key %x", d.UserData, d.PublicKey)
	}

	if _, err := v.Measure(t.Context(), manifest); err == nil {
		t.Error("a second Measure succeeded")
	}
}

// Whatever goes wrong on the way, nothing can be served.
func TestMeasureFailsClosed(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(*testing.T, *nsm.Module)
		fail    string // this request
		nth     int    // the nth time
	}{
		"extended before": {prepare: func(t *testing.T, m *nsm.Module) {
			if _, err := m.ExtendPCR(t.Context(), 16, workload.Digest(manifest)); err != nil {
				t.Fatal(err)
			}
		}},
		"locked before": {prepare: func(t *testing.T, m *nsm.Module) {
			if err := m.LockPCR(t.Context(), 16); err != nil {
				t.Fatal(err)
			}
		}},
		"no description":        {fail: "DescribePCR", nth: 1},
		"not extended":          {fail: "ExtendPCR", nth: 1},
		"not locked":            {fail: "LockPCR", nth: 1},
		"no second description": {fail: "DescribePCR", nth: 2},
		"no document":           {fail: "Attestation", nth: 1},
		"no certificate":        {fail: "Attestation", nth: 2},
	} {
		t.Run(name, func(t *testing.T) {
			module := nsmtest.New(t)
			seen := map[string]int{}
			module.Before = func(op string) response.ErrorCode {
				if seen[op]++; op == c.fail && seen[op] == c.nth {
					return response.ECInternalError
				}
				return ""
			}
			v, client := newVault(t, module)
			if c.prepare != nil {
				c.prepare(t, client)
			}
			if _, err := v.Measure(t.Context(), manifest); err == nil {
				t.Fatal("Measure succeeded")
			}
			if _, err := v.Certificate(nil); !errors.Is(err, vault.ErrNotMeasured) {
				t.Errorf("certificate: %v", err)
			}
			if _, err := v.Measure(t.Context(), manifest); err == nil {
				t.Error("a second Measure succeeded")
			}
		})
	}
}

// A module that says it did what it did not do is found out.
func TestMeasureVerifiesRegister(t *testing.T) {
	module := nsmtest.New(t)
	v, client := newVault(t, module)
	module.Before = func(op string) response.ErrorCode {
		if op == "LockPCR" { // somebody extends between the vault's extend and lock
			module.Answer([]byte("\xa1\x69ExtendPCR\xa2\x65index\x10\x64data\x41x"))
		}
		return ""
	}
	if _, err := v.Measure(t.Context(), manifest); err == nil {
		t.Error("Measure succeeded")
	}
	value, _, err := client.DescribePCR(t.Context(), 16)
	if err != nil || bytes.Equal(value, workload.PCR16(manifest)) {
		t.Errorf("the test did not change the register: %x, %v", value, err)
	}
}

// A missing source of random bytes does not keep an enclave from starting.
func TestMeasureWithoutRandom(t *testing.T) {
	module := nsmtest.New(t)
	module.Before = func(op string) response.ErrorCode {
		if op == "GetRandom" {
			return response.ECInternalError
		}
		return ""
	}
	v, _ := newVault(t, module)
	if _, err := v.Measure(t.Context(), manifest); err != nil {
		t.Error(err)
	}
}

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		module := nsmtest.New(t)
		var broken, blocked atomic.Bool
		gate := make(chan struct{})
		module.Before = func(string) response.ErrorCode {
			if blocked.Load() {
				<-gate
			}
			if broken.Load() {
				return response.ECInternalError
			}
			return ""
		}
		v, client := newVault(t, module)
		if _, err := v.Measure(t.Context(), manifest); err != nil {
			t.Fatal(err)
		}
		age := func() (time.Duration, *ecdsa.PrivateKey) {
			t.Helper()
			c, err := v.Certificate(nil)
			if err != nil {
				t.Fatal(err)
			}
			parsed, err := x509.ParseCertificate(c.Certificate[0])
			if err != nil {
				t.Fatal(err)
			}
			document, err := attestation.DocumentFromCertificate(parsed)
			if err != nil {
				t.Fatal(err)
			}
			d, err := attestation.ParseUnverified(document)
			if err != nil {
				t.Fatal(err)
			}
			return time.Since(d.Timestamp), c.PrivateKey.(*ecdsa.PrivateKey)
		}
		expect := func(want time.Duration) *ecdsa.PrivateKey {
			t.Helper()
			synctest.Wait()
			got, key := age()
			if got.Round(time.Second) != want {
				t.Errorf("the document is %s old, want %s", got, want)
			}
			return key
		}
		key := expect(0)
		time.Sleep(4 * time.Minute)
		expect(4 * time.Minute)
		time.Sleep(time.Minute + time.Second)
		if !key.Equal(expect(time.Second)) {
			t.Error("the renewal changed the key")
		}

		// Due at 5:00, tried again after 1, 2 and 4 s, and successful after 8 more.
		broken.Store(true)
		time.Sleep(5*time.Minute + 8*time.Second)
		expect(5*time.Minute + 9*time.Second)
		broken.Store(false)
		time.Sleep(7 * time.Second)
		expect(time.Second)

		// A module that does not answer delays the renewal and no handshake.
		blocked.Store(true)
		time.Sleep(6 * time.Minute)
		expect(6*time.Minute + time.Second)
		blocked.Store(false)
		close(gate)
		time.Sleep(2 * time.Minute)
		if got, _ := age(); got > 5*time.Minute {
			t.Errorf("the document is %s old after the module came back", got)
		}

		v.Close()
		time.Sleep(time.Hour)
		if got, _ := age(); got < time.Hour {
			t.Errorf("renewed %s after Close", got)
		}
		client.Close()
	})
}

func TestFreshDocumentIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		module := nsmtest.New(t)
		gate := make(chan struct{})
		var blocked atomic.Bool
		module.Before = func(string) response.ErrorCode {
			if blocked.Load() {
				<-gate
			}
			return ""
		}
		v, client := newVault(t, module)
		if _, err := v.Measure(t.Context(), manifest); err != nil {
			t.Fatal(err)
		}
		blocked.Store(true)
		var callers sync.WaitGroup
		var served, busy atomic.Int32
		for range 20 {
			callers.Go(func() {
				switch _, err := v.FreshDocument(t.Context(), []byte{1}); {
				case err == nil:
					served.Add(1)
				case errors.Is(err, vault.ErrBusy):
					busy.Add(1)
				default:
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		if got := busy.Load(); got != 4 {
			t.Errorf("%d of 20 callers were turned away, want 4", got)
		}
		close(gate)
		callers.Wait()
		if got := served.Load(); got != 16 {
			t.Errorf("%d callers got a document, want 16", got)
		}
		v.Close()
		client.Close()
	})
}

// Printing a vault shows no secret.
func TestNoSecretInPrint(t *testing.T) {
	v, _ := newVault(t, nsmtest.New(t))
	if _, err := v.Measure(t.Context(), manifest); err != nil {
		t.Fatal(err)
	}
	encoded, err := json.Marshal(map[string]any{"vault": v})
	if err != nil {
		t.Fatal(err)
	}
	var logged strings.Builder
	slog.New(slog.NewJSONHandler(&logged, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	})).Info("m", "vault", v)
	got := []string{string(encoded), fmt.Sprintf("%v %+v %#v %s %d", v, v, v, v, v), logged.String()}
	want := []string{`{"vault":{}}`, "vault vault vault vault vault", `{"level":"INFO","msg":"m","vault":{}}` + "\n"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
