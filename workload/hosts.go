package workload

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"
)

// HostAlias is a line of the workload's /etc/hosts. It only names an address: what can be reached is a
// matter of Egress.
type HostAlias struct {
	// IP is an address in its shortest form, without a zone.
	IP string `json:"ip"`
	// Names are host names in lower case, none of them in Egress.
	Names []string `json:"names"`
}

// hostnameRE is a host name (RFC 1123).
var hostnameRE = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// HostLines returns HostAliases as lines of /etc/hosts.
func (m *Manifest) HostLines() []string {
	lines := make([]string, len(m.HostAliases))
	for i, a := range m.HostAliases {
		lines[i] = a.IP + "\t" + strings.Join(a.Names, "\t")
	}
	return lines
}

func (m *Manifest) validateHostAliases(bad func(string, ...any)) {
	var egress []string
	for _, e := range m.Egress {
		if host, _, err := ParseEndpoint(e); err == nil {
			egress = append(egress, host)
		}
	}
	for _, a := range m.HostAliases {
		if ip, err := netip.ParseAddr(a.IP); err != nil || ip.Zone() != "" || ip.String() != a.IP {
			bad("hostAliases: %q is not an IP address in its shortest form", a.IP)
		}
		if len(a.Names) == 0 {
			bad("hostAliases: %s has no name", a.IP)
		}
		for _, n := range a.Names {
			if len(n) > 253 || !hostnameRE.MatchString(n) {
				bad("hostAliases: %q is not a host name", n)
			}
			if slices.Contains(egress, n) {
				bad("hostAliases: %s is a name of egress, which has an address already", n)
			}
		}
	}
}
