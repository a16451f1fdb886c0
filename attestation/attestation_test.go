package attestation

import (
	"bytes"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	fxcbor "github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"

	"cloister.dev/cloister/internal/cbor"
	"cloister.dev/cloister/internal/nsmdev"
	"cloister.dev/cloister/workload"
)

// vectors holds real documents of AWS enclaves. They are other people's and not part of the repository.
const vectors = "../../shared/vectors/attestation"

// hexReg is a register of 48 equal bytes, in hexadecimal.
func hexReg(b byte) string { return strings.Repeat(hex.EncodeToString([]byte{b}), 48) }

func TestAWSRoot(t *testing.T) {
	const want = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
	sum := sha256.Sum256(AWSRoot().Raw)
	if got := hex.EncodeToString(sum[:]); got != want {
		t.Errorf("the built-in root has SHA-256 %s, want %s", got, want)
	}
}

func TestParseRoot(t *testing.T) {
	one := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: AWSRoot().Raw})
	tests := map[string]struct {
		in   []byte
		want string // error; empty: none
	}{
		"one":         {one, ""},
		"nothing":     {nil, "no PEM block"},
		"a key":       {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY"}), "no PEM block of type CERTIFICATE"},
		"two":         {bytes.Repeat(one, 2), "exactly one root"},
		"not a valid": {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}), "read root certificate"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := ParseRoot(tc.in)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("got error %v, want %q", err, tc.want)
			}
		})
	}
}

// TestVectors verifies real documents at their own time, and refuses them now and a tampered one.
func TestVectors(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(vectors, "*.bin"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Skipf("no test vectors: %s is absent", vectors)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			doc, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			d, err := ParseUnverified(doc)
			if err != nil {
				t.Fatal(err)
			}
			isDebug := strings.Contains(file, "_debug_")
			if d.Debug() != isDebug {
				t.Errorf("Debug() = %v", d.Debug())
			}
			_, err = Verify(doc, Options{AllowDebug: isDebug})
			wantRule(t, err, RuleAge, "old at")
			_, err = Verify(doc, Options{AllowDebug: isDebug, MaxAge: 100 * 365 * 24 * time.Hour})
			wantRule(t, err, RuleChain, "expired")
			chains := new(Chains)
			got, err := Verify(doc, Options{Now: d.Timestamp, AllowDebug: isDebug, Chains: chains})
			if strings.Contains(file, "_tampered_") {
				wantRule(t, err, RuleSignature, "is not that of the document's certificate")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.Development {
				t.Error("a document below the AWS root is marked as development")
			}
			if diff := cmp.Diff(d, got); diff != "" {
				t.Errorf("Verify and ParseUnverified differ (-parsed +verified):\n%s", diff)
			}
			if isDebug {
				_, err = Verify(doc, Options{Now: d.Timestamp})
				wantRule(t, err, RuleDebug, "debug mode")
			}
			if again, err := Verify(doc, Options{Now: d.Timestamp, AllowDebug: isDebug, Chains: chains}); err != nil || len(chains.entries) != 1 {
				t.Errorf("again, with its chain remembered: %v, %v", again, err)
			}
			_, err = Verify(doc, Options{AllowDebug: isDebug, MaxAge: 100 * 365 * 24 * time.Hour, Chains: chains})
			wantRule(t, err, RuleChain, "expired")
			_, err = Verify(doc, Options{Now: d.Timestamp, AllowDebug: isDebug, Root: strangerRoot(t)})
			wantRule(t, err, RuleChain, "intermediate certificate 1: its issuer is")
			for i := 0; i < len(doc); i += 97 { // a sample of the bits
				bad := bytes.Clone(doc)
				bad[i] ^= 1
				if _, err := Verify(bad, Options{Now: d.Timestamp, AllowDebug: true, Chains: chains}); err == nil {
					t.Errorf("accepted with a changed bit in byte %d", i)
				}
			}
		})
	}
}

// strangerRoot makes a root that issued nothing else.
func strangerRoot(t testing.TB) *x509.Certificate {
	m := newMaker()
	if err := m.issueAnew(); err != nil {
		t.Fatal(err)
	}
	return m.root
}

// wantRule checks that err is an *Error of the rule and contains the text.
func wantRule(t *testing.T, err error, rule Rule, text string) {
	t.Helper()
	var e *Error
	if !errors.As(err, &e) {
		t.Errorf("got error %v, want an *Error of rule %s", err, rule)
		return
	}
	if e.Rule != rule || !strings.Contains(err.Error(), text) {
		t.Errorf("got error %q, want rule %s and %q", err, rule, text)
	}
}

