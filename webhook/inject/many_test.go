package inject

import (
	"fmt"
	"strings"
	"testing"
)

// TestTooMany: a pod that takes long to decide about is refused before anything in it is compared.
func TestTooMany(t *testing.T) {
	list := func(n int, item string) string { return strings.TrimSuffix(strings.Repeat(item+",", n), ",") }
	for name, tc := range map[string]struct{ annotation, spec, want string }{
		"volumes":     {"", `"volumes":[` + list(1500, `{"name":"v","emptyDir":{}}`) + `],"initContainers":[{"name":"i","volumeMounts":[` + list(549, `{"name":"v","mountPath":"/v"}`) + `]}],`, "spec: Forbidden: it has 2049 volumes with their mounts, in a pod with an enclave there can be 2048"},
		"ports":       {"", `"initContainers":[{"name":"i","ports":[` + list(2049, `{"containerPort":1}`) + `]}],`, "it has 2049 ports"},
		"hostAliases": {"", `"hostAliases":[{"ip":"192.0.2.1","hostnames":[` + list(2048, `"a"`) + `]}],`, "it has 2049 hostAliases with their names"},
		"config":      {strings.Repeat(" ", 128<<10+1), "", "it has 131073 bytes, and there can be 131072"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := fmt.Sprintf(`{"metadata":{"annotations":{"cloister.dev/enclave":"app","cloister.dev/config":%q}},"spec":{%s"containers":[{"name":"app"}]}}`, tc.annotation, tc.spec)
			_, _, errs := Patch([]byte(pod), Options{Driver: DriverProcess})
			if len(errs) != 1 || !strings.Contains(errs[0].Error(), tc.want) {
				t.Errorf("%.300v", errs)
			}
		})
	}
}
