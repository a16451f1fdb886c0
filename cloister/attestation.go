package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/workload"
)

func newAttestation() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "attestation COMMAND",
		Short: "Verify attestation documents",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return errors.New("name what to do with the attestation document")
		},
	}
	cmd.AddCommand(newAttestationVerify(), newAttestationFetch())
	return cmd
}

// parseNonce reads the flag --nonce.
func parseNonce(s string) ([]byte, error) {
	nonce, err := hex.DecodeString(s)
	if err != nil || len(nonce) == 0 {
		return nil, fmt.Errorf("--nonce takes one or more bytes in hexadecimal, not %q", s)
	}
	return nonce, nil
}

// printAttestation writes a verified document; set is what it was compared with, or nil.
func printAttestation(w io.Writer, f format, d *attestation.Document, set workload.MeasurementSet) error {
	var label string
	if set != nil {
		entry, err := set.Match(d.PCRs)
		if err != nil {
			return err
		}
		label = entry.Label
	}
	if f == formatJSON {
		return printAttestationJSON(w, d, label)
	}
	var b strings.Builder
	line := func(name, value string) { fmt.Fprintf(&b, "verified  %-10s  %s\n", name, value) }
	line("module", d.ModuleID)
	line("made", d.Timestamp.Format(time.RFC3339Nano))
	for _, i := range slices.Sorted(maps.Keys(d.PCRs)) {
		if v := hex.EncodeToString(d.PCRs[i]); i == 0 || strings.Trim(v, "0") != "" {
			line(fmt.Sprint("PCR", i), v)
		}
	}
	if label != "" {
		line("label", label)
	}
	if d.Nonce != nil {
		line("nonce", hex.EncodeToString(d.Nonce))
	}
	if d.UserData != nil {
		line("user data", fmt.Sprintf("%q", d.UserData))
	}
	if d.PublicKey != nil {
		line("public key", hex.EncodeToString(d.PublicKey))
	}
	if d.Debug() {
		b.WriteString("debug mode: the enclave's host can read it\n")
	}
	if set == nil {
		b.WriteString("no measurement set was compared: an enclave made this document, but which code runs in it you must see from the PCRs\n")
	}
	if d.Development {
		b.WriteString(development + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// hexBytes are hexadecimal in JSON.
type hexBytes []byte

func (b hexBytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

func printAttestationJSON(w io.Writer, d *attestation.Document, label string) error {
	pcrs := map[string]hexBytes{}
	for i, v := range d.PCRs {
		pcrs[fmt.Sprint("PCR", i)] = v
	}
	// Absent in the document is null here, and 0 bytes are an empty string.
	optional := func(b []byte) *hexBytes {
		if b == nil {
			return nil
		}
		return (*hexBytes)(&b)
	}
	return json.NewEncoder(w).Encode(struct {
		Development bool                `json:"development"`
		Debug       bool                `json:"debug"`
		ModuleID    string              `json:"moduleID"`
		Timestamp   time.Time           `json:"timestamp"`
		PCRs        map[string]hexBytes `json:"pcrs"`
		Label       string              `json:"label,omitempty"`
		Nonce       *hexBytes           `json:"nonce"`
		UserData    *hexBytes           `json:"userData"`
		PublicKey   *hexBytes           `json:"publicKey"`
	}{d.Development, d.Debug(), d.ModuleID, d.Timestamp, pcrs, label, optional(d.Nonce), optional(d.UserData), optional(d.PublicKey)})
}
