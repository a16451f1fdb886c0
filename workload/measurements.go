package workload

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"cloister.dev/cloister/internal/strictjson"
)

// PCRSize is the length of a platform configuration register in bytes: one SHA-384 digest.
const PCRSize = 48

// Measurement is one entry of a measurement set: the registers that a document must show. Each
// register is the hexadecimal form of 48 bytes; an empty one is not pinned.
//
// An entry pins code and workload: PCR16 (the workload manifest) and either PCR0 (the whole EIF),
// or PCR1 and PCR2 (kernel with first ramdisk, and the other ramdisks), or PCR8 (the certificate
// that signed the EIF; all zero is every EIF that nobody signed, and pins nothing). PCR3 (role) and
// PCR4 (instance) narrow it further.
type Measurement struct {
	// Label names the entry for people, for example "1.4.0".
	Label string `json:"label,omitempty"`
	PCR0  string `json:"PCR0,omitempty"`
	PCR1  string `json:"PCR1,omitempty"`
	PCR2  string `json:"PCR2,omitempty"`
	PCR3  string `json:"PCR3,omitempty"`
	PCR4  string `json:"PCR4,omitempty"`
	PCR8  string `json:"PCR8,omitempty"`
	PCR16 string `json:"PCR16,omitempty"`
}

// register is one register of an entry by its index.
type register struct {
	index uint
	value *string
}

// registers lists the entry's registers in numeric order, pinned or not.
func (m *Measurement) registers() []register {
	return []register{{0, &m.PCR0}, {1, &m.PCR1}, {2, &m.PCR2}, {3, &m.PCR3}, {4, &m.PCR4}, {8, &m.PCR8}, {16, &m.PCR16}}
}

// Validate reports why the entry cannot be used: a register that is not 96 hexadecimal characters,
// or an entry that does not pin both code and workload.
func (m Measurement) Validate() error {
	for _, r := range m.registers() {
		if *r.value == "" {
			continue
		}
		if b, err := hex.DecodeString(*r.value); err != nil || len(b) != PCRSize {
			return fmt.Errorf("PCR%d must be %d hexadecimal characters (one SHA-384 digest), not %q", r.index, 2*PCRSize, *r.value)
		}
	}
	if m.PCR16 == "" {
		return errors.New("it pins no workload: add PCR16, as `cloister measure -f` prints it")
	}
	if m.PCR0 == "" && (m.PCR1 == "" || m.PCR2 == "") && strings.Trim(m.PCR8, "0") == "" {
		return errors.New("it pins no code: add PCR0, or PCR1 and PCR2, or PCR8, as `cloister measure --eif` prints them")
	}
	return nil
}

// compare lists the pinned registers that pcrs lacks or shows with another value.
func (m Measurement) compare(pcrs map[uint][]byte) []Mismatch {
	var out []Mismatch
	for _, r := range m.registers() {
		if *r.value == "" {
			continue
		}
		expected := strings.ToLower(*r.value)
		if seen := hex.EncodeToString(pcrs[r.index]); seen != expected {
			out = append(out, Mismatch{PCR: r.index, Expected: expected, Seen: seen})
		}
	}
	return out
}

// MeasurementSet is a list of entries, any one of which is accepted. In JSON it is
//
//	{"measurements":[{"label":"1.4.0","PCR0":"…","PCR16":"…"}]}
type MeasurementSet []Measurement

