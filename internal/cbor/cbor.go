// Package cbor reads and writes the small part of CBOR (RFC 8949) that attestation documents, COSE
// signatures and conceptual message wrappers use: integers, byte and text strings, arrays, maps,
// null and tags.
//
// It is a pull decoder: the caller says what must come next and anything else is an error. Nothing
// is ever allocated by a length that the input claims; strings are returned as parts of the input.
// Indefinite lengths are understood for arrays and maps, which the Nitro Security Module uses since
// August 2025, and refused for strings, which nobody sends.
package cbor

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"
)

// Major types of RFC 8949, section 3.1.
const (
	majorUint   = 0
	majorNegInt = 1
	majorBytes  = 2
	majorText   = 3
	majorArray  = 4
	majorMap    = 5
	majorTag    = 6
	majorSimple = 7
)

const (
	null       = 0xf6
	breakByte  = 0xff
	indefinite = 31 // additional information of an indefinite length
	maxDepth   = 16 // nesting that Skip follows
)

var names = [...]string{"an unsigned integer", "a negative integer", "a byte string", "a text string", "an array", "a map", "a tag", "a simple value"}

var errShort = errors.New("the data ends in the middle of a CBOR item")

// Decoder reads CBOR items one by one. The zero value reads nothing; see NewDecoder.
type Decoder struct {
	rest []byte
}

// NewDecoder returns a decoder of data. It keeps data and the strings it returns share its memory.
func NewDecoder(data []byte) *Decoder {
	return &Decoder{rest: data}
}

// End reports an error if data is left.
func (d *Decoder) End() error {
	if len(d.rest) != 0 {
		return fmt.Errorf("%d bytes follow the CBOR item", len(d.rest))
	}
	return nil
}

// head reads the initial byte and argument of the next item. For an indefinite length it returns
// indef and no argument.
func (d *Decoder) head() (major byte, arg uint64, indef bool, err error) {
	if len(d.rest) == 0 {
		return 0, 0, false, errShort
	}
	first := d.rest[0]
	major, info := first>>5, first&31
	if info < 24 {
		d.rest = d.rest[1:]
		return major, uint64(info), false, nil
	}
	if info == indefinite {
		if major != majorArray && major != majorMap {
			return 0, 0, false, fmt.Errorf("%s of indefinite length, which is not accepted here", names[major])
		}
		d.rest = d.rest[1:]
		return major, 0, true, nil
	}
	if info > 27 {
		return 0, 0, false, fmt.Errorf("reserved CBOR additional information %d", info)
	}
	n := 1 << (info - 24)
	if len(d.rest) < 1+n {
		return 0, 0, false, errShort
	}
	for _, b := range d.rest[1 : 1+n] {
		arg = arg<<8 | uint64(b)
	}
	if major == majorSimple && info == 24 && arg < 32 {
		return 0, 0, false, fmt.Errorf("simple value %d is not encoded in one byte", arg)
	}
	d.rest = d.rest[1+n:]
	return major, arg, false, nil
}

// expect reads the head of an item of the given major type.
func (d *Decoder) expect(want byte) (arg uint64, indef bool, err error) {
	before := d.rest
	major, arg, indef, err := d.head()
	if err != nil {
		return 0, false, err
	}
	if major != want {
		d.rest = before
		return 0, false, fmt.Errorf("%s where %s must be", names[major], names[want])
	}
	return arg, indef, nil
}

// take returns the next n bytes.
func (d *Decoder) take(n uint64) ([]byte, error) {
	if n > uint64(len(d.rest)) {
		return nil, errShort
	}
	b := d.rest[:n:n]
	d.rest = d.rest[n:]
	return b, nil
}

// Uint reads an unsigned integer.
func (d *Decoder) Uint() (uint64, error) {
	arg, _, err := d.expect(majorUint)
	return arg, err
}

