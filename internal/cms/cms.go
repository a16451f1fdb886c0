// Package cms opens the one kind of CMS message that AWS KMS answers an attested request with: the
// CiphertextForRecipient, an EnvelopedData (RFC 5652, section 6) for one RSA key. KMS encodes it in BER
// with indefinite lengths, which encoding/asn1 refuses.
package cms

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
)

// MaxSize is the largest message in bytes that is read. KMS's are at most 6144 bytes (API reference,
// Decrypt, CiphertextForRecipient).
const MaxSize = 64 << 10

// ErrOpen is the only error about keys and padding, whatever is wrong: a reason would help who tries.
var ErrOpen = errors.New("the envelope is not made for this key or has been changed")

// keySize is the length of an AES-256 key in bytes.
const keySize = 32

// Object identifiers, DER without tag and length.
const (
	oidData          = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01" // 1.2.840.113549.1.7.1
	oidEnvelopedData = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03" // 1.2.840.113549.1.7.3
	oidOAEP          = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x07" // 1.2.840.113549.1.1.7
	oidMGF1          = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x08" // 1.2.840.113549.1.1.8
	oidSHA256        = "\x60\x86\x48\x01\x65\x03\x04\x02\x01" // 2.16.840.1.101.3.4.2.1
	oidAES256CBC     = "\x60\x86\x48\x01\x65\x03\x04\x01\x2a" // 2.16.840.1.101.3.4.1.42
)

// Open returns the content of a message for key. It accepts one recipient, named by subjectKeyIdentifier
// or by issuer and serial number, RSAES-OAEP with SHA-256 and MGF1 with SHA-256 (RFC 4055), AES-256 in CBC
// mode with PKCS #7 padding, and encrypted content in one piece or several. What is not of this form has
// an error of its own, which depends on nothing secret; everything else is ErrOpen.
func Open(key *rsa.PrivateKey, ber []byte) ([]byte, error) {
	m, err := parse(ber)
	if err != nil {
		return nil, fmt.Errorf("read CMS message: %w", err)
	}
	// A key that cannot be had is replaced by a random one, so that the work is the same and the padding
	// fails, as it does with a wrong key (RFC 3218, section 2.3.2).
	random := make([]byte, keySize)
	rand.Read(random)
	contentKey, err := rsa.DecryptOAEP(sha256.New(), nil, key, m.encryptedKey, nil)
	good := 1
	if err != nil || len(contentKey) != keySize {
		good, contentKey = 0, random
	}
	block, err := aes.NewCipher(contentKey)
	if err != nil {
		return nil, ErrOpen
	}
	clear(contentKey)
	content := make([]byte, len(m.content))
	cipher.NewCBCDecrypter(block, m.iv).CryptBlocks(content, m.content)
	n, padded := unpad(content)
	if good&padded != 1 {
		clear(content)
		return nil, ErrOpen
	}
	return content[:n], nil
}

// unpad returns the length of content without its padding (RFC 5652, section 6.3), and 1 when the padding
// is right. It takes the same time whatever the padding is.
func unpad(content []byte) (n, ok int) {
	last := int(content[len(content)-1])
	ok = subtle.ConstantTimeLessOrEq(1, last) & subtle.ConstantTimeLessOrEq(last, aes.BlockSize)
	for i := 1; i <= aes.BlockSize; i++ {
		same := subtle.ConstantTimeByteEq(content[len(content)-i], byte(last))
		within := subtle.ConstantTimeLessOrEq(i, last)
		ok &= subtle.ConstantTimeSelect(within, same, 1)
	}
	return len(content) - last*ok, ok
}

// message is what Open needs of an EnvelopedData.
type message struct {
	encryptedKey []byte
	iv           []byte
	content      []byte
}

