// Package cmstest makes messages for package cms, in each of the shapes that a KMS is known to answer
// with. It is for tests and for what they run against.
package cmstest

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
)

// Shape is how a message is encoded. The zero value is how AWS KMS does it.
type Shape struct {
	// Definite has DER's lengths instead of indefinite ones.
	Definite bool
	// Pieces are the sizes in bytes of the octet strings that the encrypted content comes in; none means
	// one primitive string. What is left is the last piece.
	Pieces []int
	// IssuerAndSerial names the recipient as LocalStack does, instead of by subjectKeyIdentifier.
	IssuerAndSerial bool
}

var (
	oidData          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 1}
	oidEnvelopedData = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 7, 3}
	oidOAEP          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 7}
	oidMGF1          = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 1, 8}
	oidSHA256        = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 1}
	oidAES256CBC     = asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 1, 42}
)

// Seal encrypts content for key.
func Seal(key *rsa.PublicKey, content []byte, shape Shape) ([]byte, error) {
	secret, iv := make([]byte, 32), make([]byte, aes.BlockSize)
	rand.Read(secret)
	rand.Read(iv)
	pad := aes.BlockSize - len(content)%aes.BlockSize
	padded := append(bytes.Clone(content), bytes.Repeat([]byte{byte(pad)}, pad)...)
	return SealPadded(key, secret, iv, padded, shape)
}

// SealPadded encrypts whole blocks as they are, under secret, which may be of any length that OAEP takes.
func SealPadded(key *rsa.PublicKey, secret, iv, padded []byte, shape Shape) ([]byte, error) {
	encryptedKey, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key, secret, nil)
	if err != nil {
		return nil, fmt.Errorf("encrypt key: %w", err)
	}
	encrypted := bytes.Clone(padded)
	if block, err := aes.NewCipher(secret); err == nil {
		cipher.NewCBCEncrypter(block, iv).CryptBlocks(encrypted, padded)
	}
	return message(key, encryptedKey, iv, encrypted, shape)
}

func message(key *rsa.PublicKey, encryptedKey, iv, encrypted []byte, shape Shape) ([]byte, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	// Only these are of an indefinite length in KMS's messages.
	open := func(tag byte, parts ...[]byte) []byte {
		if shape.Definite {
			return tlv(tag, parts...)
		}
		return append(append([]byte{tag, 0x80}, bytes.Join(parts, nil)...), 0, 0)
	}
	id := sha256.Sum256(spki)
	recipient, version := tlv(0x80, id[:]), byte(2)
	if shape.IssuerAndSerial {
		recipient, version = tlv(0x30, tlv(0x30), integer(1)), 0
	}
	sha := tlv(0x30, oid(oidSHA256), tlv(0x05))
	oaep := tlv(0x30, oid(oidOAEP), tlv(0x30,
		tlv(0xa0, sha),
		tlv(0xa1, tlv(0x30, oid(oidMGF1), sha))))
	content := tlv(0x80, encrypted)
	if len(shape.Pieces) > 0 {
		var pieces [][]byte
		for _, n := range shape.Pieces {
			n = min(n, len(encrypted))
			pieces = append(pieces, tlv(0x04, encrypted[:n]))
			encrypted = encrypted[n:]
		}
		content = open(0xa0, append(pieces, tlv(0x04, encrypted))...)
	}
	return open(0x30, oid(oidEnvelopedData), open(0xa0, open(0x30,
		integer(version),
		tlv(0x31, tlv(0x30, integer(version), recipient, oaep, tlv(0x04, encryptedKey))),
		open(0x30, oid(oidData), tlv(0x30, oid(oidAES256CBC), tlv(0x04, iv)), content),
	))), nil
}

// tlv is one element of a definite length.
func tlv(tag byte, parts ...[]byte) []byte {
	value := bytes.Join(parts, nil)
	head := []byte{tag, byte(len(value))}
	if len(value) >= 0x80 {
		head = []byte{tag, 0x82, byte(len(value) >> 8), byte(len(value))}
	}
	return append(head, value...)
}

func integer(n byte) []byte { return tlv(0x02, []byte{n}) }

func oid(id asn1.ObjectIdentifier) []byte {
	b, err := asn1.Marshal(id)
	if err != nil { // only for an identifier that is none
		panic(err)
	}
	return b
}
