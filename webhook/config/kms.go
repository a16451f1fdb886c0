package config

import (
	"bytes"
	"encoding/json"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

var secretTable = table[workload.Secret]{rows: []row[workload.Secret]{
	{Field{
		Key: "name", Type: "text", Measured: true, Schema: text,
		Sentence: "Name of the secret, for logs and errors.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, s *workload.Secret) {
		r.value(p, raw, &s.Name, "a name")
	}},
	{Field{
		Key: "ciphertext", Type: "base64", Measured: true, Schema: text,
		Sentence: "What KMS has encrypted; it may be broken into lines.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, s *workload.Secret) {
		s.Ciphertext = r.base64(p, raw)
	}},
	{Field{
		Key: "env", Type: "text", Measured: true, Schema: text,
		Sentence: "The variable that gets the plaintext.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, s *workload.Secret) {
		r.value(p, raw, &s.Env, "the name of a variable")
	}},
	{Field{
		Key: "file", Type: "path", Measured: true, Schema: text,
		Sentence: "The file that gets the plaintext.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, s *workload.Secret) {
		r.value(p, raw, &s.File, "the path of a file")
	}},
	{encryptionContext, func(r *reader, p *field.Path, raw json.RawMessage, s *workload.Secret) {
		s.EncryptionContext = r.texts(p, raw)
	}},
}}

var encryptionContext = Field{
	Key: "encryptionContext", Type: "mapping of texts", Measured: true, Schema: textMap,
	Sentence: "The encryption context that it was encrypted with.",
}

var kmsTable = table[workload.KMS]{rows: []row[workload.KMS]{
	{Field{
		Key: "region", Type: "text", Measured: true, Schema: text,
		Sentence: "The AWS region of the key.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, k *workload.KMS) {
		r.value(p, raw, &k.Region, "the name of an AWS region")
	}},
	{Field{
		Key: "endpoint", Type: "https URL", Default: "KMS of the region", Measured: true, Schema: text,
		Sentence: "A VPC or FIPS endpoint.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, k *workload.KMS) {
		r.value(p, raw, &k.Endpoint, "an https URL")
	}},
	{Field{
		Key: "ca", Type: "PEM certificates", Default: "Amazon's roots", Measured: true, Schema: text,
		Sentence: "The roots of the endpoint's certificate.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, k *workload.KMS) {
		r.value(p, raw, &k.CA, "PEM certificates")
	}},
	{Field{
		Key: "certificate", Type: "mapping", Measured: true, Schema: certificateTable.schema(), Fields: certificateTable.fields(),
		Sentence: "The certificate that `tls: kms` serves.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, k *workload.KMS) {
		k.Certificate = r.certificate(p, raw)
	}},
}}

var certificateTable = table[workload.Certificate]{rows: []row[workload.Certificate]{
	{Field{
		Key: "chain", Type: "PEM certificates", Measured: true, Schema: text,
		Sentence: "The leaf first, then what is between it and the root.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *workload.Certificate) {
		r.value(p, raw, &c.Chain, "PEM certificates")
	}},
	{Field{
		Key: "key", Type: "base64", Measured: true, Schema: text,
		Sentence: "The private key (PEM), as KMS has encrypted it.",
	}, func(r *reader, p *field.Path, raw json.RawMessage, c *workload.Certificate) { c.Key = r.base64(p, raw) }},
	{encryptionContext, func(r *reader, p *field.Path, raw json.RawMessage, c *workload.Certificate) {
		c.EncryptionContext = r.texts(p, raw)
	}},
}}

// ephemeral is the default of tls: a certificate that is made in the enclave.
const ephemeral = "ephemeral"

// tls reads how the enclave's ports are served to clients that do not ask for the attested certificate.
func (r *reader) tls(p *field.Path, raw json.RawMessage) string {
	if bytes.Equal(raw, []byte(`"acme"`)) {
		r.errs = append(r.errs, field.Forbidden(p, "acme is not built yet: write "+ephemeral+" or "+workload.TLSKMS))
		return ""
	}
	return r.choice(p, raw, ephemeral, workload.TLSKMS)
}

func (r *reader) kms(p *field.Path, raw json.RawMessage) *workload.KMS {
	k := &workload.KMS{}
	if _, ok := kmsTable.read(r, p, raw, k); !ok {
		return nil
	}
	if k.Endpoint == (&workload.KMS{Region: k.Region}).URL() {
		k.Endpoint = ""
	}
	return k
}

func (r *reader) certificate(p *field.Path, raw json.RawMessage) *workload.Certificate {
	c := &workload.Certificate{}
	if _, ok := certificateTable.read(r, p, raw, c); !ok {
		return nil
	}
	return c
}

// base64 reads a text that YAML may have broken into lines.
func (r *reader) base64(p *field.Path, raw json.RawMessage) string {
	var text string
	r.value(p, raw, &text, "base64 of what KMS has encrypted")
	return strings.Join(strings.Fields(text), "")
}

// texts reads a mapping of texts; an empty one means the same as none.
func (r *reader) texts(p *field.Path, raw json.RawMessage) map[string]string {
	const what = "a mapping of names to texts"
	var values map[string]*string
	if !r.value(p, raw, &values, what) || len(values) == 0 {
		return nil
	}
	out := make(map[string]string, len(values))
	for name, v := range values {
		if v == nil {
			r.errs = append(r.errs, field.Invalid(p, field.OmitValueType{}, "write "+what))
			return nil
		}
		out[name] = *v
	}
	return out
}