// parse reads
//
//	ContentInfo     { envelopedData, [0] { EnvelopedData } }
//	EnvelopedData   { version, SET { KeyTransRecipientInfo }, { data, { aes256-CBC, iv }, [0] content } }
//	KeyTransRecipientInfo { version, [0] subjectKeyIdentifier | { issuer, serial }, { id-RSAES-OAEP, … }, encryptedKey }
func parse(ber []byte) (*message, error) {
	if len(ber) > MaxSize {
		return nil, fmt.Errorf("it has %d bytes, at most %d are read", len(ber), MaxSize)
	}
	root, rest, err := readElement(ber, 0)
	if err != nil {
		return nil, err
	}
	if len(rest) > 0 {
		return nil, errors.New("other data follows it")
	}
	info, ok := root.members(tagSequence, 2)
	if !ok || !info[0].isOID(oidEnvelopedData) || !info[1].is(context0, true) || len(info[1].children) != 1 {
		return nil, errors.New("it is no EnvelopedData")
	}
	enveloped, ok := info[1].children[0].members(tagSequence, 3)
	if !ok || !enveloped[0].isInteger(0, 2) {
		return nil, errors.New("its EnvelopedData is not of version 0 or 2 with nothing but recipients and content")
	}
	recipients, ok := enveloped[1].members(tagSet, 1)
	if !ok {
		return nil, errors.New("it does not have exactly one recipient")
	}
	m := &message{}
	if m.encryptedKey, err = parseRecipient(recipients[0]); err != nil {
		return nil, err
	}
	m.iv, m.content, err = parseContent(enveloped[2])
	return m, err
}

func parseRecipient(e element) (encryptedKey []byte, err error) {
	r, ok := e.members(tagSequence, 4)
	if !ok || !r[0].isInteger(0, 2) {
		return nil, errors.New("its recipient is none with an RSA key")
	}
	// Who it is for shows when it is opened.
	if !r[1].is(context0, false) && !r[1].is(tagSequence, true) {
		return nil, errors.New("its recipient has neither a subjectKeyIdentifier nor an issuer and a serial number")
	}
	if !isOAEP(r[2]) {
		return nil, errors.New("its key is not encrypted by RSAES-OAEP with SHA-256 and MGF1 with SHA-256")
	}
	encryptedKey, ok = r[3].octets(tagOctetString)
	if !ok {
		return nil, errors.New("its encrypted key is no octet string")
	}
	return encryptedKey, nil
}

// isOAEP tells whether e is the only accepted AlgorithmIdentifier of a key: RSAES-OAEP-params with
// hashFunc [0] and maskGenFunc [1], and without a label [2], which is empty by default.
func isOAEP(e element) bool {
	algorithm, ok := e.members(tagSequence, 2)
	if !ok || !algorithm[0].isOID(oidOAEP) {
		return false
	}
	params, ok := algorithm[1].members(tagSequence, 2)
	if !ok || !params[0].is(context0, true) || !params[1].is(context1, true) || len(params[0].children) != 1 || len(params[1].children) != 1 {
		return false
	}
	mask, ok := params[1].children[0].members(tagSequence, 2)
	return ok && isSHA256(params[0].children[0]) && mask[0].isOID(oidMGF1) && isSHA256(mask[1])
}

// isSHA256 takes the parameters NULL and none (RFC 4055, section 2.1).
func isSHA256(e element) bool {
	if !e.is(tagSequence, true) || len(e.children) == 0 || !e.children[0].isOID(oidSHA256) {
		return false
	}
	rest := e.children[1:]
	return len(rest) == 0 || len(rest) == 1 && rest[0].is(tagNull, false) && len(rest[0].value) == 0
}

func parseContent(e element) (iv, content []byte, err error) {
	info, ok := e.members(tagSequence, 3)
	if !ok || !info[0].isOID(oidData) {
		return nil, nil, errors.New("its content is not data")
	}
	algorithm, ok := info[1].members(tagSequence, 2)
	if !ok || !algorithm[0].isOID(oidAES256CBC) {
		return nil, nil, errors.New("its content is not encrypted by AES-256 in CBC mode")
	}
	if iv, ok = algorithm[1].octets(tagOctetString); !ok || len(iv) != aes.BlockSize {
		return nil, nil, errors.New("its initialization vector is not of 16 bytes")
	}
	if content, ok = info[2].octets(context0); !ok || len(content) == 0 || len(content)%aes.BlockSize != 0 {
		return nil, nil, errors.New("its encrypted content is not of whole blocks")
	}
	return iv, content, nil
}
