package telemetry

import (
	"net/http"
	"strings"
	"testing"
)

const (
	traceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	spanID  = "00f067aa0ba902b7"
)

func TestEnter(t *testing.T) {
	for name, tt := range map[string]struct {
		parents []string
		follows bool
		sampled bool
	}{
		"none":             {nil, false, true},
		"sampled":          {[]string{"00-" + traceID + "-" + spanID + "-01"}, true, true},
		"not sampled":      {[]string{"00-" + traceID + "-" + spanID + "-00"}, true, false},
		"other flags":      {[]string{"00-" + traceID + "-" + spanID + "-02"}, true, false},
		"later version":    {[]string{"cc-" + traceID + "-" + spanID + "-01-what-comes"}, true, true},
		"more in 00":       {[]string{"00-" + traceID + "-" + spanID + "-01-more"}, false, true},
		"no version":       {[]string{"ff-" + traceID + "-" + spanID + "-01"}, false, true},
		"zero trace":       {[]string{"00-" + strings.Repeat("0", 32) + "-" + spanID + "-01"}, false, true},
		"zero span":        {[]string{"00-" + traceID + "-0000000000000000-01"}, false, true},
		"capitals":         {[]string{"00-" + strings.ToUpper(traceID) + "-" + spanID + "-01"}, false, true},
		"no hexadecimal":   {[]string{"00-" + traceID + "-" + spanID + "-0x"}, false, true},
		"short":            {[]string{"00-" + traceID[1:] + "-" + spanID + "-01"}, false, true},
		"two of them":      {[]string{"00-" + traceID + "-" + spanID + "-01", "00-" + traceID + "-" + spanID + "-01"}, false, true},
		"empty":            {[]string{""}, false, true},
		"nothing but dash": {[]string{"---"}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			h := http.Header{"Tracestate": {"vendor=1"}}
			for _, p := range tt.parents {
				h.Add("traceparent", p)
			}
			c, parent := enter(h)
			made, ok := parse(h.Get("traceparent"))
			if !ok || made != c || len(h["Traceparent"]) != 1 {
				t.Errorf("the workload gets %q", h["Traceparent"])
			}
			if c.sampled != tt.sampled {
				t.Errorf("sampled %v", c.sampled)
			}
			follows := strings.Contains(c.String(), traceID)
			if follows != tt.follows || (parent != [8]byte{}) != tt.follows || (h.Get("tracestate") != "") != tt.follows {
				t.Errorf("in the client's trace: %v, parent %x, state %q", follows, parent, h.Get("tracestate"))
			}
			if strings.Contains(c.String(), spanID) {
				t.Error("the span is the client's own")
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	f.Add("00-" + traceID + "-" + spanID + "-01")
	f.Add("cc-" + traceID + "-" + spanID + "-01-x")
	f.Fuzz(func(t *testing.T, s string) {
		c, ok := parse(s)
		if !ok {
			return
		}
		if again, ok := parse(c.String()); !ok || again != c {
			t.Errorf("%q is read as %s, which is read as %s", s, c, again)
		}
	})
}
