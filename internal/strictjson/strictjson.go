// Package strictjson reads JSON whose every field is known before: names are case-sensitive, and a name
// that comes twice, or that the caller refuses, is an error. encoding/json takes all three.
package strictjson

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Object reads a JSON object and calls field for each key, once, to consume its value. The errors say
// what they speak of.
func Object(dec *json.Decoder, what string, field func(key string) error) error {
	if tok, err := dec.Token(); err != nil {
		return noEOF(err)
	} else if tok != json.Delim('{') {
		return fmt.Errorf("%s must be a JSON object", what)
	}
	seen := map[string]bool{}
	for dec.More() {
		tok, err := dec.Token()
		if err != nil {
			return noEOF(err)
		}
		key, ok := tok.(string)
		if !ok {
			return fmt.Errorf("%s has a key that is not a string", what)
		}
		if seen[key] {
			return fmt.Errorf("%s has the field %q twice", what, key)
		}
		seen[key] = true
		if err := field(key); err != nil {
			return noEOF(err)
		}
	}
	_, err := dec.Token()
	return noEOF(err)
}

// Array reads a JSON array and calls element to consume each element.
func Array(dec *json.Decoder, what string, element func() error) error {
	if tok, err := dec.Token(); err != nil {
		return noEOF(err)
	} else if tok != json.Delim('[') {
		return fmt.Errorf("%s must be a JSON array", what)
	}
	for dec.More() {
		if err := element(); err != nil {
			return err
		}
	}
	_, err := dec.Token()
	return noEOF(err)
}

// String reads a string that is not empty.
func String(dec *json.Decoder, what string) (string, error) {
	tok, err := dec.Token()
	if err != nil {
		return "", noEOF(err)
	}
	s, ok := tok.(string)
	if !ok || s == "" {
		return "", fmt.Errorf("%s must be a string that is not empty", what)
	}
	return s, nil
}

// End reports what follows the value.
func End(dec *json.Decoder) error {
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("data follows the closing brace")
	}
	return nil
}

// noEOF makes a plain end of input an error in words, since every caller expects more.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
