package supervise

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"
	"unicode/utf8"

	"cloister.dev/cloister/enclaved/supervise/process"
	"cloister.dev/cloister/enclaved/vault"
	"cloister.dev/cloister/workload"
)

// A batch that KMS does not decrypt is tried again after firstWait, doubled each time up to lastWait.
const (
	firstWait = time.Second
	lastWait  = 30 * time.Second
)

// openSecrets has KMS decrypt what the manifest holds, gives the certificate to the vault and returns the
// values of the manifest's secrets, in their order. What fails is told and tried again until ctx ends: a
// key's policy can come later than the pod. Then the error is ctx's cause.
func (e *Enclave) openSecrets(ctx context.Context, progress func(step, failure string)) ([][]byte, error) {
	m := e.manifest
	if m.KMS == nil {
		return nil, nil
	}
	const step = "decrypting secrets by KMS"
	progress(step, "")
	k, err := e.vault.NewKMS(m.KMS, e.relay.Dial, func(ctx context.Context) (net.Conn, error) {
		return e.secret.Dial(ctx, e.credentialsPort, e.cfg.Guest.Dial)
	})
	if err != nil {
		return nil, err
	}
	defer k.Close()
	batch, err := ciphertexts(m)
	if err != nil {
		return nil, err
	}
	for wait := firstWait; ; wait = min(2*wait, lastWait) {
		values, err := k.Decrypt(ctx, batch)
		if err == nil {
			if values, err = e.accept(values); err == nil {
				return values, nil
			}
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		progress(step, err.Error())
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
	}
}

// ciphertexts are the manifest's secrets, and last the key of its certificate where it has one.
func ciphertexts(m *workload.Manifest) ([]vault.Ciphertext, error) {
	var batch []vault.Ciphertext
	add := func(name, text string, context map[string]string) error {
		blob, err := base64.StdEncoding.DecodeString(text)
		batch = append(batch, vault.Ciphertext{Name: name, Blob: blob, Context: context})
		return err
	}
	for _, s := range m.Secrets {
		if err := add("secret "+s.Name, s.Ciphertext, s.EncryptionContext); err != nil {
			return nil, err
		}
	}
	if c := m.KMS.Certificate; c != nil {
		if err := add("the certificate's key", c.Key, c.EncryptionContext); err != nil {
			return nil, err
		}
	}
	return batch, nil
}

// accept checks what was decrypted, and takes the certificate's key out of it. What it refuses it erases.
func (e *Enclave) accept(values [][]byte) (accepted [][]byte, err error) {
	defer func() {
		if err != nil {
			erase(values)
		}
	}()
	for i, s := range e.manifest.Secrets {
		if s.Env != "" && (!utf8.Valid(values[i]) || bytes.IndexByte(values[i], 0) >= 0) {
			return nil, fmt.Errorf("secret %s is no text, which a variable must be: give it a file instead of env", s.Name)
		}
	}
	c := e.manifest.KMS.Certificate
	if c == nil {
		return values, nil
	}
	last := len(values) - 1
	defer clear(values[last])
	return values[:last], e.vault.UseCertificate(c.Chain, values[last])
}

// erase overwrites values that nobody needs any more.
func erase(values [][]byte) {
	for _, v := range values {
		clear(v)
	}
}

// deliver puts the values of secrets into the workload's environment, and into files that its user alone
// can read.
func (e *Enclave) deliver(values [][]byte, spec *process.Spec) error {
	if len(values) == 0 {
		return nil
	}
	dir := filepath.Join(e.cfg.Dir, "secrets")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for i, s := range e.manifest.Secrets {
		if s.Env != "" {
			spec.SetEnv(s.Env, string(values[i]))
			continue
		}
		source := filepath.Join(dir, strconv.Itoa(i))
		if err := os.WriteFile(source, values[i], 0o400); err != nil {
			return fmt.Errorf("write secret %s: %w", s.Name, err)
		}
		if err := os.Chown(source, spec.UID, spec.GID); err != nil {
			return fmt.Errorf("write secret %s: %w", s.Name, err)
		}
		spec.Binds = append(spec.Binds, process.Bind{Source: source, Target: s.File})
	}
	return nil
}