// good are options that a document of newMaker fulfils.
func good(root *x509.Certificate) Options {
	return Options{
		Root:      root,
		Now:       testTime.Add(time.Minute),
		PublicKey: []byte("key"),
		UserData:  []byte{},
		Measurements: workload.MeasurementSet{
			{Label: "old", PCR0: hexReg(0xff), PCR16: hexReg(0xb0)},
			{Label: "new", PCR0: hexReg(0xa0), PCR3: hexReg(0xa3), PCR16: hexReg(0xb0)},
		},
	}
}

// TestVerify keeps every rule once, at its border where it has one.
func TestVerify(t *testing.T) {
	type doc = func(*maker)
	type opts = func(*Options)
	cert := func(i int, change func(*x509.Certificate)) doc {
		return func(m *maker) { change(m.templates[i]) }
	}
	// A set of this one entry, with PCR16.
	entry := func(m workload.Measurement) opts {
		m.PCR16 = hexReg(0xb0)
		return func(o *Options) { o.Measurements = workload.MeasurementSet{m} }
	}
	tests := map[string]struct {
		doc  doc
		opts opts
	}{
		// COSE, CBOR and fields.
		"as AWS sends it since August 2025": {doc: func(m *maker) { m.indefinite = true }},
		"as AWS sent it before":             {},
		"tag 18":                            {doc: func(m *maker) { m.cose = func(b []byte) []byte { return append([]byte{0xd2}, b...) } }},
		"indefinite COSE array": {doc: func(m *maker) {
			m.cose = func(b []byte) []byte { return append(append([]byte{0x9f}, b[1:]...), 0xff) }
		}},
		"no nonce field": {doc: func(m *maker) { m.remove("nonce") }},
		"unknown field":  {doc: func(m *maker) { m.set("new", []byte{0x82, 0x01, 0xa2, 0x02, 0xf5, 0x03, 0xf5}) }},
		"nested 16 deep": {doc: func(m *maker) { m.set("deep", append(bytes.Repeat([]byte{0x81}, 15), 0)) }},

		// Age.
		"made now":                      {opts: func(o *Options) { o.Now = testTime }},
		"exactly the maximum age":       {opts: func(o *Options) { o.Now = testTime.Add(DefaultMaxAge) }},
		"exactly the age asked for":     {opts: func(o *Options) { o.MaxAge = time.Minute }},
		"as old as asked for":           {opts: func(o *Options) { o.Now, o.MaxAge = testTime.Add(time.Hour), time.Hour }},
		"as far ahead as clocks may be": {opts: func(o *Options) { o.Now = testTime.Add(-Skew) }},

		// Chain.
		"one intermediate": {doc: func(m *maker) { m.templates = append(m.templates[:1:1], m.templates[3:]...) }},
		"no intermediate":  {doc: func(m *maker) { m.templates = append(m.templates[:1:1], m.templates[4:]...) }},
		"no path lengths": {doc: func(m *maker) {
			m.templates[1].MaxPathLen, m.templates[2].MaxPathLen, m.templates[3].MaxPathLenZero = 0, 0, false
		}},
		"root with path length 3":      {doc: cert(0, func(c *x509.Certificate) { c.MaxPathLen = 3 })},
		"unknown extension":            {doc: cert(4, func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{unknownExtension(false)} })},
		"long certificate":             {doc: cert(4, func(c *x509.Certificate) { c.Subject.CommonName = strings.Repeat("x", 600) })},
		"leaf expired within the skew": {doc: cert(4, func(c *x509.Certificate) { c.NotAfter = testTime.Add(-4 * time.Minute) })},
		"leaf valid within the skew":   {doc: cert(4, func(c *x509.Certificate) { c.NotBefore = testTime.Add(6 * time.Minute) })},

		// What the caller pins.
		"nonce":            {doc: func(m *maker) { m.set("nonce", []byte{0x41, 0x01}) }, opts: func(o *Options) { o.Nonce = []byte{1} }},
		"empty nonce":      {doc: func(m *maker) { m.set("nonce", []byte{0x40}) }, opts: func(o *Options) { o.Nonce = []byte{} }},
		"nothing pinned":   {opts: func(o *Options) { *o = Options{Root: o.Root, Now: o.Now} }},
		"PCR1 and PCR2":    {opts: entry(workload.Measurement{PCR1: hexReg(0xa1), PCR2: hexReg(0xa2)})},
		"PCR8":             {doc: func(m *maker) { m.set("pcrs", pcrs(map[uint]byte{0: 0xa0, 8: 0xa8, 16: 0xb0})) }, opts: entry(workload.Measurement{PCR8: hexReg(0xa8)})},
		"PCR0, PCR3, PCR4": {opts: entry(workload.Measurement{PCR0: hexReg(0xa0), PCR3: hexReg(0xa3), PCR4: hexReg(0xa4)})},
		"capital digits":   {opts: entry(workload.Measurement{PCR0: strings.ToUpper(hexReg(0xa0))})},
		"debug, if allowed": {doc: func(m *maker) { m.set("pcrs", pcrs(map[uint]byte{0: 0, 16: 0xb0})) }, opts: func(o *Options) {
			o.AllowDebug = true
			o.Measurements = workload.MeasurementSet{{PCR0: hexReg(0), PCR16: hexReg(0xb0)}}
		}},
		"debug allowed, but not used": {opts: func(o *Options) { o.AllowDebug = true }},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMaker()
			if tc.doc != nil {
				tc.doc(m)
			}
			doc := m.make(t)
			opts := good(m.root)
			if tc.opts != nil {
				tc.opts(&opts)
			}
			d, err := Verify(doc, opts)
			if err != nil {
				t.Fatal(err)
			}
			want := &Document{
				ModuleID: "i-0123456789abcdef0-enc0123456789abcdef", Digest: "SHA384", Timestamp: testTime, PCRs: d.PCRs,
				Certificate: m.ders[len(m.ders)-1], CABundle: m.ders[:len(m.ders)-1],
				PublicKey: []byte("key"), UserData: []byte{}, Nonce: opts.Nonce, Development: true,
			}
			if diff := cmp.Diff(want, d); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if !bytes.Equal(d.PCRs[16], bytes.Repeat([]byte{0xb0}, 48)) {
				t.Errorf("PCR16 is %x", d.PCRs[16])
			}
		})
	}
}

