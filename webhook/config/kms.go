package config

import (
	"encoding/json"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

var (
	secretFields      = []string{"name", "ciphertext", "env", "file", "encryptionContext"}
	kmsFields         = []string{"region", "endpoint", "ca", "certificate"}
	certificateFields = []string{"chain", "key", "encryptionContext"}
)

// ephemeral is the default of tls: a certificate that is made in the enclave.
const ephemeral = "ephemeral"

// tls reads how the enclave's ports are served to clients that do not ask for the attested certificate.
func (r *reader) tls(p *field.Path, raw json.RawMessage) string {
	var mode string
	if !r.value(p, raw, &mode, ephemeral+" or "+workload.TLSKMS) {
		return ""
	}
	switch mode {
	case ephemeral:
		return ""
	case workload.TLSKMS:
		return mode
	case "acme":
		r.errs = append(r.errs, field.Forbidden(p, "acme is not built yet: write "+ephemeral+" or "+workload.TLSKMS))
	default:
		r.errs = append(r.errs, field.NotSupported(p, mode, []string{ephemeral, workload.TLSKMS}))
	}
	return ""
}

// secrets reads the list of secrets. What remains to be checked is checked with the whole manifest.
func (r *reader) secrets(p *field.Path, raw json.RawMessage) []workload.Secret {
	var list []json.RawMessage
	if !r.value(p, raw, &list, "a list of secrets") {
		return nil
	}
	var out []workload.Secret
	for i, raw := range list {
		p := p.Index(i)
		fields, ok := r.object(p, raw)
		if !ok {
			continue
		}
		var s workload.Secret
		for _, key := range sorted(fields) {
			p, raw := p.Child(key), fields[key]
			switch key {
			case "name":
				r.value(p, raw, &s.Name, "a name")
			case "ciphertext":
				s.Ciphertext = r.base64(p, raw)
			case "env":
				r.value(p, raw, &s.Env, "the name of a variable")
			case "file":
				r.value(p, raw, &s.File, "the path of a file")
			case "encryptionContext":
				s.EncryptionContext = r.texts(p, raw)
			default:
				r.unknown(p, key, secretFields)
			}
		}
		out = append(out, s)
	}
	return out
}

func (r *reader) kms(p *field.Path, raw json.RawMessage) *workload.KMS {
	fields, ok := r.object(p, raw)
	if !ok {
		return nil
	}
	k := &workload.KMS{}
	for _, key := range sorted(fields) {
		p, raw := p.Child(key), fields[key]
		switch key {
		case "region":
			r.value(p, raw, &k.Region, "the name of an AWS region")
		case "endpoint":
			r.value(p, raw, &k.Endpoint, "an https URL")
		case "ca":
			r.value(p, raw, &k.CA, "PEM certificates")
		case "certificate":
			k.Certificate = r.certificate(p, raw)
		default:
			r.unknown(p, key, kmsFields)
		}
	}
	if k.Endpoint == (&workload.KMS{Region: k.Region}).URL() {
		k.Endpoint = ""
	}
	return k
}

func (r *reader) certificate(p *field.Path, raw json.RawMessage) *workload.Certificate {
	fields, ok := r.object(p, raw)
	if !ok {
		return nil
	}
	c := &workload.Certificate{}
	for _, key := range sorted(fields) {
		p, raw := p.Child(key), fields[key]
		switch key {
		case "chain":
			r.value(p, raw, &c.Chain, "PEM certificates")
		case "key":
			c.Key = r.base64(p, raw)
		case "encryptionContext":
			c.EncryptionContext = r.texts(p, raw)
		default:
			r.unknown(p, key, certificateFields)
		}
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
	var out map[string]string
	if !r.value(p, raw, &out, "a mapping of names to texts") || len(out) == 0 {
		return nil
	}
	return out
}
