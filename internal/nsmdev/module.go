package nsmdev

import (
	"crypto/rand"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"cloister.dev/cloister/internal/cbor"
)

const (
	registers    = 32
	firstFree    = 16 // lower ones are locked before the enclave runs
	registerSize = sha512.Size384

	// maxRequest is the largest request in bytes (linux, drivers/misc/nsm.c).
	maxRequest = 0x1000
	randomSize = 256 // bytes of a GetRandom

	maxUserData  = 512 // bytes, of user data and of the nonce
	maxPublicKey = 1024

	boolFalse, boolTrue = 0xf4, 0xf5 // RFC 8949, section 3.3
)

// code is an error of the device (ErrorCode in src/api/mod.rs).
type code string

func (c code) Error() string { return string(c) }

const (
	invalidArgument  code = "InvalidArgument"
	invalidIndex     code = "InvalidIndex"
	readOnlyIndex    code = "ReadOnlyIndex"
	invalidOperation code = "InvalidOperation"
	inputTooLarge    code = "InputTooLarge"
	internalError    code = "InternalError"
)

// Module is the software module of one enclave: it answers the requests of a Nitro Security Module and
// signs documents. It is safe for concurrent use.
//
// Sources: aws-nitro-enclaves-nsm-api, src/api/mod.rs (requests, answers, errors) and
// docs/attestation_process.md (limits); qemu, hw/virtio/virtio-nsm.c (which error when).
type Module struct {
	// Now is the time of documents, time.Now unless it is set before the first request.
	Now func() time.Time

	signer   *Signer
	moduleID string

	mu     sync.Mutex // the real one is serial too
	pcrs   [registers][registerSize]byte
	locked [registers]bool
}

// NewModule returns the module of an enclave that has just been booted: PCR0 to PCR15 are locked, and hold
// what pcrs says, 48 bytes by index, or zeros.
func NewModule(signer *Signer, pcrs map[uint][]byte) *Module {
	id := make([]byte, 8)
	rand.Read(id)
	m := &Module{Now: time.Now, signer: signer, moduleID: "i-development-enc" + hex.EncodeToString(id)}
	for i, value := range pcrs {
		copy(m.pcrs[i][:], value)
	}
	for i := range firstFree {
		m.locked[i] = true
	}
	return m
}

// Serve reads requests from rw and writes what answer makes of them, for example Module.Answer, until rw
// ends. Each request and each answer is its length in 4 bytes, big-endian, and the CBOR that the device
// takes and gives.
func Serve(rw io.ReadWriter, answer func(request []byte) []byte) error {
	for {
		size := make([]byte, 4)
		if _, err := io.ReadFull(rw, size); err != nil {
			return err
		}
		length := binary.BigEndian.Uint32(size)
		if length > maxRequest {
			rw.Write(frame(failure(inputTooLarge)))
			return fmt.Errorf("read NSM request: it has %d bytes, more than %d", length, maxRequest)
		}
		request := make([]byte, length)
		if _, err := io.ReadFull(rw, request); err != nil {
			return err
		}
		if _, err := rw.Write(frame(answer(request))); err != nil {
			return err
		}
	}
}

