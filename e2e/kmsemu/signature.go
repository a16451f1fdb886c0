package kmsemu

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// maxClockSkew is how far a signature's time may be away.
const maxClockSkew = 15 * time.Minute

// authenticate returns who signed a request: it signs what was signed again and compares.
func (e *Emulator) authenticate(r *http.Request, body []byte) (*Identity, error) {
	given := r.Header.Get("Authorization")
	fields := map[string]string{}
	scheme, rest, _ := strings.Cut(given, " ")
	for f := range strings.SplitSeq(rest, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(f), "=")
		fields[name] = value
	}
	scope := strings.Split(fields["Credential"], "/")
	if scheme != "AWS4-HMAC-SHA256" || len(scope) != 5 {
		return nil, fail("MissingAuthenticationTokenException", "the request is not signed")
	}
	i := slices.IndexFunc(e.config.Identities, func(who Identity) bool { return who.AccessKeyID == scope[0] })
	if i < 0 {
		return nil, fail("UnrecognizedClientException", "the security token included in the request is invalid")
	}
	who := &e.config.Identities[i]
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if err != nil || time.Since(at).Abs() > maxClockSkew {
		return nil, fail("InvalidSignatureException", "the signature is not of now")
	}
	again, err := http.NewRequestWithContext(r.Context(), r.Method, "https://"+r.Host+r.URL.RequestURI(), nil)
	if err != nil {
		return nil, err
	}
	signed := strings.Split(fields["SignedHeaders"], ";")
	for _, name := range []string{"host", "x-amz-date", "x-amz-target"} {
		if !slices.Contains(signed, name) {
			return nil, fail("InvalidSignatureException", "%s is not signed", name)
		}
	}
	for _, name := range signed {
		switch name {
		case "host":
		case "content-length":
			if again.ContentLength, err = strconv.ParseInt(r.Header.Get("Content-Length"), 10, 64); err != nil {
				again.ContentLength = r.ContentLength
			}
		default:
			again.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	}
	sum := sha256.Sum256(body)
	credentials := aws.Credentials{AccessKeyID: who.AccessKeyID, SecretAccessKey: who.SecretAccessKey, SessionToken: who.SessionToken}
	if err := v4.NewSigner().SignHTTP(r.Context(), credentials, again, hex.EncodeToString(sum[:]), "kms", e.config.Region, at); err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare([]byte(again.Header.Get("Authorization")), []byte(given)) != 1 {
		return nil, fail("InvalidSignatureException", "the request signature we calculated does not match the signature you provided")
	}
	return who, nil
}
