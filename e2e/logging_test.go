package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// A line of the workload reaches VictoriaLogs with the name of its pod and without the secret in it, and
// with `logs: otlp` the host sees none of it. A plugin that prints to the console keeps the secret from it.
func TestLogging(t *testing.T) {
	c := e2e(t)
	ns := c.namespace(t, true)
	o := newTelemetry(t, ns)
	redact := map[string]any{"redact": []string{`token=[^ &"]+`}}
	silent := c.nginxPod(t, "silent")
	enclaveConfig(silent, map[string]any{"logs": "otlp", "plugins": []any{o.plugin("logs", "logging", redact)}})
	printed := c.nginxPod(t, "printed")
	enclaveConfig(printed, map[string]any{"plugins": []any{
		map[string]any{"name": "logs", "type": "logging", "builtin": "stdout", "config": redact},
	}})
	set, _ := c.measure(t, silent)
	o.start(t, set)
	ns.create(t, silent)
	ns.create(t, printed)
	o.wait(t, "otel-collector", "victorialogs")
	for _, name := range []string{"silent", "printed"} {
		ns.ready(t, name, 1)
	}

	const secret = "5ecr3t-of-a-customer"
	victorialogs := ns.forward(t, "service/victorialogs", 9428)
	if r := c.curl(t, ns.forward(t, "pod/silent", 80), set, "/an-order?token="+secret+"&a=b"); r.code != 0 {
		t.Fatalf("nginx does not answer: %s", r.stderr)
	}
	eventually(t, time.Minute, "the line in VictoriaLogs", func() (bool, string) {
		found := logLines(t, victorialogs, "an-order")
		ok := len(found) == 1 && strings.Contains(found[0]["_msg"], `"GET /an-order?[redacted]&a=b HTTP/1.1" 404`) &&
			found[0]["k8s.pod.name"] == "silent" && found[0]["k8s.namespace.name"] == ns.name && found[0]["log.iostream"] == "stdout"
		return ok, fmt.Sprint(found)
	})
	if found := logLines(t, victorialogs, secret); len(found) > 0 {
		t.Errorf("the secret is in VictoriaLogs: %v", found)
	}
	if console := ns.logs(t, "silent", "nginx"); console != "" {
		t.Errorf("the console is not silent: %q", console)
	}

	set, _ = c.measure(t, printed)
	if r := c.curl(t, ns.forward(t, "pod/printed", 80), set, "/an-order?token="+secret); r.code != 0 {
		t.Fatalf("nginx does not answer: %s", r.stderr)
	}
	eventually(t, time.Minute, "the line on the console", func() (bool, string) {
		console := ns.logs(t, "printed", "nginx")
		return strings.Contains(console, `"GET /an-order?[redacted] HTTP/1.1" 404`), console
	})
	if console := ns.logs(t, "printed", "nginx"); strings.Contains(console, secret) {
		t.Errorf("the secret is on the console: %s", console)
	}
}
