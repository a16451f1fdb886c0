// Package kmsemu is a KMS for tests: AWS's JSON protocol with signatures checked (Signature Version 4), key
// policies with the conditions kms:RecipientAttestation:… evaluated on verified attestation documents, and
// answers encrypted as the real service does it. It has what the tests need: CreateKey, PutKeyPolicy,
// Encrypt and Decrypt of symmetric keys. There is no IAM: a policy that allows the account's root allows
// every identity of the account.
//
// Sources: AWS KMS API reference; developer guide, "Condition keys for AWS Nitro Enclaves"; IAM user guide,
// "Policy evaluation logic" and "Condition operators".
package kmsemu

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/internal/cms/cmstest"
)

const (
	// maxDocumentAge is how old a document may be (developer guide: five minutes).
	maxDocumentAge = 5 * time.Minute
	maxRequest     = 1 << 20
	maxPlaintext   = 4096
)

// Identity is somebody who can sign requests.
type Identity struct {
	AccessKeyID     string
	SecretAccessKey string
	SessionToken    string // empty for one that lasts
	ARN             string
}

// Event is one request, as a trail tells it.
type Event struct {
	Action    string `json:"action"`
	Principal string `json:"principal"`
	Key       string `json:"key,omitempty"`
	// Attestation holds the condition keys of a verified document, without their prefix.
	Attestation map[string]string `json:"attestation,omitempty"`
	// Error is the error's type and sentence; empty for a success.
	Error string `json:"error,omitempty"`
}

// Config is what an Emulator works with.
type Config struct {
	Region string
	// Root is the only root of documents; nil means AWS's.
	Root       *x509.Certificate
	Identities []Identity
	// Shape is how answers are encoded; the zero value is KMS's.
	Shape cmstest.Shape
	// Trail, if set, gets every request; one at a time.
	Trail func(Event)
}

// Emulator is the service. It is safe for concurrent use.
type Emulator struct {
	config Config
	mu     sync.Mutex
	keys   map[string]*key
}

type key struct {
	id     string
	secret cipher.AEAD
	policy policy
}

// New returns a service without keys.
func New(config Config) *Emulator { return &Emulator{config: config, keys: map[string]*key{}} }

// failure is an error of the API, or nil.
type failure struct{ kind, message string }

func (f *failure) Error() string { return f.kind + ": " + f.message }

func fail(kind, format string, args ...any) error {
	return &failure{kind, fmt.Sprintf(format, args...)}
}

// request is what the four actions take.
type request struct {
	KeyID             string            `json:"KeyId"`
	Policy            string            `json:"Policy"`
	Plaintext         []byte            `json:"Plaintext"`
	CiphertextBlob    []byte            `json:"CiphertextBlob"`
	EncryptionContext map[string]string `json:"EncryptionContext"`
	Recipient         *struct {
		AttestationDocument    []byte `json:"AttestationDocument"`
		KeyEncryptionAlgorithm string `json:"KeyEncryptionAlgorithm"`
	} `json:"Recipient"`
}

// ServeHTTP implements http.Handler.
func (e *Emulator) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	event := Event{Action: strings.TrimPrefix(r.Header.Get("X-Amz-Target"), "TrentService.")}
	answer, err := e.serve(r, &event)
	status := http.StatusOK
	if err != nil {
		event.Error = err.Error()
		f, ok := errors.AsType[*failure](err)
		if !ok {
			f = &failure{"KMSInternalException", err.Error()}
		}
		status, answer = http.StatusBadRequest, map[string]string{"__type": f.kind, "message": f.message}
	}
	if e.config.Trail != nil {
		e.mu.Lock()
		e.config.Trail(event)
		e.mu.Unlock()
	}
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(answer)
}

func (e *Emulator) serve(r *http.Request, event *Event) (any, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, maxRequest))
	if err != nil {
		return nil, err
	}
	who, err := e.authenticate(r, body)
	if err != nil {
		return nil, err
	}
	event.Principal = who.ARN
	var in request
	if err := json.Unmarshal(body, &in); err != nil {
		return nil, fail("SerializationException", "%v", err)
	}
	if event.Action == "CreateKey" {
		return e.createKey(in, event)
	}
	k, sealed, err := e.find(in)
	if err != nil {
		return nil, err
	}
	event.Key = k.id
	context := map[string]string{}
	for name, value := range in.EncryptionContext {
		context["kms:EncryptionContext:"+name] = value
	}
	var recipient *rsa.PublicKey
	if in.Recipient != nil {
		if recipient, err = e.recipient(in, event, context); err != nil {
			return nil, err
		}
	}
	e.mu.Lock()
	allowed := k.policy.allows(who.ARN, "kms:"+event.Action, context)
	e.mu.Unlock()
	if !allowed {
		return nil, fail("AccessDeniedException", "User: %s is not authorized to perform: kms:%s on resource: %s because no resource-based policy allows the kms:%s action",
			who.ARN, event.Action, e.arn(k.id), event.Action)
	}
	switch event.Action {
	case "PutKeyPolicy":
		return e.putPolicy(k, in)
	case "Encrypt":
		return e.encrypt(k, in)
	case "Decrypt":
		return e.decrypt(k, in, sealed, recipient)
	}
	return nil, fail("UnknownOperationException", "%s is not emulated", event.Action)
}

