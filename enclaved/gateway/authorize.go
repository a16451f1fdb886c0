package gateway

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"cloister.dev/cloister/workload"
)

// Verdict is what Config.Authorize says about a request.
type Verdict struct {
	// Status refuses the request with this status of HTTP, and with Body and Response. 0 lets it pass.
	Status int
	Body   string
	// Response are headers of the answer, beside the workload's where the request passes.
	Response http.Header
	// Set are headers that the workload gets with the request, in place of the client's, and Remove names
	// those that it does not get.
	Set    http.Header
	Remove []string
}

// verdictKey is the context key of a request's *Verdict.
type verdictKey struct{}

// reserved tells whether only the gateway sets a header. Servers that hand headers to programs as
// variables write every punctuation alike (RFC 3875, section 4.1.18), so it is all the same here.
func (w *web) reserved(name string) bool {
	plain := strings.Map(func(r rune) rune {
		switch {
		case 'A' <= r && r <= 'Z':
			return r - 'A' + 'a'
		case 'a' <= r && r <= 'z' || '0' <= r && r <= '9':
			return r
		}
		return '-'
	}, name)
	return strings.HasPrefix(plain, workload.HeaderPrefix) || slices.Contains(forwarded, plain) || slices.Contains(w.port.reserved, plain)
}

// forwarded are headers of proxies on the way, of which the gateway is the first that can be believed.
// ReverseProxy removes them too, but later than Authorize is asked, and in this spelling only.
var forwarded = []string{"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"}

// strip removes what a client must not send, or what ends at the gateway: headers and trailers that only
// the gateway sets, and headers that Connection names.
func (w *web) strip(r *http.Request) {
	stripConnection(r.Header)
	forbidden := func(name string, _ []string) bool { return w.reserved(name) }
	maps.DeleteFunc(r.Header, forbidden)
	if r.Trailer == nil {
		return
	}
	maps.DeleteFunc(r.Trailer, forbidden)
	// Trailers come with the end of the body, those that were not announced too.
	r.Body = &trailers{ReadCloser: r.Body, ended: func() { maps.DeleteFunc(r.Trailer, forbidden) }}
}

// hopByHop are what Connection may name: the options of HTTP/1.1 and the fields that net/http and
// ReverseProxy read before they remove them (RFC 9110, section 7.6.1).
var hopByHop = []string{"Close", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade"}

// stripConnection removes every other header that Connection names, and the name. ReverseProxy would do so
// later: Authorize would have decided by a header that the workload does not get, and what Observe sets
// would be gone.
func stripConnection(h http.Header) {
	var kept []string
	for _, list := range h["Connection"] {
		for name := range strings.SplitSeq(list, ",") {
			if name = http.CanonicalHeaderKey(strings.TrimSpace(name)); slices.Contains(hopByHop, name) {
				kept = append(kept, name)
			} else {
				h.Del(name)
			}
		}
	}
	if h.Del("Connection"); kept != nil {
		h.Set("Connection", strings.Join(kept, ", "))
	}
}

// trailers is a body that tells its end.
type trailers struct {
	io.ReadCloser
	ended func()
}

func (t *trailers) Read(b []byte) (int, error) {
	n, err := t.ReadCloser.Read(b)
	if err == io.EOF {
		t.ended()
	}
	return n, err
}

// refuse answers what v says.
func (w *web) refuse(rw http.ResponseWriter, r *http.Request, v *Verdict) {
	w.dismiss(rw.Header(), r)
	if v.Body != "" && rw.Header().Get("Content-Type") == "" {
		rw.Header().Set("Content-Type", "text/plain; charset=utf-8")
		rw.Header().Set("X-Content-Type-Options", "nosniff")
	}
	rw.WriteHeader(v.Status)
	io.WriteString(rw, v.Body)
}

// apply makes the request what the verdict on it says. It comes after hop-by-hop fields have been removed:
// a client could name a header of the verdict among those.
func (v *Verdict) apply(h http.Header) {
	for _, name := range v.Remove {
		h.Del(name)
	}
	for name, values := range v.Set {
		h[http.CanonicalHeaderKey(name)] = values
	}
}