// Int reads an integer of either sign that fits in an int64.
func (d *Decoder) Int() (int64, error) {
	if len(d.rest) > 0 && d.rest[0]>>5 == majorNegInt {
		arg, _, err := d.expect(majorNegInt)
		if err == nil && arg > math.MaxInt64 {
			err = errors.New("an integer is too large")
		}
		return -1 - int64(arg), err
	}
	arg, err := d.Uint()
	if err == nil && arg > math.MaxInt64 {
		err = errors.New("an integer is too large")
	}
	return int64(arg), err
}

// Bytes reads a byte string.
func (d *Decoder) Bytes() ([]byte, error) {
	n, _, err := d.expect(majorBytes)
	if err != nil {
		return nil, err
	}
	return d.take(n)
}

// OptionalBytes reads a byte string or null, for which it returns nil. An empty byte string is
// empty but not nil.
func (d *Decoder) OptionalBytes() ([]byte, error) {
	if d.Null() {
		return nil, nil
	}
	return d.Bytes()
}

// Text reads a text string of valid UTF-8.
func (d *Decoder) Text() (string, error) {
	n, _, err := d.expect(majorText)
	if err != nil {
		return "", err
	}
	b, err := d.take(n)
	if err == nil && !utf8.Valid(b) {
		err = errors.New("a text string is not UTF-8")
	}
	return string(b), err
}

// Null skips the next item if it is null and reports whether it was.
func (d *Decoder) Null() bool {
	if len(d.rest) == 0 || d.rest[0] != null {
		return false
	}
	d.rest = d.rest[1:]
	return true
}

// Tag skips the tag if the next item carries exactly this one and reports whether it did.
func (d *Decoder) Tag(number uint64) bool {
	before := d.rest
	if major, arg, _, err := d.head(); err == nil && major == majorTag && arg == number {
		return true
	}
	d.rest = before
	return false
}

// Array reads an array of definite or indefinite length and calls element for each of its elements,
// which element must read whole.
func (d *Decoder) Array(element func(i int) error) error {
	n, indef, err := d.expect(majorArray)
	if err != nil {
		return err
	}
	return d.items(n, indef, element)
}

// Map reads a map of definite or indefinite length and calls entry for each of its pairs; entry must
// read key and value whole, and refuse a key that it has seen.
func (d *Decoder) Map(entry func() error) error {
	n, indef, err := d.expect(majorMap)
	if err != nil {
		return err
	}
	return d.items(n, indef, func(int) error { return entry() })
}

func (d *Decoder) items(n uint64, indef bool, item func(i int) error) error {
	if !indef && n > uint64(len(d.rest)) { // every item takes at least a byte
		return errShort
	}
	for i := 0; indef || uint64(i) < n; i++ {
		if indef && len(d.rest) > 0 && d.rest[0] == breakByte {
			d.rest = d.rest[1:]
			return nil
		}
		if err := item(i); err != nil {
			return err
		}
	}
	return nil
}

// Skip reads one item of any type, refusing what is not well-formed, is nested more than 16 deep, or has a
// map with the same key, byte for byte, twice.
func (d *Decoder) Skip() error {
	return d.skip(maxDepth)
}

func (d *Decoder) skip(depth int) error {
	if depth == 0 {
		return fmt.Errorf("CBOR items are nested more than %d deep", maxDepth)
	}
	major, arg, indef, err := d.head()
	if err != nil {
		return err
	}
	next := func(int) error { return d.skip(depth - 1) }
	switch major {
	case majorBytes:
		_, err = d.take(arg)
	case majorText:
		var b []byte
		if b, err = d.take(arg); err == nil && !utf8.Valid(b) {
			err = errors.New("a text string is not UTF-8")
		}
	case majorArray:
		err = d.items(arg, indef, next)
	case majorMap:
		seen := map[string]bool{}
		err = d.items(arg, indef, func(i int) error {
			before := d.rest
			if err := next(i); err != nil {
				return err
			}
			key := string(before[:len(before)-len(d.rest)])
			if seen[key] {
				return errors.New("a map has a key twice")
			}
			seen[key] = true
			return next(i)
		})
	case majorTag:
		err = next(0)
	}
	return err
}
