package eif

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Metadata describes an EIF for people. It is not measured. BuildTime makes two builds differ in
// bytes, though not in measurements.
type Metadata struct {
	ImageName      string
	ImageVersion   string
	BuildMetadata  BuildMetadata
	DockerInfo     json.RawMessage // what `docker inspect` prints; empty is null
	CustomMetadata json.RawMessage // any JSON; empty is null
}

// BuildMetadata says how an EIF was built.
type BuildMetadata struct {
	BuildTime        string // RFC 3339
	BuildTool        string
	BuildToolVersion string
	OperatingSystem  string
	KernelVersion    string
}

// encode returns the metadata as Rust's serde_json writes it, which AWS's builder uses: without
// spaces, with the fields in the order of the type and the keys of other objects sorted.
func (m *Metadata) encode() (string, error) {
	var b strings.Builder
	for _, f := range []struct{ prefix, value string }{
		{`{"ImageName":`, m.ImageName},
		{`,"ImageVersion":`, m.ImageVersion},
		{`,"BuildMetadata":{"BuildTime":`, m.BuildMetadata.BuildTime},
		{`,"BuildTool":`, m.BuildMetadata.BuildTool},
		{`,"BuildToolVersion":`, m.BuildMetadata.BuildToolVersion},
		{`,"OperatingSystem":`, m.BuildMetadata.OperatingSystem},
		{`,"KernelVersion":`, m.BuildMetadata.KernelVersion},
	} {
		b.WriteString(f.prefix)
		writeString(&b, f.value)
	}
	b.WriteString(`},"DockerInfo":`)
	if err := writeRaw(&b, m.DockerInfo); err != nil {
		return "", fmt.Errorf("DockerInfo: %w", err)
	}
	b.WriteString(`,"CustomMetadata":`)
	if err := writeRaw(&b, m.CustomMetadata); err != nil {
		return "", fmt.Errorf("CustomMetadata: %w", err)
	}
	b.WriteByte('}')
	return b.String(), nil
}

// writeRaw writes any JSON in serde_json's form.
func writeRaw(b *strings.Builder, raw json.RawMessage) error {
	if len(raw) == 0 {
		raw = json.RawMessage("null")
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data follows the JSON value")
	}
	return writeValue(b, v)
}

func writeValue(b *strings.Builder, v any) error {
	switch v := v.(type) {
	case nil:
		b.WriteString("null")
	case bool:
		b.WriteString(strconv.FormatBool(v))
	case string:
		writeString(b, v)
	case json.Number:
		return writeNumber(b, v)
	case []any:
		for i, element := range v {
			b.WriteByte("[,"[min(i, 1)])
			if err := writeValue(b, element); err != nil {
				return err
			}
		}
		if len(v) == 0 {
			b.WriteByte('[')
		}
		b.WriteByte(']')
	case map[string]any:
		for i, key := range slices.Sorted(maps.Keys(v)) {
			b.WriteByte("{,"[min(i, 1)])
			writeString(b, key)
			b.WriteByte(':')
			if err := writeValue(b, v[key]); err != nil {
				return err
			}
		}
		if len(v) == 0 {
			b.WriteByte('{')
		}
		b.WriteByte('}')
	}
	return nil
}

// writeString escapes only what JSON demands (RFC 8259, section 7), with the short forms.
func writeString(b *strings.Builder, s string) {
	b.WriteByte('"')
	for _, r := range strings.ToValidUTF8(s, "\uFFFD") {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\b':
			b.WriteString(`\b`)
		case r == '\f':
			b.WriteString(`\f`)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\r':
			b.WriteString(`\r`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x20:
			fmt.Fprintf(b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
}

// writeNumber writes integers that fit into 64 bits as they are and all other numbers as the
// shortest float64, as serde_json does with the crate zmij: plain from 1e-5 up to 1e16, always with a
// fraction or an exponent.
func writeNumber(b *strings.Builder, n json.Number) error {
	s := n.String()
	if s != "-0" {
		if _, err := strconv.ParseInt(s, 10, 64); err == nil {
			b.WriteString(s)
			return nil
		}
		if _, err := strconv.ParseUint(s, 10, 64); err == nil {
			b.WriteString(s)
			return nil
		}
	}
	f, err := parseFloat(s)
	if err != nil {
		return err
	}
	mantissa, exponent, _ := strings.Cut(strconv.FormatFloat(f, 'e', -1, 64), "e")
	exp, err := strconv.Atoi(exponent)
	if err != nil {
		return err
	}
	switch {
	case f == 0 || exp >= -5 && exp < 16:
		plain := strconv.FormatFloat(f, 'f', -1, 64)
		if !strings.Contains(plain, ".") {
			plain += ".0"
		}
		b.WriteString(plain)
	default:
		fmt.Fprintf(b, "%se%+d", mantissa, exp)
	}
	return nil
}

// parseFloat reads a JSON number as serde_json does (src/de.rs), which without its feature
// float_roundtrip may miss the nearest float64: it takes as many digits as fit into 64 bits, and
// multiplies or divides them by a power of ten.
func parseFloat(s string) (float64, error) {
	digits, negative := strings.CutPrefix(s, "-")
	exponent := 0
	if i := strings.IndexAny(digits, "eE"); i >= 0 {
		var err error
		if exponent, err = strconv.Atoi(digits[i+1:]); err != nil {
			exponent = math.MaxInt32 // out of range, but for a zero
			if digits[i+1] == '-' {
				exponent = -exponent
			}
		}
		digits = digits[:i]
	}
	integer, fraction, _ := strings.Cut(digits, ".")
	var significand uint64
	add := func(digit byte) (fits bool) {
		d := uint64(digit - '0')
		if significand > (math.MaxUint64-d)/10 {
			return false
		}
		significand = significand*10 + d
		return true
	}
	for i := range integer {
		if !add(integer[i]) {
			exponent += len(integer) - i
			break
		}
	}
	for i := range fraction {
		if !add(fraction[i]) {
			break
		}
		exponent--
	}

	f := float64(significand)
	for ; exponent < -308 && f != 0; exponent += 308 {
		f /= 1e308
	}
	if f != 0 {
		power, err := strconv.ParseFloat(fmt.Sprintf("1e%d", max(exponent, -exponent)), 64)
		if exponent >= 0 {
			f *= power
		} else {
			f /= power
		}
		if err != nil || math.IsInf(f, 0) {
			return 0, fmt.Errorf("number %s is out of range", s)
		}
	}
	if negative {
		f = -f
	}
	return f, nil
}