func unknownExtension(critical bool) pkix.Extension {
	return pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: critical, Value: []byte{5, 0}}
}

// TestVerifyRefuses breaks every rule once, in the document or in the options.
func TestVerifyRefuses(t *testing.T) {
	type doc = func(*maker)
	type opts = func(*Options)
	payload := func(change func([]byte) []byte) doc { return func(m *maker) { m.payload = change } }
	cose := func(change func([]byte) []byte) doc { return func(m *maker) { m.cose = change } }
	set := func(key string, value []byte) doc { return func(m *maker) { m.set(key, value) } }
	cert := func(i int, change func(*x509.Certificate)) doc {
		return func(m *maker) { change(m.templates[i]) }
	}
	tests := map[string]struct {
		doc  doc
		opts opts
		rule Rule
		want string
	}{
		// COSE and CBOR.
		"empty":                       {doc: cose(func([]byte) []byte { return nil }), rule: RuleFormat, want: "data ends"},
		"too large":                   {doc: cose(func([]byte) []byte { return make([]byte, MaxDocumentSize+1) }), rule: RuleFormat, want: "more than 16384"},
		"trailing byte":               {doc: cose(func(b []byte) []byte { return append(b, 0) }), rule: RuleFormat, want: "1 bytes follow"},
		"cut":                         {doc: cose(func(b []byte) []byte { return b[:len(b)-1] }), rule: RuleFormat, want: "data ends"},
		"other tag":                   {doc: cose(func(b []byte) []byte { return append([]byte{0xd1}, b...) }), rule: RuleFormat, want: "a tag where an array"},
		"tagged twice":                {doc: cose(func(b []byte) []byte { return append([]byte{0xd2, 0xd2}, b...) }), rule: RuleFormat, want: "a tag where an array"},
		"three elements":              {doc: cose(func(b []byte) []byte { b[0] = 0x83; return b[:len(b)-98] }), rule: RuleFormat, want: "3 elements"},
		"five elements":               {doc: cose(func(b []byte) []byte { b[0] = 0x85; return append(b, 0) }), rule: RuleFormat, want: "more than 4 elements"},
		"QEMU's unsigned document":    {doc: cose(qemuDocument), rule: RuleFormat, want: "algorithm -1, but only ES384"},
		"ES256":                       {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa1, 0x01, 0x26}) }), rule: RuleFormat, want: "algorithm -7"},
		"ES384 in another width":      {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa1, 0x01, 0x39, 0, 34}) }), rule: RuleSignature},
		"no algorithm":                {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa0}) }), rule: RuleFormat, want: "no algorithm"},
		"empty protected header":      {doc: cose(func(b []byte) []byte { return spliceHeader(b, nil) }), rule: RuleFormat, want: "data ends"},
		"crit":                        {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa2, 0x01, 0x38, 34, 0x02, 0x81, 0x01}) }), rule: RuleFormat, want: "unexpected entry 2"},
		"algorithm twice":             {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa2, 0x01, 0x38, 34, 0x01, 0x38, 34}) }), rule: RuleFormat, want: "unexpected entry 1"},
		"data after the header":       {doc: cose(func(b []byte) []byte { return spliceHeader(b, []byte{0xa1, 0x01, 0x38, 34, 0}) }), rule: RuleFormat, want: "1 bytes follow"},
		"unprotected header":          {doc: cose(func(b []byte) []byte { return bytes.Replace(b, []byte{0xa0}, []byte{0xa1, 0x01, 0x26}, 1) }), rule: RuleFormat, want: "must be empty"},
		"signature of 95 bytes":       {doc: cose(func(b []byte) []byte { b[len(b)-97] = 95; return b[:len(b)-1] }), rule: RuleFormat, want: "95 bytes, not 96"},
		"payload is null":             {doc: cose(func(b []byte) []byte { return append(append(b[:7:7], 0xf6), b[len(b)-98:]...) }), rule: RuleFormat, want: "payload: a simple value"},
		"payload is empty":            {doc: payload(func([]byte) []byte { return nil }), rule: RuleFormat, want: "data ends"},
		"payload is no map":           {doc: payload(func([]byte) []byte { return []byte{0x80} }), rule: RuleFormat, want: "an array where a map"},
		"payload with trailing bytes": {doc: payload(func(b []byte) []byte { return append(b, 0) }), rule: RuleFormat, want: "1 bytes follow"},
		"payload without break":       {doc: func(m *maker) { m.indefinite = true; m.payload = func(b []byte) []byte { return b[:len(b)-1] } }, rule: RuleFormat, want: "data ends"},
		"nested too deep":             {doc: set("deep", bytes.Repeat([]byte{0x81}, 1000)), rule: RuleFormat, want: "nested more than 16 deep"},
		"key twice in a new field":    {doc: set("new", []byte{0xa2, 0x01, 0x02, 0x01, 0x03}), rule: RuleFormat, want: "a key twice"},
		"huge array":                  {doc: set("huge", []byte{0x9a, 0xff, 0xff, 0xff, 0xff}), rule: RuleFormat, want: "data ends"},

		// Fields.
		"field twice":             {doc: func(m *maker) { m.fields = append(m.fields, m.fields[0]) }, rule: RuleFormat, want: `"module_id" appears twice`},
		"unknown field twice":     {doc: func(m *maker) { m.fields = append(m.fields, field{"x", []byte{0}}, field{"x", []byte{0}}) }, rule: RuleFormat, want: `"x" appears twice`},
		"no module_id":            {doc: func(m *maker) { m.remove("module_id") }, rule: RuleFormat, want: `"module_id" is missing`},
		"no digest":               {doc: func(m *maker) { m.remove("digest") }, rule: RuleFormat, want: `"digest" is missing`},
		"no timestamp":            {doc: func(m *maker) { m.remove("timestamp") }, rule: RuleFormat, want: `"timestamp" is missing`},
		"no pcrs":                 {doc: func(m *maker) { m.remove("pcrs") }, rule: RuleFormat, want: `"pcrs" is missing`},
		"no certificate":          {doc: func(m *maker) { m.remove("certificate") }, rule: RuleFormat, want: `"certificate" is missing`},
		"no cabundle":             {doc: func(m *maker) { m.remove("cabundle") }, rule: RuleFormat, want: `"cabundle" is missing`},
		"empty module_id":         {doc: set("module_id", []byte{0x60}), rule: RuleFormat, want: `"module_id" is empty`},
		"module_id is a number":   {doc: set("module_id", []byte{0x01}), rule: RuleFormat, want: `"module_id": an unsigned integer`},
		"other digest":            {doc: set("digest", cbor.AppendText(nil, "SHA256")), rule: RuleFormat, want: `"SHA256", not "SHA384"`},
		"time 0":                  {doc: set("timestamp", []byte{0}), rule: RuleFormat, want: "no sensible time"},
		"time 2^64-1":             {doc: set("timestamp", cbor.AppendUint(nil, 1<<64-1)), rule: RuleFormat, want: "no sensible time"},
		"negative time":           {doc: set("timestamp", []byte{0x20}), rule: RuleFormat, want: "a negative integer"},
		"no PCR0":                 {doc: set("pcrs", pcrs(map[uint]byte{1: 1})), rule: RuleFormat, want: "lacks PCR0"},
		"PCR32":                   {doc: set("pcrs", pcrs(map[uint]byte{32: 1})), rule: RuleFormat, want: "no PCR32"},
		"PCR0 twice":              {doc: set("pcrs", append([]byte{0xa2}, bytes.Repeat(pcrs(map[uint]byte{0: 1})[1:], 2)...)), rule: RuleFormat, want: "PCR0 appears twice"},
		"short PCR":               {doc: set("pcrs", []byte{0xa1, 0x00, 0x41, 0x00}), rule: RuleFormat, want: "PCR0 has 1 bytes"},
		"PCR is null":             {doc: set("pcrs", []byte{0xa1, 0x00, 0xf6}), rule: RuleFormat, want: "a simple value"},
		"empty certificate":       {doc: set("certificate", []byte{0x40}), rule: RuleFormat, want: `"certificate" is empty`},
		"empty bundle":            {doc: set("cabundle", []byte{0x80}), rule: RuleFormat, want: `"cabundle" is empty`},
		"large bundle":            {doc: set("cabundle", append([]byte{0x89}, bytes.Repeat([]byte{0x40}, 9)...)), rule: RuleFormat, want: "more than 8 certificates"},
		"user_data is text":       {doc: set("user_data", []byte{0x60}), rule: RuleFormat, want: `"user_data": a text string`},
		"certificate is no DER":   {doc: set("certificate", []byte{0x41, 0x00}), rule: RuleChain, want: "leaf certificate"},
		"intermediate is no DER":  {doc: set("cabundle", []byte{0x82, 0x40, 0x41, 0x00}), rule: RuleChain, want: "intermediate certificate 1"},
		"bundle with only a root": {doc: set("cabundle", []byte{0x81, 0x40}), rule: RuleChain, want: "leaf certificate: its issuer"},

		// Age.
		"too old":                {opts: func(o *Options) { o.Now = testTime.Add(15*time.Minute + time.Second) }, rule: RuleAge, want: "15m1s old"},
		"older than asked for":   {opts: func(o *Options) { o.Now, o.MaxAge = testTime.Add(time.Minute+time.Second), time.Minute }, rule: RuleAge, want: "at most 1m0s"},
		"from the future":        {opts: func(o *Options) { o.Now = testTime.Add(-5*time.Minute - time.Second) }, rule: RuleAge, want: "5m1s in the future"},
		"checked at this moment": {opts: func(o *Options) { o.Now = time.Time{} }, rule: RuleAge},

		// Chain.
		"another root":                  {opts: func(o *Options) { o.Root = AWSRoot() }, rule: RuleChain, want: "intermediate certificate 1: its issuer"},
		"the built-in root":             {opts: func(o *Options) { o.Root = nil }, rule: RuleChain, want: "intermediate certificate 1: its issuer"},
		"root expired":                  {doc: cert(0, func(c *x509.Certificate) { c.NotAfter = testTime.Add(-5 * time.Minute) }), rule: RuleChain, want: "root certificate: it expired"},
		"root without keyCertSign":      {doc: cert(0, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageDigitalSignature }), rule: RuleChain, want: "root certificate: its key usage"},
		"root with path length 2":       {doc: cert(0, func(c *x509.Certificate) { c.MaxPathLen = 2 }), rule: RuleChain, want: "root certificate: its path length is 2, but 3"},
		"intermediate not yet valid":    {doc: cert(1, func(c *x509.Certificate) { c.NotBefore = testTime.Add(6*time.Minute + time.Second) }), rule: RuleChain, want: "intermediate certificate 1: it is valid from"},
		"intermediate expired":          {doc: cert(2, func(c *x509.Certificate) { c.NotAfter = testTime.Add(-5 * time.Minute) }), rule: RuleChain, want: "intermediate certificate 2: it expired"},
		"leaf expired":                  {doc: cert(4, func(c *x509.Certificate) { c.NotAfter = testTime.Add(-5 * time.Minute) }), rule: RuleChain, want: "leaf certificate: it expired"},
		"intermediate is no CA":         {doc: cert(2, func(c *x509.Certificate) { c.IsCA, c.MaxPathLen = false, 0 }), rule: RuleChain, want: "intermediate certificate 2: it is not the certificate of a certificate authority"},
		"no basic constraints":          {doc: cert(2, func(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA, c.MaxPathLen = false, false, 0 }), rule: RuleChain, want: "intermediate certificate 2: it is not"},
		"intermediate without certSign": {doc: cert(3, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), rule: RuleChain, want: "intermediate certificate 3: its key usage"},
		"path length exceeded":          {doc: cert(1, func(c *x509.Certificate) { c.MaxPathLen = 1 }), rule: RuleChain, want: "intermediate certificate 1: its path length is 1, but 2"},
		"path length 0 exceeded":        {doc: cert(2, func(c *x509.Certificate) { c.MaxPathLen, c.MaxPathLenZero = 0, true }), rule: RuleChain, want: "intermediate certificate 2: its path length is 0, but 1"},
		"leaf is a CA":                  {doc: cert(4, func(c *x509.Certificate) { c.IsCA = true }), rule: RuleChain, want: "leaf certificate: it is the certificate of a certificate authority"},
		"leaf without digitalSignature": {doc: cert(4, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), rule: RuleChain, want: "leaf certificate: its key usage"},
		"unknown critical extension":    {doc: cert(3, func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{unknownExtension(true)} }), rule: RuleChain, want: "unknown critical extension 1.2.3"},
		"name constraints":              {doc: cert(1, func(c *x509.Certificate) { c.PermittedDNSDomains = []string{"a"} }), rule: RuleChain, want: "name constraints"},
		"SHA-256":                       {doc: cert(2, func(c *x509.Certificate) { c.SignatureAlgorithm = x509.ECDSAWithSHA256 }), rule: RuleChain, want: "signed with ECDSA-SHA256"},
		"P-256":                         {doc: func(m *maker) { m.curve = elliptic.P256() }, rule: RuleChain, want: "not on P-384"},
		"intermediate of another key":   {doc: func(m *maker) { m.unrelated = 1 }, rule: RuleChain, want: "intermediate certificate 1: it is not signed by"},
		"leaf of another key":           {doc: func(m *maker) { m.unrelated = 4 }, rule: RuleChain, want: "leaf certificate: it is not signed by"},

		// Signature.
		"changed payload":   {doc: cose(func(b []byte) []byte { return bytes.Replace(b, []byte("i-0123"), []byte("i-0124"), 1) }), rule: RuleSignature, want: "the document was changed"},
		"changed signature": {doc: cose(func(b []byte) []byte { b[len(b)-1] ^= 1; return b }), rule: RuleSignature},
		"zero signature":    {doc: cose(func(b []byte) []byte { clear(b[len(b)-96:]); return b }), rule: RuleSignature},
		"maximal signature": {doc: cose(func(b []byte) []byte { copy(b[len(b)-96:], bytes.Repeat([]byte{0xff}, 96)); return b }), rule: RuleSignature},

		// What the caller pins.
		"nonce absent":       {opts: func(o *Options) { o.Nonce = []byte("n") }, rule: RuleNonce, want: "has no nonce"},
		"empty nonce absent": {opts: func(o *Options) { o.Nonce = []byte{} }, rule: RuleNonce, want: "has no nonce"},
		"other nonce":        {doc: set("nonce", []byte{0x41, 0x01}), opts: func(o *Options) { o.Nonce = []byte{2} }, rule: RuleNonce, want: "expected 02 (1 bytes), seen 01 (1 bytes)"},
		"other user data":    {opts: func(o *Options) { o.UserData = []byte(UserDataServer) }, rule: RuleUserData},
		"user data longer":   {doc: set("user_data", cbor.AppendBytes(nil, []byte(UserDataServer+"x"))), opts: func(o *Options) { o.UserData = []byte(UserDataServer) }, rule: RuleUserData},
		"other public key":   {opts: func(o *Options) { o.PublicKey = []byte("kez") }, rule: RulePublicKey},
		"debug":              {doc: set("pcrs", pcrs(map[uint]byte{0: 0, 16: 0xb0})), opts: func(o *Options) { o.Measurements = nil }, rule: RuleDebug, want: "debug mode"},
		"debug in the set": {doc: set("pcrs", pcrs(map[uint]byte{0: 0, 16: 0xb0})), opts: func(o *Options) {
			o.Measurements = workload.MeasurementSet{{PCR0: hexReg(0), PCR16: hexReg(0xb0)}}
		}, rule: RuleDebug, want: "debug mode"},
		"other code":         {doc: set("pcrs", pcrs(map[uint]byte{0: 0xa1, 3: 0xa3, 16: 0xb0})), rule: RuleMeasurement, want: "PCR0 expected " + hexReg(0xff) + ", seen " + hexReg(0xa1)},
		"other workload":     {doc: set("pcrs", pcrs(map[uint]byte{0: 0xa0, 3: 0xa3, 16: 0xb1})), rule: RuleMeasurement, want: `the closest is "new": PCR16 expected ` + hexReg(0xb0) + ", seen " + hexReg(0xb1)},
		"PCR16 not locked":   {doc: set("pcrs", pcrs(map[uint]byte{0: 0xa0, 3: 0xa3})), rule: RuleMeasurement, want: "PCR16 expected " + hexReg(0xb0) + ", seen none"},
		"empty measurements": {opts: func(o *Options) { o.Measurements = workload.MeasurementSet{} }, rule: RuleMeasurement, want: "set is empty"},
		"PCR1 without PCR2": {opts: func(o *Options) {
			o.Measurements = workload.MeasurementSet{{PCR1: hexReg(0xa1), PCR16: hexReg(0xb0)}}
		}, rule: RuleMeasurement, want: "pins no code"},
		"PCR8 of no signer": {doc: set("pcrs", pcrs(map[uint]byte{0: 0xa0, 8: 0, 16: 0xb0})), opts: func(o *Options) {
			o.Measurements = workload.MeasurementSet{{PCR8: hexReg(0), PCR16: hexReg(0xb0)}}
		}, rule: RuleMeasurement, want: "pins no code"},
		"other role":    {opts: func(o *Options) { o.Measurements = o.Measurements[1:]; o.Measurements[0].PCR3 = hexReg(0xa4) }, rule: RuleMeasurement, want: "PCR3 expected"},
		"half an entry": {opts: func(o *Options) { o.Measurements = workload.MeasurementSet{{PCR0: hexReg(0xa0)}} }, rule: RuleMeasurement, want: "pins no workload"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			m := newMaker()
			if tc.doc != nil {
				tc.doc(m)
			}
			doc := m.make(t)
			opts := good(m.root)
			if tc.opts != nil {
				tc.opts(&opts)
			}
			d, err := Verify(doc, opts)
			wantRule(t, err, tc.rule, tc.want)
			if d != nil {
				t.Error("a refused document is returned")
			}
		})
	}
}

