package nsmdev

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/hf/nsm/request"
	"github.com/hf/nsm/response"

	"cloister.dev/cloister/attestation"
)

func newModule(t testing.TB) (*Module, *Signer) {
	t.Helper()
	cert, key, err := NewRoot(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	signer, err := New(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pcr := func(b byte) []byte { return bytes.Repeat([]byte{b}, registerSize) }
	return NewModule(signer, map[uint][]byte{0: pcr(1), 1: pcr(2), 2: pcr(3)}), signer
}

// ask sends a request as the client library does and reads the answer as it does.
func ask(t *testing.T, m *Module, r request.Request) response.Response {
	t.Helper()
	b, err := cbor.Marshal(r.Encoded())
	if err != nil {
		t.Fatal(err)
	}
	var answer response.Response
	if err := cbor.Unmarshal(m.Answer(b), &answer); err != nil {
		t.Fatal(err)
	}
	return answer
}

func TestModuleRegisters(t *testing.T) {
	m, _ := newModule(t)
	const invalidIndex = response.ErrorCode("InvalidIndex")
	zero := make([]byte, registerSize)
	once := sha512.Sum384(append(bytes.Clone(zero), "data"...))
	twice := sha512.Sum384(append(bytes.Clone(once[:]), "data"...))
	for _, step := range []struct {
		r    request.Request
		want response.Response
	}{
		{&request.DescribePCR{Index: 0}, response.Response{DescribePCR: &response.DescribePCR{Lock: true, Data: bytes.Repeat([]byte{1}, 48)}}},
		{&request.DescribePCR{Index: 3}, response.Response{DescribePCR: &response.DescribePCR{Lock: true, Data: zero}}},
		{&request.DescribePCR{Index: 16}, response.Response{DescribePCR: &response.DescribePCR{Data: zero}}},
		{&request.DescribePCR{Index: 32}, response.Response{Error: invalidIndex}},
		{&request.ExtendPCR{Index: 16, Data: []byte("data")}, response.Response{ExtendPCR: &response.ExtendPCR{Data: once[:]}}},
		{&request.ExtendPCR{Index: 16, Data: []byte("data")}, response.Response{ExtendPCR: &response.ExtendPCR{Data: twice[:]}}},
		{&request.ExtendPCR{Index: 15, Data: []byte("data")}, response.Response{Error: response.ECReadOnlyIndex}},
		{&request.ExtendPCR{Index: 32, Data: []byte("data")}, response.Response{Error: invalidIndex}},
		{&request.LockPCR{Index: 16}, response.Response{LockPCR: &response.LockPCR{}}},
		{&request.LockPCR{Index: 16}, response.Response{Error: response.ECReadOnlyIndex}},
		{&request.LockPCR{Index: 32}, response.Response{Error: invalidIndex}},
		{&request.ExtendPCR{Index: 16, Data: []byte("data")}, response.Response{Error: response.ECReadOnlyIndex}},
		{&request.DescribePCR{Index: 16}, response.Response{DescribePCR: &response.DescribePCR{Lock: true, Data: twice[:]}}},
		{&request.LockPCRs{Range: 33}, response.Response{Error: invalidIndex}},
		{&request.LockPCRs{Range: 18}, response.Response{LockPCRs: &response.LockPCRs{}}},
		{&request.DescribePCR{Index: 17}, response.Response{DescribePCR: &response.DescribePCR{Lock: true, Data: zero}}},
		{&request.DescribePCR{Index: 18}, response.Response{DescribePCR: &response.DescribePCR{Data: zero}}},
	} {
		if diff := cmp.Diff(step.want, ask(t, m, step.r)); diff != "" {
			t.Fatalf("%#v (-want +got):\n%s", step.r, diff)
		}
	}
	d := ask(t, m, &request.DescribeNSM{}).DescribeNSM
	if d == nil || d.MaxPCRs != 32 || len(d.LockedPCRs) != 18 || d.Digest != "SHA384" || d.ModuleID == "" {
		t.Errorf("DescribeNSM: %+v", d)
	}
	a, b := ask(t, m, &request.GetRandom{}).GetRandom, ask(t, m, &request.GetRandom{}).GetRandom
	if a == nil || len(a.Random) != 256 || bytes.Equal(a.Random, b.Random) {
		t.Errorf("GetRandom: %v", a)
	}
}

func TestModuleAttests(t *testing.T) {
	m, signer := newModule(t)
	ask(t, m, &request.ExtendPCR{Index: 16, Data: []byte("data")})
	ask(t, m, &request.ExtendPCR{Index: 17, Data: []byte("data")})
	ask(t, m, &request.LockPCR{Index: 16})
	r := &request.Attestation{UserData: bytes.Repeat([]byte{7}, 512), Nonce: []byte{}, PublicKey: bytes.Repeat([]byte{8}, 1024)}
	answer := ask(t, m, r).Attestation
	if answer == nil {
		t.Fatal("no document")
	}
	doc, err := attestation.Verify(answer.Document, attestation.Options{Root: signer.Root(), UserData: r.UserData, Nonce: []byte{}, PublicKey: r.PublicKey})
	if err != nil {
		t.Fatal(err)
	}
	if len(doc.PCRs) != 17 || doc.PCRs[16] == nil || doc.PCRs[17] != nil || doc.PCRs[0][0] != 1 {
		t.Errorf("registers: %v", doc.PCRs)
	}
	empty, err := attestation.Verify(ask(t, m, &request.Attestation{}).Attestation.Document, attestation.Options{Root: signer.Root()})
	if err != nil || empty.UserData != nil || empty.Nonce != nil || empty.PublicKey != nil {
		t.Errorf("without fields: %v, %v", empty, err)
	}
	for name, r := range map[string]*request.Attestation{
		"user data":  {UserData: make([]byte, 513)},
		"nonce":      {Nonce: make([]byte, 513)},
		"public key": {PublicKey: make([]byte, 1025)},
	} {
		if got := ask(t, m, r); got.Error != response.ECInputTooLarge {
			t.Errorf("too long a %s: %+v", name, got)
		}
	}
	other, _ := newModule(t)
	if bytes.Equal([]byte(m.moduleID), []byte(other.moduleID)) {
		t.Error("two modules have one name")
	}
}

func TestModuleBadRequests(t *testing.T) {
	m, _ := newModule(t)
	encode := func(v any) []byte {
		b, err := cbor.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	type fields = map[string]any
	for name, tc := range map[string]struct {
		raw  []byte
		want response.ErrorCode
	}{
		"nothing":       {nil, response.ECInvalidArgument},
		"garbage":       {[]byte{0xff, 1, 2}, response.ECInvalidArgument},
		"two requests":  {encode(fields{"LockPCR": fields{"index": 16}, "LockPCRs": fields{"range": 1}}), response.ECInvalidArgument},
		"trailing":      {append(encode("GetRandom"), 0), response.ECInvalidArgument},
		"missing field": {encode(fields{"ExtendPCR": fields{"index": 16}}), response.ECInvalidArgument},
		"other field":   {encode(fields{"LockPCR": fields{"index": 16, "x": 1}}), response.ECInvalidArgument},
		"wrong type":    {encode(fields{"LockPCR": fields{"index": "16"}}), response.ECInvalidArgument},
		"no fields":     {encode("LockPCR"), response.ECInvalidArgument},
		"unknown":       {encode("Reboot"), response.ECInvalidOperation},
	} {
		var got response.Response
		if err := cbor.Unmarshal(m.Answer(tc.raw), &got); err != nil || got.Error != tc.want {
			t.Errorf("%s: %+v, %v, want %s", name, got, err, tc.want)
		}
	}
}

func TestServe(t *testing.T) {
	m, _ := newModule(t)
	ours, theirs := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- Serve(theirs, m.Answer) }()
	for range 2 {
		b, _ := cbor.Marshal("GetRandom")
		ours.Write(frame(b))
		size := make([]byte, 4)
		if _, err := io.ReadFull(ours, size); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, binary.BigEndian.Uint32(size))
		if _, err := io.ReadFull(ours, answer); err != nil {
			t.Fatal(err)
		}
		var r response.Response
		if err := cbor.Unmarshal(answer, &r); err != nil || r.GetRandom == nil {
			t.Fatalf("%+v, %v", r, err)
		}
	}
	go ours.Write([]byte{0xff, 0xff, 0xff, 0xff})
	answer := make([]byte, 4+len(failure(inputTooLarge)))
	if _, err := io.ReadFull(ours, answer); err != nil || !bytes.Equal(answer, frame(failure(inputTooLarge))) {
		t.Errorf("too long a request: %x, %v", answer, err)
	}
	if err := <-done; err == nil {
		t.Error("the connection goes on after a request that was not read")
	}
}

func FuzzAnswer(f *testing.F) {
	m, _ := newModule(f)
	for _, r := range []request.Request{&request.DescribeNSM{}, &request.ExtendPCR{Index: 20, Data: []byte("x")}, &request.LockPCRs{Range: 17}, &request.Attestation{Nonce: []byte("n")}} {
		b, _ := cbor.Marshal(r.Encoded())
		f.Add(b)
	}
	locked := m.pcrs[0]
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := cbor.Wellformed(m.Answer(b)); err != nil {
			t.Error(err)
		}
		if m.pcrs[0] != locked {
			t.Error("a locked register changed")
		}
	})
}
