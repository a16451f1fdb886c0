package attestation

import (
	"crypto/tls"
	"crypto/x509"
	"runtime"
	"testing"

	"cloister.dev/cloister/internal/cbor"
)

// TestHugeLengths claims lengths of up to 2^64-1 in documents of under 1 KiB, in each place where there is
// a length.
func TestHugeLengths(t *testing.T) {
	header := cbor.AppendBytes([]byte{0x84}, []byte{0xa1, 0x01, 0x38, 0x22})
	after := func(b []byte, more ...byte) []byte { return append(b[:len(b):len(b)], more...) }
	message := func(payload []byte) []byte {
		payload = append(payload, make([]byte, 800-len(payload))...)
		return cbor.AppendBytes(cbor.AppendBytes(after(header, 0xa0), payload), make([]byte, 96))
	}
	payload := func(key string, value []byte) []byte {
		return message(append(cbor.AppendText([]byte{0xbf}, key), value...))
	}
	// head is that of an item of the major type with 2^32-1 or 2^64-1 bytes or elements.
	head := func(major byte, wide bool) []byte {
		if wide {
			return []byte{major<<5 | 27, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
		}
		return []byte{major<<5 | 26, 0xff, 0xff, 0xff, 0xff}
	}
	const bytes, text, array, dict = 2, 3, 4, 5
	deep := func(wide bool) []byte { // an array of arrays of arrays ...
		var b []byte
		for range 15 {
			b = append(b, head(array, wide)...)
		}
		return b
	}
	for _, wide := range []bool{false, true} {
		for name, doc := range map[string][]byte{
			"COSE array":         head(array, wide),
			"protected header":   append([]byte{0x84}, head(bytes, wide)...),
			"unprotected header": after(header, head(dict, wide)...),
			"payload":            after(header, append([]byte{0xa0}, head(bytes, wide)...)...),
			"payload's map":      message(head(dict, wide)),
			"field's name":       message(append([]byte{0xbf}, head(text, wide)...)),
			"module_id":          payload("module_id", head(text, wide)),
			"pcrs":               payload("pcrs", head(dict, wide)),
			"one of pcrs":        payload("pcrs", append([]byte{0xbf, 0x00}, head(bytes, wide)...)),
			"cabundle":           payload("cabundle", head(array, wide)),
			"one of cabundle":    payload("cabundle", append([]byte{0x9f}, head(bytes, wide)...)),
			"certificate":        payload("certificate", head(bytes, wide)),
			"user_data":          payload("user_data", head(bytes, wide)),
			"new field":          payload("new", deep(wide)),
			"new map":            payload("new", head(dict, wide)),
		} {
			var start, end runtime.MemStats
			runtime.ReadMemStats(&start)
			_, err := Verify(doc, Options{})
			runtime.ReadMemStats(&end)
			wantRule(t, err, RuleFormat, "the data ends in the middle")
			if got := end.TotalAlloc - start.TotalAlloc; got > 64<<10 {
				t.Errorf("%s: %d bytes were allocated for a document of %d", name, got, len(doc))
			}
		}
	}
}

// TestAllocations keeps verification from growing unseen; what it costs in time, `make bench-attestation`
// measures.
func TestAllocations(t *testing.T) {
	m := newMaker()
	doc := m.make(t)
	cold := good(m.root)
	warm := cold
	warm.Chains = new(Chains)
	e := newEnclave(t)
	cert, err := x509.ParseCertificate(e.certificate(t).Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	state := tls.ConnectionState{Version: tls.VersionTLS13, PeerCertificates: []*x509.Certificate{cert}}
	v := e.verifier(t)
	for name, tc := range map[string]struct {
		most   float64
		verify func() error
	}{
		"cold":                 {400, func() error { _, err := Verify(doc, cold); return err }},
		"chain remembered":     {100, func() error { _, err := Verify(doc, warm); return err }},
		"certificate verified": {0, func() error { _, err := v.verifyConnection(state, testTime); return err }},
	} {
		got := testing.AllocsPerRun(20, func() {
			if err := tc.verify(); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		})
		if got > tc.most {
			t.Errorf("%s: %.0f allocations, more than %.0f", name, got, tc.most)
		}
	}
}