func (e *Emulator) arn(id string) string {
	return "arn:aws:kms:" + e.config.Region + ":111122223333:key/" + id
}

func (e *Emulator) createKey(in request, event *Event) (any, error) {
	p, err := parsePolicy(in.Policy)
	if err != nil {
		return nil, err
	}
	secret, id := make([]byte, 32), make([]byte, 16)
	rand.Read(secret)
	rand.Read(id)
	block, err := aes.NewCipher(secret)
	if err != nil {
		return nil, err
	}
	k := &key{id: hex.EncodeToString(id), policy: p}
	if k.secret, err = cipher.NewGCM(block); err != nil {
		return nil, err
	}
	e.mu.Lock()
	e.keys[k.id] = k
	e.mu.Unlock()
	event.Key = k.id
	return map[string]any{"KeyMetadata": map[string]any{"KeyId": k.id, "Arn": e.arn(k.id), "Enabled": true}}, nil
}

func (e *Emulator) putPolicy(k *key, in request) (any, error) {
	p, err := parsePolicy(in.Policy)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	k.policy = p
	return map[string]any{}, nil
}

// idSize is the length of a key's id at the begin of a ciphertext.
const idSize = 32

// find returns the key that a request names, in its ciphertext or by its id or ARN, and the rest of the
// ciphertext.
func (e *Emulator) find(in request) (*key, []byte, error) {
	id, sealed := in.KeyID[strings.LastIndex(in.KeyID, "/")+1:], in.CiphertextBlob
	if in.CiphertextBlob != nil {
		if len(sealed) < idSize || id != "" && id != string(sealed[:idSize]) {
			return nil, nil, fail("InvalidCiphertextException", "the ciphertext is not of this key")
		}
		id, sealed = string(sealed[:idSize]), sealed[idSize:]
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	k := e.keys[id]
	if k == nil {
		return nil, nil, fail("NotFoundException", "the key %q does not exist", id)
	}
	return k, sealed, nil
}

// recipient verifies a document and adds its registers to the context.
func (e *Emulator) recipient(in request, event *Event, context map[string]string) (*rsa.PublicKey, error) {
	if event.Action != "Decrypt" {
		return nil, fail("ValidationException", "%s takes no Recipient", event.Action)
	}
	if in.Recipient.KeyEncryptionAlgorithm != "RSAES_OAEP_SHA_256" {
		return nil, fail("ValidationException", "KeyEncryptionAlgorithm must be RSAES_OAEP_SHA_256")
	}
	// A debug enclave's registers are zero, and that is what its document says.
	d, err := attestation.Verify(in.Recipient.AttestationDocument, attestation.Options{Root: e.config.Root, MaxAge: maxDocumentAge, AllowDebug: true})
	if err != nil {
		return nil, fail("ValidationException", "the attestation document is not valid: %v", err)
	}
	public, err := x509.ParsePKIXPublicKey(d.PublicKey)
	if err != nil {
		return nil, fail("ValidationException", "the attestation document has no public key")
	}
	k, ok := public.(*rsa.PublicKey)
	if !ok || k.N.BitLen() < 2048 {
		return nil, fail("ValidationException", "the attestation document's public key is no RSA key of 2048 bits or more")
	}
	event.Attestation = map[string]string{}
	for n, value := range d.PCRs {
		event.Attestation[fmt.Sprintf("PCR%d", n)] = hex.EncodeToString(value)
	}
	event.Attestation["ImageSha384"] = hex.EncodeToString(d.PCRs[0])
	for name, value := range event.Attestation {
		context["kms:RecipientAttestation:"+name] = value
	}
	return k, nil
}

// bound is the encryption context as it is bound to a ciphertext.
func bound(context map[string]string) []byte {
	if len(context) == 0 {
		return nil
	}
	b, _ := json.Marshal(context) // texts always marshal, in the order of their names
	return b
}

func (e *Emulator) encrypt(k *key, in request) (any, error) {
	if len(in.Plaintext) == 0 || len(in.Plaintext) > maxPlaintext {
		return nil, fail("ValidationException", "Plaintext must have 1 to %d bytes", maxPlaintext)
	}
	nonce := make([]byte, k.secret.NonceSize())
	rand.Read(nonce)
	blob := append([]byte(k.id), nonce...)
	blob = k.secret.Seal(blob, nonce, in.Plaintext, bound(in.EncryptionContext))
	return map[string]any{"KeyId": e.arn(k.id), "CiphertextBlob": blob, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}, nil
}

func (e *Emulator) decrypt(k *key, in request, sealed []byte, recipient *rsa.PublicKey) (any, error) {
	n := k.secret.NonceSize()
	if len(sealed) < n {
		return nil, fail("InvalidCiphertextException", "")
	}
	plaintext, err := k.secret.Open(nil, sealed[:n], sealed[n:], bound(in.EncryptionContext))
	if err != nil {
		return nil, fail("InvalidCiphertextException", "")
	}
	answer := map[string]any{"KeyId": e.arn(k.id), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
	if recipient == nil {
		answer["Plaintext"] = plaintext
		return answer, nil
	}
	envelope, err := cmstest.Seal(recipient, plaintext, e.config.Shape)
	if err != nil {
		return nil, err
	}
	answer["CiphertextForRecipient"] = envelope
	return answer, nil
}
