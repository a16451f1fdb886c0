package workload

import (
	"errors"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxHost is the longest name of a host in bytes (RFC 1035, section 2.3.4, without the final dot).
const maxHost = 253

// dnsLabelRE is one label of a host's name (RFC 1123, section 2.1), and the underscore that is met in names
// all the same.
var dnsLabelRE = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?$`)

// ownNames are in the enclave's /etc/hosts already.
var ownNames = []string{"localhost", "enclave", "ip6-localhost", "ip6-loopback"}

// ParseEndpoint reads "host:port" in its only accepted form: a lower-case name without a final dot, an
// IPv4 address or an IPv6 address in brackets (RFC 5952), and a port from 1 to 65535. Addresses that mean
// the enclave itself or many hosts are refused. Errors are sentences without the value.
func ParseEndpoint(s string) (host string, port uint16, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.Contains(s, "/") {
		return "", 0, errors.New("write host:port, such as db.example.org:5432 or [2001:db8::1]:443")
	}
	host = s[:i]
	n, err := strconv.ParseUint(s[i+1:], 10, 16)
	if err != nil || n == 0 || s[i+1:] != strconv.FormatUint(n, 10) {
		return "", 0, errors.New("write host:port with a port from 1 to 65535")
	}
	bracketed := strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]")
	if bracketed {
		host = host[1 : len(host)-1]
	}
	address, err := netip.ParseAddr(host)
	switch {
	case err == nil:
		err = checkAddress(address, host, bracketed)
	case bracketed || strings.Contains(host, ":"):
		err = errors.New("only an IPv6 address has colons, and stands in brackets: [2001:db8::1]:443")
	default:
		err = checkName(host)
	}
	if err != nil {
		return "", 0, err
	}
	return host, uint16(n), nil
}

func checkAddress(a netip.Addr, text string, bracketed bool) error {
	switch {
	case a.Is6() != bracketed:
		return errors.New("only an IPv6 address has colons, and stands in brackets: [2001:db8::1]:443")
	case a.String() != text || a.Is4In6() || a.Zone() != "":
		return errors.New("write the address in its shortest form, without a zone")
	case a.IsLoopback() || a.IsUnspecified():
		return errors.New("this address means the enclave itself, where nothing needs to be allowed")
	case a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return errors.New("this address means many hosts, and only TCP leaves an enclave")
	}
	return nil
}

func checkName(host string) error {
	labels := strings.Split(host, ".")
	last := labels[len(labels)-1]
	switch {
	case strings.Contains(host, "*"):
		return errors.New("wildcards are not built yet: name each host")
	case len(host) > maxHost || slices.ContainsFunc(labels, func(l string) bool { return !dnsLabelRE.MatchString(l) }):
		return errors.New("the host is neither an address nor a lower-case DNS name without a final dot")
	case strings.Trim(last, "0123456789") == "":
		return errors.New("the host looks like an address and is none")
	case slices.Contains(ownNames, host) || last == "localhost":
		return errors.New("this name means the enclave itself, where nothing needs to be allowed")
	}
	return nil
}

// Endpoints returns every host:port that the enclave may reach, in ascending order: what the workload may,
// and what the enclave needs for itself. The host's side of egress is configured with this list; the rule
// is the measured list inside.
func (m *Manifest) Endpoints() []string {
	out := append(slices.Clone(m.Egress), m.PluginEndpoints()...)
	if m.KMS != nil {
		out = append(out, m.KMS.Address())
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (m *Manifest) validateEgress(bad func(string, ...any)) {
	for i, e := range m.Egress {
		if _, _, err := ParseEndpoint(e); err != nil {
			bad("egress %q: %w", e, err)
		}
		if i > 0 && m.Egress[i-1] >= e {
			bad("egress must be in ascending order without duplicates")
		}
	}
}
