package inject

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"cloister.dev/cloister/workload"
)

// hostAliases returns the pod's own lines of /etc/hosts, which the enclave gets too. A name of egress has
// an address of its own there.
func (p *problems) hostAliases(spec *corev1.PodSpec, m *workload.Manifest) []workload.HostAlias {
	var out []workload.HostAlias
	egress := map[string]bool{}
	for _, e := range m.Egress {
		if host, _, err := workload.ParseEndpoint(e); err == nil {
			egress[host] = true
		}
	}
	for i, a := range spec.HostAliases {
		at := specPath.Child("hostAliases").Index(i)
		ip, err := netip.ParseAddr(a.IP)
		if err != nil || ip.Zone() != "" {
			p.list = append(p.list, field.Invalid(at.Child("ip"), a.IP, "write an IP address"))
			continue
		}
		for j, name := range a.Hostnames {
			if egress[name] {
				p.forbid(at.Child("hostnames").Index(j), name+" is in egress, which gives it an address inside the enclave: remove it from one of the two")
			}
		}
		if len(a.Hostnames) > 0 {
			out = append(out, workload.HostAlias{IP: ip.String(), Names: a.Hostnames})
		}
	}
	return out
}
