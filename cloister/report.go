package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"time"

	"cloister.dev/cloister/attestation"
	"cloister.dev/cloister/webhook/inject"
	"cloister.dev/cloister/workload"
)

// development is said of every result below a root that is not AWS's.
const development = "DEVELOPMENT, not a real enclave"

// hostNote is what holds for every connection. What the host can do beside it depends on the workload's
// manifest, which a client does not see: of the list that `cloister measure` prints it has the part that
// holds for every workload.
const hostNote = `the host can read: who connects, when, and how many bytes go each way
the host can change: it can delay and drop, but not forge
what else this workload shows its host, and which variables and files it takes from it: cloister measure -f FILE`

// printVerified says what the other end of a connection has proven.
func printVerified(w io.Writer, d *attestation.Document, m workload.Measurement) {
	line := func(name, value string) { fmt.Fprintf(w, "verified  %-6s  %s\n", name, value) }
	line("module", d.ModuleID)
	for _, pcr := range []uint{0, 1, 2, 16} {
		if v, ok := d.PCRs[pcr]; ok {
			line(fmt.Sprint("PCR", pcr), hex.EncodeToString(v))
		}
	}
	if m.Label != "" {
		line("label", m.Label)
	}
	if d.Development {
		fmt.Fprintln(w, development)
	}
}

// printDocument shows the rest of a verified document, and what the host still can do.
func printDocument(w io.Writer, d *attestation.Document, now time.Time) {
	line := func(name, value string) { fmt.Fprintf(w, "document  %-6s  %s\n", name, value) }
	line("made", fmt.Sprintf("%s, %s ago", d.Timestamp.Format(time.RFC3339), now.Sub(d.Timestamp).Round(time.Second)))
	for _, pcr := range []uint{3, 4, 8} {
		if v, ok := d.PCRs[pcr]; ok {
			line(fmt.Sprint("PCR", pcr), hex.EncodeToString(v))
		}
	}
	if d.UserData != nil {
		line("use", fmt.Sprintf("%q", d.UserData))
	}
	line("key", hex.EncodeToString(d.PublicKey))
	for _, sentence := range inject.HostAccess(&workload.Manifest{}) {
		fmt.Fprintln(w, sentence)
	}
	fmt.Fprintln(w, hostNote)
}

// refusal returns err for people, if it says that attestation was refused in a handshake.
func refusal(err error) (error, bool) {
	var refused *attestation.Error
	if !errors.As(err, &refused) {
		return nil, false
	}
	return fmt.Errorf("not one byte of the request was sent: %w", inWords(refused)), true
}

// inWords returns a refusal for people: with every register that differs on lines of its own.
func inWords(refused error) error {
	var mismatch *workload.MismatchError
	if !errors.As(refused, &mismatch) {
		return refused
	}
	text := "the enclave is not the measured one"
	switch {
	case mismatch.Entries > 1 && mismatch.Label != "":
		text += fmt.Sprintf(": it matches none of the %d entries, the closest is %q", mismatch.Entries, mismatch.Label)
	case mismatch.Entries > 1:
		text += fmt.Sprintf(": it matches none of the %d entries, the closest differs", mismatch.Entries)
	case mismatch.Label != "":
		text += fmt.Sprintf(": it does not match %q", mismatch.Label)
	}
	for _, m := range mismatch.Mismatches {
		seen := m.Seen
		if seen == "" {
			seen = "not in the document"
		}
		text += fmt.Sprintf("\n  PCR%-3d expected  %s\n         seen      %s", m.PCR, m.Expected, seen)
	}
	return errors.New(text)
}
