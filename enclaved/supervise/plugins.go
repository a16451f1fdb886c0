package supervise

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"

	"cloister.dev/cloister/enclaved/image"
	"cloister.dev/cloister/enclaved/otlp"
	"cloister.dev/cloister/enclaved/plugin"
	"cloister.dev/cloister/enclaved/plugins/telemetry"
	"cloister.dev/cloister/workload"
)

// startPlugins starts the plugins that are processes; nil when there are none. Their images come from where
// the workload's does.
func (e *Enclave) startPlugins(ctx context.Context, progress func(step, failure string)) (*plugin.Set, error) {
	dir := filepath.Join(e.cfg.Dir, "plugins")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	return plugin.Start(ctx, plugin.Config{
		Manifest: e.manifest, Dir: dir, Self: e.cfg.Self, Children: e.cfg.Children,
		Image: func(ctx context.Context, want workload.Image, root string, progress func(step, failure string)) (*image.Config, error) {
			// What the workload's image has left.
			var st unix.Statfs_t
			if err := unix.Statfs(root, &st); err != nil {
				return nil, fmt.Errorf("look for free memory: %w", err)
			}
			f, limit := e.fetcher(progress)
			defer f.Close()
			left := int64(st.Bavail)*st.Bsize - (e.cfg.Memory - limit)
			return f.Image(ctx, want, root, filepath.Join(e.cfg.Dir, "layers"), min(limit, left))
		},
		Dial: e.relay.Dial, Progress: progress,
	})
}

// startInProcess starts the plugins that run inside this program.
func (e *Enclave) startInProcess() (*plugin.InProcessSet, error) {
	pod := map[string]string{}
	for key, value := range map[string]string{
		"k8s.pod.name": e.pod.GetName(), "k8s.namespace.name": e.pod.GetNamespace(), "k8s.pod.uid": e.pod.GetUid(),
	} {
		if podValue.MatchString(value) {
			pod[key] = value
		}
	}
	return plugin.StartInProcess(plugin.InProcessConfig{
		Manifest: e.manifest,
		Host:     otlp.Host{Dial: e.relay.Dial, Certificate: e.vault.ClientCertificate, Pod: pod},
		Usage: func() (telemetry.Usage, error) {
			u, err := e.usage.Read()
			return telemetry.Usage{MemoryUsed: u.MemoryUsed, MemoryTotal: u.MemoryTotal, CPU: u.CPU, NSMCalls: e.vault.Calls()}, err
		},
	})
}

// podValue is what a name or uid of Kubernetes looks like (RFC 1123, subdomain). Others come from a host
// that plays tricks.
var podValue = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)
