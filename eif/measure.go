package eif

import (
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"io"
)

// HashAlgorithm is the name under which nitro-cli prints the measurements' hash.
const HashAlgorithm = "Sha384 { ... }"

// Measurements are the registers that an EIF determines, 48 bytes each.
type Measurements struct {
	PCR0 []byte // kernel, command line and all ramdisks
	PCR1 []byte // kernel, command line and the first ramdisk
	PCR2 []byte // the other ramdisks
	PCR8 []byte // the certificate that signed the EIF; nil if it is not signed
}

// MarshalJSON returns what nitro-cli prints under "Measurements": HashAlgorithm and the registers
// in lower-case hexadecimal, PCR8 only if the EIF is signed.
func (m Measurements) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		HashAlgorithm string
		PCR0          string
		PCR1          string
		PCR2          string
		PCR8          string `json:",omitempty"`
	}{HashAlgorithm, hex.EncodeToString(m.PCR0), hex.EncodeToString(m.PCR1), hex.EncodeToString(m.PCR2), hex.EncodeToString(m.PCR8)})
}

// register returns the value of a register that was extended once with a digest of data: SHA-384
// over 48 zero bytes and the digest.
func register(digest []byte) []byte {
	h := sha512.New384()
	h.Write(make([]byte, sha512.Size384))
	h.Write(digest)
	return h.Sum(nil)
}

// measurer hashes the sections of an EIF, which come as kernel, command line, ramdisks. The first part
// of PCR0 is PCR1, so each byte is hashed at most twice, and those of the first ramdisk once.
type measurer struct {
	all, rest *digest // for PCR0 and PCR2
	pcr1      []byte  // digest, once the first ramdisk is done
	ramdisks  int
}

func newMeasurer() *measurer {
	return &measurer{all: newDigest(), rest: newDigest()}
}

// writers returns where the data of the next section goes.
func (m *measurer) writers(t SectionType) []io.Writer {
	switch t {
	case SectionKernel, SectionCmdline:
		return []io.Writer{m.all}
	case SectionRamdisk:
		m.ramdisks++
		if m.ramdisks == 1 {
			return []io.Writer{m.all}
		}
		if m.ramdisks == 2 {
			m.pcr1 = m.all.Sum(nil)
		}
		return []io.Writer{m.all, m.rest}
	}
	return nil // metadata and signature are not measured
}

// measurements ends the measuring. PCR8 stays nil.
func (m *measurer) measurements() *Measurements {
	digest := m.all.Sum(nil)
	if m.pcr1 == nil {
		m.pcr1 = digest
	}
	return &Measurements{PCR0: register(digest), PCR1: register(m.pcr1), PCR2: register(m.rest.Sum(nil))}
}
