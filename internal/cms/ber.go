package cms

import "errors"

// Identifier octets without the bit of the constructed form (X.690, section 8.1.2).
const (
	tagInteger     = 0x02
	tagOctetString = 0x04
	tagNull        = 0x05
	tagOID         = 0x06
	tagSequence    = 0x10
	tagSet         = 0x11
	context0       = 0x80
	context1       = 0x81
)

const (
	constructed = 0x20
	// maxDepth is how deep elements may lie in each other; a message of KMS has 11 levels.
	maxDepth = 16
)

// element is one BER element: its value when it is primitive, its children when it is constructed.
type element struct {
	tag         byte
	constructed bool
	value       []byte
	children    []element
}

var (
	errShort  = errors.New("it ends in the middle of an element")
	errLength = errors.New("an element has a length that is not accepted")
	errTag    = errors.New("an element has a tag that is not accepted")
	errDepth  = errors.New("its elements lie too deep in each other")
)

// readElement reads the first element of b and returns what follows it.
func readElement(b []byte, depth int) (e element, rest []byte, err error) {
	if depth > maxDepth {
		return e, nil, errDepth
	}
	if len(b) < 2 {
		return e, nil, errShort
	}
	if b[0] == 0 || b[0]&0x1f == 0x1f { // the end of contents where none can be, or a long tag
		return e, nil, errTag
	}
	e.tag, e.constructed = b[0]&^constructed, b[0]&constructed != 0
	length, indefinite, b, err := readLength(b[1:])
	if err != nil {
		return e, nil, err
	}
	switch {
	case indefinite && !e.constructed:
		return e, nil, errLength
	case indefinite:
		for {
			if len(b) < 2 {
				return e, nil, errShort
			}
			if b[0] == 0 && b[1] == 0 {
				return e, b[2:], nil
			}
			var child element
			if child, b, err = readElement(b, depth+1); err != nil {
				return e, nil, err
			}
			e.children = append(e.children, child)
		}
	case length > len(b):
		return e, nil, errShort
	}
	e.value, rest = b[:length:length], b[length:]
	if !e.constructed {
		return e, rest, nil
	}
	for inner := e.value; len(inner) > 0; {
		var child element
		if child, inner, err = readElement(inner, depth+1); err != nil {
			return e, nil, err
		}
		e.children = append(e.children, child)
	}
	e.value = nil
	return e, rest, nil
}

// readLength reads length octets (X.690, section 8.1.3), of a definite length at most 3.
func readLength(b []byte) (length int, indefinite bool, rest []byte, err error) {
	first, b := b[0], b[1:]
	switch {
	case first < 0x80:
		return int(first), false, b, nil
	case first == 0x80:
		return 0, true, b, nil
	case first > 0x83:
		return 0, false, nil, errLength
	}
	n := int(first & 0x7f)
	if len(b) < n {
		return 0, false, nil, errShort
	}
	for _, c := range b[:n] {
		length = length<<8 | int(c)
	}
	return length, false, b[n:], nil
}

func (e element) is(tag byte, constructed bool) bool {
	return e.tag == tag && e.constructed == constructed
}

// members returns the children of a constructed element that has exactly n.
func (e element) members(tag byte, n int) ([]element, bool) {
	return e.children, e.is(tag, true) && len(e.children) == n
}

func (e element) isOID(oid string) bool { return e.is(tagOID, false) && string(e.value) == oid }

// isInteger tells whether e is one of two small numbers.
func (e element) isInteger(a, b byte) bool {
	return e.is(tagInteger, false) && len(e.value) == 1 && (e.value[0] == a || e.value[0] == b)
}

// octets returns the value of an octet string with an implicit tag: primitive, or put together from octet
// strings (X.690, section 8.7).
func (e element) octets(tag byte) ([]byte, bool) {
	switch {
	case e.tag != tag:
		return nil, false
	case !e.constructed:
		return e.value, true
	}
	var out []byte
	for _, c := range e.children {
		part, ok := c.octets(tagOctetString)
		if !ok {
			return nil, false
		}
		out = append(out, part...)
	}
	return out, true
}