// spliceHeader replaces the protected header of a document of newMaker.
func spliceHeader(doc, header []byte) []byte {
	old := cbor.AppendBytes([]byte{0x84}, []byte{0xa1, 0x01, 0x38, 0x22})
	return append(cbor.AppendBytes([]byte{0x84}, header), doc[len(old):]...)
}

// qemuDocument makes what the emulated NSM of QEMU returns: algorithm -1 and a signature of zeros.
func qemuDocument(doc []byte) []byte {
	doc = spliceHeader(doc, []byte{0xa1, 0x01, 0x20})
	clear(doc[len(doc)-96:])
	return doc
}

// TestIgnoresBundleRoot puts another root, and then nonsense, where the bundle has its root.
func TestIgnoresBundleRoot(t *testing.T) {
	signer := newSigner(t)
	doc, err := signer.Sign(nsmdev.Document{ModuleID: "m", Timestamp: testTime, PCRs: map[uint][]byte{0: bytes.Repeat([]byte{1}, 48)}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := Verify(doc, Options{Root: signer.Root(), Now: testTime})
	if err != nil {
		t.Fatal(err)
	}
	for name, first := range map[string][]byte{"AWS's root": AWSRoot().Raw, "nonsense": {1, 2, 3}, "nothing": nil} {
		t.Run(name, func(t *testing.T) {
			bundle := append([][]byte{first}, d.CABundle[1:]...)
			if _, err := verifyChain(signer.Root(), bundle, d.Certificate, testTime); err != nil {
				t.Errorf("with the pinned root: %v", err)
			}
			if _, err := verifyChain(AWSRoot(), bundle, d.Certificate, testTime); err == nil {
				t.Error("accepted with a root that did not sign")
			}
		})
	}
}

func TestMismatchIsTyped(t *testing.T) {
	m := newMaker()
	doc := m.make(t)
	opts := good(m.root)
	opts.Measurements = workload.MeasurementSet{{Label: "x", PCR0: hexReg(0xa0), PCR16: hexReg(0xb1)}}
	_, err := Verify(doc, opts)
	var mismatch *workload.MismatchError
	if !errors.As(err, &mismatch) {
		t.Fatalf("got %v, want a *workload.MismatchError", err)
	}
	want := []workload.Mismatch{{PCR: 16, Expected: hexReg(0xb1), Seen: hexReg(0xb0)}}
	if diff := cmp.Diff(want, mismatch.Mismatches); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// newSigner returns a development signer with a root that is valid at testTime and now.
func newSigner(t testing.TB) *nsmdev.Signer {
	t.Helper()
	cert, key, err := nsmdev.NewRoot(testTime.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	signer, err := nsmdev.New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// FuzzVerify feeds documents to the parser and, at the time that they claim, to the verifier. Only
// documents of the seeds' root that were not changed may pass.
func FuzzVerify(f *testing.F) {
	m := newMaker()
	seed := m.make(f)
	f.Add(seed)
	m.indefinite = true
	f.Add(m.make(f))
	f.Add(qemuDocument(bytes.Clone(seed)))
	f.Add(append([]byte{0xd2}, seed...))
	f.Add([]byte{0x84, 0x44, 0xa1, 0x01, 0x38, 0x22, 0xa0, 0x40, 0x58, 0x60})
	other := newMaker()
	other.templates[0].Subject.CommonName = "other" // refused by name, so fuzzing does not wait for P-384
	other.issue(f)
	stranger := other.root
	decoder, err := fxcbor.DecOptions{FieldNameMatching: fxcbor.FieldNameMatchingCaseSensitive}.DecMode()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		in := bytes.Clone(doc)
		env, d, err := parse(doc)
		if err != nil {
			var e *Error
			if !errors.As(err, &e) || e.Rule != RuleFormat {
				t.Errorf("got %v, want an *Error of rule format", err)
			}
			return
		}
		for index, value := range d.PCRs {
			if index > 31 || len(value) != 48 {
				t.Errorf("PCR%d has %d bytes", index, len(value))
			}
		}
		// A complete decoder reads the same.
		if err := fxcbor.Wellformed(doc); err != nil {
			t.Errorf("accepted, but not well-formed: %v", err)
		}
		var other struct {
			ModuleID    string          `cbor:"module_id"`
			Timestamp   int64           `cbor:"timestamp"`
			PCRs        map[uint][]byte `cbor:"pcrs"`
			Certificate []byte          `cbor:"certificate"`
			CABundle    [][]byte        `cbor:"cabundle"`
			PublicKey   []byte          `cbor:"public_key"`
			UserData    []byte          `cbor:"user_data"`
			Nonce       []byte          `cbor:"nonce"`
		}
		if err := decoder.Unmarshal(env.payload, &other); err != nil {
			t.Fatalf("accepted, but another decoder says: %v", err)
		}
		want := &Document{
			ModuleID: other.ModuleID, Digest: "SHA384", Timestamp: time.UnixMilli(other.Timestamp).UTC(), PCRs: other.PCRs,
			Certificate: other.Certificate, CABundle: other.CABundle, PublicKey: other.PublicKey, UserData: other.UserData, Nonce: other.Nonce,
		}
		if diff := cmp.Diff(want, d); diff != "" {
			t.Errorf("read otherwise than another decoder does (-it +got):\n%s", diff)
		}
		if _, err := Verify(doc, Options{Root: stranger, Now: d.Timestamp, AllowDebug: true}); err == nil {
			t.Error("verified below a root that signed nothing")
		}
		if !bytes.Equal(in, doc) {
			t.Error("the input was changed")
		}
	})
}

// BenchmarkVerify measures one cold verification in AWS's shape (five certificates), to be compared
// with BenchmarkP384, which is one bare signature verification.
func BenchmarkVerify(b *testing.B) {
	m := newMaker()
	doc := m.make(b)
	opts := good(m.root)
	for b.Loop() {
		if _, err := Verify(doc, opts); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkP384(b *testing.B) {
	root := AWSRoot()
	for b.Loop() {
		if err := root.CheckSignature(root.SignatureAlgorithm, root.RawTBSCertificate, root.Signature); err != nil {
			b.Fatal(err)
		}
	}
}
