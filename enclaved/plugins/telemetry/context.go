package telemetry

import (
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"strings"
)

// Fields of a request that carry its trace (W3C Trace Context, https://www.w3.org/TR/trace-context/).
const (
	headerParent = "Traceparent"
	headerState  = "Tracestate"
)

// traceContext is a place in a trace.
type traceContext struct {
	trace   [16]byte
	span    [8]byte
	sampled bool
}

// parse reads a traceparent. A version that is not known is read as far as version 00 goes.
func parse(value string) (c traceContext, ok bool) {
	f := strings.Split(value, "-")
	if len(f) < 4 || len(f[0]) != 2 || len(f[1]) != 32 || len(f[2]) != 16 || len(f[3]) != 2 || f[0] == "ff" || f[0] == "00" && len(f) != 4 {
		return c, false
	}
	var version, flags [1]byte
	for _, field := range []struct {
		into []byte
		text string
	}{{version[:], f[0]}, {c.trace[:], f[1]}, {c.span[:], f[2]}, {flags[:], f[3]}} {
		// hex takes capitals, the recommendation does not.
		if _, err := hex.Decode(field.into, []byte(field.text)); err != nil || strings.ToLower(field.text) != field.text {
			return traceContext{}, false
		}
	}
	c.sampled = flags[0]&1 != 0
	return c, c.trace != [16]byte{} && c.span != [8]byte{}
}

func (c traceContext) String() string {
	flags := "00"
	if c.sampled {
		flags = "01"
	}
	return "00-" + hex.EncodeToString(c.trace[:]) + "-" + hex.EncodeToString(c.span[:]) + "-" + flags
}

// enter makes a span below the one that a request comes from, or a trace of its own, and puts it into the
// request. Parent is zero for the first span of a trace.
func enter(h http.Header) (c traceContext, parent [8]byte) {
	ok := false
	if values := h.Values(headerParent); len(values) == 1 {
		c, ok = parse(values[0])
	}
	if ok {
		parent = c.span
	} else {
		c = traceContext{sampled: true}
		rand.Read(c.trace[:])
		h.Del(headerState) // it belongs to the parent
	}
	rand.Read(c.span[:])
	h.Set(headerParent, c.String())
	return c, parent
}
