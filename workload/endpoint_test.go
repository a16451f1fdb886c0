package workload

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseEndpoint(t *testing.T) {
	for s, want := range map[string]struct {
		host string
		port uint16
		err  string
	}{
		"example.org:443":                   {host: "example.org", port: 443},
		"db:5432":                           {host: "db", port: 5432},
		"a_b.x-1.svc.cluster.local:1":       {host: "a_b.x-1.svc.cluster.local", port: 1},
		"10.0.0.1:65535":                    {host: "10.0.0.1", port: 65535},
		"[2001:db8::1]:443":                 {host: "2001:db8::1", port: 443},
		strings.Repeat("a", 63) + ".org:80": {host: strings.Repeat("a", 63) + ".org", port: 80},

		"":                                {err: "write host:port"},
		"example.org":                     {err: "write host:port"},
		"https://example.org:443":         {err: "write host:port"},
		"example.org:443/path":            {err: "write host:port"},
		"example.org:0":                   {err: "port from 1 to 65535"},
		"example.org:65536":               {err: "port from 1 to 65535"},
		"example.org:080":                 {err: "port from 1 to 65535"},
		"example.org:+80":                 {err: "port from 1 to 65535"},
		"example.org:https":               {err: "port from 1 to 65535"},
		":443":                            {err: "neither an address nor"},
		"Example.org:443":                 {err: "neither an address nor"},
		"example.org.:443":                {err: "neither an address nor"},
		"exa mple.org:443":                {err: "neither an address nor"},
		"-a.org:443":                      {err: "neither an address nor"},
		"a..org:443":                      {err: "neither an address nor"},
		"user@example.org:443":            {err: "neither an address nor"},
		strings.Repeat("a", 64) + ":1":    {err: "neither an address nor"},
		strings.Repeat("a.", 127) + "a:1": {err: "neither an address nor"},
		"*.example.org:443":               {err: "wildcards are not built yet"},
		"10.0.0.256:443":                  {err: "looks like an address"},
		"10.1:443":                        {err: "looks like an address"},
		"10.0.0.1.:443":                   {err: "neither an address nor"},
		"2001:db8::1:443":                 {err: "in brackets"},
		"[10.0.0.1]:443":                  {err: "in brackets"},
		"[example.org]:443":               {err: "in brackets"},
		"[2001:db8:0::1]:443":             {err: "shortest form"},
		"[2001:DB8::1]:443":               {err: "shortest form"},
		"[fe80::1%eth0]:443":              {err: "shortest form"},
		"[::ffff:10.0.0.1]:443":           {err: "shortest form"},
		"127.0.0.1:443":                   {err: "the enclave itself"},
		"127.64.0.1:443":                  {err: "the enclave itself"},
		"[::1]:443":                       {err: "the enclave itself"},
		"0.0.0.0:443":                     {err: "the enclave itself"},
		"localhost:443":                   {err: "the enclave itself"},
		"app.localhost:443":               {err: "the enclave itself"},
		"enclave:443":                     {err: "the enclave itself"},
		"224.0.0.1:443":                   {err: "many hosts"},
		"255.255.255.255:443":             {err: "many hosts"},
	} {
		t.Run(s, func(t *testing.T) {
			host, port, err := ParseEndpoint(s)
			if want.err != "" {
				if err == nil || !strings.Contains(err.Error(), want.err) {
					t.Errorf("got %q, %d, %v; want an error with %q", host, port, err, want.err)
				}
				return
			}
			if err != nil || host != want.host || port != want.port {
				t.Errorf("got %q, %d, %v; want %q, %d", host, port, err, want.host, want.port)
			}
		})
	}
}

// FuzzParseEndpoint: what is accepted has one spelling, and is nothing that a hosts file could read
// differently.
func FuzzParseEndpoint(f *testing.F) {
	f.Add("example.org:443")
	f.Add("[2001:db8::1]:80")
	f.Add("10.0.0.1:1")
	f.Fuzz(func(t *testing.T, s string) {
		host, port, err := ParseEndpoint(s)
		if err != nil {
			return
		}
		if again := net.JoinHostPort(host, strconv.Itoa(int(port))); again != s {
			t.Errorf("%q means %q", s, again)
		}
		if host != strings.ToLower(host) || strings.ContainsAny(host, " \t\r\n#/@%*") {
			t.Errorf("%q has host %q", s, host)
		}
	})
}

func TestEndpoints(t *testing.T) {
	m := full()
	if diff := cmp.Diff([]string{"10.0.0.1:80", "[2001:db8::1]:443", "example.org:443"}, m.Endpoints()); diff != "" {
		t.Errorf("endpoints (-want +got):\n%s", diff)
	}
	if got := (&Manifest{}).Endpoints(); len(got) != 0 {
		t.Errorf("endpoints of nothing: %v", got)
	}
}
