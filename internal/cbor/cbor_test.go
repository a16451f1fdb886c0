package cbor

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	fxcbor "github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
)

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRoundTrip appends one of everything and reads it back, around the borders of the lengths.
func TestRoundTrip(t *testing.T) {
	for _, n := range []uint64{0, 1, 23, 24, 255, 256, 65535, 65536, 1<<32 - 1, 1 << 32, 1<<63 - 1} {
		b := AppendUint(nil, n)
		b = AppendInt(b, -1-int64(n))
		b = AppendInt(b, int64(n))
		d := NewDecoder(b)
		if got, err := d.Uint(); got != n || err != nil {
			t.Errorf("Uint() = %d, %v; want %d", got, err, n)
		}
		if got, err := d.Int(); got != -1-int64(n) || err != nil {
			t.Errorf("Int() = %d, %v; want %d", got, err, -1-int64(n))
		}
		if got, err := d.Int(); got != int64(n) || err != nil {
			t.Errorf("Int() = %d, %v; want %d", got, err, n)
		}
		if err := d.End(); err != nil {
			t.Error(err)
		}
	}
	for _, n := range []int{0, 23, 24, 255, 256, 65536} {
		b := AppendTag(nil, 18)
		b = AppendArray(b, 4)
		b = AppendBytes(b, make([]byte, n))
		b = AppendText(b, strings.Repeat("é", n))
		b = AppendOptionalBytes(b, nil)
		b = AppendMap(b, 1)
		b = AppendUint(b, 1)
		b = AppendOptionalBytes(b, []byte{})
		d := NewDecoder(b)
		if d.Tag(17) || !d.Tag(18) || d.Tag(18) {
			t.Error("Tag() does not skip exactly the tag 18")
		}
		var bytes, null, empty []byte
		var text string
		err := d.Array(func(i int) (err error) {
			switch i {
			case 0:
				bytes, err = d.Bytes()
			case 1:
				text, err = d.Text()
			case 2:
				null, err = d.OptionalBytes()
			case 3:
				err = d.Map(func() error {
					if _, err := d.Uint(); err != nil {
						return err
					}
					empty, err = d.OptionalBytes()
					return err
				})
			}
			return err
		})
		if err != nil || d.End() != nil {
			t.Fatalf("read: %v, %v", err, d.End())
		}
		if len(bytes) != n || len(text) != 2*n || null != nil || empty == nil {
			t.Errorf("read %d bytes, %d bytes of text, %v, %v", len(bytes), len(text), null, empty)
		}
	}
}

func TestIndefinite(t *testing.T) {
	d := NewDecoder(unhex(t, "bf 01 9f 02 ff 03 9f ff ff"))
	var got [][]uint64
	err := d.Map(func() error {
		key, err := d.Uint()
		if err != nil {
			return err
		}
		entry := []uint64{key}
		err = d.Array(func(int) error {
			v, err := d.Uint()
			entry = append(entry, v)
			return err
		})
		got = append(got, entry)
		return err
	})
	if err != nil || d.End() != nil {
		t.Fatalf("read: %v, %v", err, d.End())
	}
	if diff := cmp.Diff([][]uint64{{1, 2}, {3}}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestRefuses(t *testing.T) {
	readBytes := func(d *Decoder) error { _, err := d.Bytes(); return err }
	readText := func(d *Decoder) error { _, err := d.Text(); return err }
	readUint := func(d *Decoder) error { _, err := d.Uint(); return err }
	readInt := func(d *Decoder) error { _, err := d.Int(); return err }
	readArray := func(d *Decoder) error { return d.Array(func(int) error { return d.Skip() }) }
	skip := (*Decoder).Skip
	tests := map[string]struct {
		in   string
		read func(*Decoder) error
		want string
	}{
		"nothing":                    {"", readUint, "data ends"},
		"cut argument":               {"19 01", readUint, "data ends"},
		"cut string":                 {"43 01 02", readBytes, "data ends"},
		"string of 2^64-1":           {"5b ff ff ff ff ff ff ff ff 00", readBytes, "data ends"},
		"array of 2^32-1":            {"9a ff ff ff ff 00", readArray, "data ends"},
		"skipped array of 2^63":      {"9b 80 00 00 00 00 00 00 00 00", skip, "data ends"},
		"map of 2^64-1":              {"bb ff ff ff ff ff ff ff ff 00", skip, "data ends"},
		"array without break":        {"9f 01", readArray, "data ends"},
		"reserved information":       {"1c", readUint, "reserved"},
		"indefinite byte string":     {"5f 41 00 ff", readBytes, "indefinite length"},
		"indefinite text string":     {"7f 61 61 ff", readText, "indefinite length"},
		"indefinite integer":         {"1f", readUint, "indefinite length"},
		"lone break":                 {"ff", skip, "indefinite length"},
		"break in a definite array":  {"81 ff", readArray, "indefinite length"},
		"simple value 20 in 2 bytes": {"f8 14", skip, "simple value 20"},
		"not UTF-8":                  {"61 ff", readText, "not UTF-8"},
		"skipped, not UTF-8":         {"61 ff", skip, "not UTF-8"},
		"text for bytes":             {"61 61", readBytes, "a text string where a byte string must be"},
		"bytes for text":             {"41 61", readText, "a byte string where a text string must be"},
		"null for bytes":             {"f6", readBytes, "a simple value where a byte string must be"},
		"tagged bytes":               {"d8 18 41 00", readBytes, "a tag where a byte string must be"},
		"2^63 as int":                {"1b 80 00 00 00 00 00 00 00", readInt, "too large"},
		"-2^63-1 as int":             {"3b 80 00 00 00 00 00 00 00", readInt, "too large"},
		"key twice":                  {"a2 01 02 01 03", skip, "a key twice"},
		"key twice, indefinite":      {"bf 41 00 02 03 04 41 00 03 ff", skip, "a key twice"},
		"key twice, inside a key":    {"a1 a2 f6 01 f6 02 00", skip, "a key twice"},
		"key without value":          {"bf 01 ff", skip, "indefinite length"},
		"too deep":                   {strings.Repeat("81", 17) + "00", skip, "nested more than 16 deep"},
		"too deep, indefinite":       {strings.Repeat("9f", 1000), skip, "nested more than 16 deep"},
		"tags too deep":              {strings.Repeat("c1", 17) + "00", skip, "nested more than 16 deep"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			err := tc.read(NewDecoder(unhex(t, tc.in)))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got error %v, want one with %q", err, tc.want)
			}
		})
	}
	if err := NewDecoder([]byte{0}).End(); err == nil || !strings.Contains(err.Error(), "1 bytes follow") {
		t.Errorf("End() = %v with data left", err)
	}
}

// FuzzSkip compares Skip with a complete decoder: what Skip accepts whole is well-formed there.
func FuzzSkip(f *testing.F) {
	for _, seed := range []string{"00", "8301820203820405", "bf6161019f0203ffff", "d28443a1013822a0f6f6", "f93c00", "fb3ff199999999999a", "f820"} {
		b, err := hex.DecodeString(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		in := bytes.Clone(b)
		d := NewDecoder(b)
		if d.Skip() != nil || d.End() != nil {
			return
		}
		if !bytes.Equal(in, b) {
			t.Error("Skip changed its input")
		}
		if err := fxcbor.Wellformed(b); err != nil {
			t.Errorf("accepted %x, which is not well-formed: %v", b, err)
		}
	})
}