// ParseMeasurements reads the JSON form of a measurement set. It refuses unknown and duplicate
// fields, trailing data, an empty set, and entries that Measurement.Validate refuses. Hexadecimal
// digits are accepted in both cases and returned in lower case.
func ParseMeasurements(data []byte) (MeasurementSet, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	var set MeasurementSet
	err := strictjson.Object(dec, "a measurement set", func(key string) error {
		if key != "measurements" {
			return fmt.Errorf("a measurement set has no field %q, only \"measurements\"", key)
		}
		return strictjson.Array(dec, strconv.Quote(key), func() error {
			m, err := readMeasurement(dec)
			if err != nil {
				return fmt.Errorf("entry %d: %w", len(set)+1, err)
			}
			set = append(set, m)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("read measurement set: %w", err)
	}
	if err := strictjson.End(dec); err != nil {
		return nil, fmt.Errorf("read measurement set: %w", err)
	}
	if err := set.Validate(); err != nil {
		return nil, fmt.Errorf("read measurement set: %w", err)
	}
	return set, nil
}

// readMeasurement reads one entry.
func readMeasurement(dec *json.Decoder) (Measurement, error) {
	var m Measurement
	fields := map[string]*string{"label": &m.Label}
	for _, r := range m.registers() {
		fields[fmt.Sprintf("PCR%d", r.index)] = r.value
	}
	err := strictjson.Object(dec, "an entry", func(key string) error {
		field, ok := fields[key]
		if !ok {
			return fmt.Errorf("an entry has no field %q; it has label, PCR0, PCR1, PCR2, PCR3, PCR4, PCR8 and PCR16", key)
		}
		s, err := strictjson.String(dec, key)
		if err != nil {
			return err
		}
		if key != "label" {
			s = strings.ToLower(s)
		}
		*field = s
		return nil
	})
	return m, err
}

// MarshalJSON returns the canonical form: one line, fields in the order label, PCR0, PCR1, PCR2,
// PCR3, PCR4, PCR8, PCR16, lower-case digits, unpinned registers left out.
func (s MeasurementSet) MarshalJSON() ([]byte, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	entries := slices.Clone(s)
	for i := range entries {
		for _, r := range entries[i].registers() {
			*r.value = strings.ToLower(*r.value)
		}
	}
	return json.Marshal(struct {
		Measurements []Measurement `json:"measurements"`
	}{entries})
}

// UnmarshalJSON is ParseMeasurements.
func (s *MeasurementSet) UnmarshalJSON(data []byte) error {
	set, err := ParseMeasurements(data)
	if err != nil {
		return err
	}
	*s = set
	return nil
}

// Validate reports an empty set or the first entry that cannot be used, by its number and label.
func (s MeasurementSet) Validate() error {
	if len(s) == 0 {
		return errors.New("the measurement set is empty and would accept nothing: add an entry")
	}
	for i, m := range s {
		if err := m.Validate(); err != nil {
			if m.Label != "" {
				return fmt.Errorf("entry %d (%s): %w", i+1, m.Label, err)
			}
			return fmt.Errorf("entry %d: %w", i+1, err)
		}
	}
	return nil
}

// Match returns the first entry of which every pinned register has the pinned value in pcrs, a map
// from register index to 48 bytes. A register that pcrs lacks differs. If no entry matches, the
// error is a *MismatchError; a set that Validate refuses matches nothing.
func (s MeasurementSet) Match(pcrs map[uint][]byte) (Measurement, error) {
	if err := s.Validate(); err != nil {
		return Measurement{}, err
	}
	var closest *MismatchError
	for _, m := range s {
		diff := m.compare(pcrs)
		if len(diff) == 0 {
			return m, nil
		}
		if closest == nil || len(diff) < len(closest.Mismatches) {
			closest = &MismatchError{Label: m.Label, Entries: len(s), Mismatches: diff}
		}
	}
	return Measurement{}, closest
}

// Mismatch is one register that differs from a measurement.
type Mismatch struct {
	PCR      uint   `json:"pcr"`
	Expected string `json:"expected"`       // lower-case hexadecimal
	Seen     string `json:"seen,omitempty"` // lower-case hexadecimal; empty if the register was not shown
}

func (m Mismatch) String() string {
	seen := m.Seen
	if seen == "" {
		seen = "none (not in the document)"
	}
	return fmt.Sprintf("PCR%d expected %s, seen %s", m.PCR, m.Expected, seen)
}

// MismatchError says that no entry of a measurement set matches, and how the closest one (the one
// with the fewest registers that differ) does not.
type MismatchError struct {
	Label      string     // label of the closest entry, possibly empty
	Entries    int        // number of entries in the set
	Mismatches []Mismatch // registers that differ from the closest entry, in numeric order
}

func (e *MismatchError) Error() string {
	var b strings.Builder
	switch {
	case e.Entries == 1 && e.Label == "":
		b.WriteString("the registers do not match the measurement")
	case e.Entries == 1:
		fmt.Fprintf(&b, "the registers do not match measurement %q", e.Label)
	case e.Label == "":
		fmt.Fprintf(&b, "the registers match none of the %d measurements, the closest one differs", e.Entries)
	default:
		fmt.Fprintf(&b, "the registers match none of the %d measurements, the closest is %q", e.Entries, e.Label)
	}
	for i, m := range e.Mismatches {
		sep := ", "
		if i == 0 {
			sep = ": "
		}
		b.WriteString(sep)
		b.WriteString(m.String())
	}
	return b.String()
}