func frame(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

// Answer returns the answer to one request, both in CBOR.
func (m *Module) Answer(request []byte) []byte {
	r, err := parse(request)
	if err != nil {
		return failure(invalidArgument)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	answer, failed := m.do(r)
	if failed != "" {
		return failure(failed)
	}
	return answer
}

// failure is {"Error": code}.
func failure(c code) []byte {
	return cbor.AppendText(cbor.AppendText(cbor.AppendMap(nil, 1), "Error"), string(c))
}

// call is any request; fields that it does not have are zero.
type call struct {
	name                       string
	fields                     map[string]bool // which there are
	index                      uint64          // also the range of LockPCRs
	data                       []byte
	userData, nonce, publicKey []byte
}

// parse reads a request: a text string, or a map from it to its fields.
func parse(b []byte) (*call, error) {
	r := &call{fields: map[string]bool{}}
	d := cbor.NewDecoder(b)
	var err error
	if r.name, err = d.Text(); err == nil {
		return r, d.End()
	}
	entries := 0
	err = d.Map(func() (err error) {
		if entries++; entries > 1 {
			return invalidArgument
		}
		if r.name, err = d.Text(); err != nil {
			return err
		}
		return d.Map(func() error { return r.field(d) })
	})
	if err != nil {
		return nil, err
	}
	return r, d.End()
}

func (r *call) field(d *cbor.Decoder) error {
	key, err := d.Text()
	if err != nil {
		return err
	}
	if r.fields[key] {
		return invalidArgument
	}
	r.fields[key] = true
	switch key {
	case "index", "range":
		r.index, err = d.Uint()
	case "data":
		r.data, err = d.Bytes()
	case "user_data":
		r.userData, err = d.OptionalBytes()
	case "nonce":
		r.nonce, err = d.OptionalBytes()
	case "public_key":
		r.publicKey, err = d.OptionalBytes()
	default:
		err = invalidArgument
	}
	return err
}

// has reports whether the request has exactly these fields.
func (r *call) has(fields ...string) bool {
	for _, f := range fields {
		if !r.fields[f] {
			return false
		}
	}
	return len(r.fields) == len(fields)
}

// only reports whether the request has no other fields than these.
func (r *call) only(fields ...string) bool {
	for f := range r.fields {
		if !slices.Contains(fields, f) {
			return false
		}
	}
	return true
}

// do carries out a request. The caller holds mu.
func (m *Module) do(r *call) ([]byte, code) {
	switch {
	case r.name == "DescribeNSM" && r.has():
		return m.describe(), ""
	case r.name == "GetRandom" && r.has():
		random := make([]byte, randomSize)
		rand.Read(random)
		b := cbor.AppendMap(cbor.AppendText(cbor.AppendMap(nil, 1), r.name), 1)
		return cbor.AppendBytes(cbor.AppendText(b, "random"), random), ""
	case r.name == "DescribePCR" && r.has("index"):
		if r.index >= registers {
			return nil, invalidIndex
		}
		lock := byte(boolFalse)
		if m.locked[r.index] {
			lock = boolTrue
		}
		b := cbor.AppendMap(cbor.AppendText(cbor.AppendMap(nil, 1), r.name), 2)
		b = append(cbor.AppendText(b, "lock"), lock)
		return cbor.AppendBytes(cbor.AppendText(b, "data"), m.pcrs[r.index][:]), ""
	case r.name == "ExtendPCR" && r.has("index", "data"):
		if r.index >= registers {
			return nil, invalidIndex
		}
		if m.locked[r.index] {
			return nil, readOnlyIndex
		}
		m.pcrs[r.index] = sha512.Sum384(slices.Concat(m.pcrs[r.index][:], r.data))
		b := cbor.AppendMap(cbor.AppendText(cbor.AppendMap(nil, 1), r.name), 1)
		return cbor.AppendBytes(cbor.AppendText(b, "data"), m.pcrs[r.index][:]), ""
	case r.name == "LockPCR" && r.has("index"):
		if r.index >= registers {
			return nil, invalidIndex
		}
		if m.locked[r.index] {
			return nil, readOnlyIndex
		}
		m.locked[r.index] = true
		return cbor.AppendText(nil, r.name), ""
	case r.name == "LockPCRs" && r.has("range"):
		if r.index > registers {
			return nil, invalidIndex
		}
		for i := range r.index {
			m.locked[i] = true
		}
		return cbor.AppendText(nil, r.name), ""
	case r.name == "Attestation" && r.only("user_data", "nonce", "public_key"):
		return m.attest(r)
	}
	if slices.Contains([]string{"DescribeNSM", "GetRandom", "DescribePCR", "ExtendPCR", "LockPCR", "LockPCRs", "Attestation"}, r.name) {
		return nil, invalidArgument
	}
	return nil, invalidOperation
}

func (m *Module) describe() []byte {
	b := cbor.AppendMap(cbor.AppendText(cbor.AppendMap(nil, 1), "DescribeNSM"), 7)
	b = cbor.AppendUint(cbor.AppendText(b, "version_major"), 1)
	b = cbor.AppendUint(cbor.AppendText(b, "version_minor"), 0)
	b = cbor.AppendUint(cbor.AppendText(b, "version_patch"), 0)
	b = cbor.AppendText(cbor.AppendText(b, "module_id"), m.moduleID)
	b = cbor.AppendUint(cbor.AppendText(b, "max_pcrs"), registers)
	var locked []uint64
	for i, l := range m.locked {
		if l {
			locked = append(locked, uint64(i))
		}
	}
	b = cbor.AppendArray(cbor.AppendText(b, "locked_pcrs"), len(locked))
	for _, i := range locked {
		b = cbor.AppendUint(b, i)
	}
	return cbor.AppendText(cbor.AppendText(b, "digest"), "SHA384")
}

// attest signs a document of the locked registers.
func (m *Module) attest(r *call) ([]byte, code) {
	if len(r.userData) > maxUserData || len(r.nonce) > maxUserData || len(r.publicKey) > maxPublicKey {
		return nil, inputTooLarge
	}
	pcrs := map[uint][]byte{}
	for i, l := range m.locked {
		if l {
			pcrs[uint(i)] = m.pcrs[i][:]
		}
	}
	doc, err := m.signer.Sign(Document{
		ModuleID: m.moduleID, Timestamp: m.Now(), PCRs: pcrs,
		PublicKey: r.publicKey, UserData: r.userData, Nonce: r.nonce,
	})
	if err != nil {
		return nil, internalError
	}
	b := cbor.AppendMap(cbor.AppendText(cbor.AppendMap(nil, 1), "Attestation"), 1)
	return cbor.AppendBytes(cbor.AppendText(b, "document"), doc), ""
}
