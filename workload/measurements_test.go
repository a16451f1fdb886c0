package workload

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// reg is a register value of 48 equal bytes, in hexadecimal.
func reg(b byte) string { return strings.Repeat(hex.EncodeToString([]byte{b}), PCRSize) }

// shown is a document's registers.
func shown(values map[uint]byte) map[uint][]byte {
	out := map[uint][]byte{}
	for index, b := range values {
		out[index], _ = hex.DecodeString(reg(b))
	}
	return out
}

func TestParseMeasurements(t *testing.T) {
	tests := map[string]struct {
		in   string
		want MeasurementSet
	}{
		"PCR0": {`{"measurements":[{"label":"1.4.0","PCR0":"` + reg(0xab) + `","PCR16":"` + reg(16) + `"}]}`,
			MeasurementSet{{Label: "1.4.0", PCR0: reg(0xab), PCR16: reg(16)}}},
		"PCR1 and PCR2, no label": {`{"measurements":[{"PCR1":"` + reg(1) + `","PCR2":"` + reg(2) + `","PCR16":"` + reg(16) + `"}]}`,
			MeasurementSet{{PCR1: reg(1), PCR2: reg(2), PCR16: reg(16)}}},
		"PCR8 with role and instance": {`{"measurements":[{"PCR3":"` + reg(3) + `","PCR4":"` + reg(4) + `","PCR8":"` + reg(8) + `","PCR16":"` + reg(16) + `"}]}`,
			MeasurementSet{{PCR3: reg(3), PCR4: reg(4), PCR8: reg(8), PCR16: reg(16)}}},
		"upper case and white space": {" {\n\"measurements\": [ {\"PCR0\":\"" + strings.ToUpper(reg(0xab)) + "\", \"PCR16\":\"" + reg(16) + "\"} ] }\n",
			MeasurementSet{{PCR0: reg(0xab), PCR16: reg(16)}}},
		"two entries of one label": {`{"measurements":[{"label":"a","PCR0":"` + reg(1) + `","PCR16":"` + reg(16) + `"},{"label":"a","PCR0":"` + reg(2) + `","PCR16":"` + reg(16) + `"}]}`,
			MeasurementSet{{Label: "a", PCR0: reg(1), PCR16: reg(16)}, {Label: "a", PCR0: reg(2), PCR16: reg(16)}}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := ParseMeasurements([]byte(tc.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestParseMeasurementsRefuses(t *testing.T) {
	entry := func(fields string) string { return `{"measurements":[{` + fields + `}]}` }
	pcr0, pcr16 := `"PCR0":"`+reg(0)+`"`, `"PCR16":"`+reg(16)+`"`
	tests := map[string]struct{ in, want string }{
		"empty input":            {``, "unexpected EOF"},
		"not JSON":               {`x`, "invalid character"},
		"not an object":          {`[]`, "must be a JSON object"},
		"null":                   {`null`, "must be a JSON object"},
		"no measurements":        {`{}`, "is empty"},
		"empty set":              {`{"measurements":[]}`, "is empty"},
		"null set":               {`{"measurements":null}`, "must be a JSON array"},
		"entry is no object":     {`{"measurements":["x"]}`, "must be a JSON object"},
		"cut":                    {`{"measurements":[{` + pcr0 + `,`, "EOF"},
		"trailing data":          {entry(pcr0+","+pcr16) + `{}`, "data follows"},
		"unknown top field":      {`{"measurement":[]}`, `no field "measurement"`},
		"wrong case":             {entry(`"pcr0":"` + reg(0) + `",` + pcr16), `no field "pcr0"`},
		"unknown register":       {entry(pcr0 + "," + pcr16 + `,"PCR5":"` + reg(5) + `"`), `no field "PCR5"`},
		"duplicate register":     {entry(pcr0 + "," + pcr0 + "," + pcr16), `"PCR0" twice`},
		"duplicate list":         {`{"measurements":[],"measurements":[]}`, `"measurements" twice`},
		"number":                 {entry(`"PCR0":5,` + pcr16), "must be a string"},
		"empty register":         {entry(`"PCR0":"",` + pcr16), "not empty"},
		"null register":          {entry(pcr0 + `,"PCR16":null`), "must be a string"},
		"short register":         {entry(`"PCR0":"` + reg(0)[2:] + `",` + pcr16), "96 hexadecimal"},
		"long register":          {entry(`"PCR0":"` + reg(0) + `00",` + pcr16), "96 hexadecimal"},
		"no hexadecimal":         {entry(`"PCR0":"` + strings.Repeat("g", 96) + `",` + pcr16), "96 hexadecimal"},
		"only the workload":      {entry(pcr16), "pins no code"},
		"only the code":          {entry(pcr0 + `,"PCR1":"` + reg(1) + `","PCR2":"` + reg(2) + `"`), "pins no workload"},
		"PCR1 without PCR2":      {entry(`"PCR1":"` + reg(1) + `",` + pcr16), "pins no code"},
		"PCR2 without PCR1":      {entry(`"PCR2":"` + reg(2) + `",` + pcr16), "pins no code"},
		"PCR8 of no signature":   {entry(`"PCR8":"` + reg(0) + `",` + pcr16), "pins no code"},
		"only role and instance": {entry(`"PCR3":"` + reg(3) + `","PCR4":"` + reg(4) + `",` + pcr16), "pins no code"},
		"the second is bad":      {`{"measurements":[{` + pcr0 + `,` + pcr16 + `},{"label":"b",` + pcr16 + `}]}`, "entry 2 (b): it pins no code"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := ParseMeasurements([]byte(tc.in))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
}

func TestMeasurementSetJSON(t *testing.T) {
	set := MeasurementSet{{Label: "b", PCR16: strings.ToUpper(reg(0xcd)), PCR2: reg(2), PCR1: reg(1)}}
	want := `{"measurements":[{"label":"b","PCR1":"` + reg(1) + `","PCR2":"` + reg(2) + `","PCR16":"` + reg(0xcd) + `"}]}`
	got, err := json.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	var back MeasurementSet
	if err := json.Unmarshal(got, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(MeasurementSet{{Label: "b", PCR1: reg(1), PCR2: reg(2), PCR16: reg(0xcd)}}, back); diff != "" {
		t.Errorf("round trip (-want +got):\n%s", diff)
	}
	if set[0].PCR16 != strings.ToUpper(reg(0xcd)) {
		t.Error("MarshalJSON changed the set")
	}
	if _, err := json.Marshal(MeasurementSet{{PCR0: reg(0)}}); err == nil {
		t.Error("MarshalJSON writes a set that no client would load")
	}
}

func TestMatch(t *testing.T) {
	old := Measurement{Label: "1.0", PCR0: reg(0xa), PCR16: reg(0x16)}
	new := Measurement{Label: "1.1", PCR0: reg(0xa), PCR16: reg(0x17)}
	other := Measurement{Label: "other", PCR1: reg(1), PCR2: reg(2), PCR3: reg(3), PCR16: reg(0x18)}
	signed := Measurement{PCR8: strings.ToUpper(reg(0xcd)), PCR16: reg(0x16)}
	tests := map[string]struct {
		set  MeasurementSet
		pcrs map[uint]byte
		want string         // label
		err  *MismatchError // nil: matches
	}{
		"first":              {set: MeasurementSet{old, new}, pcrs: map[uint]byte{0: 0xa, 16: 0x16}, want: "1.0"},
		"second":             {set: MeasurementSet{old, new}, pcrs: map[uint]byte{0: 0xa, 16: 0x17}, want: "1.1"},
		"upper case":         {set: MeasurementSet{signed}, pcrs: map[uint]byte{0: 1, 8: 0xcd, 16: 0x16}},
		"more registers":     {set: MeasurementSet{other}, pcrs: map[uint]byte{0: 9, 1: 1, 2: 2, 3: 3, 4: 4, 16: 0x18}, want: "other"},
		"the workload":       {set: MeasurementSet{old}, pcrs: map[uint]byte{0: 0xa, 16: 0x17}, err: &MismatchError{"1.0", 1, []Mismatch{{16, reg(0x16), reg(0x17)}}}},
		"the code":           {set: MeasurementSet{old}, pcrs: map[uint]byte{0: 0xb, 16: 0x16}, err: &MismatchError{"1.0", 1, []Mismatch{{0, reg(0xa), reg(0xb)}}}},
		"both":               {set: MeasurementSet{old}, pcrs: map[uint]byte{0: 0xb, 16: 0x17}, err: &MismatchError{"1.0", 1, []Mismatch{{0, reg(0xa), reg(0xb)}, {16, reg(0x16), reg(0x17)}}}},
		"PCR16 not locked":   {set: MeasurementSet{old}, pcrs: map[uint]byte{0: 0xa}, err: &MismatchError{"1.0", 1, []Mismatch{{16, reg(0x16), ""}}}},
		"no registers":       {set: MeasurementSet{signed}, err: &MismatchError{"", 1, []Mismatch{{8, reg(0xcd), ""}, {16, reg(0x16), ""}}}},
		"closest of several": {set: MeasurementSet{other, old, new}, pcrs: map[uint]byte{0: 0xb, 16: 0x17}, err: &MismatchError{"1.1", 3, []Mismatch{{0, reg(0xa), reg(0xb)}}}},
		"no mix of entries":  {set: MeasurementSet{old, {Label: "2.0", PCR0: reg(0xb), PCR16: reg(0x17)}}, pcrs: map[uint]byte{0: 0xa, 16: 0x17}, err: &MismatchError{"1.0", 2, []Mismatch{{16, reg(0x16), reg(0x17)}}}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := tc.set.Match(shown(tc.pcrs))
			var mismatch *MismatchError
			errors.As(err, &mismatch)
			if diff := cmp.Diff(tc.err, mismatch); diff != "" {
				t.Fatalf("error (-want +got):\n%s", diff)
			}
			if tc.err == nil && err != nil {
				t.Fatal(err)
			}
			if got.Label != tc.want {
				t.Errorf("matched %q, want %q", got.Label, tc.want)
			}
		})
	}
}

// TestMatchInvalid makes sure that a set that was not parsed cannot match by pinning nothing.
func TestMatchInvalid(t *testing.T) {
	for name, set := range map[string]MeasurementSet{
		"nil":           nil,
		"empty entry":   {{}},
		"only code":     {{PCR0: reg(0)}},
		"only workload": {{PCR16: reg(16)}},
		"bad digits":    {{PCR0: "zz", PCR16: reg(16)}},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := set.Match(shown(map[uint]byte{0: 0, 16: 16})); err == nil {
				t.Error("matches")
			}
		})
	}
}

func TestMismatchErrorText(t *testing.T) {
	diffs := []Mismatch{{0, "aa", "bb"}, {16, "cc", ""}}
	tests := map[string]struct {
		err  MismatchError
		want string
	}{
		"one entry":  {MismatchError{"1.0", 1, diffs}, `the registers do not match measurement "1.0": PCR0 expected aa, seen bb, PCR16 expected cc, seen none (not in the document)`},
		"no label":   {MismatchError{"", 1, diffs[:1]}, `the registers do not match the measurement: PCR0 expected aa, seen bb`},
		"several":    {MismatchError{"1.0", 2, diffs[:1]}, `the registers match none of the 2 measurements, the closest is "1.0": PCR0 expected aa, seen bb`},
		"no label 2": {MismatchError{"", 2, diffs[:1]}, `the registers match none of the 2 measurements, the closest one differs: PCR0 expected aa, seen bb`},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			if got := tc.err.Error(); got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func FuzzParseMeasurements(f *testing.F) {
	f.Add([]byte(`{"measurements":[{"label":"1.4.0","PCR0":"` + reg(0) + `","PCR16":"` + reg(16) + `"}]}`))
	f.Add([]byte(`{"measurements":[{"PCR1":"` + reg(1) + `","PCR2":"` + reg(2) + `","PCR16":"` + reg(16) + `"}]}`))
	f.Add([]byte(`{"measurements":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := ParseMeasurements(data)
		if err != nil {
			return
		}
		canonical, err := json.Marshal(set)
		if err != nil {
			t.Fatalf("a set that was read cannot be written: %v", err)
		}
		again, err := ParseMeasurements(canonical)
		if err != nil {
			t.Fatalf("the canonical form cannot be read: %v", err)
		}
		if diff := cmp.Diff(set, again); diff != "" {
			t.Errorf("round trip (-first +second):\n%s", diff)
		}
	})
}
